"""glipv2 schedule --status: of each run, which steps are scored, and where the others stand."""

from typing import TYPE_CHECKING

from glipv2.model.folders import STEP_NAME
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.pins import pins

if TYPE_CHECKING:
    from glipv2.jobs.schedule import Scheduler

WORDS = {"ready": "waits", "waiting": "tried again", "running": "running", "failed": "failed"}
WIDTH = 18


def status_table(scheduler: "Scheduler") -> str:
    """A block a run: a line a step, newest first, and why what failed did."""
    return "\n\n".join(_run_table(scheduler, url) for url in scheduler.runs)


def _run_table(scheduler: "Scheduler", url: str) -> str:
    open_items = {(i.step, i.suite.name): i for i in scheduler.due() if i.run == url}
    stands = {key: scheduler.standing(item) for key, item in open_items.items()}
    committed = set(committed_steps(url))
    folders = storage.list_names(storage.join(url, "eval"))
    scored = {int(match[1]) for name in folders if (match := STEP_NAME.fullmatch(name))}
    best = {name: step for name, step in pins(url).items() if name.startswith("best-")}
    lines = [url, f"{'step':>10s}" + "".join(f"{s.name:>{WIDTH}s}" for s in scheduler.suites)]
    notes = []
    for step in sorted(committed | scored, reverse=True):
        cells = []
        for suite in scheduler.suites:
            value = scheduler.values(url, f"{suite.name}.{suite.first}").get(step)
            own = stands.get((step, suite.name))
            star = "*" if best.get(f"best-{suite.name}.{suite.first}") == step else " "
            if own is not None:
                cells.append(f"{WORDS[own.state]} ")
                if own.told:
                    notes.append(f"  step {step}, {suite.name}: {WORDS[own.state]}: {own.told}")
            else:
                cells.append("- " if value is None else f"{value:.4f}{star}")
        gone = "" if step in committed else "   (pruned)"
        lines.append(f"{step:>10d}" + "".join(f"{cell:>{WIDTH}s}" for cell in cells) + gone)
    if len(lines) == 2:
        lines.append("  no checkpoint yet")
    if best:
        lines.append("  * best, and kept")
    return "\n".join([*lines, *notes])
