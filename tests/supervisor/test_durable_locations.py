"""Supervised runs with a further location: a whole copy, a directory that is gone, a second job, an outage."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import botocore.session
import jax
import numpy as np
import pytest
import xxhash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxscale import tree
from jaxscale.checkpoint import step_copy
from jaxscale.checkpoint.layout import list_steps, read_manifest, step_folder
from jaxscale.checkpoint.owner import OWNER
from jaxscale.storage.addresses import open_store
from jaxscale.supervisor.status import Watcher
from jaxscale.testing.cluster import launched, left_behind
from jaxscale.testing.http_faults import faulty_proxy
from jaxscale.testing.s3_server import s3_server, variables

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
SHAPE = ("--slices", 2, "--hosts-per-slice", 1)
FLAGS = (*SHAPE, "--memory.every", 5, "--checkpoint.every", 20, "--checkpoint.keep", 9)
STEPS = 60
pytestmark = pytest.mark.usefixtures("one_cache")


def digests(folder, step):
    """Of every shard of a step's state."""
    return {
        path: [shard.digest for shard in shards] for path, shards in read_manifest(folder / str(step)).shards.items()
    }


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def launch_again(run, *flags):
    """A second launch beside one that lives."""
    command = [sys.executable, "-m", "jaxscale", "launch", str(NANO), "--run.dir", str(run), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check_refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="module", name="folder")
def _folder(one_cache, tmp_path_factory):  # noqa: ARG001 - programs are compiled once
    """A run of two hosts, `run`, with its copies in `far`; while it lived, another was refused. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    run, far = folder / "run", folder / "far"
    flags = (*FLAGS, "--checkpoint.locations", far)
    with launched(NANO, run, *flags, "--steps", STEPS) as cluster:
        cluster.wait_for_event("elected")
        check_refused(launch_again(run, *flags), "in use", str(run))
        assert cluster.finish() == 0, cluster.output
        assert "alarm" not in cluster.output
        assert json.loads((run / OWNER).read_bytes())["released"]
    assert not left_behind(run)
    return folder


def test_the_copy_is_whole_and_its_own_step_for_step(folder):
    steps = list_steps(folder / "run" / "checkpoints")
    assert steps[-1] == 60
    assert set(list_steps(folder / "far" / "checkpoints")) <= set(steps), "of two that come at once the newer is copied"
    assert list_steps(folder / "far" / "checkpoints")[-1] == 60
    for step in list_steps(folder / "far" / "checkpoints"):
        here, far = (files(step_folder(folder / place / "checkpoints", step)) for place in ("run", "far"))
        assert here == far
    (state,) = json.loads((folder / "run" / "locations.json").read_bytes())
    assert (state["step"], state["behind"], state["failing_since"], state["lost"]) == (60, None, None, False)
    copied = [
        json.loads(line)
        for line in (folder / "run" / "events.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "sealed" and "location" in json.loads(line)
    ]
    assert copied[-1]["step"] == 60
    assert {event["location"] for event in copied} == {str(folder / "far")}


def test_stock_orbax_reads_a_copy(folder):
    """The arrays that Orbax gives are those that training had, by the digests that were taken in the workers."""
    path = folder / "far" / "checkpoints" / "60"
    manifest = read_manifest(path)
    here = NamedSharding(jax.make_mesh((1,), ("x",)), P())
    wanted = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=here) for name, (shape, dtype) in manifest.arrays.items()
    }
    found = tree.flatten(ocp.load_checkpointables(path, {"state": tree.unflatten(wanted)})["state"])
    assert found.keys() == manifest.arrays.keys()
    for name, shards in manifest.shards.items():
        for shard in shards:
            part = np.asarray(found[name])[tuple(slice(*pair) for pair in shard.box)]
            assert xxhash.xxh3_128_hexdigest(np.ascontiguousarray(part).tobytes()) == shard.digest, name


def test_a_run_whose_directory_is_gone_goes_on_from_the_location_to_the_same_weights(folder, tmp_path):
    shutil.copytree(folder / "far", tmp_path / "far")
    first, *others = list_steps(tmp_path / "far" / "checkpoints")
    for step in others:
        shutil.rmtree(tmp_path / "far" / "checkpoints" / str(step))
    assert first < STEPS
    flags = (*FLAGS, "--checkpoint.locations", tmp_path / "far")
    with launched(NANO, tmp_path / "new", *flags, "--steps", STEPS) as cluster:
        assert cluster.finish() == 0, cluster.output
        (fetched,) = cluster.events("fetched")
        lines = cluster.metrics()
    assert (fetched["step"], fetched["location"]) == (first, str(tmp_path / "far"))
    before = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in before if line["step"] >= first}
    assert {line["step"]: line["loss"] for line in lines} == expected
    assert digests(tmp_path / "new" / "checkpoints", 60) == digests(folder / "run" / "checkpoints", 60)
    assert digests(tmp_path / "far" / "checkpoints", 60) == digests(folder / "run" / "checkpoints", 60)
    assert json.loads((tmp_path / "far" / OWNER).read_bytes())["generation"] == 2


def check_another_job_takes(run, place, far):
    """Another job's record, of a higher generation, is written at a place: the run ends and commits nothing there."""
    run.wait_for(lambda: step_copy.steps_at(far) or None, "the first copy")
    here = open_store(str(run.run))
    stolen = {"run": here, "location": far}[place]
    newest = run.wait_for_event("sealed", tier="durable")["step"]
    run.wait_for(
        lambda: [e for e in run.events("sealed") if e["tier"] == "durable" and e["step"] > newest] or None, "next"
    )
    record = json.loads(stolen.read(OWNER))
    stolen.write(OWNER, json.dumps({**record, "job": "other", "host": "far away", "generation": 9}).encode())
    before = set(step_copy.steps_at(stolen))
    assert run.finish(60) == 1
    assert "has lost the run" in run.output
    assert "job other, generation 9" in run.output
    assert json.loads(stolen.read(OWNER))["job"] == "other"
    assert set(step_copy.steps_at(stolen)) <= before, "nothing was committed after the loss"
    assert not left_behind(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "location"])
