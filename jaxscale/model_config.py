"""Base of every model's configuration: how a run gets its task, its rows and their shapes. Read next: `config.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from jaxscale.config import Config
    from jaxscale.data.source import Layout, Source
    from jaxscale.task import Task

Unit = Literal["tokens", "examples"]


@dataclass(frozen=True)
class ModelConfig:
    """Base of every model's configuration; the concrete class knows how to build its task."""

    unit: ClassVar[Unit] = "tokens"
    """What a loss weight counts, and people: the tokens of rows of `data.sequence`, or whole rows."""

    def check(self, config: Config, platform: str) -> None:
        """Raises ConfigError for what cannot work on such devices; called before a run leaves any trace."""

    def task(self, config: Config) -> Task:  # noqa: ARG002 - the signature that subclasses implement
        """The task that trains this model. Imports the model lazily: importing a recipe stays cheap."""
        raise TypeError(f"{type(self).__name__} does not say how to build a task; override task(config)")

    def source(self, config: Config) -> Source:
        """Opens the data of a run, text here. Raises DataError. Safe in many processes at once."""
        from jaxscale.data.corpora import open_corpora

        return open_corpora(config)

    def layout(self, sequence: int) -> Layout:
        """The arrays of a batch."""
        from jaxscale.data.batches import text_layout

        return text_layout(sequence)
