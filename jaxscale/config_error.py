"""What a config raises about itself, also where a part of it lives in a file of its own. Read next: `config.py`."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting that cannot work. The message says what, why, and how to fix it."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def choices(options: Sequence[object]) -> str:
    """What an error offers, one or more: `2`, `2 or 4`, `2, 4 or 8`."""
    words = [str(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
