"""A click log shaped like Criteo's whose true probabilities are known, so that the best possible AUC is too.

    logit = bias + sum of weight x over dense features + sum over bags of the mean effect of their ids
            + sum over pairs of neighbouring features of strength u(id) v(id')

All of it is drawn from the seed. Ids follow a power law (id i as often as (i + 1)^-1.4), dense values a normal. Rows
are drawn in blocks, each from a key of its own. Read next: `click_file.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from jaxscale.cache import cache_folder
from jaxscale.data.click_file import ClickWriter, Column, is_click_folder

BLOCK = 1 << 16
ZIPF = 1.4
BIAS, DENSE, EFFECT, PAIR = -1.2, 1.2, 1.2, 0.4
"""Standard deviations of what all dense features, all ids and all pairs add to the logit, about."""
VERSION = 3


def make_clicks(folder: Path, rows: int, tables: Sequence[int], hots: Sequence[int], dense: int, seed: int) -> None:
    """Writes a click log of `rows` rows, with `dense` features i1, i2, ... and categorical ones c1, c2, ..."""
    columns = tuple(Column(f"c{n + 1}", size, hot) for n, (size, hot) in enumerate(zip(tables, hots, strict=True)))
    truth = _Truth(columns, dense, seed)
    writer = ClickWriter(folder, rows, tuple(f"i{n + 1}" for n in range(dense)), columns)
    for start in range(0, rows, BLOCK):
        writer.write(start, truth.draw(start // BLOCK, min(BLOCK, rows - start)))
    writer.close()


def ensure_clicks(rows: int, tables: Sequence[int], hots: Sequence[int], dense: int, seed: int, cache: str) -> Path:
    """The folder of such a log in the cache, made unless it is there. Safe in many processes at once."""
    from filelock import FileLock

    name = xxhash.xxh3_64_hexdigest(repr((VERSION, rows, tuple(tables), tuple(hots), dense, seed)).encode())
    folder = (Path(cache).expanduser() if cache else cache_folder("data")) / f"clicks-{name}"
    if is_click_folder(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_click_folder(folder):
            new = folder.with_name(f"{folder.name}.{os.getpid()}")
            try:
                make_clicks(new, rows, tables, hots, dense, seed)
                shutil.rmtree(folder, ignore_errors=True)
                new.replace(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return folder


class _Truth:
    """The weights and effects behind a log."""

    def __init__(self, columns: tuple[Column, ...], dense: int, seed: int) -> None:
        self._columns, self._dense, self._seed = columns, dense, seed
        features = len(columns)
        self._weights = self._generator(0).normal(size=dense) * DENSE / max(1, dense) ** 0.5
        self._effects, self._factors = [], []
        for number, column in enumerate(columns):
            generator = self._generator(1, number)
            self._effects.append((generator.normal(size=column.rows) * EFFECT / features**0.5).astype(np.float32))
            self._factors.append(generator.normal(size=column.rows).astype(np.float32))

    def draw(self, block: int, rows: int) -> dict[str, list[np.ndarray]]:
        """The columns of `rows` rows, drawn from the block's number."""
        generator = self._generator(2, block)
        dense = generator.normal(size=(rows, self._dense)).astype(np.float32)
        logit = BIAS + dense.astype(np.float64) @ self._weights
        ids: list[np.ndarray] = []
        factors: list[np.ndarray] = []
        for number, column in enumerate(self._columns):
            drawn = self._bags(generator, column, rows)
            count = np.maximum((drawn >= 0).sum(axis=1), 1)
            for values, sink in ((self._effects[number], None), (self._factors[number], factors)):
                mean = np.where(drawn >= 0, values[np.maximum(drawn, 0)], 0).sum(axis=1) / count
                if sink is None:
                    logit += mean
                else:
                    sink.append(mean)
            ids.append(drawn)
        pairs = list(zip(factors[::2], factors[1::2], strict=False))
        for left, right in pairs:
            logit += PAIR / len(pairs) ** 0.5 * left * right
        probability = (1 / (1 + np.exp(-logit))).astype(np.float32)
        label = (generator.random(rows) < probability).astype(np.uint8)
        return {"label": [label], "probability": [probability], "dense": list(dense.T), "ids": ids}

    def _bags(self, generator: np.random.Generator, column: Column, rows: int) -> np.ndarray:
        """(rows, hots) int32: one id, or none to `hots` of them with -1 behind."""
        share = generator.random((rows, column.hots))
        ids = np.minimum(_power_law(share, column.rows), column.rows - 1).astype(np.int32)
        if column.hots > 1:
            length = generator.integers(0, column.hots + 1, (rows, 1))
            ids = np.where(np.arange(column.hots) < length, ids, -1).astype(np.int32)
        return ids

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, *key))))


def _power_law(share: np.ndarray, rows: int) -> np.ndarray:
    """Inverse of the distribution with density x^-ZIPF on [1, rows + 1), as 0-based whole numbers."""
    power = 1 - ZIPF
    return (((rows + 1) ** power - 1) * share + 1) ** (1 / power) - 1
