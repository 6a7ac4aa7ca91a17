"""What chaos calls a leak."""

import os
import threading
from types import SimpleNamespace

from jaxscale.chaos.resources import FILES_PER_HOST, MORE_OPEN_FILES, Held, crowded, held, leaked
from jaxscale.supervisor.jobs import WorkerJob


def test_what_a_living_process_holds_is_counted(tmp_path):
    cluster = SimpleNamespace(events=lambda _: [], coordinator=os.getpid)
    before = held(cluster)
    files = [os.open(tmp_path / str(at), os.O_WRONLY | os.O_CREAT) for at in range(MORE_OPEN_FILES + 1)]
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(14)]
    try:
        for thread in threads:
            thread.start()
        found = leaked(before, held(cluster))
    finally:
        done.set()
        for file in files:
            os.close(file)
    assert [line.split(" (pid")[0] for line in found] == ["the coordinator"] * 2
    assert "open files" in found[0]
    assert "threads" in found[1]


def test_a_little_more_is_no_leak_and_another_process_is_another_one():
    before = {1: Held("the agent of host-0", 20, 9), 2: Held("the agent of host-1", 20, 9)}
    after = {1: Held("the agent of host-0", 20 + MORE_OPEN_FILES, 9), 3: Held("the agent of host-1", 90, 9)}
    assert leaked(before, after) == []


def test_a_host_with_too_many_files_in_memory_is_named(tmp_path):
    for host, files in (("host-0", FILES_PER_HOST), ("host-1", FILES_PER_HOST + 1)):
        (tmp_path / host / "own").mkdir(parents=True)
        for at in range(files):
            (tmp_path / host / "own" / str(at)).touch()
    (line,) = crowded(tmp_path)
    assert line.startswith(f"host-1 has {FILES_PER_HOST + 1} files")
    assert crowded(tmp_path / "gone") == []


def test_of_the_jobs_of_a_host_only_the_newest_is_kept(tmp_path):
    fields = {"job": "j", "host": "host-0", "listen": "127.0.0.1", "folder": "f", "run": "r", "programs": "p"}
    for epoch in (1, 2, 3):
        job = WorkerJob(
            **fields, epoch=epoch, rank=0, processes=1, address="a", mesh={}, devices=1, every=1, generations=2
        )
        path = job.write(tmp_path)
        assert [found.name for found in tmp_path.iterdir()] == [path.name] == [f"job-{epoch}.json"]
