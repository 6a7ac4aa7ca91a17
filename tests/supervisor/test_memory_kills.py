"""The kernel's own count of processes that it killed for want of memory."""

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from jaxscale.supervisor.children import Child
from jaxscale.supervisor.memory_kills import GROUPS, MemoryKills

LIMIT = 64 << 20
GREEDY = "import sys; sys.stdin.readline(); x = [bytearray(1 << 20) for _ in range(1000)]; print(len(x))"
VERSION_1, VERSION_2 = "9:name=systemd:/\n4:cpu,memory:/job/a\n0::/\n", "0::/job/a\n"


def tree(tmp_path, groups, file, kills):
    (tmp_path / "7").mkdir(exist_ok=True)
    (tmp_path / "7" / "cgroup").write_text(groups)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"low 0\noom_kill {kills}\n")


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        (VERSION_2, "job/a/memory.events"),
        (VERSION_1, "memory/job/a/memory.oom_control"),
        (VERSION_1, "memory/memory.oom_control"),  # in a container, which sees its own group as the root
    ],
)
def test_a_count_that_grows_is_a_kill(tmp_path, groups, file):
    tree(tmp_path, groups, file, 3)
    kills = MemoryKills(7, tmp_path, tmp_path)
    assert not kills.happened()
    tree(tmp_path, groups, file, 4)
    assert kills.happened()


def test_a_kill_that_is_long_ago_was_of_another_process(tmp_path):
    tree(tmp_path, VERSION_2, "job/a/memory.events", 3)
    kills = MemoryKills(7, tmp_path, tmp_path)
    tree(tmp_path, VERSION_2, "job/a/memory.events", 4)
    kills.look()
    assert kills.happened(), "it may be this one that is dying"
    kills.look()
    assert not kills.happened()


@pytest.mark.parametrize("text", ["", "oom_kill many\n", "one\n", None])
def test_a_kernel_that_does_not_count_says_no(tmp_path, text):
    tree(tmp_path, VERSION_2, "job/a/memory.events", 0)
    kills = MemoryKills(7, tmp_path, tmp_path)
    file = tmp_path / "job/a/memory.events"
    file.unlink() if text is None else file.write_text(text)
    assert not kills.happened()
    assert not MemoryKills(8, tmp_path, tmp_path).happened(), "a process that is gone"


@pytest.fixture
def group():
    """A control group of LIMIT bytes of memory."""
    for parent, limit in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        path = parent / f"jaxscale-test-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir()
            (path / limit).write_text(str(LIMIT))
        except OSError:
            if path.is_dir():
                path.rmdir()
            continue
        yield path
        path.rmdir()
        return
    pytest.skip("no control group with a limit of memory can be made here: not root, or no memory controller")


@pytest.mark.parametrize("greedy", [True, False])
def test_a_process_that_the_kernel_ended_for_memory_is_told_from_one_that_somebody_killed(group: Path, greedy):
    async def watch() -> dict[str, object]:
        process = subprocess.Popen([sys.executable, "-c", GREEDY], stdin=subprocess.PIPE, start_new_session=True)
        (group / "cgroup.procs").write_text(str(process.pid))
        child = Child(process.pid, 1, lambda *_: None)
        if greedy:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        else:
            os.kill(process.pid, 9)
        await asyncio.wait_for(child.wait(), 60)
        process.returncode = 0  # reaped by the child
        return child.how()

    how = asyncio.run(watch())
    assert (how["signal"], how["out_of_memory"], how["fenced"]) == (9, greedy, False)
