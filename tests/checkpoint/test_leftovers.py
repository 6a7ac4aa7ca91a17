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

theirs = {"__name__": "orbax.checkpoint.some_file"}
exec("def fail(): raise OSError(28, 'No space left on device')", theirs)

def unasked(function):
    # A future whose exception nobody asks for.
    future = asyncio.new_event_loop().create_future()
    try:
        function()
    except Exception as error:
        future.set_exception(error)

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


def test_another_write_that_fails_says_nothing():
    of_tensorstore = "asyncio.new_event_loop().create_future().set_exception(ValueError('RESOURCE_EXHAUSTED'))"
    assert words_after("unasked(theirs['fail'])", of_tensorstore) == ""


def test_and_what_others_say_is_printed():
    late = ("Late(RuntimeError('no room'))", "Late(ValueError('Event loop is closed'))")
    told = words_after(*late, "mine()", "unasked(lambda: 1 / 0)", "unasked(lambda: int('x'))")
    assert "ZeroDivisionError" in told
    assert "ValueError: invalid literal" in told
    assert "RuntimeError: no room" in told
    assert "ValueError: Event loop is closed" in told
    assert "coroutine 'mine' was never awaited" in told
