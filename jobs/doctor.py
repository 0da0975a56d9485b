"""glipv2 doctor: versions, devices, what is missing and how to mend it."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "deepspeed", "ray", "webdataset", "fsspec",
    "s3fs", "pycocotools", "hotcoco", "safetensors", "pyyaml", "google-crc32c", "pillow",
    "simplejpeg", "py3langid", "numpy", "textblob", "defusedxml", "jinja2", "tqdm", "tensorboardx",
)  # fmt: skip
"""All that pyproject.toml lists: a submitted job has our code, but no metadata of it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    found: str
    cure: str = ""
    """What to do; empty when all is well."""
    fatal: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    checks = [*system_checks(), *package_checks(), *device_checks()]
    for check in checks:
        mark = "ok  " if not check.cure else ("FAIL" if check.fatal else "note")
        print(f"{mark}  {check.name:14s} {check.found}")  # noqa: T201
        if check.cure:
            print(f"      {'':14s} -> {check.cure}")  # noqa: T201
    failed = [check.name for check in checks if check.fatal]
    print("everything needed is here" if not failed else f"to mend: {', '.join(failed)}")  # noqa: T201
    return 1 if failed else 0


def versions() -> dict[str, str]:
    """Python and package versions; a missing package reads "missing"."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def system_checks() -> list[Check]:
    right = (3, 10) <= sys.version_info[:2] <= (3, 12)
    free = shutil.disk_usage(".").free / 2**30
    cpus = os.cpu_count() or 1
    return [
        Check(
            name="python",
            found=f"{platform.python_version()} on {platform.platform()}",
            cure="" if right else "use Python 3.10, 3.11 or 3.12",
            fatal=not right,
        ),
        Check(
            name="processors",
            found=f"{cpus}",
            cure="" if cpus > 1 else "with one processor set train.processes=1",
        ),
        Check(
            name="disk",
            found=f"{free:.0f} GiB free here",
            cure="" if free > 2 else "free some space: checkpoints and shards need 2 GiB",
        ),
        Check(
            name="compiler",
            found=shutil.which("cc") or "none",
            cure="" if shutil.which("cc") else "only needed to install: apt install gcc",
        ),
    ]


def package_checks() -> list[Check]:
    return [
        Check(
            name=name,
            found=version,
            cure="" if version != "missing" else "run make setup",
            fatal=version == "missing",
        )
        for name, version in versions().items()
        if name != "python"
    ]


def device_checks() -> list[Check]:
    try:
        import torch
        import torchvision.ops  # fails when its build does not fit torch's
    except (ImportError, RuntimeError) as error:
        cure = "torch and torchvision must be builds for each other: run make setup"
        return [Check(name="operators", found=str(error), cure=cure, fatal=True)]
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist()
    works = kept == [0]
    checks = [
        Check(
            name="operators",
            found="torchvision nms works" if works else f"torchvision nms gives {kept}",
            cure="" if works else "reinstall torchvision: make setup",
            fatal=not works,
        )
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        bf16 = torch.cuda.is_bf16_supported()
        cure = "" if bf16 else "no bf16 on this device: set train.precision=fp16"
        checks.append(Check(name="devices", found=", ".join(names), cure=cure))
    else:
        cure = "training runs in fp32 on the CPU: set train.precision=fp32"
        checks.append(Check(name="devices", found="no CUDA device", cure=cure))
    return checks
