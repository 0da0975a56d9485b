"""Run glipv2 commands as a user does: real processes that can be killed at any moment."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from glipv2.jobs.prepare import prepare_set
from glipv2.model.folders import step_url
from glipv2.pipeline.config import PrepareConfig

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "tests" / "recipes" / "smoke.yaml"
TIMEOUT = 480.0
SETS = ("toy_detection", "toy_grounding")


def smoke_recipe(folder: Path, **changes: Any) -> Path:
    """A copy of the smoke recipe with some top-level sections replaced or extended."""
    tree = yaml.safe_load(SMOKE.read_text())
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def small_training(folder: Path, **changes: Any) -> Path:
    """The recipe of a pretraining on two small sets, which are made in `folder`."""
    for name in SETS:
        options = PrepareConfig(source="toy", set=name, count=40, size=64, seed=1)
        prepare_set(str(folder / "data" / name), options)
    data = {"root": str(folder / "data"), "mixture": dict.fromkeys(SETS, 1)}
    return smoke_recipe(folder, run_dir=str(folder / "undisturbed"), data=data, **changes)


def start(*arguments: object, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """A glipv2 command in its own process group, output collected."""
    return subprocess.Popen(
        [sys.executable, "-m", "glipv2.jobs.cli", *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(*arguments: object, code: int = 0, timeout: float = TIMEOUT, cwd: Path = ROOT) -> str:
    """Run a command to its end; what it printed on both streams."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def error_line(said: str, command: str) -> str:
    """The one line a command ends with; s3fs may still grumble when its connections are closed."""
    [told] = [line for line in said.splitlines() if line.startswith(f"glipv2 {command}: ")]
    assert "Traceback" not in said[: said.index(told)]
    return told


def wait_for(process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
    """Until the condition holds, of a command that must not have ended by then."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)


def kill_when(condition: Callable[[], bool], *arguments: object) -> int:
    """Start a command, SIGKILL it as soon as the condition holds; returns the exit code."""
    process = start(*arguments)
    wait_for(process, condition)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    return process.returncode


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def rank_process(launcher: int, rank: int) -> int | None:
    """The process that is a rank of a running pretraining, however it was launched."""
    for pid in descendants(launcher):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and "pretrain" in command_line(pid):
            return pid
    return None


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, deepest last."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(0), [])
        found += children
        queue += children
    return found


def saved_state(run: Path, step: int) -> list[bytes]:
    """What every rank saved; the names of the files are those of an attempt."""
    ranks = Path(step_url(str(run), step)).glob("state-*.safetensors")
    found = [path.read_bytes() for path in sorted(ranks, key=lambda path: path.name[-17:])]
    assert found
    return found
