"""`jaxscale status RUN`: how a run stands, once or live. Read next: `../supervisor/status.py`, which looks.

Works on every run directory: of a supervised run and of a plain `train`, while it runs and long after.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.commands.wording import age, count
from jaxscale.terminal import is_live, visible
from jaxscale.track import lines

if TYPE_CHECKING:
    from jaxscale.supervisor.location_status import LocationStatus
    from jaxscale.supervisor.status import FaultStatus, RunStatus, TierStatus, Watcher

WATCH_SECONDS = 1.0
QUIET_SECONDS = 30.0
"""A run whose coordinator is gone may be training still; after this long without a line nobody does."""

EXAMPLES = """\
  jaxscale status runs/mine
  jaxscale status runs/mine --watch        live, until Ctrl-C
  jaxscale status runs/mine --json         one line of JSON for a program"""


@dataclass(frozen=True)
class StatusCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """One line of JSON in place of text; ages and times in seconds."""
    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Look again every second, until Ctrl-C."""


def run_status(args: Sequence[str], prog: str | None = None) -> int:
    """Runs `jaxscale status ARGS` and returns the exit code. Raises ConfigError on what is no run directory."""
    prog = prog or "jaxscale status"
    if not args:
        raise UsageError(f"status needs a run directory: {prog} runs/mine")
    command = parse(StatusCommand, args, prog=prog, description="Shows how a run stands.", examples=EXAMPLES)
    from jaxscale.supervisor.status import Watcher

    watcher = Watcher(Path(command.run))
    if not command.watch:
        print(shown(watcher.look(time.time()), command.json), flush=True)
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts it with Ctrl-C ignored
    try:
        if is_live(sys.stdout) and not command.json:
            _live(watcher)
        for status in _looks(watcher):
            print(shown(status, command.json), flush=True)
    except KeyboardInterrupt:  # the way to end it
        print(file=sys.stderr)
    return 0


def shown(status: RunStatus, as_json: bool) -> str:
    """The text that one look prints."""
    if not as_json:
        return "\n".join(map(visible, status_lines(status)))
    from jaxscale.supervisor.status import to_json

    return lines.encode(to_json(status)).decode().rstrip("\n")


def _looks(watcher: Watcher) -> Iterator[RunStatus]:
    while True:
        yield watcher.look(time.time())
        time.sleep(WATCH_SECONDS)


def _live(watcher: Watcher) -> None:
    from rich.console import Console  # heavy, and only for a terminal
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for status in _looks(watcher):
            live.update(Text(shown(status, as_json=False)), refresh=True)


def status_lines(status: RunStatus) -> list[str]:
    """A screen of at most 20 lines."""
    rows = [
        ("run", _life(status)),
        ("state", _state(status)),
        ("world", _world(status)),
        ("step", _step(status)),
        ("memory", _tier(status.memory, _no_memory(status))),
        ("durable", _tier(status.durable, "no checkpoint yet") + _interval(status.durable_interval_seconds)),
        *(("copy", _location(one)) for one in status.locations),
        ("damaged", ", ".join(f"{count(number, 'line')} of {name}" for name, number in status.damaged.items())),
        ("faults", f"{status.fault_count:,}; the last ones:" if status.fault_count else "none"),
    ]
    shown = [row for row in rows if row[1] and (status.is_supervised or row[0] not in ("memory", "faults"))]
    title = f"{status.name or 'a run that has not begun'}  {status.run}"
    return [title, *(f"  {name:<7} {text}" for name, text in shown), *map(_fault, status.faults)]


def _interval(seconds: float | None) -> str:
    return "" if seconds is None else f"; one about every {age(seconds)}"


def _life(status: RunStatus) -> str:
    quiet = f"; the last line is {age(status.quiet_seconds)} old" if status.quiet_seconds is not None else ""
    match status.life:
        case "done":
            return "done: every step is trained and saved"
        case "stopped":
            return "stopped; the same command again goes on"
        case "failed":
            return "failed; the reason is below and in the logs of the run directory"
        case "starting":
            return f"starting ({status.holder})"
        case "running":
            return f"running ({status.holder})"
        case "gone" if not status.holder:
            return f"ended: nobody holds its lock{quiet}; the same command again goes on"
        case "gone" if status.is_supervised and (status.quiet_seconds or 0.0) < QUIET_SECONDS:
            return f"its coordinator is gone ({status.holder}): killed, or about to be started again{quiet}"
        case "gone":
            who = "coordinator" if status.is_supervised else "process"
            return f"its {who} is gone without a word ({status.holder}){quiet}; the same command again goes on"


def _state(status: RunStatus) -> str:
    if not status.state:
        return ""
    since = f" for {age(status.state_seconds)}" if status.life in ("running", "starting") else ""
    return f"{status.state}{since}: {status.reason}"


def _world(status: RunStatus) -> str:
    if not status.hosts:
        return "no worker has begun"
    hosts = f"epoch {status.epoch}: {count(len(status.hosts), 'host')} ({', '.join(status.hosts)})"
    if status.mesh is None:
        return hosts
    return f"{hosts}, {' x '.join(f'{axis} {size}' for axis, size in status.mesh.items()) or 'every axis 1'}"


def _step(status: RunStatus) -> str:
    if status.step_age_seconds is None:
        return f"0 of {status.steps:,}" if status.steps else "none yet"
    parts = [f"{status.step:,} of {status.steps:,}" if status.steps else f"{status.step:,}"]
    if status.steps_per_second is not None:
        parts.append(f"{status.steps_per_second:.3g} steps/s")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    return ", ".join([*parts, f"{age(status.step_age_seconds)} ago"])


def _no_memory(status: RunStatus) -> str:
    return "none yet" if status.life in ("starting", "running", "gone") else "gone with the processes of the run"


def _tier(tier: TierStatus | None, none: str) -> str:
    if tier is None:
        return none
    return f"step {tier.step:,}, {age(tier.age_seconds)} old, {count(tier.behind, 'step')} behind"


def _location(one: LocationStatus) -> str:
    """`s3://bucket/runs: step 40, 3.0 s old, 2 steps behind; FAILING for 12 s: S3Error: ...`"""
    words = "no step yet"
    if one.step is not None:
        words = f"step {one.step:,}, {age(one.age_seconds)} old, {count(one.behind, 'step')} behind"
    if one.lost:
        return f"{one.address}: {words}; LOST: {one.reason}"
    if one.failing_seconds is not None:
        return f"{one.address}: {words}; FAILING for {age(one.failing_seconds)}: {one.reason}"
    return f"{one.address}: {words}"


def _fault(fault: FaultStatus) -> str:
    back = "training has not gone on"
    if fault.recovery_seconds is not None:
        at = f" at step {fault.step:,}" if fault.step else ""
        back = f"back after {fault.recovery_seconds:.1f} s{at}"
    kind = f" ({fault.fault_class})" if fault.fault_class else ""
    return f"    {age(fault.age_seconds)} ago: {fault.text}{kind}: {back}"
