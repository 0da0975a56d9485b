"""What a run leaves behind while it trains: bar, loss log, checkpoints."""

import json
import os
from typing import Any

from safetensors.torch import save

from glipv2.model.tokenizer import Tokenizer
from glipv2.model.weights import model_files
from glipv2.pipeline import dist
from glipv2.pipeline.checkpoint import prune_checkpoints, save_checkpoint
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.optimizer_state import full_state
from glipv2.pipeline.position import Position, merge_positions
from glipv2.pipeline.progress import bar
from glipv2.pipeline.runlog import LossLog


class Recorder:
    """What a run leaves behind while it trains: bar, loss log, checkpoints (main rank only)."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, first_step: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.main = dist.is_main()
        if self.main:
            name = os.path.basename(config.run_dir.rstrip("/"))
            self.bar = bar(config.train.steps, f"pretrain {name}", "step", first_step)
            self.losses = LossLog(config.run_dir, first_step)

    def step(self, step: int, values: dict[str, float], seconds: float) -> None:
        if not self.main:
            return
        self.losses.append(step, values)
        rate = self.config.train.global_batch / max(seconds, 1e-9)
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} img/s", refresh=False)
        self.bar.update(1)

    def save(self, engine: Any, step: int, position: Position) -> None:
        """Commit a checkpoint at `step`; every rank must call it."""

        weights, moments = full_state(engine)
        positions = dist.gather_objects(position)
        if self.main:
            self.losses.flush()
            trainer = {"step": step, "position": merge_positions(positions).to_dict()}
            files = model_files(engine.module, self.tokenizer)
            files["model.safetensors"] = save(weights)
            files["optimizer.safetensors"] = save(moments)
            files["trainer.json"] = json.dumps(trainer).encode()
            save_checkpoint(self.config.run_dir, step, files)
            prune_checkpoints(self.config.run_dir, self.config.train.keep_checkpoints)
        dist.barrier()

    def close(self) -> None:
        if self.main:
            self.bar.close()
