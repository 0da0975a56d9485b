"""Where the time of training steps goes, for `profile.steps`."""

import gzip
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
    """Records some steps after the first ones of a start; call `step` after each."""

    def __init__(self, run_dir: str, config: ProfileConfig) -> None:
        self.folder, self.config = storage.join(run_dir, FOLDER), config
        self.done = 0
        self.recorder: torch.profiler.profile | None = None

    def step(self) -> None:
        """A step has ended."""
        self.done += 1
        if self.recorder and self.done == self.config.skip + self.config.steps:
            self._end()
        elif self.config.steps and self.done == self.config.skip:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
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
            f"{self.config.steps} steps recorded: {storage.join(self.folder, TRACE)} (for Perfetto "
            f"or chrome://tracing) and {storage.join(self.folder, TABLE)}"
        )
        self.recorder = None
