"""Which step to restore, and from where: the newest one whose every array is covered by slots that somebody holds.

Any mix of hosts' own slots and copies of them will do, as long as all are of one step and one epoch; epochs are never
mixed. Decisions only, no files: the coordinator chooses, and sends the choice to the workers. Read next:
`assemble.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxscale.checkpoint.boxes import Box, text, uncovered, volume, whole
from jaxscale.checkpoint.slot_format import ArrayInfo, Shard, SlotError, SlotTable, table_from_json
from jaxscale.track import lines

Lineage = Sequence[tuple[int, int]]
"""(epoch, step that it started from) of every epoch that was formed, in any order."""


@dataclass(frozen=True)
class Copy:
    """A slot file that a host holds: its own, or a copy of another's."""

    holder: str
    """The host where the file lies."""
    file: str
    table: SlotTable


@dataclass(frozen=True)
class Location:
    """Where the bytes of a shard can be had."""

    holder: str
    file: str
    offset: int


@dataclass(frozen=True)
class Source:
    """A shard of the chosen state, with every place that has it, best first."""

    path: str
    box: Box
    nbytes: int
    digest: str
    locations: tuple[Location, ...]

    def at(self, location: Location) -> Shard:
        """The shard as the file at one of the locations holds it."""
        return Shard(self.path, self.box, location.offset, self.nbytes, self.digest)


@dataclass(frozen=True)
class Damaged:
    """A slot file that turned out bad while loading this step, or one shard of it (where `path` is given)."""

    holder: str
    file: str
    step: int
    epoch: int
    path: str = ""
    box: Box = ()

    def spoils(self, copy: Copy, shard: Shard) -> bool:
        """Whether this is about that shard of that copy; what a file held before or holds later is not meant."""
        slot = (copy.holder, copy.file, copy.table.step, copy.table.epoch)
        same = slot == (self.holder, self.file, self.step, self.epoch)
        return same and (not self.path or (shard.path, shard.box) == (self.path, self.box))


@dataclass(frozen=True)
class Choice:
    """A step that can be restored."""

    step: int
    epoch: int
    """Of the worker world that wrote it."""
    job: str
    record: Mapping[str, Any]
    arrays: Mapping[str, ArrayInfo]
    shards: tuple[Source, ...]

    def seen_from(self, holder: str) -> Choice:
        """The same choice with the locations ordered for a host: its own first, the load spread over the others."""

        def order(source: Source) -> Source:
            def key(location: Location) -> tuple[bool, int]:
                return location.holder != holder, zlib.crc32(f"{holder} {source.path} {location.holder}".encode())

            return replace(source, locations=tuple(sorted(source.locations, key=key)))

        return replace(self, shards=tuple(map(order, self.shards)))


def is_valid(step: int, epoch: int, lineage: Lineage) -> bool:
    """Whether a slot still belongs to the run's history: no later epoch went back behind its step."""
    return all(start >= step for later, start in lineage if later > epoch)


def choose(copies: Iterable[Copy], lineage: Lineage, excluded: Collection[Damaged] = ()) -> Choice | None:
    """The newest step (of several epochs' the last) that is complete, or None.

    Complete: every array of the state is covered by shards of valid copies of this one step and epoch. `excluded` does
    not count; so after a load that met damage, the next source is taken, and where there is none, an older step.
    """
    for group in _groups(copies, lineage):
        sources = _sources(group, excluded)
        if next(_gaps(group[0].table.arrays, sources), None) is None:
            table = min((copy.table for copy in group), key=lambda table: table.rank)
            return Choice(table.step, table.epoch, table.job, table.record, table.arrays, sources)
    return None


def explain(
    copies: Iterable[Copy], lineage: Lineage, hosts: Collection[str] = (), excluded: Collection[Damaged] = ()
) -> list[str]:
    """For people: a line for each step that somebody holds, newest first, with what it lacks.

    `hosts`: all that took part, to name those of which nothing is there; hosts that any copy names are known anyway.
    """
    copies = list(copies)
    known = set(hosts) | {copy.table.host for copy in copies}
    report = []
    for group in _groups(copies, None):
        table = group[0].table
        name = f"step {table.step} of epoch {table.epoch}"
        if not is_valid(table.step, table.epoch, lineage):
            later, start = min((e, s) for e, s in lineage if e > table.epoch and s < table.step)
            report.append(f"{name} is void: epoch {later} started again from step {start}")
            continue
        gaps = list(_gaps(table.arrays, _sources(group, excluded)))
        if not gaps:
            report.append(f"{name} is complete")
            continue
        there = {copy.table.host for copy in group}
        missing = ", ".join(sorted(known - there)) or "no host"
        bad = sum(any(d.spoils(c, s) for d in excluded) for c in group for s in c.table.shards)
        report.append(
            f"{name} is incomplete: {gaps[0][0]} {text(gaps[0][1])} is nowhere"
            + (f", and parts of {len(gaps) - 1} more of its {len(table.arrays)} arrays" if len(gaps) > 1 else "")
            + f"; there are slots of {', '.join(sorted(there))}, none of {missing}"
            + (f"; damaged shards left out: {bad}" if bad else "")
        )
    return report


