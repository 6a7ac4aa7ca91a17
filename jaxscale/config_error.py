"""What a config raises about itself, also where a part of it lives in a file of its own. Read next: `config.py`."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. The message says what, why, and how to fix it."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(message)
