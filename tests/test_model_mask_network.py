"""The layers of the mask head: hourglasses, sizes, and the logits of a phrase."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glipv2.model.config import preset
from glipv2.model.mask_head import Hourglass, MaskHead, phrases

CONFIG = dataclasses.replace(preset("tiny"), masks=True, fusion_blocks=1)


def residual(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    y = x
    for number, dilation in ((1, 1), (2, 3), (3, 1)):
        y = F.conv2d(
            y.relu(),
            weights[f"{name}.conv{number}.weight"],
            weights[f"{name}.conv{number}.bias"],
            padding=dilation,
            dilation=dilation,
        )
    return x + y


def test_an_hourglass_is_the_formula_of_the_facts() -> None:
    torch.manual_seed(0)
    hourglass = Hourglass(depth=2, width=8)
    weights = dict(hourglass.state_dict())
    x = torch.randn(3, 8, 16, 16)

    def level(x: Tensor, prefix: str, depth: int) -> Tensor:
        low = residual(F.max_pool2d(x, 2, 2), weights, f"{prefix}low1")
        if depth > 1:
            low = level(low, f"{prefix}low2.", depth - 1)
        else:
            low = residual(low, weights, f"{prefix}low2")
        low = residual(low, weights, f"{prefix}low3")
        wide = low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return residual(x, weights, f"{prefix}up1") + wide

    torch.testing.assert_close(hourglass(x), level(x, "", 2))


@pytest.mark.parametrize(("depth", "resolution"), [(1, 14), (2, 16), (3, 16), (4, 16)])
def test_a_region_can_be_halved_as_often_as_the_hourglass_does(depth: int, resolution: int) -> None:
    head = MaskHead(dataclasses.replace(CONFIG, mask_depth=depth))
    assert head.resolution == resolution
    logits = head(torch.zeros(1, 64, resolution, resolution), torch.zeros(1, 64))
    assert logits.shape == (1, 2 * resolution, 2 * resolution)


def test_the_head_of_glip_t_has_the_parameters_of_the_original() -> None:
    with torch.device("meta"):
        head = MaskHead(dataclasses.replace(preset("T"), masks=True))
    assert sum(parameter.numel() for parameter in head.parameters()) == 3_411_201


@pytest.mark.parametrize("change", [{"mask_depth": 0}, {"mask_hourglasses": 0}])
def test_a_head_without_hourglass_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"mask_hourglasses and model\.mask_depth"):
        dataclasses.replace(CONFIG, **change)


def test_a_phrase_gets_the_mean_of_its_tokens_logits() -> None:
    torch.manual_seed(1)
    head = MaskHead(dataclasses.replace(CONFIG, mask_hourglasses=2)).double()
    with torch.no_grad():
        head.bias_text.normal_()
        head.log_scale.fill_(-0.7)
    x = torch.randn(3, 64, 14, 14).double()
    words = torch.randn(1, 9, 64).double()
    tokens = torch.zeros(1, 3, 9, dtype=torch.bool)
    tokens[0, 0, 2:6] = tokens[0, 1, 8] = True  # the third phrase has none
    found = head(x, phrases(words, tokens)[0])

    y = x
    for hourglass in head.hourglasses:
        y = hourglass(y).relu()
    y = F.conv_transpose2d(y, head.upsample.weight, head.upsample.bias, stride=2).relu()
    unit = words[0] / words[0].norm(dim=1, keepdim=True)
    query = (unit / 2) @ head.project_text.weight.T + head.project_text.bias
    each = torch.einsum("mdhw,td->mthw", y, query) / math.exp(-0.7)
    each = each + (unit @ head.bias_text)[:, None, None]
    torch.testing.assert_close(found[0], each[0, 2:6].mean(0))
    torch.testing.assert_close(found[1], each[1, 8])
    assert found.shape == (3, 28, 28)