def choice_to_json(choice: Choice) -> dict[str, Any]:
    """A choice as plain values, for a message."""
    return {
        "step": choice.step,
        "epoch": choice.epoch,
        "job": choice.job,
        "record": lines.mark(choice.record),
        "arrays": {path: [list(info.shape), info.dtype] for path, info in choice.arrays.items()},
        "shards": [
            [
                s.path,
                [list(pair) for pair in s.box],
                s.nbytes,
                s.digest,
                [[x.holder, x.file, x.offset] for x in s.locations],
            ]
            for s in choice.shards
        ],
    }


def choice_from_json(value: Any) -> Choice:
    """The choice of `choice_to_json`, checked as a slot's table is. Raises SlotError."""
    try:
        items = [
            (holder, file, [path, box, offset, nbytes, digest])
            for path, box, nbytes, digest, locations in value["shards"]
            for holder, file, offset in locations
        ]
        checked = table_from_json(value | {"host": "all", "rank": 0, "shards": [item for *_, item in items]})
    except (KeyError, TypeError, ValueError) as error:
        raise SlotError(f"this is no choice of a step to restore: {error!r}") from error
    found: dict[tuple[str, Box], Source] = {}
    for (holder, file, _), shard in zip(items, checked.shards, strict=True):
        source = found.get((shard.path, shard.box)) or Source(shard.path, shard.box, shard.nbytes, shard.digest, ())
        location = Location(str(holder), str(file), shard.offset)
        found[shard.path, shard.box] = replace(source, locations=(*source.locations, location))
    return Choice(checked.step, checked.epoch, checked.job, checked.record, checked.arrays, tuple(found.values()))


def _groups(copies: Iterable[Copy], lineage: Lineage | None) -> Iterator[list[Copy]]:
    """Copies that can make one state together, newest first: same step, epoch and arrays; of two sets the larger."""
    by_step: dict[tuple[int, int], list[list[Copy]]] = {}
    for copy in copies:
        step, epoch = copy.table.step, copy.table.epoch
        if lineage is not None and not is_valid(step, epoch, lineage):
            continue
        groups = by_step.setdefault((step, epoch), [])
        for group in groups:
            if (group[0].table.job, group[0].table.arrays) == (copy.table.job, copy.table.arrays):
                group.append(copy)
                break
        else:
            groups.append([copy])
    for key in sorted(by_step, reverse=True):
        yield from sorted(by_step[key], key=len, reverse=True)


def _sources(group: Sequence[Copy], excluded: Collection[Damaged]) -> tuple[Source, ...]:
    """Every distinct shard with its locations: the one who wrote it first, the others by name.

    Where copies of a shard disagree, the digest with the most locations counts.
    """
    found: dict[tuple[str, Box], dict[str, list[tuple[bool, Location, int]]]] = {}
    for copy in group:
        for shard in copy.table.shards:
            if volume(shard.box) and not any(damage.spoils(copy, shard) for damage in excluded):
                location = Location(copy.holder, copy.file, shard.offset)
                by_digest = found.setdefault((shard.path, shard.box), {})
                by_digest.setdefault(shard.digest, []).append((copy.holder != copy.table.host, location, shard.nbytes))
    sources = []
    for (path, box), by_digest in found.items():
        digest, places = max(by_digest.items(), key=lambda item: (len(item[1]), item[0]))
        places.sort(key=lambda place: (place[0], place[1].holder, place[1].file))
        sources.append(Source(path, box, places[0][2], digest, tuple(location for _, location, _ in places)))
    return tuple(sorted(sources, key=lambda source: (source.path, source.box)))


def _gaps(arrays: Mapping[str, ArrayInfo], sources: Iterable[Source]) -> Iterator[tuple[str, Box]]:
    """Each array that is not covered, with a part of it that nobody holds."""
    held: dict[str, list[Box]] = {}
    for source in sources:
        held.setdefault(source.path, []).append(source.box)
    for path, info in arrays.items():
        gap = uncovered(whole(info.shape), held.get(path, ()))
        if gap is not None:
            yield path, gap
