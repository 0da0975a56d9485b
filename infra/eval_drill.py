"""Is an evaluation repeatable, and does it survive being killed?

    python infra/eval_drill.py RECIPE --checkpoint MODEL --kills 5 --out runs/eval_drill

`glipv2 evaluate` scores the same model three times, each into a folder of its own: once, once more,
and once while it is killed (SIGKILL) again and again and started anew with the same command. Every
figure and every kept prediction of the three must be the same. Exit code 1 if not.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/eval_drill"))
    parser.add_argument("settings", nargs="*", help="as those of glipv2 evaluate")
    arguments = parser.parse_args()
    command = [
        "glipv2", "evaluate", str(arguments.recipe), "--checkpoint", arguments.checkpoint,
        *arguments.settings, "--out",
    ]  # fmt: skip
    once, again, killed = (arguments.out / name for name in ("once", "again", "killed"))
    for folder in (once, again):
        began = time.monotonic()
        subprocess.run([*command, str(folder)], check=True)
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
    draw, files = random.Random(arguments.seed), predicted(once)
    moments = sorted(draw.sample(range(1, files), arguments.kills))
    for moment in moments:
        there = kill_after(moment, [*command, str(killed)], killed)
        print(f"killed with {there} of {files} files", flush=True)  # noqa: T201
    subprocess.run([*command, str(killed)], check=True)
    folders = (once, again, killed)
    figures, kept = [metrics(x) for x in folders], [predictions(x) for x in folders]
    for suite, values in figures[0].items():
        print(f"{suite:14s} {json.dumps(values)}")  # noqa: T201
    same = len({json.dumps(own) for own in figures}) == 1  # as text, in which NaN is NaN
    unlike = {name for own in kept for name in own if any(o.get(name) != own[name] for o in kept)}
    print(  # noqa: T201
        f"figures of {len(figures[0])} suites {'the same' if same else 'DIFFER'}, "
        f"{len(unlike)} of {len(kept[0])} files of predictions differ"
    )
    return 0 if same and not unlike and kept[0] else 1


def kill_after(files: int, command: list[str], folder: Path) -> int:
    """Start an evaluation and kill it once so many files are there; how many there were then."""
    process = subprocess.Popen(command)
    while predicted(folder) < files and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is not None:
        raise SystemExit(f"it ended with {process.returncode} before it could be killed")
    process.kill()
    process.wait()
    return predicted(folder)


def predicted(folder: Path) -> int:
    return len(files_of(folder))


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "eval" / "predictions").rglob("*.json.gz"))


def predictions(folder: Path) -> dict[str, Any]:
    """Name of each file of predictions -> what it holds, but for the seconds it took."""
    found = {}
    for path in files_of(folder):
        content = json.loads(gzip.decompress(path.read_bytes()))
        found[str(path.relative_to(folder))] = {**content, "seconds": None}
    return found


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Suite -> its figures."""
    results = (path for path in sorted((folder / "eval").glob("*/*.json")) if "." not in path.stem)
    return {path.stem: json.loads(path.read_text())["metrics"] for path in results}


if __name__ == "__main__":
    sys.exit(main())
