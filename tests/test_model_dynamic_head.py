import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from glipv2.model.dynamic_head import DyConv, DyReLU

WIDTH, GROUPS = 16, 4
SIZES = [(12, 10), (6, 5), (3, 3)]


def maps() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, WIDTH, h, w, generator=generator) for h, w in SIZES]


def block() -> DyConv:
    torch.manual_seed(0)
    module = DyConv(WIDTH, GROUPS)
    torch.nn.init.normal_(module.scale_attention.weight)
    return module


def plain(m: DyConv, levels: list[Tensor]) -> list[Tensor]:
    """Level by level and branch by branch, with torchvision's operator."""
    outputs = []
    for i, x in enumerate(levels):
        raw = m.offset(x)
        offset, mask = raw[:, :18], raw[:, 18:].sigmoid()
        branches = [
            m.norm_same(deform_conv2d(x, offset, m.same.weight, m.same.bias, 1, 1, mask=mask))
        ]
        if i > 0:
            strided = deform_conv2d(
                levels[i - 1], offset, m.finer.weight, m.finer.bias, 2, 1, mask=mask
            )
            branches.append(m.norm_finer(strided))
        if i + 1 < len(levels):
            size = levels[i + 1].shape[2:]
            small = [F.adaptive_avg_pool2d(part, size) for part in (offset, mask)]
            coarse = deform_conv2d(
                levels[i + 1], small[0], m.coarser.weight, m.coarser.bias, 1, 1, mask=small[1]
            )
            branches.append(
                F.interpolate(
                    m.norm_coarser(coarse), size=x.shape[2:], mode="bilinear", align_corners=True
                )
            )
        weights = [F.relu6(F.relu(m.scale_attention(b.mean((2, 3)))) + 3) / 6 for b in branches]
        total = sum(w[..., None, None] * b for w, b in zip(weights, branches, strict=True))
        outputs.append(m.relu([total / len(branches)])[0])
    return outputs


def test_the_block_equals_its_plain_form_with_torchvisions_operator() -> None:
    module = block()
    for actual, expected in zip(module(maps()), plain(module, maps()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_level_hears_its_neighbours_and_nobody_else() -> None:
    module = block()
    before = module(maps())
    changed = maps()
    changed[0] = changed[0] + 1.0
    after = module(changed)
    heard = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert heard == [True, True, False]


def test_the_dynamic_relu_starts_as_a_relu() -> None:
    relu = DyReLU(WIDTH)
    torch.nn.init.zeros_(relu.expand.weight)
    torch.nn.init.zeros_(relu.expand.bias)
    for x, y in zip(maps(), relu(maps()), strict=True):
        torch.testing.assert_close(y, F.relu(x))


def test_slopes_and_offsets_follow_the_gates() -> None:
    relu = DyReLU(WIDTH)
    x = maps()[0]
    gates = F.hardsigmoid(relu.expand(F.relu(relu.squeeze(x.mean((2, 3))))))[..., None, None]
    a1, b1, a2, b2 = gates.chunk(4, dim=1)
    expected = torch.maximum(((a1 - 0.5) * 2 + 1) * x + b1 - 0.5, (a2 - 0.5) * 2 * x + b2 - 0.5)
    torch.testing.assert_close(relu([x])[0], expected)
