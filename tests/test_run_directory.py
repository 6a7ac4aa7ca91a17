"""The run directory: who may open it, what lies in it, which incarnation it is."""

import errno
import json
import logging
import os
import subprocess
import sys
import time

import pytest

from jaxscale import config, run_directory
from jaxscale.config import ConfigError
from jaxscale.run_directory import RunDirectoryError, highest_epoch, open_run
from jaxscale.train.protocols import World

HOLD = """
import sys, time
from jaxscale import config
from jaxscale.run_directory import open_run
run = open_run(config.Config("test", config.ModelConfig(), run=config.RunConfig(dir=sys.argv[1])))
run.begin({})
print("held", flush=True)
time.sleep(60)
"""


def make_config(path, name="test", **changes):
    return config.Config(name, config.ModelConfig(), run=config.RunConfig(dir=str(path)), **changes)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_begun_run_leaves(tmp_path):
    run = open_run(make_config(tmp_path / "run"))
    assert (run.is_new, run.epoch) == (True, 1)
    run.begin({"python": "3"})
    run.event("done", source="loop", step=5, loss=float("inf"))
    run.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.json",
        "environment.json",
        "events.jsonl",
        "logs",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config.to_dict(make_config(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {"python": "3"}
    started, done = read(run.events)
    assert list(started)[:5] == ["time", "mono", "epoch", "source", "kind"]
    assert (started["kind"], started["pid"], started["rank"], started["epoch"]) == ("worker_started", os.getpid(), 0, 1)
    assert (done["kind"], done["source"], done["step"], done["loss"]) == ("done", "loop", 5, None)


def test_the_default_directory_carries_recipe_and_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config.Config("test", config.ModelConfig())
    run = open_run(settings)
    assert run.path == tmp_path / "runs" / f"test-{config.config_hash(settings)}"
    run.close()


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    run = open_run(make_config(tmp_path / "run"))
    logging.getLogger("jaxscale").warning("something")
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_changes_nothing(tmp_path):
    run = open_run(make_config(tmp_path))
    run.begin({})
    run.close()
    before = (tmp_path / "config.json").read_text()
    run = open_run(make_config(tmp_path, seed=5))
    assert not run.is_new
    run.close()
    assert (tmp_path / "config.json").read_text() == before
    run = open_run(make_config(tmp_path, seed=5))
    run.begin({})
    run.close()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=rf"in use by another run \(pid {holder.pid} on \S+\); wait for it"):
            open_run(make_config(path))
        assert issubclass(RunDirectoryError, ConfigError), "the command line shows it without a traceback"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    run = open_run(make_config(path))
    assert (run.epoch, run.is_new) == (2, False)
    run.close()


def test_the_lock_is_free_after_close_and_not_before(tmp_path):
    run = open_run(make_config(tmp_path))
    with pytest.raises(RunDirectoryError, match="in use"):
        open_run(make_config(tmp_path))
    run.begin({})
    run.close()
    open_run(make_config(tmp_path)).close()


def test_children_do_not_hold_the_lock(tmp_path):
    run = open_run(make_config(tmp_path))
    run.begin({})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False)
    try:
        run.close()
        open_run(make_config(tmp_path)).close()
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("case", ["other recipe", "other folder", "broken config", "a file"])
def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path, case):
    path = tmp_path / "run"
    if case == "other recipe":
        run = open_run(make_config(path, name="other"))
        run.begin({})
        run.close()
        message = r"run directory of another recipe: it trains 'other', this is 'test'; give another --run.dir"
    elif case == "other folder":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
        message = r"not a run directory: it holds thesis.tex and no config.json"
    elif case == "broken config":
        path.mkdir()
        (path / "config.json").write_text("{")
        message = r"config.json cannot be read"
    else:
        path.write_text("x")
        message = r"is a file; give a folder"
    before = sorted(p.name for p in path.iterdir()) if path.is_dir() else None
    with pytest.raises(RunDirectoryError, match=message):
        open_run(make_config(path))
    assert (sorted(p.name for p in path.iterdir() if p.name != ".lock") if path.is_dir() else None) in (
        before,
        [name for name in before or [] if name != ".lock"],
    )


