"""Compiled programs on disk: found again by the same worker of the same program, and believed by nobody else."""

import logging
import os
import pickle
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
import xxhash
from filelock import FileLock
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.supervisor import programs
from jaxscale.supervisor.programs import DIGEST_BYTES, MAGIC, StoredPrograms

IDENTITY = {"config": {"steps": 3, "model": {"width": 4}}, "processes": 1}


@pytest.fixture(scope="module")
def rows():
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    return jax.device_put(jnp.arange(32.0).reshape(16, 2), NamedSharding(mesh, PartitionSpec("data")))


class Lower:
    """Lowers a program, and counts how often."""

    def __init__(self, rows, factor=2.0):
        self.count, self._rows, self._factor = 0, rows, factor

    def __call__(self):
        self.count += 1
        return jax.jit(lambda x: jnp.tanh(x) * self._factor).lower(self._rows)


def stored(tmp_path, rows, name="step"):
    """A folder with one program."""
    found = StoredPrograms(tmp_path / "programs", IDENTITY)
    found.get(name, Lower(rows))
    return found.path(name)


def programs_in(folder):
    """Without the locks, by which workers that share the folder take turns."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def again(tmp_path, rows, identity=None, name="step"):
    """(what a worker that comes after gets, how often it lowered)"""
    lower, later = Lower(rows), StoredPrograms(tmp_path / "programs", identity or IDENTITY)
    program = later.get(name, lower)
    assert jnp.allclose(program(rows), jnp.tanh(rows) * 2)
    assert later.compiled == [name] * lower.count
    return lower.count


def test_a_stored_program_is_neither_traced_nor_compiled_again(tmp_path, rows):
    stored(tmp_path, rows)
    assert again(tmp_path, rows) == 0


def test_a_program_for_some_of_the_devices_is_loaded_for_these_and_runs_there(tmp_path):
    devices = jax.devices()[1:3]
    mesh = jax.make_mesh((2,), ("data",), devices=devices)
    values = jax.device_put(jnp.arange(32.0).reshape(16, 2), NamedSharding(mesh, PartitionSpec("data")))
    for count in (1, 0):
        lower, found = Lower(values), StoredPrograms(tmp_path / "programs", IDENTITY, devices)
        result = found.get("step", lower)(values)
        assert lower.count == count
        assert jnp.allclose(result, jnp.tanh(values) * 2)
        assert result.sharding.device_set == set(devices)


def test_files_are_this_users_alone(tmp_path, rows):
    path = stored(tmp_path, rows)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert programs_in(path.parent) == [path]  # nothing half written is left


@pytest.mark.parametrize(
    "identity",
    [
        IDENTITY | {"processes": 2},
        IDENTITY | {"config": {"steps": 3, "model": {"width": 8}}},
        IDENTITY | {"config": {"steps": "3", "model": {"width": 4}}},
        IDENTITY | {"more": None},
    ],
)
def test_a_program_of_another_identity_is_another(tmp_path, rows, identity):
    path = stored(tmp_path, rows)
    assert again(tmp_path, rows, identity) == 1
    assert len(programs_in(path.parent)) == 2


def test_the_order_of_an_identity_does_not_matter(tmp_path, rows):
    stored(tmp_path, rows)
    assert again(tmp_path, rows, dict(reversed(IDENTITY.items()))) == 0


def test_another_name_is_another_program(tmp_path, rows):
    stored(tmp_path, rows)
    assert again(tmp_path, rows, name="evaluate") == 1


def spoil(path, how):
    data = bytearray(path.read_bytes())
    head = len(MAGIC) + DIGEST_BYTES
    match how:
        case "bit":
            data[head + len(data) // 2] ^= 1
        case "digest":
            data[len(MAGIC)] ^= 1
        case "magic":
            data[0] ^= 1
        case "cut":
            data = data[:-1]
        case "empty":
            data = bytearray()
        case "longer":
            data += b"\0"
        case "other version":
            payload = pickle.dumps((b"not an executable", None, None))
            data = MAGIC + xxhash.xxh3_128_digest(payload) + payload
        case "not a pickle":
            data = MAGIC + xxhash.xxh3_128_digest(b"nonsense") + b"nonsense"
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "digest", "magic", "cut", "empty", "longer", "other version", "not a pickle"])
def test_what_is_damaged_is_compiled_again_and_replaced(tmp_path, rows, caplog, how):
    path = stored(tmp_path, rows)
    spoil(path, how)
    with caplog.at_level(logging.WARNING):
        assert again(tmp_path, rows) == 1
    assert "compiled again" in caplog.text
    assert again(tmp_path, rows) == 0


class Trap:
    """A pickle that does something when it is read."""

    def __reduce__(self):
        return (os.system, ("touch $JAXSCALE_TEST_TRAP",))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_may_touch_is_never_unpickled(tmp_path, rows, caplog, monkeypatch, mode):
    path, trap = stored(tmp_path, rows), tmp_path / "trap"
    monkeypatch.setenv("JAXSCALE_TEST_TRAP", str(trap))
    payload = pickle.dumps(Trap())
    path.write_bytes(MAGIC + xxhash.xxh3_128_digest(payload) + payload)
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert again(tmp_path, rows) == 1
    assert f"mode {mode:o}" in caplog.text
    assert not trap.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert again(tmp_path, rows) == 0


def test_a_file_of_another_user_is_never_unpickled(tmp_path, rows, monkeypatch):
    stored(tmp_path, rows)
    monkeypatch.setattr(programs.os, "geteuid", lambda: os.getuid() + 1)
    assert again(tmp_path, rows) == 1


def test_a_disk_that_is_full_costs_a_compilation_and_no_more(tmp_path, rows, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert again(tmp_path, rows) == 1
    assert "No space left" in caplog.text


def test_a_program_that_came_through_jaxs_own_cache_is_stored_all_the_same(tmp_path, rows):
    """Compiled before in this process and found in the persistent cache, it would not load: see `jax_private.py`."""
    Lower(rows)().compile()
    stored(tmp_path, rows)
    assert again(tmp_path, rows) == 0


def test_of_workers_that_share_a_folder_one_compiles_and_the_others_wait_for_it(tmp_path, rows):
    lowering, lowered = threading.Event(), threading.Event()

    def slow():
        lowering.set()
        assert lowered.wait(30)
        return Lower(rows)()

    first, second = (StoredPrograms(tmp_path / "programs", IDENTITY) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.get, "step", slow)
        assert lowering.wait(30)
        other = pool.submit(second.get, "step", Lower(rows))
        lowered.set()
        assert jnp.allclose(one.result(60)(rows), other.result(60)(rows))
    assert (first.compiled, second.compiled) == (["step"], [])


def test_a_worker_waits_no_longer_than_it_makes_sense(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(programs, "SHARE_SECONDS", 0.1)
    path = stored(tmp_path, rows)
    path.unlink()
    with FileLock(path.with_suffix(".lock")):
        assert again(tmp_path, rows) == 1
