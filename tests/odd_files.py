"""Files of others as the bad-input tests make and prepare them."""

import io
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from sample_records import jpeg

from glipv2.jobs.cli import main
from glipv2.pipeline import shards


def tar(*members):
    """Bytes of a tar of (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample(key, text=b"a dog"):
    return [(f"{key}.jpg", jpeg()), (f"{key}.txt", text)]


def prepared(tmp_path, source, *arguments):
    """The set that a command makes."""
    out = str(tmp_path / "out")
    assert main(["prepare", source, *map(str, arguments), "--out", out]) == 0
    return shards.open_shard_set(out)


def write_tars(tmp_path, **tars):
    folder = tmp_path / "tars"
    folder.mkdir(exist_ok=True)
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data)
    return folder


def run_measured(*arguments):
    """Exit code, what was printed, and the most memory in bytes of a process of its own.

    Not `ru_maxrss`, which a process that is started takes over from the one that starts it.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    status, memory = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        memory = int(found[1]) * 1024 if found else memory
        time.sleep(0.01)
    return process.returncode, process.stdout.read(), memory
