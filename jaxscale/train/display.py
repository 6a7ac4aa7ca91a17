"""What a person sees while a run goes on: a progress bar on a terminal, a plain line every few seconds elsewhere.

A display is told the sections (`Progress`) and the metrics lines (`MetricsSink`) like any other listener; only the
writer process has one that prints. It is a copy for people: when its reader goes away, training goes on. Read next:
`bar.py`, `summary.py` (the screen before the first step), `flops.py` (MFU).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from jaxscale.terminal import Copy, is_live, visible
from jaxscale.train.bar import Part, open_bar
from jaxscale.train.protocols import ExitReason, Section

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from jaxscale.train.summary import Summary

LINE_SECONDS = 5.0
"""Between two plain lines."""
WINDOW = 32
"""Steps that speed is averaged over."""

_SECTIONS: Mapping[Section, str] = {
    "compile": "compiling",
    "restore": "restoring",
    "evaluate": "evaluating",
    "save": "saving",
    "finish": "saving",
}


class Display:
    """Prints to `stream`; a silent one for the processes that are not the writer is `Display(..., enabled=False)`.

    unit: what a step's work is counted in, and its field of a line.
    flops_per_token: of the model, forward and backward; peak: FLOP/s of all devices (None: no MFU).
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool = True,
        unit: str = "tokens",
        flops_per_token: float = 0.0,
        peak: float | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._unit = unit
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._stream: Any = Copy(stream if stream is not None else sys.stdout)
        self._clock = clock
        self._speed: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """Tokens and seconds of the last steps."""
        self._line: Mapping[str, Any] = {}
        self._printed_step = 0
        self._printed_at = -float("inf")
        self._named = ""
        """The section shown in place of the numbers."""
        self._bar: Bar | None = None

    def start(self, summary: Summary) -> None:
        """Prints the summary and, on a terminal, opens the progress bar."""
        from jaxscale.train.summary import summary_lines  # imports JAX, which a supervisor's display does without

        self.open(summary_lines(summary), summary.resumed_from)

    def open(self, lines: Sequence[str], completed: int = 0) -> None:
        """`start` with another screen. `completed`: steps done before."""
        self._print("\n".join(lines))
        if self._enabled and is_live(self._stream):
            self._bar = open_bar(self._stream, self._total, completed)
            self._bar.start()

    def enter(self, section: Section, step: int) -> None:
        """`Progress`: names the section on the bar; in plain text only the first compilation is worth a line."""
        named, self._named = self._named, _SECTIONS.get(section, "")
        if self._named == named:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], parts=[(1, self._named)] if self._named else self._parts())
        elif section == "compile":
            self.message(f"compiling the program of step {step + 1} (what was compiled before is found in the cache)")

    def write(self, line: Mapping[str, Any]) -> None:
        """`MetricsSink`: a finished line of metrics.jsonl."""
        first = not self._line or line.get("epoch") != self._line.get("epoch")
        self._line = line
        if not first:  # the first step's time holds the compilation, or a restart
            self._speed.append((float(line[self._unit]), float(line["step_seconds"])))
        evaluation = {name: value for name, value in line.items() if name.startswith("eval_")}
        if evaluation:
            found = ", ".join(f"{_words(k)} {_number(v)}" for k, v in evaluation.items())
            self.message(f"step {line['step']}, evaluation: {found}")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=line["step"], parts=self._parts())
        elif first or self._clock() - self._printed_at >= LINE_SECONDS:
            self._print_line()

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(visible(text), markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Closes the bar; in plain text prints the last line if it has not been printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._line and self._printed_step != self._line["step"]:
            self._print_line()

    def finish(self, text: str) -> None:
        """Closes the display with the run's last line."""
        self.close()
        self._print(text)

    def seconds_left(self) -> float | None:
        """From the mean time of the last steps; None before there are two."""
        if not self._speed:
            return None
        return (self._total - self._line["step"]) * sum(s for _, s in self._speed) / len(self._speed)

    def _print_line(self) -> None:
        self._printed_step, self._printed_at = self._line["step"], self._clock()
        numbers = "  ".join(text for _, text in self._parts())
        self._print(f"step {self._line['step']}/{self._total}  {numbers}")

    def _parts(self) -> list[Part]:
        """The numbers, each with its rank; see `bar.py`."""
        if not self._line:
            return []
        parts = [(2, f"loss {self._line['loss']:.4f}"), (6, f"grad norm {self._line['grad_norm']:.3g}")]
        tokens, seconds = (sum(column) for column in zip(*self._speed, strict=True)) if self._speed else (0.0, 0.0)
        if seconds:
            parts.append((3, f"{tokens / seconds:,.0f} {self._unit}/s"))
            if self._peak:
                from jaxscale.train.flops import model_flops_utilisation  # as in `start`

                mfu = model_flops_utilisation(self._flops_per_token * tokens, seconds, self._peak)
                parts.append((4, f"MFU {mfu:.1%}"))
        left = self.seconds_left()
        if left is not None:
            parts.append((1, f"{human_seconds(left)} left"))
        return parts

    def _print(self, text: str) -> None:
        if self._enabled:
            print(visible(text) if self._stream.isatty() else text, file=self._stream, flush=True)


def last_line(reason: ExitReason, step: int, total: int, run_dir: str, why: str = "") -> str:
    """What a run says at its end: where its result lies, or how to go on. `why`: what asked it to stop."""
    if reason is ExitReason.COMPLETED:
        return f"done: {step:,} steps trained and saved in {run_dir}"
    if reason is ExitReason.STOPPED:
        asked = f" ({why})" if why else ""
        return (
            f"stopped{asked} after step {step:,} of {total:,}; it is saved: the same command again goes on from there"
        )
    return f"failed after step {step:,} of {total:,}; the log is in {run_dir}/logs"


def human_seconds(seconds: float) -> str:
    """8, 75 and 7500 seconds -> `8 s`, `1 min 15 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _words(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
