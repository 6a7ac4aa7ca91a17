"""A click log as the rows of a run: batches by step and the held-out rows, a `source.Source`.

Row r of a run is one row of the log, in an order shuffled anew in each pass, as for text; the last rows of the log
are held out. Legend: B rows, H ids of an example. Read next: `../models/dlrm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.data.batches import needed_rows
from jaxscale.data.click_file import ClickFile
from jaxscale.data.errors import DataError
from jaxscale.data.loader import to_devices
from jaxscale.data.mixture import Proportions, make_references, source_seed
from jaxscale.data.position import Phase, phase_at_step, phases, row_at_step
from jaxscale.data.source import Layout, RowArray, Rows
from jaxscale.ops.auc import binned_auc, exact_auc

if TYPE_CHECKING:
    import grain  # type: ignore[import-untyped]  # no stubs

    from jaxscale.config import Config
    from jaxscale.task import Task


def click_layout(dense: int, hots: int) -> Layout:
    """The arrays of a batch: everything is split by rows."""
    row, wide = P(axes.BATCH_AXES), P(axes.BATCH_AXES, None)
    return {
        "dense": RowArray((dense,), "float32", wide),
        "ids": RowArray((hots,), "int32", wide),
        "label": RowArray((), "float32", row),
        "loss_weight": RowArray((), "float32", row),
        "row": RowArray((), "uint32", row),
    }


@dataclass(frozen=True)
class HeldRows:
    """The last rows of the log. For the trainer each is a document of one example."""

    documents: int

    @property
    def tokens(self) -> int:
        return self.documents


@dataclass(frozen=True)
class Clicks:
    """An open click log and how much of it is held out."""

    file: ClickFile
    held: int
    evaluated: int
    """Of the held-out rows, the first so many are looked at."""

    tokenizer: None = None

    @property
    def trained(self) -> int:
        return self.file.rows - self.held

    def identity(self) -> dict[str, Any]:
        return {"corpora": {self.file.content: str(self.file.folder)}, "held_out_rows": self.held}

    def check_identity(self, saved: Mapping[str, Any], step: int = 1) -> None:  # noqa: ARG002 - one log at all steps
        now, problems = self.identity(), []
        if list(saved["corpora"]) != list(now["corpora"]):
            old, new = (next(iter(which["corpora"]), "none") for which in (saved, now))
            problems.append(f"click log: content {old[:8]} -> {new[:8]}")
        if saved.get("held_out_rows") != self.held:
            problems.append(f"held-out rows: {saved.get('held_out_rows')} -> {self.held}")
        if problems:
            raise DataError(
                f"this is not the data that the checkpoint was trained on ({'; '.join(problems)}), so its position "
                "means nothing here; give the click log of the run, or start another run"
            )

    def check_task(self, task: Task) -> None:
        """What a model can read was compared when the log was opened: see `DlrmConfig.source`."""

    def length(self, phase: Phase) -> int:  # noqa: ARG002 - every phase reads the one log
        return self.trained

    def step_rows(self, config: Config, mesh: Mesh, devices: Collection[jax.Device]) -> ClickRows:
        return ClickRows(self, config, mesh, devices)

    def held_out(self) -> HeldRows:
        return HeldRows(self.held)

    def evaluation_batches(self, config: Config, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        batch, layout = config.data.batch, config.model.layout(1)
        padded = axes.padded_batch(batch, config.train.microbatches, axes.batch_shards(mesh.shape))
        wanted = needed_rows(mesh, padded, mesh.local_devices)
        specs = {name: one.spec for name, one in layout.items()}
        for start in range(0, self.evaluated, batch):
            row = start + wanted
            rows = read_rows(self.file, self.trained + row, row, wanted < min(batch, self.evaluated - start), layout)
            yield to_devices(rows, mesh, padded, specs)

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Log loss, AUC with what its bins may hide, the best AUC where it is known, and calibration."""
        count = float(totals["tokens"])
        area, error = binned_auc(totals["histograms"])
        best = {} if self.best is None else {"eval_auc_best": self.best}
        clicks = float(totals["label"])
        return {
            "eval_loss": float(totals["loss"]) / count,
            "eval_auc": area,
            "eval_auc_error": error,
            **best,
            "eval_calibration": float(totals["prediction"]) / clicks if clicks else math.inf,
            "eval_examples": count,
        }

    @cached_property
    def best(self) -> float | None:
        """Exact AUC of the true probabilities on the rows that are evaluated; no model's is better but by luck."""
        if self.file.probability is None or not self.evaluated:
            return None
        rows = slice(self.trained, self.trained + self.evaluated)
        return exact_auc(self.file.label[rows], self.file.probability[rows])


def open_click_source(file: ClickFile, config: Config) -> Clicks:
    """Raises DataError where nothing would be left to train on."""
    held, batches = config.data.held_out_documents, config.evaluate.batches
    if held >= file.rows:
        raise DataError(
            f"click log {file.folder} has {file.rows} rows, data.held-out-documents asks for {held} of them; hold out "
            f"at most {file.rows - 1}"
        )
    return Clicks(file, held, min(held, batches * config.data.batch) if batches else held)


def read_rows(file: ClickFile, place: np.ndarray, row: np.ndarray, is_real: np.ndarray, layout: Layout) -> Rows:
    """Rows of the log at `place` with the row ids `row`; where not `is_real` (B,), padding of weight 0."""
    rows: Rows = {name: np.zeros((len(row), *one.shape), one.dtype) for name, one in layout.items()}
    rows["ids"][~is_real] = -1
    for name, values in file.read(place[is_real]).items():
        rows[name][is_real] = values
    rows["loss_weight"][is_real] = 1
    rows["row"] = (row & 0xFFFFFFFF).astype(np.uint32)
    return rows


class ClickRows:
    """A `source.StepSource`."""

    def __init__(self, clicks: Clicks, config: Config, mesh: Mesh, devices: Collection[jax.Device]) -> None:
        self._file, self._layout = clicks.file, config.model.layout(1)
        self._table, self._steps = phases(config), config.steps
        self._mesh, self._devices, self._microbatches = mesh, devices, config.train.microbatches
        seed = source_seed(config.seed, clicks.file.content, 0)
        one = Proportions((1.0,), (0,))
        self._order: grain.MapDataset[int] = make_references([clicks.trained], [seed], one, config.data.shuffle)

    @property
    def specs(self) -> Mapping[str, P]:
        return {name: one.spec for name, one in self._layout.items()}

    def __len__(self) -> int:
        return self._steps

    def span(self, step: int) -> tuple[int, int]:
        return row_at_step(self._table, step), phase_at_step(self._table, step).batch

    def padded(self, step: int) -> int:
        batch = phase_at_step(self._table, step).batch
        return axes.padded_batch(batch, self._microbatches, axes.batch_shards(self._mesh.shape))

    def __getitem__(self, step: int) -> Rows:
        first, count = self.span(step)
        wanted = needed_rows(self._mesh, self.padded(step), self._devices)
        is_real = wanted < count
        place = np.zeros(len(wanted), np.int64)
        place[is_real] = [self._order[row] for row in (first + wanted[is_real]).tolist()]
        return read_rows(self._file, place, first + wanted, is_real, self._layout)
