"""Quality filters: what a document must look like to be kept. Pure functions of its text, in no language in particular.

Each measures one figure and names the limit it is compared with, so `min-characters=200` is a whole filter. The
measures of repetition follow Rae et al. 2021 (Gopher), table A1, on bytes in place of words, which not all writing
divides by spaces. Read next: `duplicates.py`, which drops what was there before.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxscale.data.errors import DataError
from jaxscale.data.shingles import byte_windows

Measure = Callable[[str], float]
_OTHER, _DIGIT = re.compile(r"[^\w\s]|_"), re.compile(r"\d")
_CHOSEN = np.uint64(3)
_ASCII_SYMBOLS = bytes(code for code in range(128) if _OTHER.match(chr(code)))


def characters(text: str) -> float:
    """How many, without space at both ends."""
    return len(text.strip())


def symbol_share(text: str) -> float:
    """Share of punctuation and symbols in all characters but space."""
    data = text.encode()
    symbols = len(data) - len(data.translate(None, _ASCII_SYMBOLS))
    if not text.isascii():  # what is left of the others are also marks of a script, which are none
        symbols += sum(unicodedata.category(one)[0] in "PS" for one in _OTHER.findall(text) if not one.isascii())
    return symbols / max(_characters_but_space(text), 1)


def digit_share(text: str) -> float:
    """Share of decimal digits in all characters but space."""
    return len(_DIGIT.findall(text)) / max(_characters_but_space(text), 1)


def repeated_lines(text: str) -> float:
    """Share of lines with text that stood further up already."""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def repeated_text(text: str) -> float:
    """Share of the runs of 32 bytes that stood further up already, of the quarter of them that their hash chooses."""
    windows = byte_windows(np.frombuffer(text.encode(), np.uint8), 32)
    windows = windows[windows & _CHOSEN == 0]
    return 1 - len(np.unique(windows)) / len(windows) if len(windows) else 0.0


def longest_line(text: str) -> float:
    """Characters of the longest line."""
    return max(map(len, text.splitlines()), default=0)


def _characters_but_space(text: str) -> int:
    return len("".join(text.split()))


MEASURES: Mapping[str, Measure] = {
    "characters": characters,
    "symbol-share": symbol_share,
    "digit-share": digit_share,
    "repeated-lines": repeated_lines,
    "repeated-text": repeated_text,
    "longest-line": longest_line,
}


@dataclass(frozen=True)
class Filter:
    """Drops documents whose measure lies beyond a limit."""

    measure: str
    limit: float
    is_least: bool
    """The limit is the least that is kept, else the most."""

    @property
    def name(self) -> str:
        """As it is written: `max-symbol-share=0.3`."""
        return f"{'min' if self.is_least else 'max'}-{self.measure}={repr(self.limit).removesuffix('.0')}"

    def keeps(self, text: str) -> bool:
        value = MEASURES[self.measure](text)
        return value >= self.limit if self.is_least else value <= self.limit


def parse_filters(words: Iterable[str]) -> tuple[Filter, ...]:
    """`min-characters=200` and the like. Raises DataError for what is no filter."""
    return tuple(map(_parse, words))


def _parse(word: str) -> Filter:
    name, _, value = word.partition("=")
    which, _, measure = name.partition("-")
    try:
        limit = float(value)
    except ValueError:
        limit = float("nan")
    if which not in ("min", "max") or measure not in MEASURES or not 0 <= limit < float("inf"):
        raise DataError(
            f"{word!r} is no filter; write min- or max-, what is measured, = and a number: max-symbol-share=0.3. "
            f"Measured are {', '.join(MEASURES)}"
        )
    return Filter(measure, limit, which == "min")


def first_refusal(text: str, filters: Iterable[Filter]) -> str:
    """Name of the first filter that drops the text; empty: it is kept."""
    return next((one.name for one in filters if not one.keeps(text)), "")
