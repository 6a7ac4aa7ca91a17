"""The world of processes that train together: how it forms, agrees, and dissolves. A single process is a world of one.

Host-level agreement goes through JAX's coordination service, not through device collectives: it costs no compiled
program, has deadlines, and can say who is missing. Read next: `train/loop.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxscale import world_watch
from jaxscale.jax_private import world_state
from jaxscale.train.protocols import World
from jaxscale.world_address import WorldError as WorldError
from jaxscale.world_address import did_not_form, free_port, hold_port
from jaxscale.world_address import parse_distributed as parse_distributed

JOIN_SECONDS = 300
LEAVE_SECONDS = 60
ANSWER_SECONDS = 120
END_SECONDS = 10
REPORT_SECONDS = 5
REFUSE_SECONDS = 5
REASON_SECONDS = 2
REFUSED = 2
"""Exit code of a process that refuses its input; `cli.py` says the same."""
POLL_SECONDS = 0.02
FOREVER_SECONDS = 30 * 24 * 3600
FAILED_KEY = "jaxscale/failed"
GONE_KEY = "jaxscale/gone"
WATCH_KEY = "jaxscale/watch"


_calls: Iterator[int] = itertools.count()
"""Numbers the collective host calls of this process; equal on all processes, since all make the same calls in order."""

_leaving = threading.Event()
"""Set once this process leaves or abandons its world: what the others say no longer concerns it."""

_ending = threading.Lock()
"""Held by the thread that ends this process."""

_is_first_gone: Callable[[], bool] = lambda: False  # noqa: E731 - replaced where process 0 is watched

_undo: list[Callable[[], object]] = []
"""What puts back the handlers of this process when it leaves."""


def join(world: World | None, timeout_seconds: int = JOIN_SECONDS) -> World:
    """Forms the world and returns it with the real process count and index. None: as TPU pods, Slurm and the like say.

    Call it before anything makes a backend; a world of one without an address is returned as it is. The members find
    each other at process 0's address; if they do not within `timeout_seconds`, the process says so on stderr and ends
    with exit code 1. Raises WorldError when the world cannot form at all.
    """
    if world is not None and not world.address:
        return world
    if world is not None and world.index == 0:
        hold_port(world.address)
    # Its preemption service would put a handler of its own on SIGTERM; the loop's graceful stop has that signal.
    jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {}
    if world is not None:
        arguments = {
            "coordinator_address": world.address,
            "num_processes": world.processes,
            "process_id": world.index,
        }
    # JAX's client aborts the process with a stack trace when its own time is over; ours ends a little earlier.
    alarm = threading.Timer(timeout_seconds, did_not_form, args=(world, timeout_seconds))
    alarm.daemon = True
    alarm.start()
    undo = world_watch.on_abort(lambda: did_not_form(world, 0))
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_seconds + END_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except ValueError as error:
        raise WorldError(
            f"--distributed auto found no cluster here (JAX looks for TPU pods, Slurm, Open MPI and Kubernetes): "
            f"{error}; use --distributed ADDRESS,N,I"
        ) from error
    except RuntimeError as error:
        where = f"process {world.index} of {world.processes} at {world.address}" if world else "--distributed auto"
        raise WorldError(f"the world did not form ({where}): {error}") from error
    finally:
        undo()
        alarm.cancel()
    state = world_state()
    world = World(processes=state.num_processes, index=state.process_id, address=state.coordinator_address)
    if world.processes > 1:
        threading.Thread(target=_follow_failures, args=(world,), name="follow-failures", daemon=True).start()
        _watch(world)
    return world


def leave(world: World) -> None:
    """Dissolves the world when all is well. Waits for the others, at most LEAVE_SECONDS; raises WorldError."""
    if not world.address:
        return
    if world.processes > 1:
        barrier(world, "end of the run", LEAVE_SECONDS)
        _leaving.set()
        with contextlib.suppress(RuntimeError):  # The first one ends all the threads that follow failures.
            world_state().client.key_value_set(FAILED_KEY, "")
    jax.distributed.shutdown()
    while _undo:
        _undo.pop()()
    if world.is_writer:
        free_port(world.address)
    if world.processes > 1:
        # A CPU backend that used collectives sometimes aborts while Python shuts down; ending it here, it does not.
        from jax.extend.backend import clear_backends  # imports Pallas: only where a world ends

        clear_backends()


def abandon(world: World, reason: str) -> None:
    """Leaves because this process failed: the others end within seconds, with `reason` on stderr and exit code 1.

    Without it they would wait in a collective, and this process at its exit for them. Nothing collective can follow:
    the caller reports its own failure and exits, always with code 1, after REPORT_SECONDS at most. In a world of one
    there is nothing to do.
    """
    if world.processes == 1:
        return
    _leaving.set()
    with contextlib.suppress(RuntimeError):  # Another process failed first, or the service is gone: they know already.
        text = f"process {world.index} of {world.processes} failed: {reason}"
        world_state().client.key_value_set(FAILED_KEY, text)
    # Handlers run last in, first out: this one comes before JAX's, which would wait for processes that never come.
    atexit.register(_end, world)
    # Python waits for threads before it runs such handlers, and a save's threads may wait for a process that is gone.
    late = threading.Timer(REPORT_SECONDS, _end, args=(world,))
    late.daemon = True
    late.start()


@contextlib.contextmanager
def membership(world: World | None) -> Iterator[World]:
    """`join` ... `leave`, or `abandon` when an exception passes through; `leave` too where all refuse their input.

    with membership(parse_distributed(text)) as world:
        ...
    """
    world = join(world)
    try:
        yield world
    except BaseException as error:
        if world.processes > 1 and world_watch.is_collective(error):
            time.sleep(REASON_SECONDS)  # whoever knows which process is gone ends this one with one line that says so
        if not _all_refuse(world, error):
            abandon(world, f"{type(error).__name__}: {error}")
        raise
    leave(world)


def _all_refuse(world: World, error: BaseException) -> bool:
    """Leaves, where every process refuses its input at the same point: each tells that, and exits with REFUSED."""
    if not (world.address and isinstance(error, ValueError) and type(error).__module__.startswith("jaxscale.")):
        return False
    with contextlib.suppress(WorldError):
        barrier(world, "refused", REFUSE_SECONDS)
        leave(world)
        atexit.register(_exit, REFUSED)  # after an error Python's own end sometimes crashes in a backend's threads
        return True
    return False


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier(world: World, name: str, timeout_seconds: float = ANSWER_SECONDS) -> None:
    """Waits until every process has called `barrier` with this name. Raises WorldError naming who did not come."""
    if world.processes == 1:
        return
    try:
        world_state().client.wait_at_barrier(f"jaxscale/barrier/{next(_calls)}/{name}", int(timeout_seconds * 1000))
    except RuntimeError as error:
        # JAX names them in no order.
        late = str(error).partition("timed out task names:")[2]
        missing = sorted(int(index) for index in re.findall(r"^(\d+)$", late, re.MULTILINE))
        who = f"process {', '.join(map(str, missing))} of {world.processes}" if missing else "another process"
        raise WorldError(
            f"process {world.index} waited up to {timeout_seconds:g} s at the barrier {name!r}, but {who} did not "
            f"come; it is gone, hung, or much slower"
        ) from error


def broadcast_json(world: World, value: Any, timeout_seconds: float = ANSWER_SECONDS) -> Any:
    """Process 0's `value` on every process, as JSON gives it back (what others pass is ignored). Raises WorldError."""
    text = json.dumps(value) if world.is_writer else ""
    if world.processes == 1:
        return json.loads(text)
    key = f"jaxscale/broadcast/{next(_calls)}"
    if world.is_writer:
        world_state().client.key_value_set(key, text)
    else:
        text = _get(key, f"a value that process 0 broadcasts ({key})", timeout_seconds)
    return json.loads(text)


