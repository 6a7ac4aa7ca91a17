"""Worlds: how they are named, form, agree and end; real ones of 2 and 4 processes over loopback."""

import json
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxscale import world as worlds
from jaxscale import world_watch
from jaxscale.config import ConfigError
from jaxscale.testing.processes import WorldFailed, reserved_port, run_world, started_world
from jaxscale.train.protocols import World
from jaxscale.world_address import free_port, hold_port

JOIN = """
import json, os, sys, threading, time
import jax, jax.numpy as jnp
from jaxscale import mesh, world as worlds
from jaxscale.config import Config, MeshConfig, ModelConfig

with worlds.membership(worlds.parse_distributed(sys.argv[1])) as world:
    config = Config("test", ModelConfig(), devices=4)
    mesh.prepare_backend(config, world)
    jax.set_mesh(mesh.make_mesh(config))
    def step():
        return float(jax.jit(jnp.sum)(jnp.ones((8, 4), out_sharding=jax.P("fsdp"))))
"""


def script(body: str, join: str = JOIN) -> str:
    return join + textwrap.indent(textwrap.dedent(body), "    ")


def result(stdout: str) -> dict:
    return json.loads(stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", World()),
        ("auto", None),
        ("10.0.0.1:8476,4,3", World(4, 3, "10.0.0.1:8476")),
        ("head.cluster:1, 2, 0", World(2, 0, "head.cluster:1")),
        ("[::1]:8476,2,1", World(2, 1, "[::1]:8476")),
    ],
)
def test_parse(text, expected):
    assert worlds.parse_distributed(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1:8476", "has 1 parts, not 3"),
        ("10.0.0.1,4,0", "'10.0.0.1' is not host:port"),
        (":8476,4,0", "':8476' is not host:port"),
        ("h:99999,4,0", "'h:99999' is not host:port"),
        ("h:1,four,0", "N and I are whole numbers, not 'four' and '0'"),
        ("h:1,4,-1", "N and I are whole numbers, not '4' and '-1'"),
        ("h:1,4,4", "there is no process 4 of 4; I goes from 0 to N-1"),
        ("h:1,0,0", "there is no process 0 of 0"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ConfigError, match="--distributed") as error:
        worlds.parse_distributed(text)
    assert message in str(error.value)


def test_world_of_one_needs_nothing():
    before = threading.active_count()
    with worlds.membership(World()) as world:
        assert world == World()
        worlds.barrier(world, "alone")
        assert worlds.broadcast_json(world, {"a": [1, (2,)]}) == {"a": [1, [2]]}
        agreement = worlds.Agreement(world)
        assert [agreement.any_asks(False), agreement.any_asks(True), agreement.any_asks(False)] == [False, True, False]
        agreement.close()
    assert threading.active_count() == before


def test_failure_in_a_world_of_one_passes_through():
    with pytest.raises(KeyError), worlds.membership(World()):
        raise KeyError("x")


def test_contract_with_jax():
    """The private names of JAX that world.py uses."""
    from jaxlib import _jax

    state = worlds.world_state()
    assert (state.client, state.num_processes, state.process_id, state.coordinator_address) == (None, 1, 0, None)
    names = ["key_value_set", "key_value_increment", "blocking_key_value_get", "wait_at_barrier"]
    assert [name for name in names if not callable(getattr(_jax.DistributedRuntimeClient, name, None))] == []
    assert "allow_overwrite" in _jax.DistributedRuntimeClient.key_value_set.__doc__
    assert hasattr(__import__("jax").config, "jax_enable_preemption_service")


@pytest.mark.parametrize("processes", [2, 4])
def test_world_forms_agrees_and_ends(processes):
    """Process 1 asks at its call 5; all get True at the same call, though they run at different speeds."""
    body = """
    caught = int(open("/proc/self/status").read().split("SigCgt:")[1].split()[0], 16)
    agreement = worlds.Agreement(world)
    calls, sums = 0, set()
    while not agreement.any_asks(world.index == 1 and calls >= 5):
        calls += 1
        time.sleep(0.005 * world.index)
        sums.add(step())
    big = worlds.broadcast_json(world, {"from": world.index, "text": "x" * 3_000_000})
    worlds.barrier(world, "all here", 30)
    agreement.close()
    last = worlds.Agreement(world)  # asked for at the very end, when nobody calls any more
    last.any_asks(world.index == 0)
    last.close()
    line = dict(calls=calls, sums=sorted(sums), processes=world.processes, index=world.index, origin=big["from"])
    line |= dict(size=len(big["text"]), catches_sigterm=bool(caught >> 14 & 1))
    print(json.dumps(line | dict(described=mesh.describe(jax.sharding.get_mesh()))), flush=True)
    """
    outcomes = run_world(script(body), processes, devices_per_process=1)
    results = [result(outcome.stdout) for outcome in outcomes]
    assert len({r["calls"] for r in results}) == 1
    assert 5 <= results[0]["calls"] < 100
    for index, r in enumerate(results):
        assert (r["processes"], r["index"]) == (processes, index)
        assert (r["origin"], r["size"]) == (0, 3_000_000)
        assert r["sums"] == [32.0]
        assert not r["catches_sigterm"]  # the loop's own handler must be the only one
        assert r["described"] == f"4 cpu devices in {processes} processes: fsdp 4"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_process_ends_all_with_the_reason(failing):
    """The others are inside a collective with the failing one, where no Python exception can reach them."""
    body = f"""
    agreement = worlds.Agreement(world)
    try:
        for i in range(10_000):
            agreement.any_asks(False)
            step()
            if world.index == {failing} and i == 3:
                raise ValueError("disk full")
    finally:
        agreement.close()
    """
    outcomes = run_world(script(body), 2, check=False, timeout=60)
    assert [(o.exit_code, o.killed) for o in outcomes] == [(1, False), (1, False)]
    assert outcomes[failing].stderr.rstrip().endswith("ValueError: disk full")
    other = outcomes[1 - failing].stderr
    assert f"process {1 - failing} ends because process {failing} of 2 failed: ValueError: disk full" in other
    assert "stack trace" not in other


def test_barrier_names_who_did_not_come():
    body = """
    if world.index == 0:
        worlds.barrier(world, "checkpoint written", 1)
    time.sleep(60)
    """
    join = JOIN[: JOIN.index("    config =")]
    outcomes = run_world(script(body, join), 3, check=False)
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    assert "at the barrier 'checkpoint written', but process 1, 2 of 3 did not come" in outcomes[0].stderr
    assert "process 2 ends because process 0 of 3 failed: WorldError" in outcomes[2].stderr


@pytest.mark.parametrize(("index", "message"), [(0, "not all of the other 1 came"), (1, "did not reach process 0 at")])
def test_world_that_does_not_form_says_so(index, message):
    with reserved_port() as port:
        code = f"from jaxscale import world; world.join(world.parse_distributed('127.0.0.1:{port},2,{index}'), 1)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("jaxscale: the world did not form in 1 s: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_port_in_use_is_said():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(worlds.WorldError, match=f"cannot listen on port {port}"):
            worlds.join(World(2, 0, f"127.0.0.1:{port}"))


def test_a_second_process_0_on_this_host_is_refused():
    """SO_REUSEPORT would let both listen; the first one holds a name that belongs to the port."""
    first = (
        "import sys, time; from jaxscale.world_address import hold_port\n"
        "hold_port(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    with reserved_port() as port:
        address = f"127.0.0.1:{port}"
        with subprocess.Popen([sys.executable, "-c", first, address], stdout=subprocess.PIPE) as holder:
            try:
                assert holder.stdout.readline() == b"1\n"
                with pytest.raises(worlds.WorldError, match=f"another process 0 on this host has port {port}"):
                    worlds.join(World(2, 0, address))
            finally:
                holder.kill()
        hold_port(address)  # the first one is gone
        free_port(address)


@pytest.mark.parametrize("way", ["connection", "abort"])
def test_the_death_of_process_0_gets_one_line(way):
    """By the connection's end; and where JAX's client is faster, just before it aborts the process."""
    body = """
    import signal
    from jaxscale.train.logs import native_output_to
    from pathlib import Path
    agreement = worlds.Agreement(world)
    agreement.any_asks(False)
    with native_output_to(Path(os.devnull)):
        worlds.barrier(world, "all here", 30)
        if world.index == 0:
            time.sleep(0.5)  # the other one has the barrier's answer
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """
    before = "" if way == "connection" else "from jaxscale import world_watch\nworld_watch._follow = lambda *_: None\n"
    outcomes = run_world(before + script(body), 2, check=False)
    assert [(o.exit_code, o.killed) for o in outcomes] == [(-9, False), (1, False)]
    assert outcomes[1].stderr == (
        "jaxscale: process 1 ends because process 0 of 2 ended without a word; start all of them again to go on from "
        "the newest checkpoint\n"
    )


def test_a_process_that_fails_of_a_loss_says_so_though_native_code_aborts_it_meanwhile():
    body = """
    import signal
    if world.index == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    worlds.barrier(world, "never", 30)
    """
    before = "from jaxscale import world_watch\nworld_watch._follow = lambda *_: None\n"
    outcomes = run_world(before + script(body), 2, check=False)
    assert [(o.exit_code, o.killed) for o in outcomes] == [(-9, False), (1, False)]


def test_a_process_that_is_being_killed_may_still_take_connections():
    """The kernel closes its files one by one: the listener may go after the connection whose end makes us ask."""
    with socket.create_server(("127.0.0.1", 0)) as dying:
        told = json.dumps({"port": dying.getsockname()[1], "token": "x"})
        is_gone = world_watch.watch("127.0.0.1", told, 1, lambda: None)
        held, _ = dying.accept()
        assert not is_gone()  # it takes connections and keeps them
        threading.Timer(0.3, dying.shutdown, [socket.SHUT_RDWR]).start()
        assert is_gone()
        held.close()


def test_process_0_ends_when_another_one_died_and_nothing_else_tells():
    body = """
    import signal
    if world.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    quick = "from jaxscale import world_watch\nworld_watch.GRACE_SECONDS = 1\n"
    outcomes = run_world(quick + script(body), 2, check=False)
    assert [(o.exit_code, o.killed) for o in outcomes] == [(1, False), (-9, False)]
    assert outcomes[0].stderr.rstrip().endswith("process 0 ends because process 1 of 2 ended without a word")


def test_what_else_native_code_aborts_for_is_left_to_it():
    code = "import os; from jaxscale import world_watch as w; u = w.on_abort(lambda: os.write(2, b'first ')); "
    code += "{} os.abort()"
    for undo, said in (("", b"first "), ("u();", b"")):
        done = subprocess.run([sys.executable, "-c", code.format(undo)], capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (-6, said)


def test_auto_without_a_cluster_says_what_to_use(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", _no_cluster)
    with pytest.raises(worlds.WorldError, match=r"found no cluster here .* use --distributed ADDRESS,N,I"):
        worlds.join(None)


CLUSTERS = {
    "slurm": {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "COUNT",
        "SLURM_PROCID": "INDEX",
        "SLURM_LOCALID": "INDEX",
    },
    "open mpi": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "COUNT",
        "OMPI_COMM_WORLD_RANK": "INDEX",
        "OMPI_COMM_WORLD_LOCAL_RANK": "INDEX",
    },
}
"""What a launcher tells each process, by launcher."""


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_auto_forms_the_world_that_the_cluster_tells_of(cluster):
    """As the trainer does: what the backend needs is set before the number of processes is known."""
    code = f"""
    import json, os, sys
    address, count, index = sys.argv[1].split(",")
    for name, value in {CLUSTERS[cluster]!r}.items():
        os.environ[name] = value.replace("COUNT", count).replace("INDEX", index)
    os.environ["JAX_COORDINATOR_PORT"] = address.rpartition(":")[2]
    import jax, jax.numpy as jnp
    from jaxscale import mesh, world as worlds
    from jaxscale.config import Config, ModelConfig

    config = Config("test", ModelConfig())
    auto = worlds.parse_distributed("auto")
    mesh.prepare_backend(config, auto)
    with worlds.membership(auto) as world:
        jax.set_mesh(mesh.make_mesh(config))
        total = float(jax.jit(jnp.sum)(jnp.ones((8, 4), out_sharding=jax.P("fsdp"))))
        told = worlds.broadcast_json(world, "from " + index)
        print(json.dumps([world.processes, world.index, world.is_writer, total, told, jax.device_count()]))
    """
    outcomes = run_world(textwrap.dedent(code), 2, devices_per_process=2)
    assert [result(outcome.stdout) for outcome in outcomes] == [
        [2, 0, True, 32.0, "from 0", 4],
        [2, 1, False, 32.0, "from 0", 4],
    ]


def _no_cluster(**arguments):
    assert "coordinator_address" not in arguments
    raise ValueError("coordinator_address should be defined.")


def test_launcher_reports_and_leaves_nothing_behind(monkeypatch):
    """Without jax: what run_world does with failures and with processes that never end."""
    monkeypatch.setattr("jaxscale.testing.processes.GRACE_SECONDS", 0.2)
    sleeper = "import sys, time\nif sys.argv[1].endswith(',1'): print('out'); sys.exit('bad luck')\ntime.sleep(60)"
    outcomes = run_world(sleeper, 2, check=False)
    assert [(o.exit_code, o.killed) for o in outcomes] == [(-9, True), (1, False)]
    assert (outcomes[1].stdout, outcomes[1].stderr) == ("out\n", "bad luck\n")
    with pytest.raises(WorldFailed, match="process 1: exit code 1\nout\n\nbad luck"):
        run_world(sleeper, 2)
    assert [o.killed for o in run_world("import time; time.sleep(60)", 2, timeout=0.3, check=False)] == [True, True]


def test_launcher_passes_place_and_environment(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'], os.environ['MINE'])"
    arguments = ["-c", code, "--distributed", "{distributed}"]
    outcomes = run_world(arguments, 2, devices_per_process=3, environment={"MINE": "yes"})
    for index, outcome in enumerate(outcomes):
        assert "'--distributed', '127.0.0.1:" in outcome.stdout
        assert outcome.stdout.endswith(f",2,{index}'] 3 yes\n")
    with started_world("import time; time.sleep(60)", 1, folder=tmp_path) as (member,):
        assert member.poll() is None
    assert member.returncode == -9
    assert (tmp_path / "0.out").exists()
