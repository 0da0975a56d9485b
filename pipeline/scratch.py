"""Temporary folders that do not fill the disk, however often their owners are killed."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "glipv2-scratch-"
LOCK = ".in-use"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder, gone at the end; those of processes that died go now.

    Its lock is the kernel's and ends with the process, so it tells the dead from the living, also
    where containers share a folder but don't see each other's processes.
    """
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        new = folder / f"{LOCK}-new"  # it gets its name when it is locked, or others might lock it
        with new.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(folder / LOCK)
            yield folder


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