def gather_text(world: World, text: str, timeout_seconds: float = ANSWER_SECONDS) -> list[str]:
    """The `text` of every process, in their order, on every process. Raises WorldError."""
    if world.processes == 1:
        return [text]
    key = f"jaxscale/gather/{next(_calls)}"
    world_state().client.key_value_set(f"{key}/{world.index}", text)
    texts: list[str] = []
    if world.is_writer:
        texts = [_get(f"{key}/{index}", f"process {index}", timeout_seconds) for index in range(world.processes)]
    return list(broadcast_json(world, texts, timeout_seconds))


class Agreement:
    """Lets every process of a world know, at the same step, that one of them asks for something (here: to stop).

    `any_asks` is called by all processes once per step. While nobody asks it costs a look at a variable: a thread waits
    for news from the coordination service. When somebody asks, every thread publishes how many calls its process has
    answered with False so far (that many steps it has committed itself to), and the answer becomes True at the call
    after the highest of these: late processes catch up, none runs ahead, so no collective is left waiting for a peer.
    """

    def __init__(self, world: World, name: str = "stop") -> None:
        self._world = world
        self._key = f"jaxscale/agree/{next(_calls)}/{name}"
        self._lock = threading.Lock()
        self._refused = 0
        """Calls answered with False."""
        self._agreed: int | None = None
        """Number of calls that are answered with False, once it is known."""
        self._error: WorldError | None = None
        self._asked = False
        self._thread: threading.Thread | None = None
        if world.processes > 1:
            self._thread = threading.Thread(target=self._listen, name=f"agree-{name}", daemon=True)
            self._thread.start()

    def any_asks(self, flag: bool) -> bool:
        """Whether any process asks; the same answer to the same call on every process. Raises WorldError."""
        if self._thread is None:
            return flag
        if flag and not self._asked:
            self._asked = True
            self._wake(range(self._world.processes), "asked")
        with self._lock:  # Held by the thread while it finds out: then this call waits for the outcome.
            if self._error is not None:
                raise self._error
            if self._agreed is not None and self._refused >= self._agreed:
                return True
            self._refused += 1
            return False

    def close(self) -> None:
        """Ends the thread, once every process is here: until then one of them may still ask. Raises WorldError.

        On the way out of a failure (in a `finally`) it waits for nobody: `abandon` ends the others.
        """
        if self._thread is not None and sys.exception() is None:
            barrier(self._world, f"end of {self._key}")
            self._wake([self._world.index], "closed")
            self._thread.join()

    def _wake(self, processes: Iterable[int], why: str) -> None:
        for process in processes:
            world_state().client.key_value_set(f"{self._key}/wake/{process}", why, allow_overwrite=True)

    def _listen(self) -> None:
        client = world_state().client
        try:
            why = _get(f"{self._key}/wake/{self._world.index}", "", FOREVER_SECONDS)
            with self._lock:
                client.key_value_set(f"{self._key}/refused/{self._world.index}", str(self._refused))
                if why == "asked":
                    self._agreed = max(self._refused_by(process) for process in range(self._world.processes))
        except (WorldError, RuntimeError) as error:
            self._error = WorldError(f"the processes could not agree on {self._key}: {error}")

    def _refused_by(self, process: int) -> int:
        return int(_get(f"{self._key}/refused/{process}", f"process {process}'s answer", ANSWER_SECONDS))


