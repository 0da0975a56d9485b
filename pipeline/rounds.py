"""Rounds of self-training: the student of one round is the teacher of the next.

A recipe says `rounds: 3` and describes the first. Its phase that trains on labelled sets, say
`student`, is followed by `student_2` and `student_3`, which differ in three things: their teacher
is the student before, whose labels go to sets of their own (`toy_labelled_2`), and these stand in
their mixture instead. A phase that starts from its teacher (`train.init`) starts from the new one.
"""

import copy
from dataclasses import replace
from typing import Any

from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError


def with_rounds(config: RunConfig) -> RunConfig:
    """The configuration with the phases of rounds 2 to `rounds`; ConfigError if none can follow."""
    if config.rounds == 1:
        return config
    student = lineage(config)
    if not config.label.calibration:
        raise ConfigError("rounds need label.calibration, gold images on which each is judged")
    phases, truth = {}, dict(config.eval.label_truth)
    for name, tree in config.phases.items():
        phases[name] = tree
        if name == student:
            for number in range(2, config.rounds + 1):
                phases[round_name(student, number)] = _round(config, student, number)
                for labelled in config.label.inputs.values():
                    if labelled in truth:
                        truth[round_name(labelled, number)] = truth[labelled]
    return replace(config, phases=phases, eval=replace(config.eval, label_truth=truth))


def lineage(config: RunConfig) -> str:
    """The first phase that trains on labelled sets; ConfigError when there is none."""
    for name, tree in config.phases.items():
        if set(_mixture(tree)) & set(config.label.inputs.values()):
            return name
    raise ConfigError("rounds need a phase whose data.mixture has a set of label.inputs")


def rounds_of(config: RunConfig) -> list[str]:
    """The student of each round, the first round's first; empty when there is one round only."""
    if config.rounds == 1:
        return []
    student = lineage(config)
    return [round_name(student, number) for number in range(1, config.rounds + 1)]


def round_name(name: str, number: int) -> str:
    """`student_2`; the first round's names are the recipe's own."""
    return name if number == 1 else f"{name}_{number}"


def _round(config: RunConfig, student: str, number: int) -> dict[str, Any]:
    """The overrides of the phase that trains the student of round `number`."""
    tree = copy.deepcopy(config.phases[student])
    teacher = round_name(student, number - 1)
    inputs = {pairs: round_name(to, number) for pairs, to in config.label.inputs.items()}
    renamed = dict(zip(config.label.inputs.values(), inputs.values(), strict=True))
    tree["data"]["mixture"] = {renamed.get(k, k): share for k, share in _mixture(tree).items()}
    tree["label"] = {**tree.get("label", {}), "teacher": teacher, "inputs": inputs}
    if tree.get("train", {}).get("init") == config.label.teacher:
        tree["train"]["init"] = teacher
    return tree


def _mixture(tree: dict[str, Any]) -> dict[str, float]:
    mixture: dict[str, float] = tree.get("data", {}).get("mixture", {})
    return mixture
