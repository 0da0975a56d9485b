"""How a model is trained: `train`, `supervise`, `log` and `profile` of a run's configuration."""

import math
from dataclasses import dataclass, field
from typing import Literal

from glipv2.model.config import Part, Tune
from glipv2.pipeline.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000
    global_batch: int = 64
    """Images per optimiser step, over all ranks; the world size never changes it."""
    accumulation: int = 1
    """Micro-batches in which a rank takes its share of a step: less memory, the same images. Loss
    and gradient stay those of the whole batch, but the inter-image contrast is within a micro-batch
    (of all ranks) and the mask term is averaged over micro-batches. ZeRO 0 and 1 reduce gradients
    once a step, 2 and 3 for every micro-batch, as whole gradients are what they don't keep."""
    checkpoint_activations: tuple[Part, ...] = ()
    """Parts whose activations are computed again in the backward pass instead of being kept."""
    processes: int = 1
    """Ranks started on this machine when no launcher (torchrun, deepspeed) has set WORLD_SIZE."""
    threads: int = 1
    """CPU threads of one rank."""
    init: str | None = None
    """Phase, run folder or checkpoint whose weights the run starts from; null starts at random."""
    tune: Tune = "full"
    """What is trained: everything, GLIP's linear probe (box, centerness and alignment heads), the
    table of a fixed prompt (needs model.prompt_rows and data.fixed_prompts), or one head alone."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that stay as they are, whatever is tuned."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """In bf16, 1 costs the host no more than 0 and keeps a share of the optimiser's state; in fp32,
    0 is the fastest. 3 works several times as much for every tensor (infra/benchmarks/cpu.md)."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What lives in the host's memory instead of the GPU's: the optimiser's state and its step
    (ZeRO 1 to 3), and the weights too (ZeRO 3)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and activations in the passes; gradients are reduced, and master weights and
    moments kept, in fp32. fp16 scales the loss, leaves out steps that overflow, and needs a GPU."""
    compile: bool = False
    """Whether torch.compile fuses the model: minutes at every start, then faster steps."""
    learning_rate: float = 1e-4
    text_learning_rate: float = 1e-5
    """Of the text encoder; the BERT layers of the fusion tower use `learning_rate` (facts G.1)."""
    head_learning_rate: float = 1e-4
    """Of everything after the two encoders and the pyramid."""
    rate_factors: dict[str, float] = field(default_factory=dict)
    """Beginning of parameters' names -> what their rate is multiplied by."""
    bias_rate_factor: float = 1.0
    """Biases, relative position tables included, learn at this many times their rate (GLIP: 2)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decayed: Literal["matrices", "all_but_biases"] = "matrices"
    """What weight decay reaches: all of two and more dimensions, or all that is no bias, norms and
    scales included (GLIP)."""
    weight_decay_milestones: tuple[float, ...] = ()
    """Shares of the run at which weight decay falls to a tenth (GLIP-L: 0.667 x `milestones`)."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 switches clipping off."""
    ema_decay: float = 0.0
    """EMA of the weights, kept beside them (GLIP-T: 0.999); checkpoints' model files hold it. 0
    keeps none."""
    warmup_steps: int = 2000
    warmup_factor: float | None = None
    """Share of the rate in the first step, from which it rises linearly (GLIP: 0.001); null begins
    at 1 / warmup_steps."""
    schedule: Literal["steps", "cosine"] = "steps"
    """After the warm-up: x 0.1 at each of the milestones, or flat and then a cosine to zero."""
    milestones: tuple[float, ...] = (0.67, 0.89)
    """steps: shares of the run."""
    flat_share: float = 0.4
    """cosine: share of the run at the full rate."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    """Committed checkpoints that are kept; older ones are deleted."""

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch", "accumulation", "processes", "threads",
                    "checkpoint_every", "learning_rate", "text_learning_rate",
                    "head_learning_rate", "bias_rate_factor", "eps"):  # fmt: skip
            require(0 < getattr(self, key) < math.inf, f"train.{key}", "positive, and finite",
                    getattr(self, key))  # fmt: skip
        for name, factor in self.rate_factors.items():
            require(factor > 0, f"train.rate_factors.{name}", "positive", factor)
        for key in ("weight_decay", "max_grad_norm", "warmup_steps"):
            require(0 <= getattr(self, key) < math.inf, f"train.{key}", "0 or more, and finite",
                    getattr(self, key))  # fmt: skip
        for key in ("milestones", "weight_decay_milestones"):
            shares = getattr(self, key)
            require(all(0 < share < 1 for share in shares) and list(shares) == sorted(shares),
                    f"train.{key}", "rising shares of the run, each in (0, 1)", shares)  # fmt: skip
        require(self.warmup_factor is None or 0 <= self.warmup_factor <= 1, "train.warmup_factor",
                "in [0, 1] or null", self.warmup_factor)  # fmt: skip
        require(0 <= self.ema_decay < 1, "train.ema_decay", "in [0, 1)", self.ema_decay)
        least = {"none": 0, "optimizer": 1, "optimizer_and_parameters": 3}[self.offload]
        require(self.zero_stage >= least, "train.zero_stage",
                f"{least} or more with train.offload={self.offload}", self.zero_stage)  # fmt: skip
        require(self.keep_checkpoints > 0, "train.keep_checkpoints", "1 or more",
                 self.keep_checkpoints)  # fmt: skip
        require(0 <= self.flat_share <= 1, "train.flat_share", "in [0, 1]", self.flat_share)

    def micro_batch(self, world_size: int) -> int:
        """Images of one rank's micro-batch; ConfigError if the batch does not divide."""
        shares = world_size * self.accumulation
        if self.global_batch % shares:
            raise ConfigError(
                f"train.global_batch ({self.global_batch}) must be a multiple of {shares}, the "
                f"number of ranks ({world_size}) times train.accumulation ({self.accumulation})"
            )
        return self.global_batch // shares


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig:
    """What happens when ranks die, hang or are told to stop; a run may be resumed with any of it.

    Seconds are bounds on what takes its usual time: a hang is noticed when one is passed.
    """

    max_restarts: int = 3
    """How often dead or hung ranks are started again without a newer checkpoint in between."""
    setup_seconds: float = 1800.0
    """From a rank's start to the end of its first step: weights, torch.compile, other hosts."""
    data_seconds: float = 900.0
    """Waiting for a batch; an object store that fails is waited for this long at most."""
    step_seconds: float = 900.0
    save_seconds: float = 1800.0
    grace_seconds: float = 120.0
    """From a signal to stop until ranks that have not saved by then are killed."""
    straggler_every: int = 100
    """Steps between two looks at which rank the others wait for; 0 never looks."""
    straggler_ratio: float = 1.5
    """A rank is reported when its own part of a step takes this many times the median's."""
    max_left_out: int = 5
    """Of the last 100 steps so many may be left out because their loss or gradient is not finite;
    one more ends the run."""
    spike_factor: float = 0.0
    """A loss above this many times the median of the last 100 is a spike: the run goes back and
    leaves out batches. 0 never goes back."""
    spike_back: int = 100
    """Steps before the spike from which batches are left out, and to which it goes back."""
    spike_skip: int = 200
    """Global batches that are left out."""
    max_rollbacks: int = 3
    """Spikes after which a run goes back; one more ends it."""
    min_processes: int = 0
    """On a Ray cluster: the run goes on with as few ranks as this when nodes are lost (of numbers
    that share batch and lanes equally), and grows to train.processes when they are back; 0 always
    wants train.processes."""
    gpus_per_process: float = 0.0
    """On a Ray cluster; train.threads says how many CPUs."""

    def __post_init__(self) -> None:
        for key in ("max_restarts", "straggler_every", "min_processes", "gpus_per_process",
                    "grace_seconds", "max_left_out", "spike_back", "spike_skip",
                    "max_rollbacks"):  # fmt: skip
            require(getattr(self, key) >= 0, f"supervise.{key}", "0 or more", getattr(self, key))
        for key in ("setup_seconds", "data_seconds", "step_seconds", "save_seconds"):
            seconds = getattr(self, key)
            require(0 < seconds <= LONGEST_SECTION, f"supervise.{key}",
                    f"positive and at most {LONGEST_SECTION:.0f}", seconds)  # fmt: skip
        require(self.spike_factor == 0 or self.spike_factor > 1, "supervise.spike_factor",
                "0 or above 1", self.spike_factor)  # fmt: skip
        require(self.straggler_ratio > 1, "supervise.straggler_ratio", "above 1",
                self.straggler_ratio)  # fmt: skip


