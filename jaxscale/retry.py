"""Retries and the circuit breaker: one configuration, used wherever something outside of a process is asked.

An attempt that failed for a passing reason is repeated after a pause that doubles. A breaker that sees too many
failures in a row stops asking for a while, then lets single probes through. The decisions (`pause`, `is_transient`,
`Breaker`) are pure; `Retry` adds the clock and the sleeping, which tests replace. Read next: `peers.py`, whose errors
it sorts.
"""

from __future__ import annotations

import asyncio
import enum
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

TRANSIENT_CODES = frozenset({408, 429, 503, 504})
"""Time-outs, too many requests, unavailable. Not 400, 401, 413 and all others: the same request has the same answer."""
CODE_FIELDS = ("code", "status", "status_code")
LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""OSErrors that say something about the request, not about the moment."""


@dataclass(frozen=True)
class RetryConfig:
    """Figures of issue 3, part 3. Seconds."""

    first_seconds: float = 0.1
    factor: float = 2.0
    longest_seconds: float = 10.0
    jitter: float = 0.2
    """A pause is longer by up to this part of it, by chance, so that many who failed together do not come together."""
    failures: int = 5
    """In a row: the breaker opens."""
    open_seconds: float = 30.0
    """Until the first probe."""
    successes: int = 3
    """Of probes: the breaker closes."""


LINK_RETRY = RetryConfig(longest_seconds=1.0)
"""Of an agent's tie to its coordinator. A host that is not heard of for 2 s counts as lost, so that 10 s between two
attempts would turn a coordinator's restart into the loss of hosts that train."""


class State(enum.StrEnum):
    """Of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(frozen=True)
class Change:
    """A breaker changed its state; becomes an event."""

    name: str
    before: State
    after: State
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}: {self.reason}"


class BreakerOpen(RuntimeError):
    """Not even tried: too many attempts have failed lately. `code` is 503's."""

    code = 503


