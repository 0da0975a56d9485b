"""How much of its time a pretraining keeps when a rank is killed every two minutes.

    PYTHONPATH=infra python infra/soak.py --minutes 30 --every 120 --out runs/soak

A run is left alone for a sixth of the time, which tells its rate; another one is trained for all of
it while a random rank is killed (SIGKILL) again and again, and nobody but its launcher helps it.
Exit code 1 if it made less than 90 % of the steps that the rate promises.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from kill_drill import command, ranks, restarts_of, steps_made, wait, write_recipe

STEPS = 10**6
SETTINGS = ["train.checkpoint_every=20", "log.samples=false"]
PROMISED = 0.9
ALONE = 6
"""The undisturbed run gets this part of the time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=120, help="seconds from kill to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    recipe = write_recipe(arguments.out, STEPS)
    seconds, draw = 60 * arguments.minutes, random.Random(arguments.seed)
    calm, _ = train_for(recipe, arguments.out / "undisturbed", seconds / ALONE, seconds, draw)
    made, kills = train_for(recipe, arguments.out / "killed", seconds, arguments.every, draw)
    kept = made / (ALONE * calm)
    restarts = restarts_of(arguments.out / "killed")
    print(  # noqa: T201
        f"{made} steps with {kills} kills and {len(restarts)} restarts in {seconds:.0f} s, "
        f"{ALONE * calm} without: {kept:.1%} kept"
    )
    return 0 if kept >= PROMISED and kills == len(restarts) else 1


def train_for(
    recipe: Path, run: Path, seconds: float, every: float, draw: random.Random
) -> tuple[int, int]:
    """(steps, kills) from the first step on; a rank is killed after every `every` seconds."""
    launcher = subprocess.Popen([*command(recipe, run), *SETTINGS])
    kills = 0
    try:
        wait(launcher, lambda: steps_made(run) > 0)
        began, first = time.monotonic(), steps_made(run)
        while (left := seconds - (time.monotonic() - began)) > 0:
            if left <= every:
                time.sleep(left)
                break
            time.sleep(every)
            victims = ranks(launcher)
            os.kill(victims[draw.choice(sorted(victims))], signal.SIGKILL)
            kills += 1
        return steps_made(run) - first, kills
    finally:
        launcher.terminate()
        launcher.wait()


if __name__ == "__main__":
    sys.exit(main())