SKELETONS = {
    "lock": {".lock": ""},
    "lock and logs": {".lock": "pid 1 on x", "logs/host-0.log": "a line"},
    "half a config": {".lock": "", "logs/host-0.log": "", "config.json.partial": '{"na'},
    "metrics before the config": {".lock": "", "logs/host-0.log": "", "metrics.jsonl": ""},
}


def write_files(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


@pytest.mark.parametrize("case", SKELETONS)
def test_what_a_start_that_was_cut_short_leaves_is_a_new_run(tmp_path, case):
    write_files(tmp_path / "run", SKELETONS[case])
    run = open_run(make_config(tmp_path / "run"))
    assert (run.is_new, run.epoch) == (True, 1)
    run.begin({})
    run.close()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert not open_is_new(tmp_path / "run")


@pytest.mark.parametrize("case", SKELETONS)
def test_it_is_tidied_up_when_the_next_start_is_refused(tmp_path, case):
    write_files(tmp_path / "run", SKELETONS[case])
    open_run(make_config(tmp_path / "run")).close()
    assert not (tmp_path / "run").exists()


def open_is_new(path):
    run = open_run(make_config(path))
    run.close()
    return run.is_new


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/2/manifest.json", "events.jsonl"])
def test_what_was_trained_is_no_skeleton(tmp_path, name):
    write_files(tmp_path, {".lock": "", "config.json.partial": "", name: '{"step": 1}\n'})
    with pytest.raises(RunDirectoryError, match=rf"it holds {name.partition('/')[0]} and no config.json"):
        open_run(make_config(tmp_path))
    assert (tmp_path / name).exists()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = open_run(make_config(tmp_path / "run"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.begin({})
    assert run.is_unused
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "logs"]
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_logs_frees_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "_start_log", full)
        with pytest.raises(RunDirectoryError, match="cannot be used: No space left on device; repair that"):
            open_run(make_config(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    assert open_is_new(tmp_path / "run")


def test_each_incarnation_has_a_higher_epoch(tmp_path):
    for epoch in (1, 2, 3):
        run = open_run(make_config(tmp_path))
        assert run.epoch == epoch
        run.begin({})
        run.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 7}\n{"step": 2, "epo')
    run = open_run(make_config(tmp_path))
    assert run.epoch == 8
    run.close()
    run = open_run(make_config(tmp_path), World(epoch=12))
    assert run.epoch == 12
    run.close()
    assert highest_epoch(tmp_path / "absent") == 0


def test_a_torn_event_is_ended(tmp_path):
    run = open_run(make_config(tmp_path))
    run.begin({})
    run.close()
    with open(run.events, "a") as file:
        file.write('{"time": 1, "kind": "sea')
    run = open_run(make_config(tmp_path))
    run.begin({})
    run.close()
    text = run.events.read_text().splitlines()
    assert text[1] == '{"time": 1, "kind": "sea'
    assert [json.loads(line)["epoch"] for line in (text[0], text[2])] == [1, 2]


def test_logs_go_to_one_file_per_host_and_rank_and_stop_with_the_run(tmp_path, capfd):
    root = logging.getLogger()
    before = list(root.handlers)
    run = open_run(make_config(tmp_path))
    run.begin({})
    logging.getLogger("jaxscale.train").info("step one")
    logging.getLogger("another.package").info("chatter")
    logging.getLogger("another.package").warning("attention")
    run.close()
    logging.getLogger("jaxscale.train").info("after")
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name.endswith("-0.log")
    text = log.read_text()
    assert "INFO jaxscale.train: step one" in text
    assert "WARNING another.package: attention" in text
    assert "chatter" not in text
    assert "after" not in text
    assert "step one" not in capfd.readouterr().err
    assert root.handlers == before


def test_events_come_from_any_thread(tmp_path):
    import threading

    run = open_run(make_config(tmp_path))
    run.begin({})
    threads = [
        threading.Thread(target=lambda n=n: [run.event("alarm", what=str(n)) for _ in range(50)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close()
    assert len([line for line in read(run.events) if line["kind"] == "alarm"]) == 200
    assert time.time() - read(run.events)[-1]["time"] < 60