def pause(config: RetryConfig, failed: int, chance: float) -> float:
    """Seconds to wait after the `failed`-th failure in a row (from 1). `chance` is drawn from [0, 1). Pure."""
    # the exponent is bounded: a factor to the power of a storage outage's attempts would overflow
    base = min(config.longest_seconds, config.first_seconds * config.factor ** min(failed - 1, 64))
    return base * (1 + config.jitter * chance)


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may end otherwise. A number (`code`, `status`) counts for more than the class. Pure."""
    for field in CODE_FIELDS:
        code = getattr(error, field, None)
        if isinstance(code, int) and not isinstance(code, bool):
            return code in TRANSIENT_CODES
    return isinstance(error, OSError) and not isinstance(error, LASTING)  # TimeoutError, ConnectionError included


class Breaker:
    """Closed, open, probing. Pure but for the lock: the time is given. Safe to use from several threads.

    Each `admit` that returns 0 has to be followed by one of `succeeded`, `failed`, `abandoned`.
    """

    def __init__(self, name: str, config: RetryConfig, changed: Callable[[Change], None] | None = None) -> None:
        self._name, self._config, self._changed = name, config, changed
        self._lock = threading.Lock()
        self._state = State.CLOSED
        self._failures = 0
        self._successes = 0
        self._opened_at = 0.0
        self._probing = False

    @property
    def state(self) -> State:
        return self._state

    def admit(self, now: float) -> float:
        """0: go ahead. Otherwise the seconds after which to ask again; nothing may be tried until then."""
        change = None
        with self._lock:
            if self._state is State.CLOSED:
                return 0.0
            if self._state is State.OPEN:
                left = self._opened_at + self._config.open_seconds - now
                if left > 0:
                    return left
                change = self._to(State.PROBING, f"{self._config.open_seconds:g} s are over")
            elif self._probing:
                return self._config.first_seconds
            self._probing = True
        self._report(change)
        return 0.0

    def succeeded(self) -> None:
        change = None
        with self._lock:
            self._failures = 0
            if self._state is State.PROBING:
                self._probing = False
                self._successes += 1
                if self._successes >= self._config.successes:
                    change = self._to(State.CLOSED, f"{self._successes} probes succeeded")
        self._report(change)

    def failed(self, now: float, reason: str) -> None:
        change = None
        with self._lock:
            self._failures += 1
            if self._state is State.PROBING:
                change = self._open(now, f"a probe failed: {reason}")
            elif self._state is State.CLOSED and self._failures >= self._config.failures:
                change = self._open(now, f"{self._failures} failures in a row, the last one: {reason}")
        self._report(change)

    def abandoned(self) -> None:
        """The attempt says nothing about the other side: it was cancelled, or the request itself was wrong."""
        with self._lock:
            if self._state is State.PROBING:
                self._probing = False

    def _open(self, now: float, reason: str) -> Change:
        self._opened_at = now
        return self._to(State.OPEN, reason)

    def _to(self, state: State, reason: str) -> Change:
        before, self._state = self._state, state
        self._failures = self._successes = 0
        self._probing = False
        return Change(self._name, before, state, reason)

    def _report(self, change: Change | None) -> None:
        if change is not None and self._changed is not None:
            self._changed(change)


class Retry:
    """Calls functions until they succeed, fail for good, or run out of time or attempts. Safe to use from threads.

    One for each thing that can be unavailable (a peer, the object store): what uses it shares its breaker.
    """

    def __init__(
        self,
        name: str,
        config: RetryConfig | None = None,
        changed: Callable[[Change], None] | None = None,
        *,
        transient: Callable[[BaseException], bool] = is_transient,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`name` is what is asked, for messages and events; `changed` is told of every change of the breaker."""
        self.name = name
        self.config = config or RetryConfig()
        self.breaker = Breaker(name, self.config, changed)
        self._transient, self._clock, self._chance = transient, clock, chance
        self._sleep, self._sleep_async = sleep, sleep_async

    def call[T](self, function: Callable[[], T], *, seconds: float | None = None, attempts: int | None = None) -> T:
        """`function()`, repeated while it fails for a passing reason, for `seconds` or `attempts` at most.

        Storage takes `seconds` only. An attempt that is under way is not cut off: it needs a deadline of its own.
        Raises the last error with a note, or BreakerOpen where the breaker outlasts the bound (or there is only a
        count).
        """
        bounds = _Bounds(self, seconds, attempts)
        while True:
            while wait := bounds.admit():
                self._sleep(wait)
            try:
                value = function()
            except Exception as error:
                pause_seconds = bounds.failed(error)
                if pause_seconds is None:
                    raise
            except BaseException:
                self.breaker.abandoned()
                raise
            else:
                self.breaker.succeeded()
                return value
            self._sleep(pause_seconds)

    async def call_async[T](
        self, function: Callable[[], Awaitable[T]], *, seconds: float | None = None, attempts: int | None = None
    ) -> T:
        """As `call`, for a function that is awaited."""
        bounds = _Bounds(self, seconds, attempts)
        while True:
            while wait := bounds.admit():
                await self._sleep_async(wait)
            try:
                value = await function()
            except Exception as error:
                pause_seconds = bounds.failed(error)
                if pause_seconds is None:
                    raise
            except BaseException:  # a cancelled task among them
                self.breaker.abandoned()
                raise
            else:
                self.breaker.succeeded()
                return value
            await self._sleep_async(pause_seconds)


class _Bounds:
    """How far one call has got."""

    def __init__(self, retry: Retry, seconds: float | None, attempts: int | None) -> None:
        if seconds is None and attempts is None:
            raise ValueError(f"a call of {retry.name} needs a bound: seconds, attempts, or both")
        self._retry, self._attempts = retry, attempts
        self._began = retry._clock()
        self._until = None if seconds is None else self._began + seconds
        self._failed = 0
        self._last: Exception | None = None

    def admit(self) -> float:
        """0 to go ahead, or seconds to wait before asking again. Raises BreakerOpen."""
        now = self._retry._clock()
        wait = self._retry.breaker.admit(now)
        if wait and (self._until is None or now + wait >= self._until):
            raise BreakerOpen(
                f"{self._retry.name} was not asked: it failed {self._retry.config.failures} times in a row or failed a "
                f"probe, and is asked again in {wait:.1f} s"
            ) from self._last
        return wait

    def failed(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt; None where this was the last one, and why is a note of the error."""
        retry, now = self._retry, self._retry._clock()
        if not retry._transient(error):
            retry.breaker.abandoned()
            return None
        retry.breaker.failed(now, f"{type(error).__name__}: {error}")
        self._failed += 1
        self._last = error
        wait = pause(retry.config, self._failed, retry._chance())
        over = self._attempts is not None and self._failed >= self._attempts
        if over or (self._until is not None and now + wait >= self._until):
            error.add_note(f"{retry.name}: given up after {self._failed} attempts in {now - self._began:.1f} s")
            return None
        return wait
