"""Command line -> dataclass, by tyro: the dataclass's fields are the flags, its docstrings the help.

What is added here: tuples of dataclasses get a one-word form (`--data.mixture a.jsonl:0.7 b.jsonl:0.3`), an unknown
flag names the nearest real one, and every mistake is one `UsageError` instead of a framed box. Read next: `train.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxscale.commands.synonyms import SYNONYMS
from jaxscale.config import ConfigError, PhaseConfig, SourceConfig


class UsageError(ConfigError):
    """A command line that cannot be read."""


class _RefusedWord(Exception):
    """Carries a ConfigError's message past tyro, which replaces the message of every ValueError inside a tuple."""


FREE_TEXT = ("--prompt", "--sample.prompt")
"""Flags whose value may look like a flag."""


def parse[T](
    kind: type[T], args: Sequence[str], *, prog: str, description: str, examples: str, default: T | None = None
) -> T:
    """Reads `args` into a `kind`, starting from `default`.

    Prints the help and raises SystemExit(0) on `--help`; raises UsageError on flags and values that cannot be read, and
    ConfigError with the dataclass's own words where its validation refuses a value.
    """
    known = list(flags(kind, default))
    before = ""
    for argument in args:  # before tyro, which would rather complain of what is missing
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known and name != "--help":
            refused = _unknown(argument, known, prog)
            if before in FREE_TEXT:
                hint = f"if {argument[:40]!r} is the value of {before}, write {before}={argument[:40]}"
                raise UsageError(f"{refused}; {hint}")
            raise refused
        before = argument
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            start: Any = tyro.MISSING_NONPROP if default is None else default
            parsed, unknown = tyro.cli(
                kind,
                args=list(args),
                default=start,
                prog=prog,
                description=description,
                registry=_registry(),
                return_unknown_args=True,
            )
    except _RefusedWord as refused:
        raise UsageError(f"{refused}; see `{prog} --help`") from None
    except SystemExit as exit:
        if not exit.code:
            print(f"examples:\n{examples}")
            raise
        raise _refusal(exit, errors.getvalue(), prog) from None
    if unknown:
        raise _unknown(unknown[0], known, prog)
    return parsed


def flags(kind: Any, value: Any = None, prefix: str = "") -> Iterator[str]:
    """Every flag of a dataclass, nested ones joined with dots; `value` tells the class where a field names a base."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner = getattr(value, field.name, None)
        marks = getattr(hints[field.name], "__metadata__", ())
        name = "" if any(getattr(mark, "name", None) == "" for mark in marks) else prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            yield from flags(type(inner), inner, f"{name}." if name else "")
        elif not any(mark is tyro.conf.Positional for mark in marks):
            yield f"--{name}"
            if hints[field.name] is bool:
                head, dot, tail = name.rpartition(".")
                yield f"--{head}{dot}no-{tail}"


def _unknown(argument: str, known: list[str], prog: str) -> UsageError:
    if not argument.startswith("-"):
        return UsageError(f"unexpected argument {argument!r}; settings are given as flags, see `{prog} --help`")
    flag = argument.partition("=")[0].replace("_", "-")
    # People forget the group, or use another program's word, more often than they misspell.
    ending = flag.lstrip("-").rpartition(".")[2]
    same_ending = [name for name in known if name.rpartition(".")[2].lstrip("-") == ending]
    synonym = [name for name in SYNONYMS.get(ending, ()) if name in known]
    # Or they type the first word of several: the shortest flag that begins with it.
    longer = sorted((name for name in known if name.startswith(f"{flag}-")), key=len)
    near = same_ending[:1] or synonym or longer[:1]
    nearest = near or difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "nothing comes near it;"
    return UsageError(f"unknown flag {flag}; {hint} `{prog} --help` lists all flags")


def _refusal(exit: SystemExit, printed: str, prog: str) -> ConfigError:
    """The one message behind tyro's SystemExit: a ConfigError it caught, or the first part of the frame it printed."""
    cause: BaseException | None = exit
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__context__
    rows = [line.strip("│ ") for line in printed.splitlines()[1:]]  # below the title
    body = itertools.dropwhile(_is_rule, rows)
    text = " ".join(itertools.takewhile(lambda row: not _is_rule(row), body)).removeprefix("Error parsing ")
    text = text.replace(f"Missing from {prog}:", "missing:").replace(" (required)", "")
    return UsageError(f"{text.rstrip('.')}; see `{prog} --help`")


def _is_rule(row: str) -> bool:
    return not row.strip("─-")  # the second where the terminal is not UTF-8


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    for rule in (
        _word(int, "INT", int, "a whole number"),
        _word(float, "FLOAT", _finite, "a number"),
        _word(int | None, "INT", lambda text: None if text.lower() == "none" else int(text), "a whole number or none"),
        _word(
            float | None, "FLOAT", lambda text: None if text.lower() == "none" else _finite(text), "a number or none"
        ),
        _word(SourceConfig, "PATH[:WEIGHT]", parse_source, "", show=_show_source),
        _word(PhaseConfig, "START:KEY=VALUE,...", parse_phase, "", show=_show_phase),
    ):
        registry.primitive_rule(rule)
    return registry


def _finite(text: str) -> float:
    """A number that JSON has a word for: config.json holds it."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _word(
    kind: Any,
    metavar: str,
    read: Callable[[str], Any],
    expected: str,
    show: Callable[[Any], str] = lambda v: str(v).lower(),
) -> Callable[[PrimitiveTypeInfo], PrimitiveConstructorSpec[Any] | None]:
    """A tyro rule for a type that is one word on the command line."""

    def from_words(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ConfigError as error:
            raise _RefusedWord(str(error)) from None
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {expected}") from None

    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type != kind:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=from_words,
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [show(value)],
        )

    return rule


def parse_source(text: str) -> SourceConfig:
    """`PATH` or `PATH:WEIGHT`. A colon that is not followed by a number belongs to the path (`gs://bucket/a.jsonl`)."""
    path, colon, weight = text.rpartition(":")
    try:
        return SourceConfig(path, float(weight)) if colon else SourceConfig(text)
    except ConfigError:
        raise
    except ValueError:
        return SourceConfig(text)


def parse_phase(text: str) -> PhaseConfig:
    """`START:sequence=N,batch=N,mixture=PATH:WEIGHT+PATH:WEIGHT`, each key optional. Raises UsageError."""
    start, _, settings = text.partition(":")
    values: dict[str, Any] = {}
    try:
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            if key == "mixture":
                values[key] = tuple(parse_source(part) for part in value.split("+"))
            elif key in ("sequence", "batch"):
                values[key] = int(value)
            else:
                raise UsageError(f"phase {text!r} sets {key!r}; a phase can set sequence, batch and mixture")
        return PhaseConfig(int(start), **values)
    except ConfigError:
        raise
    except ValueError:
        raise UsageError(
            f"cannot read phase {text!r}; write START:KEY=VALUE,..., "
            "for example 1000:sequence=512,batch=4,mixture=a.jsonl:0.7+b.jsonl:0.3"
        ) from None


def _show_source(source: SourceConfig) -> str:
    return f"{source.path}:{source.weight:g}"


def _show_phase(phase: PhaseConfig) -> str:
    settings = [f"{key}={getattr(phase, key)}" for key in ("sequence", "batch") if getattr(phase, key)]
    if phase.mixture:
        settings.append("mixture=" + "+".join(map(_show_source, phase.mixture)))
    return f"{phase.start}:{','.join(settings)}"
