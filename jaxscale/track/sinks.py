"""Which metric writers a run has: metrics.jsonl always, and the trackers that `run.track` names.

metrics.jsonl is the run's memory: what it cannot take is an error. A tracker is a copy for people: when it fails, that
is said once and training goes on without it. Read next: `tensorboard.py`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.config import Config, ConfigError, to_dict
from jaxscale.track.jsonl import JsonlMetrics
from jaxscale.train.protocols import MetricsSink

logger = logging.getLogger(__name__)


PACKAGES = {"tensorboard": ("tensorboardX",) * 2, "wandb": ("wandb",) * 2, "mlflow": ("mlflow", "mlflow-skinny")}
"""Tracker -> the module it imports, and the package that has it."""


def check_trackers(config: Config) -> None:
    """Raises ConfigError where a tracker's package is missing. Makes no file: a run is refused before it has any."""
    for name in config.run.track:
        module, package = PACKAGES[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise missing_package(package, name) from error


def make_sinks(config: Config, directory: Path) -> list[MetricsSink]:
    """The writers of a run; process 0 only. The first is `JsonlMetrics` on `directory/metrics.jsonl`.

    Raises ConfigError, before any file is made, where a tracker's package is missing; OSError where the file cannot be
    made.
    """
    trackers = [Secondary(name, _make_tracker(name, config, directory)) for name in config.run.track]
    return [JsonlMetrics(directory / "metrics.jsonl"), *trackers]


class Secondary:
    """A tracker that may fail: the first error is logged, and it gets no more lines."""

    def __init__(self, name: str, sink: MetricsSink) -> None:
        self._name = name
        self._sink: MetricsSink | None = sink

    def write(self, line: Mapping[str, Any]) -> None:
        """Passes the line on while the tracker works."""
        if self._sink is None:
            return
        try:
            self._sink.write(line)
        except Exception as error:  # a tracker raises whatever its package raises; none of it concerns the training
            self._give_up("write to", error)

    def close(self) -> None:
        """Closes the tracker while it works."""
        if self._sink is None:
            return
        try:
            self._sink.close()
        except Exception as error:  # as in write
            self._give_up("close", error)

    def _give_up(self, action: str, error: Exception) -> None:
        self._sink = None
        logger.warning(
            "could not %s the tracker %r, training goes on without it (metrics.jsonl has everything): %s: %s",
            action,
            self._name,
            type(error).__name__,
            error,
        )


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line as `name/inner name` -> value, of a list as `name/0`, `name/1`, ...

    Text, `step` and `time` are left out.
    """
    for key, value in line.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + key not in ("step", "time"):
            yield prefix + key, float(value)


def missing_package(package: str, tracker: str) -> ConfigError:
    """The error for a tracker whose package is not installed."""
    return ConfigError(
        f"run.track names {tracker!r}, which needs the package {package!r}; "
        f"install it with pip install 'jaxscale[track]', or leave {tracker!r} out"
    )


def _make_tracker(name: str, config: Config, directory: Path) -> MetricsSink:
    from jaxscale.track import mlflow, tensorboard, wandb

    if name == "tensorboard":
        return tensorboard.TensorBoardMetrics(directory)
    run_name = f"{config.name}-{directory.name}" if not directory.name.startswith(config.name) else directory.name
    if name == "wandb":
        return wandb.WandbMetrics(directory, config.name, run_name, to_dict(config))
    return mlflow.MlflowMetrics(directory, config.name, run_name, to_dict(config))
