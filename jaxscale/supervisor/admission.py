"""Who may take part: reads the first word of an agent, and refuses one that this run can never use, with the reason.

A host that was let in and is never used waits without a word, and nobody learns why. Pure. Read next: `coordinator.py`.
"""

from __future__ import annotations

import ipaddress

from jaxscale.supervisor.evidence import SECTIONS
from jaxscale.supervisor.facts import Host, Hosts
from jaxscale.supervisor.quorum import Acceptor
from jaxscale.supervisor.rpc import VERSION, Message, Refused
from jaxscale.supervisor.takeover import find_epoch
from jaxscale.supervisor.worlds import Request

SPARE = -1
"""Slice of a host that may stand in anywhere."""


def read_hello(hello: Message) -> tuple[Host, Acceptor, str]:
    """The host, its voter and its job. Raises Refused for a hello of another version, or one that makes no sense."""
    try:
        version, job = hello["version"], str(hello["job"])
        host = Host(
            name=str(hello["host"]),
            slice=int(hello["slice"]),
            devices=int(hello["devices"]),
            peer=str(hello["peer"]),
            control=str(hello["control"]),
            pid=int(hello["pid"]),
            is_ready=bool(hello["ready"]),
            fenced=int(hello["fenced"]),
            copies=list(hello["copies"]),
            work=hello["work"],
            took=[(SECTIONS[SECTIONS.index(name)], float(took), bool(first)) for name, took, first in hello["took"]],
            committed=int(hello["committed"]),
            is_leaving=bool(hello["leaving"]),
        )
        acceptor = Acceptor.from_json(hello["acceptor"])
        if host.work is not None:
            find_epoch([host])  # each tick may look for it: what is no epoch must not get so far
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"a hello that lacks something: {error!r}") from error
    if version != VERSION:
        raise Refused(f"agent {host.name} speaks version {version}, this coordinator {VERSION}; use one jaxscale")
    return host, acceptor, job


def check_shape(host: Host, request: Request, hosts: Hosts) -> None:
    """Raises Refused for a host that has no place in any world of this run. `hosts`: those that are known."""
    name, slices, each = host.name, request.slices, request.devices_per_host
    if not SPARE <= host.slice < slices:
        there = "slice 0 alone" if slices == 1 else f"slices 0 to {slices - 1}"
        raise Refused(
            f"agent {name} is of slice {host.slice}, and this run has {there}; start the agent with one of these as "
            f"--slice ({SPARE}: a spare), or the coordinator with more --slices"
        )
    if host.devices not in (0, each):
        raise Refused(
            f"agent {name} emulates {host.devices} devices, and this run has {each} on each host; start the agent with "
            f"--devices {each}, or the coordinator with --devices-per-host {host.devices}"
        )
    for other in hosts.values():
        if other.is_connected and other.name != name and (other.devices == 0) != (host.devices == 0):
            mine, others = ("real devices", "emulated ones") if host.devices == 0 else ("emulated devices", "real ones")
            raise Refused(
                f"agent {name} has {mine} and {other.name} has {others}, which make no world together; start all "
                f"agents with --devices {each} (emulated), or all with --devices 0 (real)"
            )
        if other.is_connected and other.name != name and _is_here_alone(other) != _is_here_alone(host):
            alone, reached = (host, other) if _is_here_alone(host) else (other, host)
            raise Refused(
                f"agent {alone.name} listens at {alone.peer}, where only its own machine reaches it, and "
                f"{reached.name} at {reached.peer}: they make no world together; start {alone.name} with --listen and "
                "an address at which the other hosts reach it"
            )


def _is_here_alone(host: Host) -> bool:
    """Whether its agent listens on the loopback interface. Agents tell numbers; a name is not asked for here."""
    try:
        return ipaddress.ip_address(host.peer.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False
