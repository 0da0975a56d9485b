"""How much of a device's arithmetic a training step uses."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")

PEAK_TFLOPS = {
    "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0,
    "V100": 125.0, "T4": 65.0,
}  # fmt: skip
"""Dense 16-bit tensor-core peak of a device whose name has this in it (makers' data sheets)."""


def peak_flops() -> float:
    """Operations a second that this rank's device can do; 0 where that isn't known, as on CPUs."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def count(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of `work`, and its floating-point operations: matrix products and convolutions,
    forward and backward, recomputed ones included."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = work()
    return result, float(counter.get_total_flops())