def test_a_run_that_another_job_has_taken_ends_and_commits_nothing_more(tmp_path, place):
    flags = (*SHAPE, "--memory.every", 5, "--checkpoint.every", 50, "--checkpoint.locations", tmp_path / "far")
    with launched(NANO, tmp_path / "run", *flags, "--steps", 100_000) as run:
        run.wait_for(lambda: (tmp_path / "far" / OWNER).exists() or None, "an owner of the location")
        far = str(tmp_path / "far")
        check_refused(launch_again(tmp_path / "other", *flags), "belongs to a run that is alive", far, "generation 1")
        assert not (tmp_path / "other" / "config.json").exists()
        check_another_job_takes(run, place, open_store(far))


@pytest.mark.slow
def test_a_minute_without_s3_holds_up_no_step_and_the_run_goes_on_from_s3_alone(tmp_path):
    """As a user has it: two hosts, an outage of 60 s, all of it copied after that, the directory gone."""
    with s3_server() as server, faulty_proxy(server.address) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in variables(proxy.address).items():
            patch.setenv(name, value)
        botocore.session.get_session().create_client("s3").create_bucket(Bucket="bucket")
        far = open_store("s3://bucket/runs")
        flags = (*SHAPE, "--memory.every", 5, "--checkpoint.every", 100, "--checkpoint.locations", far.address)
        with launched(NANO, tmp_path / "run", *flags, "--steps", 100_000) as run:
            run.wait_for(lambda: step_copy.steps_at(far) or None, "the first copy")
            proxy.begin("stall")
            began = time.time()
            alarm = run.wait_for_event("alarm", what="location failing")
            assert alarm["time"] - began < 5.0
            time.sleep(max(0.0, began + 60 - time.time()))
            (there,) = Watcher(run.run).look(time.time()).locations
            assert there.failing_seconds > 50
            assert there.behind > 0
            trained = [line["time"] for line in run.metrics() if began < line["time"]]
            assert max(after - before for before, after in itertools.pairwise(trained)) < 5.0, "training waited"
            sealed = [e for e in run.events("sealed") if e["tier"] == "durable" and "location" not in e]
            assert [e for e in sealed if e["time"] > began + 30], "durable steps went on in the run directory"
            proxy.heal()
            healed = time.time()
            back = run.wait_for_event("alarm", what="location back")
            assert back["time"] - healed < 45.0, "a probe each 30 s, and the first copy"
            assert not run.events("fault")
            run.process.send_signal(signal.SIGTERM)
            assert run.finish() == 75, run.output
            stopped = run.last_line()["step"]
            lines = {line["step"]: line["loss"] for line in run.metrics()}
        assert step_copy.steps_at(far)[-1] == list_steps(run.run / "checkpoints")[-1] == stopped
        shutil.move(run.run, tmp_path / "kept")
        losses = []
        for name in ("kept", "run"):
            with launched(NANO, tmp_path / name, *flags, "--steps", stopped + 20) as again:
                assert again.finish() == 0, again.output
                losses.append({line["step"]: line["loss"] for line in again.metrics() if line["step"] >= stopped})
            if name == "kept":
                for step in [step for step in step_copy.steps_at(far) if step > stopped]:
                    step_copy.delete_step(far, step)
            else:
                assert [event["step"] for event in again.events("fetched")] == [stopped]
        assert losses[0] == losses[1]
        assert losses[1][stopped] == lines[stopped]
        assert step_copy.steps_at(far)[-1] == stopped + 20
