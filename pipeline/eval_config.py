"""How checkpoints are scored, and when: the sections `eval` and `schedule` of a configuration."""

import re
from dataclasses import dataclass, field
from typing import Literal

from glipv2.pipeline.cron import Cron
from glipv2.pipeline.errors import ConfigError, require

EvalTask = Literal["detection", "lvis", "phrases", "referring", "segmentation", "vqa", "captioning"]
SUITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Suites name files, and their metrics are told apart by a dot."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What stands in the prompt for a category: "prefix name suffix", of which the name is looked
    for (facts D.6)."""

    prefix: str = ""
    name: str = ""
    """Empty: the category's own."""
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """One protocol on one shard set, or on several whose figures are averaged."""

    set: str = ""
    """Shard set (name under data.root, or URL)."""
    sets: dict[str, str] = field(default_factory=dict)
    """Instead of `set`: name -> shard set."""
    task: EvalTask = "detection"
    """detection: COCO AP. lvis: fixed and classic AP of a set of source lvis. phrases: Flickr30k
    recall, any-box and merged-box. referring: accuracy of the best box (RefCOCO). segmentation:
    IoU of the masks of an expression (PhraseCut). vqa: soft accuracy. captioning: BLEU, ROUGE-L and
    CIDEr."""
    odinw: Literal[0, 13, 35] = 0
    """detection: `set` is a folder with the shard sets of ODinW-13 or -35, by their names."""
    odinw_prompts: bool = False
    """With the prompts that GLIP gives for some of them (facts D.6), not their categories alone."""
    prompts: dict[str, PromptConfig] = field(default_factory=dict)
    """detection, lvis: category -> what stands for it in the prompt. Where one has a prefix or a
    suffix, all categories go into one prompt, of which 100 boxes are kept."""
    ask: Literal["all", "shown"] = "all"
    """detection: prompt every image with all categories of the set, or with those it shows."""
    chunk_size: int = 0
    """Categories per prompt, which decides the figures (GLIP: 40 for LVIS); 0 puts as many into one
    as fit."""
    max_boxes: int | None = None
    """Boxes kept of an image; 0 keeps all of all prompts. null: 100, and for lvis all, as fixed AP
    wants it."""
    max_boxes_per_prompt: int | None = None
    """Boxes kept of each prompt about an image. null: 100, for lvis 300, as GLIP has it."""
    masks: bool = False
    """detection, lvis: score masks as well."""
    mask_score: float = 0.5
    """segmentation: masks from this score on are what an expression names."""
    beams: int = 5
    """captioning: width of the search."""
    java: bool = False
    """captioning: METEOR and SPICE too, which need Java and pycocoevalcap."""
    annotations: str = ""
    """vqa: VQAv2's annotation file, for the accuracy of each kind of question."""
    limit: int = 0
    """Only the first images of each set; 0 takes all."""

    def __post_init__(self) -> None:
        if bool(self.set) == bool(self.sets):
            raise ConfigError("a suite of eval.suites needs `set` or `sets`, one of them")
        for key in ("chunk_size", "max_boxes", "limit"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"eval.suites.*.{key}", "0 or more", value)
        for key in ("max_boxes_per_prompt", "beams"):
            value = getattr(self, key)
            require(value is None or value > 0, f"eval.suites.*.{key}", "positive", value)
        require(0 <= self.mask_score <= 1, "eval.suites.*.mask_score", "between 0 and 1",
                 self.mask_score)  # fmt: skip
        if self.odinw and (self.task != "detection" or self.sets or self.prompts):
            raise ConfigError(
                "a suite with `odinw` is of task detection, with a `set`, the folder of them all, "
                "and without prompts of its own"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a checkpoint is scored on."""

    suites: dict[str, SuiteConfig] = field(default_factory=dict)
    """Name -> what `glipv2 evaluate` and `glipv2 schedule` score checkpoints on."""
    detection: str = ""
    """The main job's shard set with categories and captions (the toy validation set)."""
    real_detection: str = ""
    """The main job's shard set with categories only (BCCD held out)."""
    label_truth: dict[str, str] = field(default_factory=dict)
    """Labelled shard set -> shard set with the truth of its pairs (same keys)."""
    chunk_size: int = 18
    """Categories per prompt of the main job's "chunked" protocol."""
    curve_images: int = 64
    """Images of `detection` that earlier checkpoints are scored on, for the curve over steps."""
    num_actors: int = 2
    gpus_per_actor: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model's arithmetic; the halves are for GPUs."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        for key in ("chunk_size", "curve_images", "num_actors", "batch_size"):
            require(getattr(self, key) > 0, f"eval.{key}", "positive", getattr(self, key))
        for name in self.suites:
            require(bool(SUITE_NAME.fullmatch(name)), "eval.suites",
                    "names of letters, digits, _ and -", name)  # fmt: skip

    def suite(self, name: str) -> SuiteConfig:
        """ConfigError if there is none of that name."""
        if name not in self.suites:
            known = ", ".join(self.suites) or "none"
            raise ConfigError(f"eval.suites has no {name!r}; it has: {known}")
        return self.suites[name]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which checkpoints `glipv2 schedule` has scored, when, and what it does about the figures."""

    runs: tuple[str, ...] = ()
    """Run folders, anywhere; empty: this recipe's run, or its phases."""
    suites: tuple[str, ...] = ()
    """Of eval.suites; empty: all of them."""
    every_steps: int = 0
    """Only steps that this number divides; 0 takes every step that was committed."""
    cron: str = ""
    """"minute hour day month weekday" in UTC: only the step (of `every_steps`) that is newest at
    these times; empty takes each as soon as it is committed."""
    until_step: int = 0
    """End when this step of every run was dealt with; 0 goes on until told to stop."""
    poll_seconds: float = 30.0
    """Between two looks for checkpoints."""
    attempts: int = 3
    """Of scoring a checkpoint on a suite, before it is given up and reported."""
    retry_seconds: float = 60.0
    """Before the second attempt; twice as long before each one after it."""
    attempt_seconds: float = 86400.0
    """An attempt that takes longer hangs: it is counted as failed, and the scheduler ends with code
    70, to be started again; 0 waits for ever."""
    claim_seconds: float = 120.0
    """A scheduler elsewhere that gave no sign of life for so long is taken for dead."""
    best: tuple[str, ...] = ()
    """SUITE.METRIC whose best step is kept from being pruned; empty: the first of every suite."""
    alert_drop: float = 0.0
    """A fall of one of these metrics by more than this, from one scored step to the next, is
    reported; 0 reports none. Metrics are in [0, 1], CIDEr is about 10 times as large."""
    webhook: str = ""
    """http(s) URL that reports are sent to as JSON, or $NAME of an environment variable with it."""

    def __post_init__(self) -> None:
        for key in ("every_steps", "until_step", "retry_seconds", "alert_drop", "attempt_seconds"):
            value = getattr(self, key)
            require(value >= 0, f"schedule.{key}", "0 or more", value)
        for key in ("poll_seconds", "attempts", "claim_seconds"):
            value = getattr(self, key)
            require(value > 0, f"schedule.{key}", "positive", value)
        known = self.webhook == "" or self.webhook.startswith(("$", "http://", "https://"))
        require(known, "schedule.webhook", "a URL of http or https, or $NAME", "something else")
        if self.cron:
            Cron(self.cron)
