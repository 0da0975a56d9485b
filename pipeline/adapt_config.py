"""How a model is tuned to new detection sets, with few examples or all: the section `adapt`."""

from dataclasses import dataclass, field

from glipv2.pipeline.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class AdaptSetConfig:
    train: str
    """Shard set (name under data.root, or URL) to tune on, or to draw examples from."""
    suite: str
    """Of eval.suites: what tuned models are scored on."""
    val: str = ""
    """Of eval.suites: the kept checkpoint that is best on it is the one that is scored. Empty takes
    the last."""
    splits: str = ""
    """Shard sets of published splits, such as data/dice_shot{shots}_seed{seed}. Empty draws them
    from `train`."""

    def __post_init__(self) -> None:
        if self.splits and not all(part in self.splits for part in ("{shots}", "{seed}")):
            raise ConfigError("adapt.sets.*.splits must have {shots} and {seed} in it")

    def split(self, shots: int, seed: int) -> str:
        return self.splits.replace("{shots}", str(shots)).replace("{seed}", str(seed))


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Every way of tuning x every number of shots x every seed, on every set."""

    sets: dict[str, AdaptSetConfig] = field(default_factory=dict)
    ways: tuple[str, ...] = ()
    """Phases of the recipe, such as full, linear_probe and prompt; empty: all of them."""
    shots: tuple[int, ...] = (1, 3, 5, 10, 0)
    """Examples that every category has at least; 0 takes the whole set."""
    seeds: tuple[int, ...] = (3, 30, 300)
    """Each draws its own examples; figures are mean and standard deviation over them."""
    epochs: float = 0.0
    """Passes over the images that are tuned on, where those are more than train.steps."""
    num_tasks: int = 1
    """Models that are tuned at the same time."""
    gpus_per_task: float = 0.0
    cpus_per_task: float = 1.0

    def __post_init__(self) -> None:
        for key in ("shots", "seeds"):
            values = getattr(self, key)
            right = len(set(values)) == len(values) > 0 and min(values) >= 0
            require(right, f"adapt.{key}", "different numbers, 0 or more", values)
        for key in ("epochs", "gpus_per_task"):
            require(getattr(self, key) >= 0, f"adapt.{key}", "0 or more", getattr(self, key))
        require(self.cpus_per_task > 0, "adapt.cpus_per_task", "positive", self.cpus_per_task)
        require(self.num_tasks > 0, "adapt.num_tasks", "positive", self.num_tasks)
