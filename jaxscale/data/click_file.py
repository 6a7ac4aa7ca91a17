"""A click log on disk: a folder with one flat array for each column, which any row is read from at random.

    clicks.json          rows, columns, how many ids each categorical feature has, hash of the content
    label.npy            (N,) uint8, 0 or 1
    dense/NAME.npy       (N,) float32
    ids/NAME.npy         (N, hots) int32, -1 = no id (padding of a bag)
    probability.npy      (N,) float32, where the true probability of the label is known

Read next: `clicks.py`, which makes batches of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxscale.data.errors import DamagedData, DataError

HEADER = "clicks.json"
FORMAT = 1
LABEL, PROBABILITY = "label.npy", "probability.npy"


@dataclass(frozen=True)
class Column:
    """A categorical feature: ids 0 to `rows` - 1, `hots` of them an example at most."""

    name: str
    rows: int
    hots: int = 1


@dataclass(frozen=True)
class ClickFile:
    """An open click log: columns are mapped into memory, and read where rows are asked for."""

    folder: Path
    rows: int
    dense: tuple[str, ...]
    categorical: tuple[Column, ...]
    content: str
    """Hash of all columns: the identity of the log wherever it lies."""

    @cached_property
    def label(self) -> np.ndarray:
        return self._column(LABEL, np.uint8, (self.rows,))

    @cached_property
    def values(self) -> list[np.ndarray]:
        """Of each dense feature."""
        return [self._column(f"dense/{name}.npy", np.float32, (self.rows,)) for name in self.dense]

    @cached_property
    def ids(self) -> list[np.ndarray]:
        """Of each categorical feature."""
        return [self._column(f"ids/{c.name}.npy", np.int32, (self.rows, c.hots)) for c in self.categorical]

    @cached_property
    def probability(self) -> np.ndarray | None:
        """The true probability of each label, where the log has it."""
        is_there = (self.folder / PROBABILITY).exists()
        return self._column(PROBABILITY, np.float32, (self.rows,)) if is_there else None

    def read(self, row: np.ndarray) -> dict[str, np.ndarray]:
        """label (B,) float32, dense (B, number) float32, ids (B, sum of the hots) int32 of these rows.

        Raises DataError for a label that is not 0 or 1, a dense value that is not finite and an id that its feature
        does not have, naming the first one's column and row.
        """
        label = self.label[row]
        self._refuse(LABEL, row, label, label > 1, "a label is 0 or 1")
        dense = np.empty((len(row), len(self.dense)), np.float32)
        for place, (name, values) in enumerate(zip(self.dense, self.values, strict=True)):
            dense[:, place] = values[row]
            self._refuse(f"dense/{name}", row, dense[:, place], ~np.isfinite(dense[:, place]), "use finite numbers")
        parts = []
        for column, values in zip(self.categorical, self.ids, strict=True):
            ids = values[row]
            allowed = f"the feature has ids 0 to {column.rows - 1}, and -1 for none"
            self._refuse(f"ids/{column.name}", row, ids, (ids < -1) | (ids >= column.rows), allowed)
            parts.append(ids)
        return {"label": label.astype(np.float32), "dense": dense, "ids": np.concatenate(parts, axis=1)}

    def _refuse(self, name: str, row: np.ndarray, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
        if not wrong.any():
            return
        first = tuple(int(place[0]) for place in np.nonzero(wrong))
        raise DataError(f"{self.folder}: {name} has {values[first]} in row {int(row[first[0]])}; {allowed}")

    def _column(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / name
        try:
            column: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DamagedData(f"{self.folder} has no column {name}, which its {HEADER} names; make it again") from None
        except (OSError, ValueError) as error:
            raise DamagedData(f"{path} cannot be read ({error}); make it again") from None
        if column.dtype != dtype or column.shape != shape:
            raise DamagedData(
                f"{path} is {column.dtype} {column.shape}, {HEADER} says {np.dtype(dtype)} {shape}; make it again"
            )
        return column


def is_click_folder(address: str | Path) -> bool:
    return (Path(address) / HEADER).is_file()


def open_clicks(folder: str | Path) -> ClickFile:
    """Maps all columns. Raises DataError where it is no click log, DamagedData where a column is missing or another."""
    folder = Path(folder).expanduser()
    try:
        header = json.loads((folder / HEADER).read_text())
        if header["format"] != FORMAT:
            raise DataError(f"{folder} has click log format {header['format']}, this version reads {FORMAT}")
        file = ClickFile(
            folder,
            int(header["rows"]),
            tuple(header["dense"]),
            tuple(Column(**column) for column in header["categorical"]),
            str(header["content"]),
        )
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no click log: it has no {HEADER}; make one with scripts/make_clicks.py, or set --data.path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DamagedData(f"{folder / HEADER} cannot be read ({error!r}); make the folder again") from None
    _ = file.label, file.values, file.ids, file.probability
    return file


class ClickWriter:
    """Writes a click log, some rows at a time. The header comes last: a folder without one is no click log."""

    def __init__(self, folder: Path, rows: int, dense: tuple[str, ...], categorical: tuple[Column, ...]) -> None:
        self._folder, self._rows, self._dense, self._categorical = folder, rows, dense, categorical
        for part in ("dense", "ids"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        create = np.lib.format.open_memmap
        self._columns = {
            "label": [create(folder / LABEL, "w+", np.uint8, (rows,))],
            "probability": [create(folder / PROBABILITY, "w+", np.float32, (rows,))],
            "dense": [create(folder / f"dense/{name}.npy", "w+", np.float32, (rows,)) for name in dense],
            "ids": [create(folder / f"ids/{c.name}.npy", "w+", np.int32, (rows, c.hots)) for c in categorical],
        }
        self._hash = xxhash.xxh3_128()

    def write(self, start: int, parts: dict[str, list[np.ndarray]]) -> None:
        """Rows from `start` on, in growing order: lists of columns by name (`label` and `probability` of one)."""
        for name, columns in self._columns.items():
            for column, values in zip(columns, parts[name], strict=True):
                column[start : start + len(values)] = values
                self._hash.update(np.ascontiguousarray(values))

    def close(self) -> None:
        for columns in self._columns.values():
            for column in columns:
                column.flush()
        header = {
            "format": FORMAT,
            "rows": self._rows,
            "dense": list(self._dense),
            "categorical": [vars(column) for column in self._categorical],
            "content": self._hash.hexdigest(),
        }
        (self._folder / HEADER).write_text(json.dumps(header, indent=1) + "\n")
