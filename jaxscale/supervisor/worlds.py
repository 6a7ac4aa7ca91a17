"""Which hosts form the next world, in which order, on which mesh. Pure: from who is usable to members and axis sizes.

A world keeps every mesh axis of the requested one except `data`, which runs over slices: a lost slice makes it shorter.
Where no whole slice is left (one slice lost a host), hosts are left out instead and `fsdp` is made shorter; sizes that
the model's tensors do not allow are tried with more of `data` and less of `fsdp`, because rows are padded and weights
are not. The global batch and the number of microbatches never change: `axes.padded_batch` pads for the new shards.
Read next: `policy.py`, which decides when a world is left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace


class ImpossibleRequest(ValueError):
    """A requested world that no hosts can form. The message has the numbers."""


@dataclass(frozen=True)
class Host:
    """A host of the job, usable or not."""

    name: str
    slice: int | None
    """None: a spare that can stand in for a host of any slice."""
    devices: int = 1
    is_emulated: bool = True
    """Its devices are emulated; all hosts of a world are alike in that."""


def anything_goes(_sizes: Mapping[str, int]) -> bool:
    """For a model that any mesh can hold."""
    return True


@dataclass(frozen=True)
class Request:
    """The world that the recipe asks for: `slices` x `hosts_per_slice` x `devices_per_host`.

    Raises ImpossibleRequest when the axes do not multiply to the devices.
    """

    slices: int
    hosts_per_slice: int
    devices_per_host: int
    sizes: Mapping[str, int]
    """Every mesh axis with its resolved size (`mesh.resolve_sizes`)."""
    legal: Callable[[Mapping[str, int]], bool] = field(default=anything_goes, compare=False)
    """Whether the model's tensors can be laid out on a mesh of these sizes (the audit, and memory)."""
    least_hosts: int = 1
    """A smaller world than this is not worth its money: better to wait."""

    def __post_init__(self) -> None:
        devices = self.slices * self.hosts_per_slice * self.devices_per_host
        product = math.prod(self.sizes.values())
        if min(self.slices, self.hosts_per_slice, self.devices_per_host) < 1 or product != devices:
            raise ImpossibleRequest(
                f"mesh {_axes(self.sizes)} = {product} does not match {self.slices} slices x {self.hosts_per_slice} "
                f"hosts x {self.devices_per_host} devices = {devices}; change --slices, --hosts-per-slice, "
                f"--devices-per-host or the mesh"
            )
        if {"data", "fsdp"} - self.sizes.keys() or self.sizes["data"] % self.slices:
            raise ImpossibleRequest(
                f"mesh axis 'data' ({self.sizes.get('data')}) is not a multiple of the {self.slices} slices that it "
                f"runs across; leave mesh.data unset"
            )

    @property
    def hosts(self) -> int:
        """How many hosts the whole world has."""
        return self.slices * self.hosts_per_slice


@dataclass(frozen=True)
class PlannedWorld:
    """Members in rank order, by (slice, host), and the mesh they form."""

    members: tuple[Host, ...]
    axes: tuple[tuple[str, int], ...]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def slices(self) -> tuple[int, ...]:
        """Slices that take part, in order."""
        return tuple(dict.fromkeys(member.slice for member in self.members if member.slice is not None))

    def rank(self, host: str) -> int:
        """Raises ValueError for a host that is no member."""
        return self.names.index(host)


def plan(request: Request, usable: Sequence[Host], current: PlannedWorld | None = None) -> PlannedWorld | None:
    """The best world of the usable hosts, spares among them; None where there is no legal one.

    As many whole slices as there are; without a whole slice as many hosts as possible, the same number from each slice.
    Members of `current` are preferred: they have their state in memory and their programs compiled.
    """
    places = _places(request, usable, current)
    for count, hosts in _shapes(request, places):
        for sizes in _layouts(request, count, hosts):
            if request.legal(sizes):
                members = _members(places, count, hosts, current)
                return PlannedWorld(members, tuple(sizes.items()))
    return None


def next_smaller(request: Request, world: PlannedWorld) -> PlannedWorld | None:
    """The world after the next loss, for compiling its programs before it comes.

    Which slice or host will be lost is unknown, and does not matter: programs depend on sizes only.
    """
    last = world.slices[-1]
    left = [m for m in world.members if m.slice != last] if len(world.slices) > 1 else list(world.members[:-1])
    return plan(request, left, world)