def _watch(world: World) -> None:
    """From here on this process notices when another one dies without a word."""
    client = world_state().client
    _undo.append(world_watch.on_abort(lambda: _aborted(world)))
    if world.is_writer:

        def lost(index: int) -> None:
            if not _leaving.is_set():
                with contextlib.suppress(RuntimeError):  # it said why, or another one failed: that is the reason
                    client.key_value_set(FAILED_KEY, f"process {index} of {world.processes} ended without a word")

        client.key_value_set(WATCH_KEY, world_watch.listen(lost))
        return
    host = world.address.rpartition(":")[0]
    told = _get(WATCH_KEY, "where process 0 can be watched", ANSWER_SECONDS)
    what = f"process 0 of {world.processes} ended without a word"
    global _is_first_gone
    _is_first_gone = world_watch.watch(host, told, world.index, lambda: _end_because(world, what))


def _aborted(world: World) -> None:
    """Has the word before native code aborts this process: JAX's client does that when it loses the others."""
    log = f"logs/native-{world.index}.log of the run"
    if _leaving.is_set():  # this process failed, maybe of the same loss, and is about to say so: `abandon` ends it
        time.sleep(REPORT_SECONDS)
        _exit(1)
    if _is_first_gone():
        _end_because(world, f"process 0 of {world.processes} ended without a word")
    if "JAX distributed service detected fatal errors" in world_watch.native_words():
        what = f"another of the {world.processes} does not answer: it is frozen, or its host is gone"
        _end_because(world, f"{what} ({log} may name it)")
    sys.stderr.write(f"jaxscale: native code aborts process {world.index}; what it says is here, or in {log}\n")


def _end_because(world: World, reason: str) -> None:
    """Ends this process at once, without a word to the others: they, or what they meet at, may be gone."""
    if _leaving.is_set():
        return
    _ending.acquire()  # for good, as in `_end`
    again = "start all of them again to go on from the newest checkpoint"
    sys.stderr.write(f"jaxscale: process {world.index} ends because {reason}; {again}\n")
    _exit(1)


def _follow_failures(world: World) -> None:
    """Ends this process when another one says that it failed: the main thread may hang in a collective with it."""
    try:
        reason = world_state().client.blocking_key_value_get(FAILED_KEY, FOREVER_SECONDS * 1000)
    except RuntimeError:  # The service is gone, with process 0; JAX's own client ends this process then.
        return
    if reason and not _leaving.is_set():
        sys.stderr.write(f"jaxscale: process {world.index} ends because {reason}\n")
        _end(world)


def _end(world: World) -> None:
    """Ends this process at once, with code 1; process 0, which hosts the service that the others use, as the last.

    JAX's client aborts a process that loses the service, with a stack trace in place of the reason.
    """
    _ending.acquire()  # for good: whoever comes second waits here until the process is gone
    sys.stdout.flush()
    sys.stderr.flush()
    client = world_state().client
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(RuntimeError):
        gone = client.key_value_increment(GONE_KEY, 0 if world.is_writer else 1)
        while world.is_writer and gone < world.processes - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            gone = client.key_value_increment(GONE_KEY, 0)
    os._exit(1)


def _get(key: str, what: str, timeout_seconds: float) -> str:
    try:
        return str(world_state().client.blocking_key_value_get(key, int(timeout_seconds * 1000)))
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise WorldError(f"waiting for {what} failed: {error}") from error
        raise WorldError(
            f"waited {timeout_seconds:g} s for {what}; its process is gone, hung, or much slower"
        ) from error
