"""Make text from strangers safe to store, show and tokenise."""

import unicodedata

DROPPED = ("Cc", "Cf", "Cs", "Co", "Cn")
"""Unicode categories without a glyph: controls, format marks, lone surrogates, private, unused."""
KEPT = "\u200d\u200c"
"""Joiners that emoji and several scripts need."""


def clean_text(text: str) -> str:
    """One line without control characters, runs of white space made one blank."""
    return clean_with_places(text)[0]


def clean_with_places(text: str) -> tuple[str, list[int]]:
    """`clean_text` of it, and where each of its characters, and its end, went there.

    A character that is gone points to the next one left, which may be the end.
    """
    letters: list[str] = []
    places = []
    for letter in text:
        places.append(len(letters))
        if letter.isspace():
            if letters and letters[-1] != " ":
                letters.append(" ")
        elif letter in KEPT or unicodedata.category(letter) not in DROPPED:
            letters.append(letter)
    cleaned = "".join(letters).rstrip(" ")
    return cleaned, [min(place, len(cleaned)) for place in [*places, len(letters)]]


def cut_text(text: str, longest: int) -> str:
    """At most `longest` characters, cut at a blank where one is near."""
    if len(text) <= longest:
        return text
    cut = text[:longest]
    blank = cut.rfind(" ")
    return cut[:blank] if blank > longest // 2 else cut


def has_letters(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