def grown(request: Request, usable: Sequence[Host], current: PlannedWorld) -> PlannedWorld | None:
    """A world with more hosts than the current one, now that some are back; None where there is none."""
    larger = plan(request, usable, current)
    return larger if larger is not None and len(larger.members) > len(current.members) else None


def replacements(world: PlannedWorld, lost: Sequence[str], spares: Sequence[Host]) -> tuple[tuple[str, str], ...]:
    """(lost host, spare) for each lost host, the spares of its own slice first; empty unless there is one for each."""
    free = sorted(spares, key=_order)
    pairs = []
    for name in lost:
        old = world.members[world.rank(name)]
        fitting = [s for s in free if s.slice in (old.slice, None) and s.devices == old.devices]
        if not fitting:
            return ()
        spare = min(fitting, key=lambda s: s.slice is None)
        free.remove(spare)
        pairs.append((name, spare.name))
    return tuple(pairs)


def _places(request: Request, usable: Sequence[Host], current: PlannedWorld | None) -> dict[int, list[Host]]:
    """Usable hosts by slice, current members first, at most as many as a slice has; floating spares fill the gaps."""
    now = {member.name: member for member in current.members} if current is not None else {}
    # A spare that already stands in for a host of some slice belongs to that slice.
    hosts = [now.get(host.name, host) for host in usable if host.devices == request.devices_per_host]
    hosts.sort(key=lambda host: (host.name not in now, _order(host)))
    places: dict[int, list[Host]] = {index: [] for index in range(request.slices)}
    for host in hosts:
        if host.slice in places and len(places[host.slice]) < request.hosts_per_slice:
            places[host.slice].append(host)
    floating = [host for host in hosts if host.slice is None]
    # The slice that lacks least is made whole first.
    for index in sorted(places, key=lambda index: -len(places[index])):
        while floating and len(places[index]) < request.hosts_per_slice:
            places[index].append(replace(floating.pop(0), slice=index))
    return places


def _shapes(request: Request, places: Mapping[int, Sequence[Host]]) -> Iterator[tuple[int, int]]:
    """(slices, hosts of each) that the hosts allow, best first."""
    there = [len(hosts) for hosts in places.values()]
    whole = sum(count >= request.hosts_per_slice for count in there)
    shapes = [(count, request.hosts_per_slice) for count in range(whole, 0, -1)]
    smaller = [
        (count, hosts)
        for hosts in range(1, request.hosts_per_slice)
        for count in range(1, sum(usable >= hosts for usable in there) + 1)
    ]
    smaller.sort(key=lambda shape: (-shape[0] * shape[1], shape[0]))
    for count, hosts in [*shapes, *smaller]:
        if count * hosts >= request.least_hosts:
            yield count, hosts


def layouts(request: Request) -> list[dict[str, int]]:
    """Axis sizes of every world that could be formed, the requested one among them."""
    counts = [
        (slices, hosts) for slices in range(1, request.slices + 1) for hosts in range(1, request.hosts_per_slice + 1)
    ]
    found: list[dict[str, int]] = []
    for slices, hosts in counts:
        found += [sizes for sizes in _layouts(request, slices, hosts) if sizes not in found]
    return found


def _layouts(request: Request, slices: int, hosts: int) -> Iterator[dict[str, int]]:
    """Axis sizes for so many slices and hosts, the most like the requested ones first."""
    sizes = dict(request.sizes)
    data = sizes["data"] // request.slices
    if hosts == request.hosts_per_slice:
        yield sizes | {"data": data * slices}
        return
    fixed = math.prod(size for axis, size in sizes.items() if axis not in ("data", "fsdp"))
    devices = hosts * request.devices_per_host
    if devices % fixed:
        return
    free = devices // fixed
    splits = [split for split in range(1, free + 1) if free % split == 0]
    # Less of fsdp means more memory for each device, so as much of it as is legal.
    for split in sorted(splits, key=lambda split: (split != data, split)):
        yield sizes | {"data": split * slices, "fsdp": free // split}


def _members(
    places: Mapping[int, Sequence[Host]], count: int, hosts: int, current: PlannedWorld | None
) -> tuple[Host, ...]:
    there = current.slices if current is not None else ()
    fitting = [index for index in places if len(places[index]) >= hosts]
    chosen = sorted(fitting, key=lambda index: (index not in there, index))[:count]
    return tuple(sorted((host for index in chosen for host in places[index][:hosts]), key=_order))


def _order(host: Host) -> tuple[int, list[tuple[int, str]]]:
    """By slice, then by name with numbers as numbers: host-2 before host-10."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", host.name)]
    return (-1 if host.slice is None else host.slice, parts)


def _axes(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "of one device"
