"""Are our numbers GLIP's? python infra/parity.py FOLDER; exit code 1 if one is not.

FOLDER holds what the original code computed: `meta.json` (its configuration, the meaning of every
tensor), `io.safetensors` (inputs, intermediate outputs, detections, losses, gradients) and
`weights.safetensors`; without that file the weights are generated, each from its name
(glip_weights.py). Our model is built from the configuration, the weights pass through the
converter, and every reference tensor gets a row: largest absolute error, relative error, ok or not.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from glip_weights import generated_weights
from parity_model import Tensors, build, evaluated, reference_images, trained
from safetensors.torch import load_file
from torch import Tensor

from glipv2.model.convert import glip_inert

LIMIT = 1e-4
"""Largest relative error, the norm of the difference over the norm of the reference."""
BOX_LIMIT = 0.05
"""Largest error of a detection's box, in pixels."""
ROUNDING = 1e-4
"""Gradient norms below this share of the largest are rounding: some are zero in exact numbers."""
SEPARATE = r"in\.|eval\.(prenms|det|det_tv)\."
"""Inputs; detections, which are compared as sets; and detections under torchvision's box convention
(det_tv), which are no reference."""


@dataclass(kw_only=True)
class Row:
    name: str
    absolute: float
    relative: float
    ok: bool
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="reference of the original code")
    rows = compare(parser.parse_args(arguments).folder)
    for row in rows:
        verdict = "ok" if row.ok else "WRONG"
        print(f"{row.name:58s} {row.absolute:9.2e} {row.relative:9.2e}  {verdict} {row.note}")  # noqa: T201
    wrong = sum(not row.ok for row in rows)
    print(f"{len(rows)} tensors, {wrong} wrong, limit {LIMIT:g}")  # noqa: T201
    return 1 if wrong or not rows else 0


def compare(folder: Path) -> list[Row]:
    """One row per reference tensor of a folder; one more for the norms of all gradients."""
    meta = json.loads((folder / "meta.json").read_text())
    reference = load_file(folder / "io.safetensors")
    stored = folder / "weights.safetensors"
    weights = load_file(stored) if stored.exists() else generated_weights(meta["state_dict"])
    model = build(meta, weights)
    images, sizes = reference_images(reference)
    ours = evaluated(model, weights, reference, images, sizes)
    more, norms = trained(model, reference, images, sizes)
    ours |= more
    rows = [
        _row(name, ours, expected)
        for name, expected in reference.items()
        if name == "in.images" or not re.match(SEPARATE, name)
    ]  # fmt: skip
    for stage in ("prenms", "det"):
        for image in range(len(images)):
            prefix = f"eval.{stage}.{image}"
            if f"{prefix}.boxes" in reference:
                rows += _detection_rows(prefix, ours, reference)
    if "grad_norms" in meta:
        rows.append(_norm_row(norms, meta["grad_norms"]))
    return rows


def _row(name: str, ours: Tensors, expected: Tensor) -> Row:
    if name not in ours:
        return Row(name=name, absolute=torch.inf, relative=torch.inf, ok=False, note="not computed")
    found = ours[name]
    if found.shape != expected.shape:
        note = f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        return Row(name=name, absolute=torch.inf, relative=torch.inf, ok=False, note=note)
    difference = found.double() - expected.double()
    absolute = float(difference.abs().max()) if difference.numel() else 0.0
    relative = float(difference.norm() / expected.double().norm().clamp(min=1e-12))
    exact = not expected.is_floating_point()
    return Row(
        name=name, absolute=absolute, relative=relative, ok=relative <= (0 if exact else LIMIT)
    )


def _detection_rows(prefix: str, ours: Tensors, reference: Tensors) -> list[Row]:
    """Detections compared as sets: each reference box with the nearest of ours of its label."""
    boxes, scores, labels = (
        reference[f"{prefix}.{part}"] for part in ("boxes", "scores", "labels")
    )
    found_boxes, found_scores, found_labels = (
        ours[f"{prefix}.{part}"] for part in ("boxes", "scores", "labels")
    )
    same_count = torch.equal(labels.sort().values, found_labels.sort().values)
    if not same_count:
        note = f"{len(found_labels)} boxes, the original has {len(labels)}, or with other labels"
        return [Row(name=prefix, absolute=torch.inf, relative=torch.inf, ok=False, note=note)]
    distance = (boxes[:, None] - found_boxes[None]).abs().amax(-1)
    distance = distance + (scores[:, None] - found_scores[None]).abs()
    distance[labels[:, None] != found_labels[None]] = torch.inf
    partner = distance.argmin(dim=1)
    one_to_one = len(partner.unique()) == len(partner)
    note = "" if one_to_one else "two boxes of the original have the same partner"
    rows = []
    for part, expected, found, limit in (
        ("boxes", boxes, found_boxes[partner], BOX_LIMIT),
        ("scores", scores, found_scores[partner], LIMIT),
    ):
        row = _row(f"{prefix}.{part}", {f"{prefix}.{part}": found}, expected)
        row.ok = one_to_one and row.ok and row.absolute <= limit
        row.note = note
        rows.append(row)
    order = Row(name=f"{prefix}.labels", absolute=0.0, relative=0.0, ok=one_to_one, note=note)
    return [*rows, order]


def _norm_row(ours: dict[str, float], expected: dict[str, float]) -> Row:
    """The largest error of a gradient's norm; norms that are mere rounding count as nothing."""
    floor = ROUNDING * max(expected.values())
    absolute, relative, worst = 0.0, 0.0, ""
    inert = glip_inert({name: torch.zeros(0) for name in expected})
    for name, value in expected.items():
        if name in inert:
            continue
        difference = abs(ours.get(name, torch.inf) - value)
        absolute = max(absolute, difference)
        if difference / max(value, floor) > relative:
            relative, worst = difference / max(value, floor), name
    return Row(
        name=f"gradient norms of {len(expected)} parameters",
        absolute=absolute,
        relative=relative,
        ok=relative <= LIMIT,
        note=f"largest at {worst}",
    )


if __name__ == "__main__":
    sys.exit(main())
