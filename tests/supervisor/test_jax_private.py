"""The contract with JAX's private calls: what the supervisor needs of them, and a clear word where they change."""

import dataclasses
import inspect
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
import pytest
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import jax_private

PROGRAM = Path(__file__).with_name("join_a_world.py")

CALLS = {
    "get_distributed_runtime_service": {
        "address",
        "num_nodes",
        "heartbeat_timeout",
        "cluster_register_timeout",
        "shutdown_timeout",
        "recoverable",
    },
    "get_distributed_runtime_client": {
        "address",
        "node_id",
        "init_timeout",
        "shutdown_timeout",
        "heartbeat_timeout",
        "shutdown_on_destruction",
        "use_compression",
    },
    "make_gloo_tcp_collectives": {"distributed_client", "hostname"},
}


@pytest.fixture
def start():
    """Starts `join_a_world.py`; whatever happens, none is left."""
    processes = []

    def run(*arguments):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def named(call):
    """The names of the parameters that a call of jaxlib has, from its documentation (it is native)."""
    from jax._src.lib import _jax

    function = getattr(_jax, call, None)
    assert function is not None, f"jax {jax.__version__} has no _jax.{call}: jax_private.py stands on it"
    text = function.__doc__ or ""
    assert text, f"jax {jax.__version__} does not say what _jax.{call} takes"
    return set(re.findall(r"(\w+):", text.partition("->")[0]))


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_take_what_they_are_given(call):
    missing = CALLS[call] - named(call)
    assert not missing, f"_jax.{call} of jax {jax.__version__} takes no {', '.join(sorted(missing))} any more"


def test_the_state_of_the_world_has_the_fields_that_are_set():
    from jax._src import distributed

    state = distributed.global_state
    wanted = {"client", "process_id", "num_processes", "coordinator_address"}
    missing = {name for name in wanted if not hasattr(state, name)}
    assert not missing, f"jax._src.distributed.global_state of jax {jax.__version__} lacks {', '.join(sorted(missing))}"


def test_whether_there_is_a_backend_can_be_asked_and_the_cache_reset():
    from jax._src import compilation_cache, xla_bridge

    assert callable(getattr(xla_bridge, "backends_are_initialized", None)), (
        "xla_bridge.backends_are_initialized is gone"
    )
    assert not inspect.signature(compilation_cache.reset_cache).parameters, "compilation_cache.reset_cache takes more"
    jax.devices()
    assert jax_private.has_backend()


def test_the_cpu_backend_can_be_made_with_other_collectives():
    from jax._src import xla_bridge

    assert "collectives" in inspect.signature(xla_bridge.make_cpu_client).parameters, (
        f"xla_bridge.make_cpu_client of jax {jax.__version__} takes no collectives any more"
    )
    registered = xla_bridge._backend_factories["cpu"]
    fields = {field.name for field in dataclasses.fields(registered)}
    assert "factory" in fields, f"a registered backend of jax {jax.__version__} is not made by its `factory` any more"


def test_gloo_is_told_where_to_listen(monkeypatch):
    """And not to take what this machine's name resolves to; all else of the registered backend stays."""
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    registered, made = xla_bridge._backend_factories["cpu"], []
    monkeypatch.setitem(xla_bridge._backend_factories, "cpu", registered)
    monkeypatch.setattr(distributed.global_state, "client", "the client that connected")
    monkeypatch.setattr(_jax, "make_gloo_tcp_collectives", lambda **given: made.append(given) or "collectives")
    monkeypatch.setattr(xla_bridge, "make_cpu_client", lambda collectives: ("a backend with", collectives))
    jax_private.gloo_at("127.0.0.3")
    replaced = xla_bridge._backend_factories["cpu"]
    assert not made  # nothing happens before a backend is wanted
    assert replaced.factory() == ("a backend with", "collectives")
    assert made == [{"distributed_client": "the client that connected", "hostname": "127.0.0.3"}]
    assert dataclasses.replace(replaced, factory=registered.factory) == registered


def test_collectives_run_over_the_address_that_gloo_was_given(start):
    """Two processes add up what they have, each at an address of its own, where it listens and nobody else does."""
    service = start("serve", 2)
    address = service.stdout.readline().strip()
    workers = [start("add", address, 2, rank, f"127.0.0.{rank + 5}") for rank in range(2)]
    for worker in workers:  # gloo itself has something to say before
        assert "the sum is 3\n" in iter(worker.stdout.readline, "")
    for rank, worker in enumerate(workers):
        places = {connection.laddr.ip for connection in psutil.Process(worker.pid).net_connections("tcp")}
        assert f"127.0.0.{rank + 5}" in places


def test_a_world_forms_and_its_service_outlives_a_worker(start):
    service = start("serve", 2)
    address = service.stdout.readline().strip()
    workers = [start("connect", address, 2, rank) for rank in range(2)]
    assert [worker.stdout.readline().strip() for worker in workers] == ["rank 0, rank 1"] * 2
    workers[0].send_signal(signal.SIGKILL)  # rank 0 is nothing special
    workers[0].wait()
    workers[1].stdin.write("after\n")
    workers[1].stdin.flush()
    assert workers[1].stdout.readline().strip() == "set by 1"  # still served, still alive
    assert service.poll() is None
    assert workers[1].poll() is None


def test_a_port_that_is_taken_is_an_error():
    """And no segmentation fault, which is what jaxlib makes of it now and then."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as taken:
        taken.bind(("::", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match=r"cannot listen on .*in use"):
            jax_private.serve(f"[::]:{taken.getsockname()[1]}", 1)


def test_what_is_compiled_without_the_cache_can_be_serialised(tmp_path):
    """The case that fails: with a persistent compilation cache, the second compilation of a program is a hit, and a CPU
    executable that came from the cache serialises without an error but cannot be loaded ("Function ... not found", jax
    0.12.0.1). So programs that are to be stored are compiled with the cache off, however often they were before.
    """
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax._src.compilation_cache.reset_cache()
    try:
        mesh = jax.make_mesh((jax.device_count(),), ("data",))  # a program is loaded onto all devices
        rows = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, PartitionSpec("data")))
        lowered = jax.jit(lambda x: jnp.tanh(x) * 3 + x).lower(rows)
        lowered.compile()
        assert list(tmp_path.iterdir()), "the cache took nothing: this test shows nothing"
        kept = sorted(file.name for file in tmp_path.iterdir())
        with jax_private.without_compilation_cache():
            assert not jax.config.jax_enable_compilation_cache
            program = lowered.compile()
        assert jax.config.jax_enable_compilation_cache
        assert sorted(file.name for file in tmp_path.iterdir()) == kept
        data = pickle.dumps(serialize_executable.serialize(program))
        loaded = serialize_executable.deserialize_and_load(*pickle.loads(data))
        assert jnp.array_equal(loaded(rows), program(rows))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax._src.compilation_cache.reset_cache()


def test_the_cache_is_on_again_after_a_compilation_that_failed():
    with pytest.raises(ZeroDivisionError), jax_private.without_compilation_cache():
        raise ZeroDivisionError
    assert jax.config.jax_enable_compilation_cache
