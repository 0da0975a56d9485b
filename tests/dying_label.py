"""`glipv2 label RECIPE` whose workers or whose driver kill themselves at points of the commit.

    python tests/dying_label.py RECIPE FOLDER WHO

Each point is used once, and no shard's worker dies twice: FOLDER holds a file for each that did.
WHO is "worker" or "driver"; "zombie" does all in one process, which stops (SIGSTOP) before the
first shard is uploaded and before it is committed. Anything else is a caption that a worker dies
of, whenever it has it.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = [
    f"{when} {name}"
    for name in ("upload", "create_once", "move", "delete", "write_bytes", "write_json")
    for when in ("before", "after")
]


def dying(name: str, call: Callable[..., Any], folder: Path, per_shard: bool) -> Callable[..., Any]:
    def once(point: str, arguments: tuple[Any, ...]) -> None:
        shard = re.search(r"shard-\d+", str(arguments))
        who = folder / (shard[0] if shard and per_shard else "anyone")
        if not (folder / point).exists() and not (per_shard and who.exists()):
            (folder / point).touch()
            who.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        once(f"before {name}", arguments[:2])
        result = call(*arguments, **named)
        once(f"after {name}", arguments[:2])
        return result

    return wrapped


def install(folder: Path, per_shard: bool) -> None:
    from glipv2.pipeline import storage

    for name in {point.split()[1] for point in POINTS}:
        setattr(storage, name, dying(name, getattr(storage, name), folder, per_shard))


def stopping(name: str, call: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    point = folder / f"before {name}"

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if "shard-" in str(arguments[:2]) and not point.exists():
            point.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return call(*arguments, **named)

    return wrapped


def label_as_zombie(recipe: str, folder: Path) -> int:
    from in_process import without_ray

    from glipv2.jobs import cli
    from glipv2.pipeline import storage

    for name in ("upload", "create_once"):
        setattr(storage, name, stopping(name, getattr(storage, name), folder))
    with without_ray():
        return cli.main(["label", recipe])


class Allergic:
    """A teacher that dies of one caption."""

    def __init__(self, teacher: Any, caption: str) -> None:
        self.prepare, self.teacher, self.caption = teacher.prepare, teacher, caption

    def ground(self, images: Any, captions: Any, batch_size: int) -> Any:
        if self.caption in [text for text, _ in captions]:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.teacher.ground(images, captions, batch_size)


def main(recipe: str, folder: str, who: str) -> None:
    if who == "zombie":
        sys.exit(label_as_zombie(recipe, Path(folder)))
    import ray.cloudpickle

    from glipv2.jobs import cli
    from glipv2.jobs import label as job

    if who == "driver":
        install(Path(folder), per_shard=False)
    else:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

        class DyingWorker(job._Worker):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                if who == "worker":
                    install(Path(folder), per_shard=True)
                else:
                    self.labeller.teacher = Allergic(self.labeller.teacher, who)

        job._Worker = DyingWorker  # type: ignore[misc]
    sys.exit(cli.main(["label", recipe]))


if __name__ == "__main__":
    main(*sys.argv[1:])
