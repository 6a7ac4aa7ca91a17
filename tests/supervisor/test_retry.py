"""Retries and the breaker, on a clock that the test moves."""

import asyncio
import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.retry import Breaker, BreakerOpen, Retry, RetryConfig, State, is_transient, pause
from jaxscale.supervisor.handshake import AuthenticationError
from jaxscale.supervisor.peers import Code, PeerGone, PeerTimeout, Refused, Stopped

CONFIG = RetryConfig()


class Clock:
    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds):
        self.sleep(seconds)


class Numbered(Exception):
    def __init__(self, field, number):
        super().__init__(f"{field} {number}")
        setattr(self, field, number)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def changes():
    return []


@pytest.fixture
def retry(clock, changes):
    return Retry(
        "store",
        changed=changes.append,
        clock=clock,
        sleep=clock.sleep,
        sleep_async=clock.sleep_async,
        chance=lambda: 0.0,
    )


def failing(*outcomes):
    """A function that raises or returns these, one a call; the last one for ever."""
    left = list(outcomes)
    calls = []

    def function():
        calls.append(1)
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    function.calls = calls
    return function


def test_pauses_double_from_100_ms_to_10_s():
    assert [pause(CONFIG, n, 0.0) for n in range(1, 10)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_jitter_is_at_most_a_fifth(failed, chance):
    assert pause(CONFIG, failed, 0.0) <= pause(CONFIG, failed, chance) <= 1.2 * pause(CONFIG, failed, 0.0)
    assert pause(CONFIG, failed, 0.5) == pytest.approx(1.1 * pause(CONFIG, failed, 0.0))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (OSError(errno.EIO, "input/output"), True),
        (PeerTimeout("slow"), True),
        (PeerGone("gone"), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError(), False),
        (KeyError("code"), False),
        (AuthenticationError(), False),
        (Stopped(), False),
        (Refused(Code.BUSY, "busy"), True),
        (Refused(Code.UNAUTHENTICATED, "who"), False),
        (Refused(Code.NO_MEMORY, "full"), False),
        (BreakerOpen(), True),
        *[(Numbered(field, number), True) for field in ("code", "status", "status_code") for number in (408, 429, 503)],
        *[(Numbered(field, number), False) for field in ("code", "status") for number in (400, 401, 404, 413, 500)],
        (Numbered("code", "429"), False),
        (Numbered("code", True), False),
    ],
)
def test_what_is_worth_another_attempt(error, transient):
    assert is_transient(error) is transient


def test_a_number_counts_for_more_than_the_class():
    error = OSError("http")
    error.code = 401
    assert not is_transient(error)
    error.code = 503
    assert is_transient(error)


def test_repeated_until_it_succeeds(retry, clock):
    function = failing(TimeoutError(), Numbered("status", 429), ConnectionResetError(), "done")
    assert retry.call(function, seconds=60) == "done"
    assert clock.slept == [0.1, 0.2, 0.4]
    assert retry.breaker.state is State.CLOSED


@pytest.mark.parametrize("number", [400, 401, 413])
def test_never_repeated(retry, clock, number):
    function = failing(Numbered("code", number))
    with pytest.raises(Numbered):
        retry.call(function, seconds=60)
    assert (len(function.calls), clock.slept) == (1, [])


def test_never_repeated_errors_do_not_open_the_breaker(retry):
    for _ in range(10):
        with pytest.raises(ValueError, match="wrong"):
            retry.call(failing(ValueError("wrong")), seconds=1)
    assert retry.breaker.state is State.CLOSED


def test_bounded_by_a_count(retry, clock):
    function = failing(TimeoutError("slow"))
    with pytest.raises(TimeoutError, match="slow") as caught:
        retry.call(function, attempts=3)
    assert len(function.calls) == 3
    assert clock.slept == [0.1, 0.2]
    assert caught.value.__notes__ == ["store: given up after 3 attempts in 0.3 s"]


def test_bounded_by_a_deadline_and_not_by_a_count(retry, clock):
    """The breaker opens and probes again and again meanwhile: an outage of 300 s is outlived."""
    began = clock.now

    def function():
        if clock.now - began < 300:
            raise OSError(errno.EIO, "away")
        return clock.now - began

    assert 300 <= retry.call(function, seconds=400) < 340


