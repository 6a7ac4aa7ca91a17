"""The `jaxscale` command: finds the subcommand, and turns every way to fail into one clear last line and an exit code.

Exit codes: 0 all that was asked is done; 1 it failed; 2 the input was refused before anything was done; 75 stopped by a
signal after saving, and the same command goes on. Read next: `commands/train.py`.
"""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Callable, Sequence

from jaxscale import __version__
from jaxscale.config import ConfigError
from jaxscale.terminal import reader_is_gone, silence
from jaxscale.train.logs import log_failure

Command = Callable[[Sequence[str], str | None], int]

USAGE = """\
usage: jaxscale COMMAND ...

commands:
  train RECIPE.py [overrides]      train a recipe; `python RECIPE.py [overrides]` does the same
  data build PATH... --out FOLDER  turn text of many formats into token files; also data list, verify, diff
  launch RECIPE.py [overrides]     train under a supervisor that survives failing processes and hosts
  chaos RECIPE.py [--seed S]       strike a supervised run with faults, compare it with an undisturbed one
  coordinator, agent               its pieces one by one, for clusters
  plan RECIPE.py --on MESH         what a run would need and do on machines that are not here
  bench collectives --on MESH      latency and bandwidth of each mesh axis, measured here
  status RUN [--watch] [--json]    how a run stands: world, step, faults, checkpoints
  checkpoints COMMAND RUN          list, verify and prune what a run has saved; tag and promote versions
  generate RUN --prompt TEXT       continue a text with a trained run

options:
  --version                        print the version
  -h, --help                       this page; `jaxscale COMMAND --help` explains a command

examples:
  jaxscale train recipes/lm_tiny.py --devices 8 --steps 50
  jaxscale train recipes/lm_tiny.py --print-config
  jaxscale generate runs/lm_tiny-1a2b3c4d --prompt "Once more"
"""

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one command line and returns its exit code. `prog`: how the user called it, for messages."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _dispatch(arguments, prog)
        sys.stdout.flush()  # while a reader that is gone can still be answered for
        return code
    except BrokenPipeError as error:
        if not reader_is_gone(sys.stdout):
            return _report(error)
        silence(sys.stdout)  # `| head` has what it wanted; where text is all that was asked for, all is done
        return 0 if is_text_all(arguments) else FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(error)


def is_text_all(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for nothing but text on standard output."""
    return not arguments or arguments[0] == "generate" or bool(_TEXT & set(arguments))


_TEXT = frozenset(["-h", "--help", "--version", "--print-config"])


def _report(error: Exception) -> int:
    """Prints one last line and returns the exit code; before it the traceback, unless the error says all there is."""
    log_failure(error)
    worded = type(error).__module__.partition(".")[0] == "jaxscale"
    if worded:
        text = str(error)
    elif _is_full(error):
        text = f"{error}; free some space and run the same command again, it goes on from the last checkpoint"
    elif _is_out_of_memory(error):
        first = str(error).strip().splitlines()[0].rstrip(". ")
        text = (
            f"{first}: the state of the model and a step's activations have no room on a device; use more devices "
            "(--mesh.fsdp, --mesh.tensor), more --train.microbatches, --remat.policy full, or a smaller model"
        )
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; give a path that exists and can be written"
    else:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
    print(f"error: {text}", file=sys.stderr)
    return REFUSED if worded and isinstance(error, ValueError) else FAILED


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device. By name: this module does without JAX."""
    text = str(error)
    return type(error).__name__ == "JaxRuntimeError" and ("RESOURCE_EXHAUSTED" in text or "Out of memory" in text)


def _dispatch(arguments: Sequence[str], prog: str | None) -> int:
    try:
        return _run(arguments, prog)
    except SystemExit as exit:  # --help of a command
        return exit.code if isinstance(exit.code, int) else 0


def _run(arguments: Sequence[str], prog: str | None) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"jaxscale {__version__}")
        return 0
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean `jaxscale {nearest[0]}`?" if nearest else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {hint}")
    return COMMANDS[command](rest, prog)


def _train(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.train import run_train

    return run_train(arguments, prog).value


def _data(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.data import run_data

    return run_data(arguments, prog)


def _generate(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.generate import run_generate

    return run_generate(arguments, prog)


def _launch(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.launch import run_launch

    return run_launch(arguments, prog)


def _coordinator(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.supervise import run_coordinator

    return run_coordinator(arguments, prog)


def _agent(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.supervise import run_agent

    return run_agent(arguments, prog)


def _status(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.status import run_status

    return run_status(arguments, prog)


def _checkpoints(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.checkpoints import run_checkpoints

    return run_checkpoints(arguments, prog)


def _plan(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.plan import run_plan

    return run_plan(arguments, prog)


def _bench(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.bench import run_bench

    return run_bench(arguments, prog)


def _chaos(arguments: Sequence[str], prog: str | None) -> int:
    from jaxscale.commands.chaos import run_chaos_command

    return run_chaos_command(arguments, prog)


COMMANDS: dict[str, Command] = {
    "train": _train,
    "data": _data,
    "generate": _generate,
    "launch": _launch,
    "plan": _plan,
    "bench": _bench,
    "chaos": _chaos,
    "coordinator": _coordinator,
    "agent": _agent,
    "checkpoints": _checkpoints,
    "status": _status,
}
