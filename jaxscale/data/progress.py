"""Progress of a build, or of a check of what was built, on standard error: a bar on a terminal, else lines.

Read next: `build.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 5.0


class Report(Protocol):
    def __call__(self, consumed: int, tokens: int) -> None:
        """`consumed`: bytes of input read so far; `tokens`: ids so far."""
        ...


@contextmanager
def show_progress(name: str, total: int, doing: str = "tokenising") -> Iterator[Report]:
    """Yields the function to call as the work goes on. `total`: bytes of input."""
    what = f"{doing} {name}"
    with _bar(what, total) if sys.stderr.isatty() else _lines(what, total) as report:
        yield report


@contextmanager
def _bar(what: str, total: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, tokens=0)

        def report(consumed: int, tokens: int) -> None:
            bar.update(task, completed=consumed, tokens=tokens)

        yield report


@contextmanager
def _lines(what: str, total: int) -> Iterator[Report]:
    start = last = time.monotonic()

    def report(consumed: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rate = tokens / (now - start) / 1e6
            print(
                f"{what}: {consumed / max(total, 1):.0%}, {tokens:,} tokens, {rate:.2f} M/s",
                file=sys.stderr,
                flush=True,
            )

    yield report
