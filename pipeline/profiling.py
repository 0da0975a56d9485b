"""Where the time of training steps goes, for `profile.steps`."""

import gzip
import os
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from glipv2.pipeline import storage
from glipv2.pipeline.progress import say
from glipv2.pipeline.train_config import ProfileConfig

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "table.txt"
ROWS = 40


class Profile:
    """Records some steps after the first ones of a start; call `step` after each, and `close`."""

    def __init__(self, run_dir: str, config: ProfileConfig) -> None:
        self.folder, self.config = storage.join(run_dir, FOLDER), config
        self.recorded = -config.skip
        self.recorder: torch.profiler.profile | None = None
        self._begin()

    def step(self) -> None:
        """A step has ended."""
        self.recorded += 1
        self._begin()
        if self.recorder and self.recorded == self.config.steps:
            self._end()

    def close(self) -> None:
        """The run has ended, perhaps before all the steps that were asked for."""
        if self.recorder and self.recorded:
            self._end()
            return
        if self.recorder:
            self.recorder.stop()
        if self.config.steps and self.recorded <= 0:
            say(
                f"no step recorded: this start of the run made {self.recorded + self.config.skip}, "
                f"and profile.skip is {self.config.skip}"
            )

    def _begin(self) -> None:
        if not self.config.steps or self.recorded:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        else:  # the profiler would report the missing GPU as an error
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self.recorder = torch.profiler.profile(
            activities=activities, record_shapes=True, acc_events=True
        )
        self.recorder.start()

    def _end(self) -> None:
        assert self.recorder is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.recorder.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self.recorder.export_chrome_trace(str(path))
            storage.write_bytes(storage.join(self.folder, TRACE), gzip.compress(path.read_bytes()))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.recorder.key_averages().table(sort_by=order, row_limit=ROWS)
        storage.write_bytes(storage.join(self.folder, TABLE), table.encode())
        say(
            f"{self.recorded} steps recorded: {storage.join(self.folder, TRACE)} (for Perfetto "
            f"or chrome://tracing) and {storage.join(self.folder, TABLE)}"
        )
        self.recorder = None
