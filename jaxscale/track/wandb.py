"""A Weights & Biases writer (the `track` extra). Offline with WANDB_MODE=offline, as W&B's own documentation says.

A resumed run goes on in the same W&B run: its id is kept in the run directory. Read next: `mlflow.py`.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.track import sinks


class WandbMetrics:
    """The `MetricsSink` that logs to W&B, with `directory/wandb` as its local folder."""

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        """Raises ConfigError without wandb."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise sinks.missing_package("wandb", "wandb") from error
        folder = directory / "wandb"
        folder.mkdir(exist_ok=True)
        mark = folder / "run-id"
        if not mark.exists():
            mark.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, name=name, id=mark.read_text(), resume="allow", dir=str(directory), config=dict(config)
        )
        # W&B drops lines whose own step counter goes back; with the step as a field, replayed steps are kept.
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        """One W&B history row with the numbers of the line."""
        self._run.log({"step": line["step"], **dict(sinks.scalars(line))})

    def close(self) -> None:
        self._run.finish()
