"""The private calls of JAX that worlds of several processes and the supervisor stand on, all of them, in one place.

JAX's public `jax.distributed.initialize` makes process 0 the home of the coordination service, and a process that loses
the service is aborted: the death of one worker would take the others' agents of agreement with it. Under a supervisor
the service lives in a process of its own (`supervisor/zygote.py`, the epoch host) and JAX's heartbeats, which kill, are
disarmed: detection is the agent's work. The contract is in `tests/supervisor/test_jax_private.py` and
`tests/test_world.py`, which say which call changed. Read next: `supervisor/zygote.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax

DISARMED_SECONDS = 30 * 24 * 3600
"""JAX's own heartbeat limit: longer than any epoch. Ours decide."""

CONNECT_SECONDS = 20
"""How long a worker waits for the others of its epoch to connect."""


def world_state() -> Any:
    """JAX's record of the world, with the coordination service's client: there is no public way to its key-value store
    and barriers.
    """
    from jax._src.distributed import global_state

    return global_state


def serve(address: str, processes: int) -> Any:
    """Starts the coordination service of one epoch; it lives as long as the returned object. Listens when it returns.

    `address`: where to listen, `host:port`. Raises RuntimeError where it cannot.
    """
    from jax._src.lib import _jax

    _check_free(address)
    return _jax.get_distributed_runtime_service(
        address,
        processes,
        heartbeat_timeout=DISARMED_SECONDS,
        cluster_register_timeout=CONNECT_SECONDS,
        shutdown_timeout=1,
        recoverable=False,
    )


def _check_free(address: str) -> None:
    """Where the port is taken, jaxlib 0.12.0.1 ends in a segmentation fault about every second time; so look first."""
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            raise RuntimeError(f"the coordination service cannot listen on {address}: {error.strerror}") from error


def connect(address: str, processes: int, rank: int) -> None:
    """Makes this process number `rank` of a world of `processes`, as `jax.distributed.initialize` does for others.

    Returns when all have connected; raises RuntimeError after CONNECT_SECONDS. Call it before a backend exists.
    """
    from jax._src import distributed
    from jax._src.lib import _jax

    state = distributed.global_state
    client = _jax.get_distributed_runtime_client(
        address,
        rank,
        init_timeout=CONNECT_SECONDS,
        shutdown_timeout=1,
        heartbeat_timeout=DISARMED_SECONDS,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    client.connect()
    state.client, state.process_id, state.num_processes = client, rank, processes
    state.coordinator_address = address


def gloo_at(host: str) -> None:
    """Has the CPU backend's collectives listen at `host`; call it after `connect` and before a backend exists.

    JAX takes what the machine's own name resolves to, which on many machines is a loopback address.
    """
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    def client() -> Any:
        collectives = _jax.make_gloo_tcp_collectives(distributed_client=distributed.global_state.client, hostname=host)
        return xla_bridge.make_cpu_client(collectives)

    registered = xla_bridge._backend_factories["cpu"]
    xla_bridge._backend_factories["cpu"] = dataclasses.replace(registered, factory=client)


def has_backend() -> bool:
    """Whether this process has made a backend: after that it must not fork."""
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compiles what is compiled inside anew: a CPU program that came from JAX's cache cannot be serialised again.

    It serialises without an error, and loading fails ("Function ... not found"); jax 0.12.0.1.
    """
    from jax._src import compilation_cache

    with _compiling:
        if not _without:
            _enabled.append(jax.config.jax_enable_compilation_cache)
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()  # it remembers whether it is used
        _without.append(None)
    try:
        yield
    finally:
        with _compiling:
            _without.pop()
            if not _without:
                jax.config.update("jax_enable_compilation_cache", _enabled.pop())
                compilation_cache.reset_cache()


_compiling = threading.Lock()
_without: list[None] = []
"""One entry for each thread that compiles without the cache."""
_enabled: list[bool] = []
"""What the first of them found."""
