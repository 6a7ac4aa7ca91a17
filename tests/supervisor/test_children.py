"""What an agent knows of its children."""

import asyncio
import os
import select
import signal
import subprocess
import sys

import pytest

from jaxscale.supervisor.children import Child, is_dying

LARGE = """
import threading, time
memory = bytearray(400 << 20)
for i in range(0, len(memory), 4096):
    memory[i] = 1
for _ in range(8):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
print("ready", flush=True)
time.sleep(100)
"""


@pytest.fixture
def large():
    """A process that takes its time to be gone: it has memory to give back."""
    with subprocess.Popen([sys.executable, "-c", LARGE], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_a_process_that_was_ended_is_dying_from_the_first_moment_to_the_last(large):
    watched = os.pidfd_open(large.pid)
    assert not is_dying(large.pid)
    os.kill(large.pid, signal.SIGKILL)
    seen = []
    while not select.select([watched], [], [], 0)[0]:
        seen.append(is_dying(large.pid))
    os.close(watched)
    assert all(seen)


def test_our_kill_is_not_blamed_for_a_death_that_was_under_way(large):
    async def work():
        ended = asyncio.Event()
        child = Child(large.pid, 1, lambda *_: ended.set())
        os.kill(large.pid, signal.SIGKILL)
        child.kill()
        await ended.wait()
        return child

    child = asyncio.run(work())
    assert (child.exit.signal, child.was_killed) == (signal.SIGKILL, False)


def test_our_kill_of_a_living_process_is_ours(large):
    async def work():
        ended = asyncio.Event()
        child = Child(large.pid, 1, lambda *_: ended.set())
        child.kill()
        await ended.wait()
        return child

    assert asyncio.run(work()).was_killed
