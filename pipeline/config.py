"""Every section of a run's configuration; `config_loader` turns recipes into it.

A recipe holds only what differs from these defaults. Precedence, lowest first: the defaults here
(and the model preset), the recipe, the chosen phase of the recipe, `section.key=value` overrides.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from glipv2.model.config import LossWeights, ModelConfig
from glipv2.pipeline.adapt_config import AdaptConfig
from glipv2.pipeline.errors import require
from glipv2.pipeline.eval_config import EvalConfig, ScheduleConfig
from glipv2.pipeline.train_config import (
    TUNED_PARTS,
    LogConfig,
    ProfileConfig,
    SuperviseConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What of a source is left out though it could be read. Every rule is off by default."""

    exclude: tuple[str, ...] = ()
    """Shard sets, above all those of evaluation: images that look like one of theirs are dropped,
    whatever their file is called."""
    duplicates: bool = False
    """Drop repeated samples: equal image and text, or another file that looks the same."""
    look_distance: int = 3
    """Bits of the 64-bit perceptual hash in which images that "look the same" may differ; 0 wants
    equal hashes. Strongly flipped or cropped copies are not found."""
    min_side: int = 0
    """Pixels of the shorter side."""
    max_aspect: float = 0.0
    """Longer side over shorter side; 0 allows any."""
    min_words: int = 0
    max_words: int = 0
    """Words of the caption; 0 allows any number."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes, such as en: captions that are surely in another language are dropped."""

    def __post_init__(self) -> None:
        require(0 <= self.look_distance <= 7, "clean.look_distance", "between 0 and 7",
                 self.look_distance)  # fmt: skip
        require(self.max_aspect == 0 or self.max_aspect >= 1, "clean.max_aspect",
                 "0 or at least 1", self.max_aspect)  # fmt: skip
        for key in ("min_side", "min_words", "max_words"):
            require(getattr(self, key) >= 0, f"clean.{key}", "0 or more", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How one shard set of the run is made; the same options as `glipv2 prepare`."""

    source: Literal["toy", "coco", "lvis", "voc", "yolo", "glip-tsv", "visual-genome", "mdetr",
                    "flickr30k-entities", "refcoco", "phrasecut", "vqav2", "coco-captions",
                    "pairs", "webdataset"]  # fmt: skip
    set: str = ""
    """toy: which of its sets."""
    count: int = 0
    """toy: number of images."""
    size: int = 128
    """toy: side of the images in pixels."""
    hard: bool = False
    """toy: the harder world (more and smaller objects, coloured background)."""
    seed: int = 0
    annotations: tuple[str, ...] = ()
    """Annotation files, or the folder of XML files (voc)."""
    images: tuple[str, ...] = ()
    """Folders of images; an image is taken from the first that has it."""
    root: str = ""
    """Folder of a source that comes as one."""
    list: str = ""
    """voc, flickr30k-entities: text file with one image name per line; empty takes every image."""
    split: str = ""
    """Part of the data to take, where a source names its splits in its files."""
    min_count: int = 1
    """visual-genome: objects that a name needs in the file to be a category."""
    caption_field: str = ""
    """pairs, webdataset: field that holds the text; empty looks for the usual ones."""

    clean: CleanConfig = field(default_factory=CleanConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        require(self.min_count >= 1, "min_count", "1 or more", self.min_count)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str = ""
    """Folder URL of the run's shard sets; empty means RUN_DIR/data."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Shard set (name under `root`, or a full URL) -> share of the samples."""
    short_sides: tuple[int, ...] = (480, 560, 640, 720, 800)
    """Training draws the short side of each image from these (pixels)."""
    long_side: int = 1333
    pad_to: tuple[int, int] | None = None
    """(height, width) that every batch is padded to; null pads to the largest image of a rank."""
    flip: float = 0.5
    """Probability of a horizontal flip; never when the text says left or right."""
    crop: float = 0.0
    """Probability of a random crop. What it cuts to less than half is neither learned nor a
    negative."""
    crop_least: float = 0.5
    """Smallest share of each side that a crop keeps."""
    max_negatives: int = 85
    """Categories absent from the image that a detection prompt may hold (GLIP: 85)."""
    full_negatives_share: float = 0.5
    """Share of prompts with as many negatives as allowed; the others draw a uniform number."""
    fixed_prompts: bool = False
    """Detection prompts hold all categories of their set in its order, nothing drawn or shuffled:
    for tuning on one set, and what a tuned prompt needs."""
    caption_packing: float = 0.0
    """Probability that a caption with a model's boxes (scores below 1) is packed between captions
    of other images (GLIP: 0.6)."""
    max_packed_captions: int = 19
    pack_gold_captions: bool = False
    """Whether captions whose boxes people drew are packed too; GLIP's are not."""
    mlm_probability: float = 0.15
    lanes: int | None = None
    """Independent reading positions; null takes the largest divisor of the global batch <= 64."""
    unit_samples: int = 256
    """Samples of one ranged read."""
    window_units: int = 2
    """Units that are shuffled together."""
    group_by_aspect: bool = False
    """Make batches of pictures that are all taller than wide, or all not: less padding."""
    cache: str = ""
    """Local folder that keeps what was read from an object store; empty reads it every epoch."""
    cache_gb: float = 100.0
    """Size that the cache may have, in 10^9 bytes; what was not used for longest goes first."""
    vocabulary: str = ""
    """File of `glipv2 prepare vocabulary`: which categories of different sets are the same. Empty
    takes equal names for equal categories, and nothing else."""
    workers: int = 0
    """Loader processes per rank; 0 loads in the training process. Never changes the batches."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the samples read had to be skipped."""

    def __post_init__(self) -> None:
        require(bool(self.short_sides), "data.short_sides", "a list of sizes", self.short_sides)
        require(self.long_side >= max(self.short_sides), "data.long_side",
                 "at least the largest of data.short_sides", self.long_side)  # fmt: skip
        for name, weight in self.mixture.items():
            require(weight > 0, f"data.mixture.{name}", "positive", weight)
        for key in ("flip", "crop", "full_negatives_share", "caption_packing", "mlm_probability"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"data.{key}", "between 0 and 1", value)
        require(0 < self.crop_least <= 1, "data.crop_least", "in (0, 1]", self.crop_least)
        require(self.unit_samples > 0, "data.unit_samples", "positive", self.unit_samples)
        require(self.window_units > 0, "data.window_units", "positive", self.window_units)
        require(self.cache_gb > 0, "data.cache_gb", "positive", self.cache_gb)
        require(self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True, kw_only=True)
class PhraseConfig:
    """Which phrases of a caption the teacher looks for."""

    parser: str = "lexicon"
    """Ours, which needs nothing; or spacy:MODEL, an installed English model or its folder, such as
    spacy:en_core_web_sm, which is slower."""
    stop: tuple[str, ...] = ()
    """Words that a phrase must not end in, beside what nobody can see: "stock photo" leaves out
    "a nice stock photo" as well."""
    max_words: int = 6
    """A longer phrase keeps its last words, where the thing is named."""
    min_length: int = 2
    """Characters of the last word."""
    digits: bool = False
    """Keep phrases with digits in them: IMG20, size 12x4."""
    unseen: bool = False
    """Keep phrases for what nobody can draw a box around: the left side, night, a photo."""

    def __post_init__(self) -> None:
        kind, _, model = self.parser.partition(":")
        known = self.parser == "lexicon" or (kind == "spacy" and model != "")
        require(known, "label.phrases.parser", "lexicon or spacy:MODEL", self.parser)
        said = all(text.strip() for text in self.stop)
        require(said, "label.phrases.stop", "a list of words", self.stop)
        for key in ("max_words", "min_length"):
            value = getattr(self, key)
            require(value > 0, f"label.phrases.{key}", "positive", value)


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Which pairs a teacher labels, and which of its boxes are kept."""

    teacher: str = ""
    """Phase, run folder or checkpoint; or hf:FOLDER or hf:HUB/NAME, a transformers detector."""
    ensemble: tuple[str, ...] = ()
    """More teachers, whose boxes are fused with the teacher's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the teacher's arithmetic; the halves are for GPUs."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Shard set of pairs -> shard set of labelled pairs (names under data.root, or URLs)."""
    calibration: str = ""
    """Gold shard set on which the score threshold is chosen, whatever `score_threshold` says; empty
    uses that."""
    target_precision: float = 0.9
    """With `calibration`: the lowest threshold that reaches this precision there."""
    score_threshold: float = 0.5
    max_boxes: int = 20
    """Boxes kept per image, best first."""
    cross_phrase_nms: float = 0.6
    """Of boxes that overlap more than this only the best stays, across phrases; 1 keeps all."""
    keep_empty: bool = False
    """Whether images without a box are kept: their captions then serve as negatives of others."""
    num_actors: tuple[int, int] = (1, 2)
    """Workers that are asked for at once, and the most there may be while shards wait."""
    gpus_per_actor: float = 0.0
    cpus_per_actor: float = 1.0
    decode_threads: int = 2
    """Of each worker, which read images and captions ahead of the teacher."""
    batch_size: int = 8
    window: int = 128
    """Pairs that are sorted by text length, and that the teacher makes batches of one size of."""
    phrases: PhraseConfig = field(default_factory=PhraseConfig)

    def __post_init__(self) -> None:
        for key in ("max_boxes", "batch_size", "decode_threads", "window"):
            require(getattr(self, key) > 0, f"label.{key}", "positive", getattr(self, key))
        least, most = self.num_actors
        require(0 < least <= most, "label.num_actors", "[least, most], 0 < least <= most",
                 self.num_actors)  # fmt: skip
        require(0 < self.target_precision <= 1, "label.target_precision", "in (0, 1]",
                 self.target_precision)  # fmt: skip
        for key in ("score_threshold", "cross_phrase_nms"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"label.{key}", "between 0 and 1", value)
        require(self.gpus_per_actor >= 0, "label.gpus_per_actor", "0 or more", self.gpus_per_actor)
        require(self.cpus_per_actor > 0, "label.cpus_per_actor", "positive", self.cpus_per_actor)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run_dir: str
    """Folder of everything the run writes."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    losses: LossWeights = field(default_factory=LossWeights)
    prepare: dict[str, PrepareConfig] = field(default_factory=dict)
    """Shard set name -> how `glipv2 run` makes it under data.root."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named sets of overrides, such as teacher and student; a phase writes to RUN_DIR/PHASE."""
    rounds: int = 1
    """How often `glipv2 run` labels and trains a student, each the next one's teacher; it stops
    early when labels on the gold set get no better, unless with `all_rounds`."""
    all_rounds: bool = False

    def __post_init__(self) -> None:
        require(self.rounds > 0, "rounds", "positive", self.rounds)
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        least = self.supervise.min_processes
        require(least <= self.train.processes, "supervise.min_processes",
                "at most train.processes", least)  # fmt: skip
        part = TUNED_PARTS[self.train.tune]
        if part is not None:
            value = getattr(self.model, part)
            require(bool(value), f"model.{part}", f"set for train.tune={self.train.tune}", value)

    @property
    def data_root(self) -> str:
        return self.data.root or f"{self.run_dir}/data"

    def set_url(self, name: str) -> str:
        """Where the shard set `name` is: under data.root, unless it is a URL or a path."""
        return name if "/" in name else f"{self.data_root}/{name}"

    def run_url(self, name: str) -> str:
        """Where the run `name` is: a phase of this run folder, unless it is a URL, a path or a
        teacher of transformers."""
        return name if "/" in name or name.startswith("hf:") else f"{self.run_dir}/{name}"
