"""A TensorBoard writer: `tensorboard --logdir RUN/tensorboard`. Needs tensorboardX (the `track` extra).

A resumed run writes its replayed steps again; TensorBoard is told to forget the older ones. Read next: `wandb.py`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.track import sinks


class TensorBoardMetrics:
    """The `MetricsSink` that writes event files to `directory/tensorboard`."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError without tensorboardX."""
        try:
            module = importlib.import_module("tensorboardX")
        except ImportError as error:
            raise sinks.missing_package("tensorboardX", "tensorboard") from error
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # it warns of each NaN that it draws
        self._folder = directory / "tensorboard"
        self._writer_class = module.SummaryWriter
        self._writer: Any = None

    def write(self, line: Mapping[str, Any]) -> None:
        """One point per number of the line, at the line's step and time."""
        if self._writer is None:
            # The package names a file after the second it was opened in: a quick resume would write over the last one.
            suffix = f".{line.get('epoch', 1)}"
            self._writer = self._writer_class(str(self._folder), purge_step=line["step"], filename_suffix=suffix)
        for name, value in sinks.scalars(line):
            self._writer.add_scalar(name, value, line["step"], walltime=line.get("time"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
