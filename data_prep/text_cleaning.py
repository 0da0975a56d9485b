"""Make text from strangers safe to store, show and tokenise."""

import unicodedata

DROPPED = ("Cc", "Cf", "Cs", "Co", "Cn")
"""Unicode categories without a glyph: controls, format marks, lone surrogates, private, unused."""
KEPT = "\u200d\u200c"
"""Joiners that emoji and several scripts need."""


def clean_text(text: str) -> str:
    """One line without control characters, runs of white space made one blank."""
    letters = []
    for letter in text:
        if letter.isspace():
            letters.append(" ")
        elif letter in KEPT or unicodedata.category(letter) not in DROPPED:
            letters.append(letter)
    return " ".join("".join(letters).split())


def cut_text(text: str, longest: int) -> str:
    """At most `longest` characters, cut at a blank where one is near."""
    if len(text) <= longest:
        return text
    cut = text[:longest]
    blank = cut.rfind(" ")
    return cut[:blank] if blank > longest // 2 else cut


def has_letters(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
