"""A config from its JSON form: `config.to_dict` the other way round, for runs and checkpoints on disk.

A model's class is found by the `kind` it was written with. Read next: `generate/load.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxscale.config import Config, ConfigError, ModelConfig

MODELS: Mapping[str, str] = types.MappingProxyType(
    {
        "TransformerConfig": "jaxscale.models.transformer_config",
        "DlrmConfig": "jaxscale.models.dlrm_config",
    }
)
"""Class name of a model's config -> the module that has it, imported when it is asked for."""


def config_from_dict(saved: Mapping[str, Any], origin: str = "the saved config") -> Config:
    """The `Config` that `config.to_dict` made `saved` of. Fields that `saved` lacks take their defaults.

    Raises ConfigError, naming `origin`, for fields or models that this version does not have and values of other types.
    """
    try:
        return typing.cast(Config, _build(Config, saved, ""))
    except ConfigError as error:
        raise ConfigError(f"{origin} cannot be used: {error}") from error


def _build(kind: type[Any], saved: Any, path: str) -> Any:
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{path or 'it'} is {saved!r}; expected an object with the fields of {kind.__name__}")
    fields = dict(saved)
    if kind is ModelConfig:
        kind = _model_class(fields.pop("kind", None))
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(
            f"{path}{unknown[0]} is no field of {kind.__name__}; it is of another version of jaxscale, use that one"
        )
    values = {name: _value(hints[name], value, f"{path}{name}") for name, value in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{path or 'it '}lacks a field of {kind.__name__} ({error}); put the file back") from error


def _value(hint: Any, saved: Any, path: str) -> Any:
    """A field's value by its type: nested dataclasses and tuples are rebuilt, plain values are checked."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), saved, f"{path}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(saved, list):
        return tuple(_value(arguments[0], value, path) for value in saved)
    if not _fits(saved, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
        raise ConfigError(f"{path} is {saved!r}; expected {wanted}")
    return saved


def _fits(saved: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return saved in arguments
    if origin in (types.UnionType, typing.Union):  # with a Literal in it, `|` makes the second
        return any(_fits(saved, option) for option in arguments)
    return isinstance(hint, type) and _is_plain(saved, hint)


def _is_plain(value: Any, kind: type[Any]) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _model_class(name: Any) -> type[Any]:
    if name not in MODELS:
        raise ConfigError(
            f"its model is a {name!r}, and this version knows {', '.join(MODELS)}; "
            "a model class of one's own is entered in config_file.MODELS"
        )
    found: type[Any] = getattr(importlib.import_module(MODELS[name]), name)
    return found
