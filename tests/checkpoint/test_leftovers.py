"""After a failed save nothing but its error is printed, whenever Orbax's other writes end; other words are kept."""

import subprocess
import sys

PREPARED = """
import asyncio, gc, sys
from jaxscale.checkpoint import leftovers
leftovers.quiet()
leftovers.quiet()

class Late:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error

class Store:
    async def write(self):
        pass

async def mine():
    pass

loop = asyncio.new_event_loop()
loop.close()
try:
    loop.call_soon_threadsafe(print)
except RuntimeError as error:
    closed = error
at_exit = Late(closed)
print("error: the disk is full", file=sys.stderr)
"""


def words_after(*lines):
    script = PREPARED + "\n".join((*lines, "gc.collect()"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return result.stderr.partition("error: the disk is full\n")[2]


def test_what_ends_later_says_nothing():
    assert words_after("Late(closed)", "Store().write()", "late = Late(closed)", "late.cycle = late", "del late") == ""


def test_and_what_others_say_is_printed():
    told = words_after("Late(RuntimeError('no room'))", "Late(ValueError('Event loop is closed'))", "mine()")
    assert "RuntimeError: no room" in told
    assert "ValueError: Event loop is closed" in told
    assert "coroutine 'mine' was never awaited" in told
