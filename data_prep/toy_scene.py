"""What can stand in a toy scene: coloured shapes, their words, and how a scene is drawn by lot.

6 shapes x 6 colours are the 36 categories ("red square"). 15 combinations never appear in the
gold sets, though each of their words does; two further words (`teal`, `star`) appear in no gold set
at all. Texture and size are attributes that captions may mention.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Group = Literal["seen", "unseen", "novel_word"]

SHAPES = ("circle", "cross", "diamond", "ring", "square", "triangle")
COLOURS = ("blue", "green", "orange", "purple", "red", "yellow")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
NOVEL_SHAPE = "star"
NOVEL_COLOUR = "teal"

HELD_OUT = (  # every shape and every colour is held out two or three times
    ("blue", "circle"),
    ("blue", "cross"),
    ("blue", "ring"),
    ("green", "cross"),
    ("green", "diamond"),
    ("orange", "diamond"),
    ("orange", "ring"),
    ("orange", "triangle"),
    ("purple", "ring"),
    ("purple", "square"),
    ("red", "cross"),
    ("red", "square"),
    ("red", "triangle"),
    ("yellow", "circle"),
    ("yellow", "triangle"),
)
SEEN = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
NOVEL = tuple((c, NOVEL_SHAPE) for c in COLOURS) + tuple((NOVEL_COLOUR, s) for s in SHAPES)

SEEN_NAMES = tuple(f"{colour} {shape}" for colour, shape in SEEN)
UNSEEN_NAMES = tuple(f"{colour} {shape}" for colour, shape in HELD_OUT)
NOVEL_NAMES = tuple(f"{colour} {shape}" for colour, shape in NOVEL)

DIAMETERS = {  # share of the image side
    False: {"small": (0.20, 0.25), "large": (0.32, 0.40)},
    True: {"small": (0.13, 0.17), "large": (0.32, 0.40)},
}
COPY_SHARE = 0.12


def group_of(name: str) -> Group:
    """Which part of the world a category name belongs to."""
    if name in UNSEEN_NAMES:
        return "unseen"
    return "novel_word" if name in NOVEL_NAMES else "seen"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object to draw and to name."""

    colour: str
    shape: str
    texture: str
    size: str
    diameter: float
    """Share of the image side."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def look(self) -> tuple[str, str, str, str]:
        return self.colour, self.shape, self.texture, self.size


@dataclass(frozen=True, kw_only=True)
class SceneRule:
    """How often what is drawn by lot."""

    unseen_share: float = 0.0
    """Share of objects from the held-out combinations."""
    novel_share: float = 0.0
    """Share of scenes with one object whose colour or shape word is in no gold set."""
    hard: bool = False


def draw_things(rule: SceneRule, rng: np.random.Generator) -> list[Thing]:
    """The objects of one scene, 1 to 4 (hard: 5).

    Two objects of one category always look alike, so that a plural names both without ambiguity.
    """
    wanted = int(rng.integers(1, 6 if rule.hard else 5))
    novel_at = int(rng.integers(wanted)) if rng.random() < rule.novel_share else -1
    things: list[Thing] = []
    for number in range(wanted):
        if things and number != novel_at and rng.random() < COPY_SHARE:
            colour, shape, texture, size = things[int(rng.integers(len(things)))].look
        else:
            colour, shape = _draw_combination(rule, number == novel_at, things, rng)
            texture = TEXTURES[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
            size = SIZES[int(rng.integers(2))]
        low, high = DIAMETERS[rule.hard][size]
        diameter = float(rng.uniform(low, high))
        things.append(
            Thing(colour=colour, shape=shape, texture=texture, size=size, diameter=diameter)
        )
    return things


def _draw_combination(
    rule: SceneRule, novel: bool, things: list[Thing], rng: np.random.Generator
) -> tuple[str, str]:
    """A colour and shape that is not in the scene yet."""
    taken = {(thing.colour, thing.shape) for thing in things}
    while True:
        known = HELD_OUT if rng.random() < rule.unseen_share else SEEN
        pool = NOVEL if novel else known
        combination = pool[int(rng.integers(len(pool)))]
        if combination not in taken:
            return combination