def test_the_deadline_is_never_passed(retry, clock):
    began = clock.now
    with pytest.raises(BreakerOpen, match="store was not asked: it failed 5 times in a row") as caught:
        retry.call(failing(OSError("away")), seconds=10)
    assert clock.now - began < 10
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(OSError, match="away"):
        Retry("other", clock=clock, sleep=clock.sleep, chance=lambda: 0.0).call(failing(OSError("away")), seconds=0.5)
    assert clock.now - began < 10.5


def test_without_a_bound_it_is_refused(retry):
    with pytest.raises(ValueError, match="needs a bound"):
        retry.call(failing("done"))


def open_breaker(retry):
    for _ in range(5):
        with pytest.raises(OSError, match="away"):
            retry.call(failing(OSError("away")), attempts=1)


def test_the_breaker_opens_probes_and_closes(retry, clock, changes):
    open_breaker(retry)
    assert [(change.before, change.after) for change in changes] == [(State.CLOSED, State.OPEN)]
    assert (changes[0].name, changes[0].reason) == ("store", "5 failures in a row, the last one: OSError: away")
    function = failing("done")
    clock.now += 29.9
    with pytest.raises(BreakerOpen, match=r"asked again in 0\.1 s"):
        retry.call(function, attempts=1)
    assert not function.calls
    clock.now += 0.2
    for _ in range(2):
        assert retry.call(function, attempts=1) == "done"
        assert retry.breaker.state is State.PROBING
    retry.call(function, attempts=1)
    assert [change.after for change in changes] == [State.OPEN, State.PROBING, State.CLOSED]


def test_a_failed_probe_opens_it_again_for_the_whole_time(retry, clock, changes):
    open_breaker(retry)
    clock.now += 30
    retry.call(failing("done"), attempts=1)
    with pytest.raises(OSError, match="away"):
        retry.call(failing(OSError("away")), attempts=1)
    assert changes[-1].after is State.OPEN
    clock.now += 29.9
    with pytest.raises(BreakerOpen):
        retry.call(failing("done"), attempts=1)
    clock.now += 0.1
    for _ in range(3):  # earlier successes do not count any more
        assert retry.breaker.state is not State.CLOSED
        retry.call(failing("done"), attempts=1)
    assert retry.breaker.state is State.CLOSED


def test_a_success_ends_the_row_of_failures(retry):
    for _ in range(3):
        retry.call(failing(OSError(), OSError(), OSError(), OSError(), "done"), seconds=60)
    assert retry.breaker.state is State.CLOSED


def test_probes_are_single():
    breaker = Breaker("store", CONFIG)
    for _ in range(5):
        assert breaker.admit(0.0) == 0
        breaker.failed(0.0, "away")
    assert breaker.admit(10.0) == 20.0
    assert breaker.admit(30.0) == 0
    assert breaker.admit(30.0) > 0  # a second one while the first is under way
    breaker.abandoned()
    assert breaker.admit(30.0) == 0
    breaker.succeeded()
    assert breaker.admit(30.0) == 0


def test_an_interrupted_probe_makes_room_for_the_next(retry, clock):
    open_breaker(retry)
    clock.now += 30
    with pytest.raises(KeyboardInterrupt):
        retry.call(failing(KeyboardInterrupt()), attempts=1)
    assert retry.call(failing("done"), attempts=1) == "done"


def test_many_threads_open_it_once(changes):
    retry = Retry("store", changed=changes.append, sleep=lambda _: None)
    barrier = threading.Barrier(8)

    def run():
        barrier.wait()
        for _ in range(20):
            with pytest.raises((OSError, BreakerOpen)):
                retry.call(failing(OSError("away")), attempts=2)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [change.after for change in changes] == [State.OPEN]


def awaitable(function):
    async def call():
        return function()

    return call


def test_async(retry, clock):
    assert asyncio.run(retry.call_async(awaitable(failing(OSError(), OSError(), "done")), seconds=60)) == "done"
    assert clock.slept == [0.1, 0.2]
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(retry.call_async(awaitable(failing(ValueError("wrong"))), seconds=60))
    with pytest.raises(BreakerOpen):
        asyncio.run(retry.call_async(awaitable(failing(OSError("away"))), seconds=10))


def test_a_cancelled_probe_makes_room_for_the_next(retry, clock):
    open_breaker(retry)
    clock.now += 30

    async def cancelled():
        task = asyncio.create_task(retry.call_async(asyncio.Event().wait, seconds=60))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert retry.call(failing("done"), attempts=1) == "done"
