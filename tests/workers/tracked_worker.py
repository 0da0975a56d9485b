"""Note steps as a run does, and die or end.

Usage: tracked_worker.py RUN FIRST LAST STEPS [log.key=value without `log.` ...] [killed]
killed: it dies once the trackers have what was logged, and tells them nothing.
"""

import os
import sys
import time

from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.recorder import Recorder, StepTimes
from glipv2.pipeline.train_config import LogConfig, TrainConfig


def main(run_dir: str, first: int, last: int, steps: int, *settings: str) -> None:
    chosen = dict(word.split("=", 1) for word in settings if "=" in word)
    config = RunConfig(
        run_dir=run_dir,
        train=TrainConfig(steps=steps),
        log=LogConfig(every=1, tensorboard=False, **chosen),  # type: ignore[arg-type]
    )
    recorder = Recorder(config, first)
    for step in range(first, last):
        recorder.step(step, {"lr": 0.1, "loss": 100.0 - step}, StepTimes(1.0, 0.0, 100))
    if "killed" in settings:
        for tracker in recorder.trackers:
            while not tracker.todo.empty():  # type: ignore[attr-defined]
                time.sleep(0.01)
        time.sleep(0.5)  # the last of them is on its way
        os._exit(9)
    recorder.close(last)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])  # type: ignore[arg-type]
