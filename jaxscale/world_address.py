"""The address of a world: how `--distributed` names it, and that process 0 alone has its port.

Read next: `world.py`, which forms the world there.
"""

from __future__ import annotations

import os
import socket
import sys

from jaxscale.config import ConfigError
from jaxscale.train.protocols import World


class WorldError(RuntimeError):
    """A world that did not form, or a member that did not answer in time. The message names it."""


_held: dict[int, socket.socket] = {}
"""What keeps another process 0 on this host off a port, by port."""


def parse_distributed(text: str) -> World | None:
    """`--distributed`: `auto` -> None (JAX finds the world), ADDRESS,N,I -> process I of N, empty -> a world of one.

    Raises ConfigError.
    """
    if not text:
        return World()
    if text == "auto":
        return None
    form = (
        "use `auto`, or ADDRESS,N,I such as 10.0.0.1:8476,4,0: process 0 of 4, which listens on port 8476 of 10.0.0.1"
    )
    parts = text.split(",")
    if len(parts) != 3:
        raise ConfigError(f"--distributed {text!r} has {len(parts)} parts, not 3; {form}")
    address, count, index = (part.strip() for part in parts)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--distributed {text!r}: {address!r} is not host:port; {form}")
    if not count.isdigit() or not index.isdigit():
        raise ConfigError(f"--distributed {text!r}: N and I are whole numbers, not {count!r} and {index!r}; {form}")
    if int(index) >= int(count):
        raise ConfigError(f"--distributed {text!r}: there is no process {index} of {count}; I goes from 0 to N-1")
    return World(processes=int(count), index=int(index), address=address)


def hold_port(address: str) -> None:
    """Makes sure that process 0 can listen there, and keeps a second one on this host off until `free_port`.

    Raises WorldError: JAX's service dies without a word of Python where it cannot listen. Where an earlier process 0
    listens already, SO_REUSEPORT lets both have the port, and each would get some of the others and wait for the rest.
    """
    port = _port(address)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # As the service does.
        try:
            probe.bind(("", port))
        except OSError as error:
            raise WorldError(
                f"process 0 cannot listen on port {port} of --distributed {address}: {error.strerror}; another program "
                f"(an earlier run?) has it; choose another port for all processes"
            ) from error
    if sys.platform != "linux" or port in _held:
        return
    # A name in the abstract namespace belongs to a host's network, as the port does, and ends with the process.
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        hold.bind(f"\0jaxscale/process-0/{port}")
    except OSError as error:
        hold.close()
        raise WorldError(
            f"another process 0 on this host has port {port} of --distributed {address}: an earlier run, or a second "
            "start of this one; wait for it, stop it, or choose another port for all processes"
        ) from error
    _held[port] = hold


def free_port(address: str) -> None:
    """Lets the next process 0 have the port."""
    if hold := _held.pop(_port(address), None):
        hold.close()


def did_not_form(world: World | None, timeout_seconds: float) -> None:
    """Ends this process, whose main thread waits inside JAX for the others, or which JAX's client aborts (0 s)."""
    if world is None:
        what = "not all processes of the cluster that JAX found came"
    elif world.is_writer:
        what = f"process 0 listens on {world.address}, but not all of the other {world.processes - 1} came"
    else:
        others = f"others of the {world.processes} did not come"
        what = f"process {world.index} did not reach process 0 at {world.address}, or {others}"
    hint = "start every process with the same ADDRESS and N, and let the port through"
    span = f" in {timeout_seconds:g} s" if timeout_seconds else ""
    sys.stderr.write(f"jaxscale: the world did not form{span}: {what}; {hint}\n")
    sys.stderr.flush()
    os._exit(1)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
