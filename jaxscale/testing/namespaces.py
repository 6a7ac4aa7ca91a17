"""Hosts with networks of their own on this machine, to be cut off from one another: `ip netns`, veth, blackhole routes.

Needs root and iproute2; `unavailable()` says what is missing. Read next: `separated.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

PORT = 8476
"""Of the coordinator: each namespace has all ports to itself."""


class Network:
    """`count` namespaces on one bridge. `cut` and `heal` change who reaches whom."""

    def __init__(self, count: int) -> None:
        number = os.getpid()
        self._subnet = f"10.231.{number % 250}"
        self._bridge = f"jxb{number}"
        self.names = [f"jx{number}-{i}" for i in range(count)]
        self.port = PORT
        self._cuts: list[tuple[int, int]] = []

    def address(self, index: int) -> str:
        return f"{self._subnet}.{index + 1}"

    def inside(self, index: int) -> list[str]:
        """What to put before a command so that it runs in this namespace."""
        return ["ip", "netns", "exec", self.names[index]]

    def way(self, index: int, target: str) -> str:
        """At which address this host finds the target: there, as all do."""
        assert index < len(self.names)
        return target

    def processes(self) -> set[int]:
        """All that run in the namespaces."""
        found: set[int] = set()
        for name in self.names:
            said = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            found |= {int(word) for word in said.stdout.split()}
        return found

    def make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for i, name in enumerate(self.names):
            outer, inner = self._outer(i), f"jxi{os.getpid()}-{i}"[:15]
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", name)
            _ip("link", "set", outer, "master", self._bridge)
            _ip("link", "set", outer, "up")
            _ip("-n", name, "addr", "add", f"{self.address(i)}/24", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def cut(self, some: Sequence[int], others: Sequence[int]) -> None:
        """From now on neither side hears the other: nothing is refused, nothing arrives."""
        for a in some:
            for b in others:
                for here, there in ((a, b), (b, a)):
                    _ip("-n", self.names[here], "route", "add", "blackhole", f"{self.address(there)}/32")
                    self._cuts.append((here, there))

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        for here, there in self._cuts:
            _ip("-n", self.names[here], "route", "del", "blackhole", f"{self.address(there)}/32")
        self._cuts = []

    def remove(self) -> None:
        """Processes in the namespaces must have ended. The kernel may take its time with a namespace and the links that
        reach into it; the next network has the same names, so the links are deleted by themselves.
        """
        for i, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", self._outer(i))
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)

    def _outer(self, index: int) -> str:
        """Name of the end of a host's link that is on this side; 15 characters are allowed."""
        return f"jxo{os.getpid()}-{index}"[:15]


def unavailable() -> str:
    """Why no namespaces can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (iproute2)"
    name = f"jxtry{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Makes the namespaces, and removes them on the way out."""
    made = Network(count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
