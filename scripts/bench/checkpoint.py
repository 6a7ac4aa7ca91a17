"""Durable checkpoints: how fast they are written and read, how much memory a restore takes, and what damage gets by.

    python scripts/bench/checkpoint.py [--rows save restore memory flips faults] [--megabytes 400] [--rounds 5]

save      megabytes a second of a save (as a plain run makes it, and as a supervised host makes it from a memory slot),
          beside a raw write by tensorstore of the same arrays in the same files, without digests, alternately
restore   seconds of a verified restore beside Orbax's of the same step, alternately
memory    peak memory of a process that restores, beside the bytes that its devices need, as saved and cut another way
deltas    what a step writes, and how long that takes, where parts of the state did not change since the step before
flips     single bits flipped all over the files of a step, each at a time: how many are found, and how many Orbax loads
faults    files cut short, emptied, removed, folders missing or half deleted, junk: the next good step has to be taken

The arrays are sharded over 8 emulated devices. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.durable import DurableCheckpoints, load_orbax
from jaxscale.checkpoint.finalise import finalise
from jaxscale.checkpoint.memory import MemorySnapshots
from jaxscale.checkpoint.persist import persist
from jaxscale.checkpoint.restore import restore, restore_newest
from jaxscale.checkpoint.room import make_room
from jaxscale.checkpoint.sharing import on_disk
from jaxscale.mesh import emulation_flags
from jaxscale.train.protocols import Record
from jaxscale.tree import flatten

ROWS = ("save", "restore", "memory", "deltas", "flips", "faults")
ARRAYS, ROW = 16, 2048
FLIPS = 400
GONE = (
    "the step removed",
    "junk in its place",
    "a file in its place",
    "commit_success.txt removed",
    "commit_success.txt a folder",
)
"""What leaves nothing that was a finished save: the step before is taken, and there is nothing to tell of."""
SPEC, OTHER_SPEC = P("fsdp"), P(None, "fsdp")
State = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to save; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0, help="of the positions of flipped bits")
    parser.add_argument("--restore-here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = emulation_flags(os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        load_orbax()
        if options.restore_here:
            folder, how = options.restore_here
            print(json.dumps(_restore_here(Path(folder), how, options.megabytes, mesh)))
            return 0
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="jaxscale-checkpoint-") as folder:
            held = [_row(name, options, Path(folder) / name, mesh) for name in options.rows]
    return 0 if all(held) else 1


def _row(name: str, options: argparse.Namespace, folder: Path, mesh: jax.sharding.Mesh) -> bool:
    folder.mkdir()
    match name:
        case "save":
            return _save(folder, options.megabytes, options.rounds, mesh)
        case "restore":
            return _restore(folder, options.megabytes, options.rounds, mesh)
        case "memory":
            return _memory(folder, options.megabytes, mesh)
        case "deltas":
            return _deltas(folder, options.megabytes, options.rounds, mesh)
        case "flips":
            return _flips(folder, options.seed, mesh)
    return _faults(folder, mesh)


def make_state(
    megabytes: float, mesh: jax.sharding.Mesh, seed: int = 0, arrays: int = ARRAYS, rows: int = ROW
) -> State:
    """Float32 matrices of random numbers, `megabytes` in all, sharded over fsdp."""
    columns = max(8, int(megabytes * 1e6 / 4 / arrays / rows) // 8 * 8)
    sharding = NamedSharding(mesh, SPEC)
    keys = jax.random.split(jax.random.key(seed), arrays)
    draw = jax.jit(lambda key: jax.random.normal(key, (rows, columns), out_sharding=sharding))
    return {"params": {f"w{i:02}": draw(key) for i, key in enumerate(keys)}}


def abstract(megabytes: float, mesh: jax.sharding.Mesh, arrays: int = ARRAYS, spec: P = SPEC) -> State:
    columns = max(8, int(megabytes * 1e6 / 4 / arrays / ROW) // 8 * 8)
    leaf = jax.ShapeDtypeStruct((ROW, columns), np.float32, sharding=NamedSharding(mesh, spec))
    return {"params": {f"w{i:02}": leaf for i in range(arrays)}}


def record(step: int) -> Record:
    return Record(step, step, {}, {}, {}, {})


def save(folder: Path, state: State, step: int) -> float:
    """Seconds from the offer until the step exists."""
    checkpoints = DurableCheckpoints(folder, every=1, keep=99)
    started = time.perf_counter()
    checkpoints.offer(step, state, record(step), final=True)
    seconds = time.perf_counter() - started
    checkpoints.close()
    return seconds


def _save(folder: Path, megabytes: int, rounds: int, mesh: jax.sharding.Mesh) -> bool:
    state = make_state(megabytes, mesh)
    total = sum(leaf.nbytes for leaf in flatten(state).values()) / 1e6
    slots = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="jaxscale-checkpoint-"))
    found: dict[str, list[float]] = {"raw": [], "plain": [], "supervised": []}
    try:
        memory = MemorySnapshots(
            slots, job="bench", host="host", rank=0, epoch=1, every=1, generations=1, verdicts=lambda: (-1, -1),
            notify=lambda *_: None,
        )  # fmt: skip
        memory.offer(1, state, record(1), final=True)
        memory.close()
        for number in range(rounds + 1):  # the first one is not counted: folders and code are new
            for name, write in (
                ("raw", lambda: _raw(folder / "raw", state)),
                ("plain", lambda: save(folder / "plain", state, 1)),
                ("supervised", lambda: _supervised(folder / "supervised" / "1", slots)),
            ):
                os.sync()
                seconds = write()
                shutil.rmtree(folder / name)
                if number:
                    found[name].append(total / seconds)
    finally:
        shutil.rmtree(slots)
    raw = statistics.median(found["raw"])
    print(f"save       {total:.0f} MB, {rounds} rounds: raw tensorstore {raw:.0f} MB/s", flush=True)
    held = True
    for name in ("plain", "supervised"):
        rate = statistics.median(found[name])
        held = held and rate >= 0.8 * raw
        print(f"           {name:<10} {rate:.0f} MB/s, {rate / raw:.2f} of raw (to reach: 0.8)", flush=True)
    return held


def _raw(folder: Path, state: State) -> float:
    """The same shards in the same files, by tensorstore alone, on the disk when it is done."""
    import tensorstore

    started = time.perf_counter()
    writes = []
    for name, leaf in flatten(state).items():
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / name.replace("/", "."))},
            "metadata": {
                "shape": list(leaf.shape),
                "data_type": "float32",
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": list(leaf.sharding.shard_shape(leaf.shape))},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
        }
        array = tensorstore.open(spec, create=True, open=True).result()
        writes += [array[shard.index].write(np.asarray(shard.data)) for shard in leaf.addressable_shards]
    for write in writes:
        write.result()
    return time.perf_counter() - started


def _supervised(path: Path, slots: Path) -> float:
    started = time.perf_counter()
    make_room(path, 1)
    persist(sorted(slots.glob("gen-*")), "bench", 1, int(path.name), path)
    finalise(path, 1, 1, {})
    return time.perf_counter() - started


def _restore(folder: Path, megabytes: int, rounds: int, mesh: jax.sharding.Mesh) -> bool:
    save(folder, make_state(megabytes, mesh), 1)
    wanted = abstract(megabytes, mesh)
    found: dict[str, list[float]] = {"orbax": [], "ours": []}
    loads: dict[str, Callable[[], Any]] = {
        "orbax": lambda: load_orbax().load_checkpointables(folder / "1", {layout.STATE_ITEM: wanted}),
        "ours": lambda: restore(folder, 1, wanted),
    }
    for number in range(rounds + 1):
        for name, read in loads.items():
            started = time.perf_counter()
            jax.block_until_ready(read())
            if number:
                found[name].append(time.perf_counter() - started)
    ours, orbax = (statistics.median(found[name]) for name in ("ours", "orbax"))
    print(
        f"restore    {megabytes} MB, {rounds} rounds: verified {ours:.2f} s, Orbax without verification {orbax:.2f} s, "
        f"ratio {ours / orbax:.2f} (to reach: 1.25)",
        flush=True,
    )
    return ours <= 1.25 * orbax


def _memory(folder: Path, megabytes: int, mesh: jax.sharding.Mesh) -> bool:
    save(folder, make_state(megabytes, mesh), 1)
    save(folder / "small", make_state(1, mesh), 1)
    held = True
    for how in ("same", "other"):
        command = [sys.executable, __file__, "--megabytes", str(megabytes), "--restore-here", str(folder), how]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        found = json.loads(answer)
        ratio = found["peak"] / found["needed"]
        held = held and ratio <= 1.2
        print(
            f"memory     a restore of {found['needed'] / 1e6:.0f} MB onto {how} shards adds {found['peak'] / 1e6:.0f} "
            f"MB at its peak to what the process had, {ratio:.2f} of the bytes needed (to reach: 1.2)",
            flush=True,
        )
    return held


def _restore_here(folder: Path, how: str, megabytes: int, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """In a process of its own: the peak of its resident memory, after a small restore has loaded all code."""
    spec = SPEC if how == "same" else OTHER_SPEC
    restore(folder / "small", 1, abstract(1, mesh, spec=spec))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    state, _ = restore(folder, 1, abstract(megabytes, mesh, spec=spec))
    needed = sum(leaf.nbytes for leaf in flatten(state).values())
    return {"needed": needed, "peak": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _changed(kind: str, state: State, step: int) -> State:
    """The state after another step: all of it changed, a hundredth (adapters), or the rows that a batch asked for."""

    def rows(leaf: jax.Array) -> jax.Array:
        # Ids by how often they are asked for; nine tenths of the rows are for those that nobody has seen yet.
        draws = np.random.default_rng(step).zipf(1.2, 10_000) - 1
        return leaf.at[np.unique(draws[draws < len(leaf) // 10])].add(1.0, out_sharding=P("fsdp"))

    params = dict(state["params"])
    for name in list(params)[: 1 if kind == "adapters" else None]:
        params[name] = rows(params[name]) if kind == "table" else params[name] + 1.0
    return {"params": params}


def _deltas(folder: Path, megabytes: int, rounds: int, mesh: jax.sharding.Mesh) -> bool:
    """Both ways of saving: bytes beside all bytes, and seconds beside those of a first step, which shares nothing."""
    for kind, arrays in (("everything", ARRAYS), ("adapters", 100), ("table", 1)):
        rows = ROW if kind != "table" else 1 << 20
        state = make_state(megabytes, mesh, arrays=arrays, rows=rows)
        for how in ("plain", "supervised"):
            run, slots = folder / kind / how, Path(tempfile.mkdtemp(dir="/dev/shm", prefix="jaxscale-checkpoint-"))
            seconds, written, total = [], [], 0
            try:
                for step in range(1, rounds + 2):
                    state = _changed(kind, state, step)
                    os.sync()
                    before = on_disk(run, range(1, step))
                    seconds.append(_save_as(how, run, slots, state, step))
                    total = sum(file.stat().st_size for file in (run / str(step)).rglob("*") if file.is_file())
                    written.append(on_disk(run, range(1, step + 1)) - before)
            finally:
                shutil.rmtree(slots)
            shutil.rmtree(run)
            part, took = statistics.median(written[1:]) / total, statistics.median(seconds[1:]) / seconds[0]
            print(
                f"deltas     {kind:<10} {how:<10} {part:.3f} of the bytes are new, {took:.2f} of the time", flush=True
            )
    return True


def _save_as(how: str, run: Path, slots: Path, state: State, step: int) -> float:
    if how == "plain":
        return save(run, state, step)
    memory = MemorySnapshots(
        slots, job="bench", host="host", rank=0, epoch=1, every=1, generations=1, verdicts=lambda: (-1, step),
        notify=lambda *_: None,
    )  # fmt: skip
    memory.offer(step, state, record(step), final=True)
    memory.close()
    return _supervised(run / str(step), slots)


def _same(state: State, right: Mapping[str, Any]) -> bool:
    return all(np.asarray(leaf).tobytes() == right[path] for path, leaf in flatten(state).items())


def _flips(folder: Path, seed: int, mesh: jax.sharding.Mesh) -> bool:
    """Every file of a step gets its share, at least one flip each; the file is put right again after each."""
    size = 4.0
    state = make_state(size, mesh)
    right = {path: np.asarray(leaf).tobytes() for path, leaf in flatten(state).items()}
    save(folder, state, 1)
    step, wanted, chance = folder / "1", abstract(size, mesh), random.Random(seed)
    files = sorted(file for file in step.rglob("*") if file.is_file() and file.stat().st_size)
    positions = [(file, chance.randrange(8 * file.stat().st_size)) for file in files]
    sizes = [file.stat().st_size for file in files]
    positions += [
        (file, chance.randrange(8 * file.stat().st_size))
        for file in chance.choices(files, sizes, k=max(0, FLIPS - len(files)))
    ]
    found, wrong, orbax_refused, orbax_wrong, missed = 0, 0, 0, 0, []
    for file, position in positions:
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        file.write_bytes(changed)
        try:
            loaded, _ = restore(folder, 1, wanted)
        except layout.DamagedCheckpoint:
            found += 1
        else:
            missed.append(f"{file.relative_to(step)} bit {position}")
            wrong += not _same(loaded, right)
        try:
            loaded = load_orbax().load_checkpointables(step, {layout.STATE_ITEM: wanted})[layout.STATE_ITEM]
            orbax_wrong += not _same(loaded, right)
        except Exception:  # of many kinds
            orbax_refused += 1
        file.write_bytes(whole)
    restore(folder, 1, wanted)
    print(
        f"flips      {len(positions)} single bits in {len(files)} files: {found} found, {wrong} loaded wrong "
        f"(to reach: all, 0); Orbax refused {orbax_refused} and loaded {orbax_wrong} wrong",
        flush=True,
    )
    for line in missed[:10]:
        print(f"           NOT FOUND: {line}")
    return found == len(positions) and not wrong


def _faults(folder: Path, mesh: jax.sharding.Mesh) -> bool:
    """Each fault at the newest of three steps: the one before is loaded, and the reason is told."""
    size, few = 0.5, 2
    states = {step: make_state(size, mesh, step, few) for step in (1, 2, 3)}
    for step, state in states.items():
        save(folder / "whole", state, step)
    right = {
        step: {path: np.asarray(leaf).tobytes() for path, leaf in flatten(state).items()}
        for step, state in states.items()
    }
    names = [str(file.relative_to(folder / "whole" / "3")) for file in (folder / "whole" / "3").rglob("*")]
    files = [name for name in names if (folder / "whole" / "3" / name).is_file()]
    folders = [name for name in names if (folder / "whole" / "3" / name).is_dir()]
    faults: list[tuple[str, Callable[[Path], Any]]] = []
    each = (("cut short", _cut), ("emptied", _empty), ("removed", Path.unlink), ("a folder", _folder))
    faults += [
        (f"{name} {what}", partial(_at, name, damage))
        for name in files
        for what, damage in each
        if (folder / "whole" / "3" / name).stat().st_size or what in ("removed", "a folder")
    ]
    faults += [(f"{name}/ removed", partial(_at, name, shutil.rmtree)) for name in folders]
    faults += [
        ("the step removed", shutil.rmtree),
        ("half of it deleted", _half),
        ("junk in its place", _junk),
        ("a file in its place", _file),
        ("junk beside it", lambda step: (step.parent / "9").mkdir()),
    ]
    good, bad = 0, []
    for name, damage in faults:
        shutil.copytree(folder / "whole", folder / "now", symlinks=True)
        damage(folder / "now" / "3")
        told: list[int] = []
        try:
            found = restore_newest(folder / "now", abstract(size, mesh, few), partial(_tell, told))
            step = found[1].step if found else 0
            is_right = found is not None and _same(found[0], right[step])
        except Exception as error:  # a fault that gets through is a finding, whatever it raises
            step, is_right = 0, False
            name += f" ({type(error).__name__}: {error})"
        gone = name in GONE
        expected = 3 if name == "junk beside it" else 2
        if is_right and step == expected and (told == [3] or gone or expected == 3):
            good += 1
        else:
            bad.append(f"{name}: step {step}, told of {told}")
        shutil.rmtree(folder / "now")
    print(f"faults     {len(faults)}: {good} handled (to reach: all)", flush=True)
    for line in bad[:20]:
        print(f"           NOT HANDLED: {line}")
    return not bad


def _tell(told: list[int], step: int, _reason: str) -> None:
    told.append(step)


def _at(name: str, damage: Callable[[Path], Any], step: Path) -> None:
    damage(step / name)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _half(step: Path) -> None:
    for file in [file for file in sorted(step.rglob("*")) if file.is_file()][::2]:
        file.unlink()


def _junk(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()
    (step / "junk").write_text("junk")


def _file(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("junk")


if __name__ == "__main__":
    sys.exit(main())
