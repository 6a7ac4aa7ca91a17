"""An MLflow writer (the `track` extra). Goes where MLFLOW_TRACKING_URI says, otherwise to files in `RUN/mlflow`.

A resumed run goes on in the same MLflow run: its id is kept in the run directory. Read next: `../run_directory.py`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale import config as config_library
from jaxscale.track import sinks

PARAMETER_LENGTH = 500


class MlflowMetrics:
    """The `MetricsSink` that logs to MLflow."""

    def __init__(self, directory: Path, experiment: str, name: str, config: Mapping[str, Any]) -> None:
        """Raises ConfigError without mlflow."""
        try:
            mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            raise sinks.missing_package("mlflow-skinny", "mlflow") from error
        folder = directory / "mlflow"
        folder.mkdir(exist_ok=True)
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            # MLflow's plain files are frozen, not gone; a database would need more packages than mlflow-skinny brings.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = folder.absolute().as_uri()
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=address)
        mark = folder / "run-id"
        if mark.exists():
            self._run = mark.read_text()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for key, value in config_library.flatten(dict(config)).items():
            self._client.log_param(self._run, key, str(value)[:PARAMETER_LENGTH])
        mark.write_text(self._run)

    def write(self, line: Mapping[str, Any]) -> None:
        """The numbers of the line at its step."""
        stamp = int(line.get("time", time.time()) * 1000)
        points = [self._metric(name, value, stamp, line["step"]) for name, value in sinks.scalars(line)]
        self._client.log_batch(self._run, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._run)
