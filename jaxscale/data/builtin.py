"""The corpus that needs no file: a few hundred short English-like stories, the same on every machine.

Addressed as data path `builtin`. Enough regularity for a small model's loss to fall, and no more is claimed for it.
Read next: `sources.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

ADDRESS = "builtin"
IDENTITY = "jaxscale builtin stories 1"
"""Changes when the text changes: it is the content identity of this corpus."""
DOCUMENTS = 400

_PEOPLE = (
    "the miller",
    "a tailor",
    "the old queen",
    "her brother",
    "the ferryman",
    "a young smith",
    "the baker",
    "my aunt",
)
_THINGS = (
    "a copper kettle",
    "the long rope",
    "a basket of pears",
    "the blue lamp",
    "three coins",
    "a letter",
    "the red horse",
)
_PLACES = (
    "by the river",
    "in the market",
    "under the bridge",
    "at the mill",
    "on the hill",
    "near the harbour",
    "in the wood",
)
_ACTIONS = ("found", "lost", "carried", "sold", "hid", "mended", "painted", "forgot", "bought")
_TIMES = (
    "In the morning",
    "Before the rain",
    "After supper",
    "On the third day",
    "When the bell rang",
    "All that winter",
)
_FEELINGS = ("laughed", "wept a little", "said nothing", "sang softly", "was afraid", "slept well", "ran home")
_ENDINGS = (
    "and nobody asked why.",
    "and so the day ended.",
    "for the night was cold.",
    "as everyone had hoped.",
    "at last.",
)
_NUMBERS = ("two", "three", "four", "five", "seven", "nine", "twelve")


def documents() -> Iterator[str]:
    """The stories, in order."""
    for number in range(DOCUMENTS):
        # random() is the one method whose stream Python promises to keep between versions.
        draw = random.Random(f"{IDENTITY}/{number}").random
        yield _story(number, draw)


def _story(number: int, draw: Callable[[], float]) -> str:
    def pick(words: tuple[str, ...]) -> str:
        return words[int(draw() * len(words))]

    hero, friend = pick(_PEOPLE), pick(_PEOPLE)
    lines = [f"Story {number + 1}: {hero} and {friend}", ""]
    for _ in range(3 + int(draw() * 4)):
        person = pick((hero, friend))
        lines.append(f"{pick(_TIMES)} {person} {pick(_ACTIONS)} {pick(_THINGS)} {pick(_PLACES)}.")
        lines.append(f"{person.capitalize()} {pick(_FEELINGS)} and counted to {pick(_NUMBERS)}, {pick(_ENDINGS)}")
        lines.append(f'"{pick(_TIMES)} we will speak of {pick(_THINGS)} again," said {pick((hero, friend))}.')
    return "\n".join(lines) + "\n"
