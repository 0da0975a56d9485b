"""A training step neither waits for the GPU nor hides its work from torch.compile."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_parts import scene
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glipv2.model.batch import Batch
from glipv2.model.config import preset
from glipv2.model.glip import GLIPv2, build_model

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
"""Operators whose result, or its shape, the host must know before it can go on."""


class Waits(TorchDispatchMode):
    """Collects the operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        if name in WAITS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def tiny() -> tuple[GLIPv2, Batch]:
    model = build_model(preset("tiny"), seed=0).eval()  # no dropout: comparable
    batch, _ = scene(2, (64, 96), locations=0, boxes=3, tokens=12)
    batch.mlm_labels_BT[0, 2:4] = 50
    batch.mlm_labels_BT[1, 5] = 60
    return model, replace(batch, most_masked=2)


def step(model: GLIPv2, batch: Batch) -> dict[str, Tensor]:
    terms = model(batch)
    sum(terms.values()).backward()
    return terms


def test_the_watch_sees_an_operator_that_waits() -> None:
    values = torch.arange(3)
    with Waits() as waits:
        values[values > 1]
        values.sum().item()
    assert len(waits.found) >= 2


@pytest.mark.parametrize("boxes", [3, 0])
def test_a_training_step_never_waits_for_the_gpu(boxes: int) -> None:
    model, batch = tiny()
    batch = replace(
        batch,
        boxes_BN4=batch.boxes_BN4[:, :boxes],
        box_mask_BN=batch.box_mask_BN[:, :boxes],
        positive_BNT=batch.positive_BNT[:, :boxes],
        box_category_BN=batch.box_category_BN[:, :boxes],
    )
    with Waits() as waits:
        step(model.train(), batch)
    assert waits.found == []


def test_masked_words_are_the_same_with_and_without_their_number() -> None:
    model, batch = tiny()
    model.double()
    known = step(model, batch)["mlm"]
    torch.testing.assert_close(known, model(replace(batch, most_masked=None))["mlm"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_takes_the_same_step_without_graph_breaks(backend: str) -> None:
    model, batch = tiny()
    expected = step(model, batch)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = step(torch.compile(model, backend=backend, fullgraph=True), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            bound = 1e-3 * wanted[name].norm() + 1e-5  # some are zero but for rounding
            assert (parameter.grad - wanted[name]).norm() < bound, name
