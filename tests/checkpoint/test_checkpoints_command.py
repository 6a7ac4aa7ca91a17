"""`jaxscale checkpoints list` and `verify`: what there is and whether it is whole, at a folder or a bucket."""

import errno
import json
import os
import random
import secrets
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept_runs import LOSSES, STEPS, checkpoints, said

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.listing import look
from jaxscale.checkpoint.manifest import digest_of_value
from jaxscale.checkpoint.place import open_place
from jaxscale.checkpoint.step_copy import StepCopy
from jaxscale.checkpoint.verify import verify_step
from jaxscale.cli import main
from jaxscale.storage.addresses import open_store
from jaxscale.storage.local_store import LocalStore
from jaxscale.testing.checkpoints import flip, rewrite


def files_of(run, step):
    folder = run / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def states(run):
    store = LocalStore(run)
    return {step: look(store, step).state for step in STEPS}


def damage(run, step):
    return [found.reason for found in verify_step(LocalStore(run), step)]


def test_the_list(run):
    found = said("list", run)
    assert [one["step"] for one in found] == list(STEPS)
    for one in found:
        path = run / "checkpoints" / str(one["step"])
        assert (one["tier"], one["state"], one["detail"]) == ("durable", "sealed", "")
        assert one["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert one["time"] == json.loads((path / "manifest.json").read_text())["time"]
        assert one["loss"] == LOSSES.get(one["step"])
        assert 0 <= one["age_seconds"] < 3600
    assert found[-1]["kept_because"] == ["newest"]
    assert found[1]["kept_because"] == ["newest 3 of 10", "best evaluation (1.5000)"]
    table = checkpoints("list", run).splitlines()
    assert table[0].split() == ["step", "state", "size", "age", "eval", "loss", "kept", "because"]
    assert table[2].split()[:2] == ["20", "sealed"]
    assert table[-1].startswith("4 checkpoints, ")


def test_the_list_says_what_is_damaged_and_what_was_never_finished(run):
    (run / "checkpoints" / "20" / "record.json").unlink()
    (run / "checkpoints" / "50").mkdir()
    (run / "checkpoints" / "50.saving").touch()
    found = {one["step"]: one for one in said("list", run)}
    assert [found[step]["state"] for step in (10, 20, 30, 40, 50)] == [
        "sealed",
        "damaged",
        "sealed",
        "sealed",
        "partial",
    ]
    assert "20/record.json is missing" in found[20]["detail"]
    assert found[50]["kept_because"] == ["unfinished"]
    assert f"step 20 is damaged: {run}/checkpoints/20/record.json is missing" in checkpoints("list", run)


def test_the_list_knows_copies(run, tmp_path):
    far = tmp_path / "far"
    StepCopy(LocalStore(far), run / "checkpoints" / "20").run(lambda: None)
    config = {"name": "test", "checkpoint": {"locations": [str(far)], "keep": 2, "milestones": 10}}
    (run / "config.json").write_text(json.dumps(config))
    found = {one["step"]: one for one in said("list", run)}
    assert {step: one["also_at"] for step, one in found.items()} == {10: [], 20: [str(far)], 30: [], 40: []}
    assert found[30]["kept_because"] == ["newest 2 of 2", "milestone of 10 steps"]
    assert [(one["step"], one["location"]) for one in said("list", far)] == [(20, str(far))]
    config["checkpoint"]["locations"] = ["nowhere://at/all"]
    (run / "config.json").write_text(json.dumps(config))
    assert len(said("list", run, code=1)) == 4, "one place does not answer, and that is told"


def test_verify_reads_all(run):
    found = said("verify", run)
    assert [(one["step"], one["tier"], one["state"], one["damage"]) for one in found] == [
        (step, "durable", "sealed", []) for step in STEPS
    ]
    for one in found:
        size = sum(path.stat().st_size for path in files_of(run, one["step"]) if path.name != "manifest.json")
        assert one["bytes"] == size
    assert checkpoints("verify", run, "--step", 20).startswith("step 20: whole, ")
    assert [one["step"] for one in said("verify", run, "--step", 30)] == [30]


def test_verify_names_each_damaged_file_and_what_is_lost(run):
    bad = run / "checkpoints" / "20" / "state" / "params.layers.mlp" / "c" / "0" / "3" / "0"
    flip(bad, 13)
    (run / "checkpoints" / "20" / "environment.json").unlink()
    found = {one["step"]: one for one in said("verify", run, code=1)}
    assert [found[step]["state"] for step in STEPS] == ["sealed", "damaged", "sealed", "sealed"]
    assert [(one["file"], one["shard"]) for one in found[20]["damage"]] == [
        ("environment.json", ""),
        ("state/params.layers.mlp/c/0/3/0", "params/layers/mlp [0:3, 6:8, 0:8]"),
    ]
    text = checkpoints("verify", run, code=1)
    assert "step 20: DAMAGED, 2 things wrong" in text
    assert f"{bad} is damaged: its digest does not fit; lost: params/layers/mlp [0:3, 6:8, 0:8]" in text
    checkpoints("verify", run, "--step", 30)
    checkpoints("verify", run, "--step", 20, code=1)


def test_a_save_under_way_is_no_damage_unless_it_is_asked_for(run):
    (run / "checkpoints" / "50").mkdir()
    (run / "checkpoints" / "50.saving").touch()
    assert said("verify", run)[-1]["state"] == "partial"
    checkpoints("verify", run, "--step", 50, code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], "needs a run"),
        (["list", "{run}/nothing"], "is not there"),
        (["verify", "{run}/config.json"], "is a file"),
        (["verify", "{run}/checkpoints/10"], "is one step's folder; give the run directory"),
        (["verify", "{run}", "--step", "11"], "has no checkpoint of step 11; it has 10, 20, 30, 40"),
        (["verify", "{run}", "--step", "many"], "'many' is not a whole number"),
        (["list", "{run}", "--jsn"], "did you mean --json"),
        (["verfy", "{run}"], "did you mean `jaxscale checkpoints verify`"),
        (["verify", "{run}/empty"], "has no checkpoint"),
        (["list", "nowhere://at/all"], "no address that fsspec opens"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, capsys, arguments, words):
    (run / "empty").mkdir()
    (run / "empty" / "config.json").write_text("{}")
    assert main(["checkpoints", *(one.format(run=run) for one in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_run_without_checkpoints_is_listed(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    assert "has no checkpoint yet" in capsys.readouterr().out
    assert main(["checkpoints", "list", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["verify", "--help"]])
def test_help_has_an_example(arguments, capsys):
    assert main(["checkpoints", *arguments]) == 0
    assert "jaxscale checkpoints" in capsys.readouterr().out.partition("examples:")[2]


def test_no_jax_is_imported(made):
    code = (
        "import sys; from jaxscale.cli import main; "
        f"assert main(['checkpoints', 'verify', {str(made)!r}]) == main(['checkpoints', 'list', {str(made)!r}]) == 0; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_every_flipped_bit_is_found(run):
    """At least 200 positions over all files of a step; each file's first and last bit among them."""
    folder, random_ = run / "checkpoints" / "30", random.Random(5)
    missed, done = [], 0
    for path in files_of(run, 30):
        bits = path.stat().st_size * 8
        if not bits:
            continue
        for bit in {0, bits - 1, *(random_.randrange(bits) for _ in range(3))}:
            flip(path, bit)
            done += 1
            found = verify_step(LocalStore(run), 30)
            if path.name not in (layout.MANIFEST,) and [one.file for one in found] != [str(path.relative_to(folder))]:
                missed.append((path, bit, found))
            if not found:
                missed.append((path, bit, found))
            flip(path, bit)
    assert done >= 200
    assert missed == []
    assert damage(run, 30) == []


def test_whatever_happens_to_a_file_is_named(run):
    for number, path in enumerate(files_of(run, 30)):
        kept = path.read_bytes()
        kind = ("cut", "empty", "gone", "folder", "link", "pipe")[number % 6]
        if kind == "cut":
            path.write_bytes(kept[:-1])
        elif kind == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/nothing/there")
        elif kind == "pipe":
            os.mkfifo(path)
        assert any(str(path) in one for one in damage(run, 30)), kind
        assert look(LocalStore(run), 30).state == "damaged", (path, kind)
        path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(kept)
    assert damage(run, 30) == []


@pytest.mark.parametrize("what", ["empty", "file", "half", "junk", "moved"])
def test_what_is_no_step(run, what):
    path = run / "checkpoints" / "30"
    if what == "half":
        shutil.rmtree(path / "state" / "params.embed")
    elif what == "moved":
        shutil.rmtree(path)
        shutil.copytree(run / "checkpoints" / "20", path)
    else:
        shutil.rmtree(path)
        if what == "file":
            path.write_text("no folder")
        else:
            path.mkdir()
        if what == "junk":
            for name in (layout.COMMIT_FILE, layout.MANIFEST, "record.json"):
                (path / name).write_bytes(b"\xff\x00junk")
    expected = "partial" if what == "empty" else "damaged"
    assert states(run) == {10: "sealed", 20: "sealed", 30: expected, 40: "sealed"}
    checkpoints("verify", run, code=1 if expected == "damaged" else 0)
    checkpoints("list", run)


def test_a_deletion_that_a_kill_cut_short_is_litter_and_no_damage(run):
    layout.uncommit(run / "checkpoints" / "30")
    assert states(run)[30] == "partial"
    (run / "checkpoints" / "20" / layout.COMMIT_FILE).unlink()
    assert states(run)[20] == "damaged", "it was a step once, and nobody deleted it"
    assert layout.sweep(run / "checkpoints") == ["20", "30"]


def test_a_manifest_that_lies_is_found(run):
    path = run / "checkpoints" / "30"
    rewrite(path, "record.json", json.dumps({"step": 30}))
    assert "does not hold what a record holds" in damage(run, 30)[0]
    text = (run / "checkpoints" / "20" / layout.MANIFEST).read_text()
    (run / "checkpoints" / "20" / layout.MANIFEST).write_text(json.dumps(json.loads(text)))
    assert "not the bytes" in damage(run, 20)[0], "the same value"


@pytest.mark.parametrize("lie", ["no shard", "other bytes"])
def test_a_manifest_whose_shards_lie_is_found(run, lie):
    path = run / "checkpoints" / "30" / layout.MANIFEST
    value = json.loads(path.read_text())
    del value["digest"]
    shards = value["arrays"]["params/layers/mlp"]["shards"]
    if lie == "no shard":
        del shards[3]
    else:
        shards[3][2] = "0" * 32
    path.write_text(layout.json_text(value | {"digest": digest_of_value(value)}))
    (found,) = verify_step(LocalStore(run), 30)
    assert "params/layers/mlp [0:3, " in found.shard
    assert ("names no file that holds" if lie == "no shard" else "is whole, and not the bytes") in found.reason


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_manifest_makes_it_fail(run, data):
    """Garbage, and manifests with one value replaced and their digest made anew."""
    path = run / "checkpoints" / "30" / layout.MANIFEST
    kept = path.read_bytes()
    anything = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode())))
    else:
        value = json.loads(kept)
        del value["digest"]
        where, key = value, data.draw(st.sampled_from(sorted(value)))
        while isinstance(where[key], dict) and where[key] and data.draw(st.booleans()):
            where = where[key]
            key = data.draw(st.sampled_from(sorted(where)))
        where[key] = data.draw(anything)
        path.write_text(json.dumps(value | {"digest": digest_of_value(value)}))
    try:
        state, found = look(LocalStore(run), 30).state, verify_step(LocalStore(run), 30)
        assert state in ("sealed", "damaged")
        assert found or path.read_bytes() == layout.json_text(json.loads(path.read_bytes())).encode()
        open_place(str(run)).known(30)
    finally:
        path.write_bytes(kept)


def test_a_disk_that_does_not_answer_for_a_file(run, monkeypatch):
    read = LocalStore.read

    def broken(self, name, *arguments):
        if name.endswith("params.norm/c/0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, name, *arguments)

    monkeypatch.setattr(LocalStore, "read", broken)
    (reason,) = damage(run, 30)
    assert reason.endswith("params.norm/c/0 cannot be read (Input/output error)")


def test_a_bucket(run, s3, monkeypatch):
    import botocore.session

    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{secrets.token_hex(6)}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=bucket)
    address = f"s3://{bucket}/runs/mine"
    store = open_store(address)
    for step in (20, 30):
        StepCopy(store, run / "checkpoints" / str(step)).run(lambda: None)
    assert [(one["step"], one["state"]) for one in said("list", address)] == [(20, "sealed"), (30, "sealed")]
    assert [one["damage"] for one in said("verify", address)] == [[], []]
    name = "checkpoints/30/state/params.norm/c/0"
    store.write(name, bytes([store.read(name)[0] ^ 1]) + store.read(name)[1:])
    (_, found) = said("verify", address, code=1)
    assert [one["file"] for one in found["damage"]] == ["state/params.norm/c/0"]
    store.delete("checkpoints/20/commit_success.txt")
    assert [one["state"] for one in said("list", address)] == ["partial", "sealed"]
    assert "no checkpoint" in checkpoints("verify", f"s3://{bucket}/others", code=2)
