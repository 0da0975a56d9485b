"""How a model is trained: the sections `train` and `supervise` of a run's configuration."""

from dataclasses import dataclass
from typing import Literal

from glipv2.model.config import Tune
from glipv2.pipeline.errors import require


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000
    global_batch: int = 64
    """Images per optimiser step, over all ranks; the world size never changes it."""
    processes: int = 1
    """Ranks started on this machine when no launcher (torchrun, deepspeed) has set WORLD_SIZE."""
    threads: int = 1
    """CPU threads of one rank."""
    init: str | None = None
    """Phase, run folder or checkpoint whose weights the run starts from; null starts at random."""
    tune: Tune = "full"
    """What is trained: everything, GLIP's linear probe (box, centerness and alignment heads), the
    table of a fixed prompt (needs model.prompt_rows and data.fixed_prompts), or one head alone."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    """Whether torch.compile fuses the model: minutes at every start, then faster steps."""
    learning_rate: float = 1e-4
    text_learning_rate: float = 1e-5
    """Of the text encoder; the BERT layers of the fusion tower use `learning_rate` (facts G.1)."""
    head_learning_rate: float = 1e-4
    """Of everything after the two encoders and the pyramid."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 switches clipping off."""
    warmup_steps: int = 2000
    schedule: Literal["steps", "cosine"] = "steps"
    """After the warm-up: x 0.1 at 67 % and 89 % (GLIP), or flat and then a cosine to zero."""
    flat_share: float = 0.4
    """cosine: share of the run at the full rate."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    """Committed checkpoints that are kept; older ones are deleted."""

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch", "processes", "threads", "checkpoint_every"):
            require(getattr(self, key) > 0, f"train.{key}", "positive", getattr(self, key))
        for key in ("learning_rate", "text_learning_rate", "head_learning_rate"):
            require(getattr(self, key) > 0, f"train.{key}", "positive", getattr(self, key))
        require(self.keep_checkpoints > 0, "train.keep_checkpoints", "1 or more",
                 self.keep_checkpoints)  # fmt: skip
        require(0 <= self.flat_share <= 1, "train.flat_share", "in [0, 1]", self.flat_share)


TUNED_PARTS: dict[Tune, str | None] = {
    "full": None,
    "linear_probe": None,
    "prompt": "prompt_rows",
    "mask_head": "masks",
    "answer_head": "answers",
    "caption_head": "captions",
}
"""What must be set in `model` for each kind of tuning."""
