"""A partition without namespaces or root: each agent reaches the coordinator through a proxy that can fall silent.

Only the way to the coordinator is cut: hosts still reach each other, as in a network that is split for some routes and
not for others. Where namespaces are allowed, `namespaces.py` cuts everything. Read next: `separated.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence

from jaxscale.supervisor.zygote import free_port

CHUNK = 1 << 16
END_SECONDS = 10.0


class Proxy:
    """Passes bytes on between whoever connects and one address. While it is cut nothing is refused, nothing arrives."""

    def __init__(self, target: str) -> None:
        """Listens at once; raises OSError."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-to-{target}", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(END_SECONDS)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())

    def cut(self) -> None:
        """From now on bytes wait, and so does whoever connects."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        """What waited arrives, as what TCP sends again does."""
        self._loop.call_soon_threadsafe(self._open.set)

    def close(self) -> None:
        """Ends every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(END_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_SECONDS)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            there, here = await asyncio.open_connection(self._host, self._port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(reader, here))
                    both.create_task(self._pass_on(there, writer))
            finally:
                here.close()
        except* (OSError, asyncio.CancelledError):
            pass  # one side is gone; the other one learns it from its connection
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        await self._open.wait()
        raise ConnectionError("this side has ended")  # then so does the other

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ProxiedNetwork:
    """Hosts of one machine, of which each has a proxy on its way to the coordinator of host 0."""

    def __init__(self, count: int) -> None:
        self.port = free_port("127.0.0.1")
        self._proxies: dict[int, Proxy] = {}
        self._count = count

    def address(self, index: int) -> str:
        """Of a host: the same for all."""
        assert index < self._count
        return "127.0.0.1"

    def inside(self, index: int) -> list[str]:
        """What to put before a command of this host: nothing."""
        assert index < self._count
        return []

    def way(self, index: int, target: str) -> str:
        """At which address this host finds the target."""
        if index not in self._proxies:
            self._proxies[index] = Proxy(target)
        return self._proxies[index].address

    def cut(self, some: Sequence[int], others: Sequence[int]) -> None:
        """The hosts on the other side than host 0 lose the coordinator there."""
        for index in others if 0 in some else some:
            self._proxies[index].cut()

    def heal(self) -> None:
        """Everybody reaches the coordinator again."""
        for proxy in self._proxies.values():
            proxy.heal()

    def processes(self) -> set[int]:
        """Those that only this network knows of."""
        return set()

    def remove(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()


@contextlib.contextmanager
def proxied(count: int) -> Iterator[ProxiedNetwork]:
    """Such a network, with no connection left on the way out."""
    made = ProxiedNetwork(count)
    try:
        yield made
    finally:
        made.remove()
