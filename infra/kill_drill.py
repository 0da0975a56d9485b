"""Kill ranks of a pretraining at random moments, and see that nothing is lost and nothing differs.

    python infra/kill_drill.py --kills 100 --out runs/kill_drill

One run is left alone; another has a random rank killed (SIGKILL) again and again: while it starts,
while it waits for data, in a forward or backward pass, in a collective, and between a checkpoint's
first file and its commit. What a rank is doing is read from its stack while it is stopped (by
py-spy, which Ray brings). Nobody but its own launcher helps the run. In the end losses, weights,
stream position and the ledger of consumed samples must be the undisturbed run's, byte for byte, and
each sample of the sets must have been used once in every epoch. Exit code 1 if anything differs, or
if going on took longer than a minute.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glipv2.jobs.prepare import prepare_set
from glipv2.model.folders import COMMIT, WEIGHTS, step_name
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.launch import RESTARTS
from glipv2.pipeline.position import Position
from glipv2.pipeline.runlog import LOSSES, SAMPLES, read_losses
from glipv2.pipeline.saver import TRAINER
from glipv2.pipeline.shard_reader import open_shard_set, read_index

ROOT = Path(__file__).parent.parent
SETS = ("toy_detection", "toy_grounding")
MOMENTS = ("start-up", "loading", "forward", "backward", "collective", "save")
FRAMES = {
    "collective": "torch/distributed/distributed_c10d.py",
    "loading": "pipeline/loader.py",
    "forward": "DeepSpeedEngine.forward",
    "backward": "_engine_run_backward",
}
"""What a training rank is in, by the first of these that its stack has."""
TRAINING = "_train (pipeline/trainer.py"
STEPS_PER_KILL, CHECKPOINT_EVERY = 8, 2
LONGEST_WAIT = 600.0
PROMISED = 60.0
"""Seconds from a kill to the first new step."""


@dataclass
class Kill:
    moment: str
    rank: int
    at_step: int = 0
    at: float = 0.0
    resumed_from: int = 0
    noticed: float = 0.0
    """Seconds until all ranks are being started again."""
    stepped: float = 0.0
    """Seconds until the first new step."""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_drill"))
    arguments = parser.parse_args()
    steps = STEPS_PER_KILL * arguments.kills + 2 * CHECKPOINT_EVERY
    recipe = write_recipe(arguments.out, steps)
    calm, killed = arguments.out / "undisturbed", arguments.out / "killed"
    subprocess.run(command(recipe, calm), check=True)
    kills = drill(recipe, killed, arguments.kills, random.Random(arguments.seed))
    show(kills)
    wrong = differences(calm, killed, steps)
    late = [kill for kill in kills if kill.stepped > PROMISED]
    noticed = max((kill.noticed for kill in kills), default=0.0)
    print(  # noqa: T201
        f"{len(kills)} kills, noticed after {noticed:.1f} s at most; later than {PROMISED:.0f} s: "
        f"{len(late)}; differing: {', '.join(wrong) or 'nothing'}"
    )
    return 1 if wrong or late or len(kills) < arguments.kills else 0


def write_recipe(out: Path, steps: int) -> Path:
    """The smallest recipe of the tests on two small sets, with as many steps as needed."""
    tree = yaml.safe_load((ROOT / "tests" / "recipes" / "smoke.yaml").read_text())
    for name in SETS:
        options = PrepareConfig(source="toy", set=name, count=40, size=64, seed=1)
        prepare_set(str(out / "data" / name), options)
    tree["data"] |= {"root": str(out / "data"), "mixture": dict.fromkeys(SETS, 1)}
    tree["train"] |= {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY}
    tree["log"] = {"samples": True}
    tree["supervise"] = {"max_restarts": 1000}  # many kills leave no progress
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(recipe: Path, run: Path) -> list[str]:
    words = ["-m", "glipv2.jobs.cli", "pretrain", str(recipe), f"run_dir={run}"]
    return [sys.executable, *words]


def drill(recipe: Path, run: Path, count: int, draw: random.Random) -> list[Kill]:
    """Train to the end while ranks are killed."""
    launcher = subprocess.Popen(command(recipe, run))
    kills: list[Kill] = []
    try:
        while len(kills) < count:
            kill = Kill(draw.choice(MOMENTS), draw.randrange(2))
            if kill.moment != "start-up" and not wait_for_step(launcher, run, kills):
                break
            victim = wait_for_moment(launcher, run, kill, draw)
            if not victim or not hit(launcher, run, kill, victim):
                break
            kills.append(kill)
        wait_for_step(launcher, run, kills)
        launcher.wait(LONGEST_WAIT)
    finally:
        launcher.kill()
    return kills


def wait_for_step(launcher: "subprocess.Popen[bytes]", run: Path, kills: list[Kill]) -> bool:
    """Wait for a step made after the last kill, and note when it came for all that waited."""
    last = kills[-1] if kills else Kill("", 0)
    came = wait(launcher, lambda: has_new_step(run, last.resumed_from, last.at + last.noticed))
    for kill in kills:
        if not kill.stepped:
            kill.stepped = time.time() - kill.at
    return came


def wait_for_moment(
    launcher: "subprocess.Popen[bytes]", run: Path, kill: Kill, draw: random.Random
) -> int:
    """The process of the rank, stopped, at such a moment; 0 if the run ends before."""
    if not wait(launcher, lambda: len(ranks(launcher)) == 2, draw.uniform(0, 1)):
        return 0
    if kill.moment == "start-up":
        time.sleep(draw.uniform(0, 3))
    since = time.time()
    while wait(launcher, lambda: kill.moment != "save" or is_saving(run, since)):
        victim = ranks(launcher).get(kill.rank, 0)
        with suppress(ProcessLookupError):
            if victim:
                os.kill(victim, signal.SIGSTOP)
                now = doing(victim)
                if kill.moment in ("save", now):
                    return victim
                if kill.moment == "start-up":  # that is over
                    kill.moment = "forward"
                os.kill(victim, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.02))
    return 0


def doing(process: int) -> str:
    """What a stopped rank is in the middle of."""
    spy = [Path(sys.executable).with_name("py-spy"), "dump", "--nonblocking", "--pid", str(process)]
    return moment_of(subprocess.run(spy, capture_output=True, text=True).stdout)


def moment_of(dump: str) -> str:
    """By the stack of the main thread; "" in a step, but in none of its parts that are named."""
    stack = dump.partition('"MainThread"')[2].partition("\nThread")[0]
    if TRAINING not in stack:
        return "start-up"
    return next((moment for moment, frame in FRAMES.items() if frame in stack), "")


def hit(launcher: "subprocess.Popen[bytes]", run: Path, kill: Kill, victim: int) -> bool:
    """Kill a rank and wait until all are being started again."""
    kill.at_step, known, kill.at = steps_made(run), len(restarts_of(run)), time.time()
    os.kill(victim, signal.SIGKILL)
    if not wait(launcher, lambda: len(restarts_of(run)) > known):
        return False
    kill.resumed_from = restarts_of(run)[-1]["step"]
    kill.noticed = time.time() - kill.at
    return True


def wait(
    launcher: "subprocess.Popen[bytes]", condition: Callable[[], bool], at_least: float = 0.0
) -> bool:
    """Until the condition holds, then `at_least` seconds more; False if the run ends before."""
    deadline = time.monotonic() + LONGEST_WAIT
    while not condition():
        if launcher.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    time.sleep(at_least)
    return launcher.poll() is None


def ranks(launcher: "subprocess.Popen[bytes]") -> dict[int, int]:
    """Rank -> process of the ranks that run now."""
    found = {}
    for child in children(launcher.pid):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = child
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_saving(run: Path, since: float) -> bool:
    """Whether a checkpoint has new files but no commit record."""
    for folder in (run / "checkpoints").glob("step-*"):
        with suppress(FileNotFoundError):  # being pruned
            newest = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
            if newest > since and not (folder / COMMIT).exists():
                return True
    return False


def steps_made(run: Path) -> int:
    entries = read_losses(str(run))
    return entries[-1]["step"] + 1 if entries else 0


def has_new_step(run: Path, resumed_from: int, since: float) -> bool:
    """Whether the log, cut back by the restart, has a step that was made after it."""
    return steps_made(run) > resumed_from and (run / LOSSES).stat().st_mtime > since


def restarts_of(run: Path) -> list[dict[str, Any]]:
    return storage.read_json_lines(str(run / RESTARTS))


def differences(calm: Path, killed: Path, steps: int) -> list[str]:
    """Files of the two runs that should be equal and are not."""
    if committed_steps(str(killed))[-1:] != [steps]:
        return ["the killed run did not end"]
    step = Path("checkpoints") / step_name(steps)
    names = [Path(LOSSES), Path(SAMPLES), step / WEIGHTS, step / TRAINER]
    wrong = [str(n) for n in names if (calm / n).read_bytes() != (killed / n).read_bytes()]
    keys = {name: keys_of(str(killed.parent / "data" / name)) for name in SETS}
    position = Position.from_dict(json.loads((killed / step / TRAINER).read_bytes())["position"])
    return wrong + uneven(storage.read_json_lines(str(killed / SAMPLES)), position, keys)


def uneven(
    ledger: list[dict[str, Any]], position: Position, keys: dict[str, list[str]]
) -> list[str]:
    """Samples that were not used once in each epoch.

    Lanes of a source may be in different epochs: every sample was used in all those that each lane
    has behind it, and in none that no lane has begun.
    """
    used = Counter(key for entry in ledger for key in entry["samples"])
    print(f"ledger: {len(used)} samples, {used.total()} uses")  # noqa: T201
    wrong = []
    for source, own in keys.items():
        epochs = [lane[0] for lane in position.lanes[source] if lane]
        for key in own:
            count = used.pop(f"{source}/{key}", 0)
            if not min(epochs) <= count <= max(epochs) + 1:
                wrong.append(f"{source}/{key} was used {count} times by epoch {min(epochs)}")
    return wrong + [f"{key} is of no set" for key in used]


def keys_of(url: str) -> list[str]:
    """Of all samples of a shard set."""
    shard_set = open_shard_set(url)
    return [
        entry.key
        for shard in range(len(shard_set.shards))
        for entry in read_index(shard_set, shard)
    ]


def show(kills: list[Kill]) -> None:
    head = "| kill | while | rank | steps made | gone on from | seconds: noticed | next step |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {number} | {kill.moment} | {kill.rank} | {kill.at_step} | {kill.resumed_from} | "
        f"{kill.noticed:.1f} | {kill.stepped:.1f} |"
        for number, kill in enumerate(kills, start=1)
    ]
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
