"""How much of a device's arithmetic a training step uses."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

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


def training_operations(forward: Callable[[], object]) -> float:
    """Floating-point operations of a training step around `forward`: matrix products and
    convolutions, three times those of the forward pass, recomputed ones not counted.

    It is a pass of its own, since counting changes how operators are put together, and so the last
    bits of their results.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        forward()
    return 3.0 * float(counter.get_total_flops())
