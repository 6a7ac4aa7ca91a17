"""Event loops for tests: a limit that only a hang reaches, and waiting for what is about to happen."""

import asyncio

SECONDS = 60


def run(work):
    """Runs a coroutine and returns what it gives."""

    async def limited():
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)
