"""Shape of a deep learning recommendation model. Cheap to import: recipes use it. Read next: `models/dlrm.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxscale.config import Config, ConfigError
from jaxscale.model_config import ModelConfig, Unit

if TYPE_CHECKING:
    from jaxscale.data.source import Layout, Source
    from jaxscale.task import Task

BUILTIN = "builtin"
BUILTIN_ROWS = 600_000


@dataclass(frozen=True)
class DlrmConfig(ModelConfig):
    """Bottom MLP on dense features, embedding bags, dot products of all pairs, top MLP, a logit for each example."""

    unit: ClassVar[Unit] = "examples"

    tables: tuple[int, ...] = (1000, 100, 10)
    """Ids of each categorical feature: the rows of its table."""
    hots: tuple[int, ...] = ()
    """Ids an example has of each feature at most (a bag); none given = one of each."""
    dense: int = 13
    """Dense features."""
    width: int = 16
    """Numbers in an embedding vector."""
    bottom: tuple[int, ...] = (64, 32)
    """Hidden units of the MLP on dense features; its output has `width`."""
    top: tuple[int, ...] = (64, 32)
    """Hidden units of the MLP on dot products; its output is the logit."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the vectors of a bag become one."""
    placement: tuple[Literal["row", "column", "table"], ...] = ("row",)
    """Where tables lie: one for all, or one of each (`jaxscale.parallel.table_layout`)."""
    bins: int = 8
    """Parts that tables of placement `table` are dealt into: a multiple of the devices that split the batch."""
    exchange: float = 0.0
    """Ids sent to an owner a round, as a multiple of an even share; 0 = room for all in one round."""
    table_optimizer: Literal["rowwise-adagrad", "adagrad", "sgd"] = "rowwise-adagrad"
    """Update rule of the rows that a batch has (`jaxscale.optim.sparse`)."""
    table_learning_rate: float = 0.05
    """Peak learning rate of the tables; its schedule is that of optim."""
    table_epsilon: float = 1e-8
    """Added to the root of an accumulator."""

    def __post_init__(self) -> None:
        if not self.tables:
            raise ConfigError("model.tables is empty; give the number of ids of each categorical feature")
        if min(self.tables) < 1:
            raise ConfigError(f"model.tables is {self.tables}; each feature has 1 id or more")
        for name in ("hots", "bottom", "top"):
            if min(getattr(self, name), default=1) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; use 1 or more each")
        for name in ("hots", "placement"):
            given = len(getattr(self, name))
            allowed = {len(self.tables), 1 if name == "placement" else 0}
            if given not in allowed:
                options = " or ".join(map(str, sorted(allowed)))
                raise ConfigError(f"model.{name} has {given} entries for {len(self.tables)} tables; give {options}")
        for name in ("dense", "width", "bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.exchange < 0:
            raise ConfigError(f"model.exchange is {self.exchange}; use 0 for room for all, or a positive multiple")
        for name in ("table_learning_rate", "table_epsilon"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        if sum(self.tables) >= 2**30:
            raise ConfigError(f"model.tables has {sum(self.tables):,} rows; at most {2**30 - 1:,} can be numbered")

    @property
    def bags(self) -> tuple[int, ...]:
        """Ids of each feature."""
        return self.hots or (1,) * len(self.tables)

    @property
    def placements(self) -> tuple[Literal["row", "column", "table"], ...]:
        """Of each feature."""
        return self.placement if len(self.placement) > 1 else self.placement * len(self.tables)

    def check(self, config: Config, platform: str) -> None:  # noqa: ARG002 - every platform is the same
        wrong = {
            "optim.ema": (config.optim.ema, "an average of a table would touch all of its rows at each step"),
            "init-from": (config.init_from, "tables are not loaded from another run"),
            "sample.every": (config.sample.every, "the model has no text"),
            "train.noise-scale": (config.train.noise_scale, "tables have no gradient of each microbatch"),
            "data.mixture": (config.data.mixture, "a run reads one click log"),
            "phases": (any(p.sequence or p.mixture for p in config.phases), "they can change data.batch only"),
        }
        for name, (value, why) in wrong.items():
            if value:
                raise ConfigError(f"{name} does not go with embedding tables: {why}; leave it unset")

    def task(self, config: Config) -> Task:
        from jaxscale.models.dlrm import DlrmTask

        return DlrmTask(self, config.precision)

    def layout(self, sequence: int) -> Layout:  # noqa: ARG002 - examples have no length
        from jaxscale.data.clicks import click_layout

        return click_layout(self.dense, sum(self.bags))

    def source(self, config: Config) -> Source:
        """A click log: the folder `data.path`, or `builtin` (or `builtin:ROWS`), one made for this model's sizes.

        Raises DataError where the log has other columns than the model.
        """
        from jaxscale.data.click_file import open_clicks
        from jaxscale.data.clicks import open_click_source
        from jaxscale.data.errors import DataError
        from jaxscale.data.make_clicks import ensure_clicks

        path = config.data.path
        if not path:
            raise DataError(f"the run has no data; set --data.path to a folder of clicks, or to {BUILTIN}")
        name, _, rows = path.partition(":")
        if name == BUILTIN:
            if rows and not (rows.isdigit() and int(rows)):
                raise DataError(f"data.path is {path!r}; write {BUILTIN} or {BUILTIN}:ROWS")
            count = int(rows or BUILTIN_ROWS)
            folder = ensure_clicks(count, self.tables, self.bags, self.dense, 0, config.data.cache)
        else:
            folder = Path(path)
        file = open_clicks(folder)
        if len(file.dense) != self.dense:
            raise DataError(
                f"{folder} has {len(file.dense)} dense features, model.dense is {self.dense}; make them equal"
            )
        if len(file.categorical) != len(self.tables):
            raise DataError(
                f"{folder} has {len(file.categorical)} categorical features, model.tables {len(self.tables)}; "
                "make them equal"
            )
        for column, size, hots in zip(file.categorical, self.tables, self.bags, strict=True):
            if column.rows > size:
                raise DataError(
                    f"{folder}: feature {column.name} has ids up to {column.rows - 1}, its table in model.tables has "
                    f"{size} rows; give it {column.rows} or more"
                )
            if column.hots != hots:
                raise DataError(
                    f"{folder}: feature {column.name} has {column.hots} ids, model.hots {hots}; make them equal"
                )
        return open_click_source(file, config)
