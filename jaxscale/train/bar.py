"""The progress bar of a terminal: one line, of which the least important parts go first where there is no room.

Read next: `display.py`, which says what is on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

Part = tuple[int, str]
"""A part of the line and its rank: 0 is the last one to go."""

BAR: Part = (5, " " * 24)
"""Drawn in the place of these spaces."""


def fit(parts: Sequence[Part], width: int) -> list[Part]:
    """The parts that fit into so many columns, two between them; the least important go first, and one always stays."""
    kept = list(parts)
    while len(kept) > 1 and sum(len(text) for _, text in kept) + 2 * (len(kept) - 1) > width:
        kept.remove(max(kept))
    return kept


def open_bar(stream: IO[str], total: int, completed: int) -> Progress:
    """A bar with one task, whose field `parts` is what stands behind the count of steps. Not started yet."""
    from rich.console import Console, RenderableType  # heavy, and not needed where there is no terminal
    from rich.progress import Progress
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    class OneLine(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.tasks:
                shown = fit([BAR, (0, f"{task.completed:.0f}/{total}"), *task.fields["parts"]], self.console.width)
                text = Text("  ".join(text for rank, text in shown if (rank, text) != BAR), no_wrap=True)
                if BAR not in shown:
                    yield text
                    continue
                line = Table.grid(padding=(0, 2))
                line.add_row(ProgressBar(total=total, completed=task.completed, width=len(BAR[1])), text)
                yield line

    no_parts: dict[str, Any] = {"parts": []}
    bar = OneLine(console=Console(file=stream), transient=True, refresh_per_second=4)
    bar.add_task("train", total=total, completed=completed, **no_parts)
    return bar
