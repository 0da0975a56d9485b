"""What a checkpoint argument means, everywhere: a model's folder, or a run's newest step.

Whoever asks brings `exists(url)` and `list_names(url)` (the names in a folder, none if it is
absent), so that the pipeline's storage and plain fsspec agree.
"""

import re
from collections.abc import Callable, Sequence

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
VOCABULARY = "vocab.txt"
MODEL_FILES = (WEIGHTS, CONFIG, VOCABULARY)
"""The exchange format: a folder with these is a model, whoever wrote it."""
COMMIT = "COMMIT.json"
"""Lists the files of a step with their checksums; written last, so it makes the step exist."""
STEP_NAME = re.compile(r"step-(\d{6,})")

Exists = Callable[[str], bool]
ListNames = Callable[[str], Sequence[str]]


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_url(run: str, step: int) -> str:
    return f"{run.rstrip('/')}/checkpoints/{step_name(step)}"


def begun_steps(run: str, list_names: ListNames) -> list[int]:
    """Steps of a run folder that someone began to save, oldest first."""
    names = list_names(f"{run.rstrip('/')}/checkpoints")
    return sorted(int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name)))


def committed_steps(run: str, exists: Exists, list_names: ListNames) -> list[int]:
    """Steps of a run folder with a commit record, oldest first; their files are not checked."""
    steps = begun_steps(run, list_names)
    return [step for step in steps if exists(f"{step_url(run, step)}/{COMMIT}")]


def model_folder(url: str, exists: Exists, list_names: ListNames) -> str:
    """`url` if it is a committed step or holds a model's files; of a run the newest committed step.

    ValueError says what was looked for and what would do.
    """
    root = url.rstrip("/")
    if exists(f"{root}/{COMMIT}"):
        return url
    missing = [name for name in MODEL_FILES if not exists(f"{root}/{name}")]
    if not missing:
        return url
    if len(missing) < len(MODEL_FILES):
        raise ValueError(f"{url} is not the folder of a model: it has no {', '.join(missing)}")
    steps = committed_steps(url, exists, list_names)
    if steps:
        return step_url(url, steps[-1])
    names = list_names(url)
    holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(
        f"no checkpoint in {url}: it {f'holds {holds}' if names else 'is no folder, or empty'}. "
        f"Looked for checkpoints/step-*/{COMMIT} (a run that has saved a step), for {COMMIT} (a "
        f"step), and for {', '.join(MODEL_FILES)} (a model, as glipv2 convert writes it). Give "
        "another folder, or train first"
    )