LONGEST_SECTION = 7200.0
"""Seconds; collectives wait longer, so that a hang ends with stacks and not with their error."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where figures of a pretraining go, beside RUN/losses.jsonl and RUN/metrics.jsonl."""

    every: int = 10
    """Steps between two lines of metrics.jsonl and two points of what follows."""
    samples: bool = False
    """RUN/samples.jsonl: the keys of the samples that each step was made of, of all ranks."""
    tensorboard: bool = True
    """Event files in RUN/tensorboard."""
    wandb: str = ""
    """Project of Weights & Biases (package wandb); empty for none."""
    mlflow: str = ""
    """URI of MLflow's server or database (package mlflow); empty for none."""
    peak_tflops: float = 0.0
    """10^12 operations a second that a device can do, for the share of it that is used; 0 looks up
    common GPUs."""

    def __post_init__(self) -> None:
        require(self.every > 0, "log.every", "positive", self.every)
        require(self.peak_tflops >= 0, "log.peak_tflops", "0 or more", self.peak_tflops)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Where the time of a step goes: RUN/profile gets a Chrome trace and a table of rank 0."""

    steps: int = 0
    """Steps that are recorded, after `skip` others; 0 records none."""
    skip: int = 3

    def __post_init__(self) -> None:
        for key in ("steps", "skip"):
            require(getattr(self, key) >= 0, f"profile.{key}", "0 or more", getattr(self, key))


TUNED_PARTS: dict[Tune, str | None] = {
    "full": None,
    "linear_probe": None,
    "prompt": "prompt_rows",
    "mask_head": "masks",
    "answer_head": "answers",
    "caption_head": "captions",
}
"""What must be set in `model` for each kind of tuning."""
