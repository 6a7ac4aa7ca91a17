"""What of the log reaches the terminal: errors of anyone and warnings of jaxscale, not what libraries chat about.

Everything else goes to the run's log file, which `run_directory.py` opens. Read next: `display.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FILE_ONLY = "file_only"
_OURS = "jaxscale"


def quiet_terminal(stream: IO[str] | None = None) -> logging.Handler:
    """Puts the terminal's handler on the root logger (default: stderr) and returns it.

    absl, Orbax, Grain and Python's warnings then no longer find stderr by themselves.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_is_for_terminal)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    return handler


def log_failure(error: BaseException) -> None:
    """The traceback goes to the run's log, where one is open; the terminal gets its one clear line from `cli.main`."""
    logger = logging.getLogger(_OURS)
    if logger.hasHandlers():  # without any, Python would print it to the terminal
        logger.error("the run ended with an error", exc_info=error, extra={FILE_ONLY: True})


@contextlib.contextmanager
def native_output_to(path: Path) -> Iterator[None]:
    """What native code writes to stdout and stderr goes to a file; what Python prints still reaches the terminal.

    Gloo greets every peer of every device on stdout, which no setting of it turns off; and JAX's client meets the end
    of another process with a stack dump on stderr, between which nobody would find the line that says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file, _python_alone("stdout", 1, file), _python_alone("stderr", 2, file):
        yield


@contextlib.contextmanager
def _python_alone(name: str, descriptor: int, file: IO[bytes]) -> Iterator[None]:
    """`sys.NAME` goes where it went, and whatever else writes to the descriptor into the file."""
    python = getattr(sys, name)
    python.flush()
    with os.fdopen(os.dup(descriptor), "w", buffering=1, errors="backslashreplace") as stream:
        os.dup2(file.fileno(), descriptor)
        _switch(name, python, stream)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # its reader is gone
                stream.flush()
            _switch(name, stream, python)
            os.dup2(stream.fileno(), descriptor)


def _switch(name: str, old: IO[str], new: IO[str]) -> None:
    setattr(sys, name, new)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


def _is_for_terminal(record: logging.LogRecord) -> bool:
    # Orbax's threads log each failure with a traceback, under absl's name, and raise it as well: that one is told.
    if getattr(record, FILE_ONLY, False) or record.name == "absl":
        return False
    return record.levelno >= logging.ERROR or (
        record.levelno >= logging.WARNING and record.name.partition(".")[0] == _OURS
    )
