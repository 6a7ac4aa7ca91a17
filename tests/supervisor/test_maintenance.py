"""Notice of a host's end: from a file or a command, again and again while it stands; no command can stop the agent."""

import asyncio
import contextlib
import os
import shlex
import sys
from pathlib import Path

import psutil
import pytest
from loops import run, until

from jaxscale.supervisor import maintenance as module
from jaxscale.supervisor.maintenance import Maintenance, notice

ALWAYS = 0.001


class Looks:
    """asyncio for the module, counting how often it looked."""

    def __init__(self):
        self.count = 0

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        self.count += 1
        await asyncio.sleep(seconds)

    async def some(self):
        before = self.count
        await until(lambda: self.count > before + 2)


@pytest.fixture
def looks(monkeypatch):
    looks = Looks()
    monkeypatch.setattr(module, "asyncio", looks)
    return looks


@contextlib.asynccontextmanager
async def watching(maintenance):
    """Yields what was told so far, and the task that tells."""
    told = []
    task = asyncio.ensure_future(notice(maintenance, told.append))
    try:
        yield told, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def children(mark):
    """Processes below this one that have `mark` in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and mark in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture
def sleeper():
    """A command that does not end, and a mark in its command line; none is left."""
    mark = f"sleeper-{os.urandom(4).hex()}"
    yield shlex.join([sys.executable, "-c", f"import time; time.sleep(900)  # {mark}"]), mark
    for child in children(mark):
        child.kill()


def test_a_file_is_the_notice_while_it_is_there(tmp_path, looks):
    path = tmp_path / "notice"

    async def work():
        async with watching(Maintenance(file=str(path), every_seconds=ALWAYS)) as (told, _):
            await looks.some()
            assert told == []
            path.touch()
            await until(lambda: len(told) > 2)
            assert set(told) == {f"{path} is there"}
            path.unlink()
            await looks.some()
            before = len(told)
            await looks.some()
            assert len(told) == before

    run(work())


def test_a_command_is_the_notice_while_its_exit_code_is_0(tmp_path, looks):
    path = tmp_path / "a file; with $(words)"  # no shell reads this
    command = shlex.join(["test", "-e", str(path)])

    async def work():
        async with watching(Maintenance(command=command, every_seconds=ALWAYS)) as (told, _):
            await looks.some()
            assert told == []
            path.touch()
            await until(lambda: len(told) > 2)
            assert set(told) == {f"{command!r} says so"}
            path.unlink()
            await looks.some()
            before = len(told)
            await looks.some()
            assert len(told) == before

    run(work())


def test_both_are_asked(tmp_path):
    async def work():
        async with watching(Maintenance(str(tmp_path), "true", ALWAYS)) as (told, _):
            await until(lambda: len(told) > 3)
            assert told[:2] == [f"{tmp_path} is there", "'true' says so"]

    run(work())


@pytest.mark.parametrize("command", ["no-such-program --flag", "sh -c 'open", "/", " ", "true \0"])
def test_a_command_that_cannot_be_run_is_told_and_is_no_notice(looks, caplog, command):
    async def work():
        async with watching(Maintenance(command=command, every_seconds=ALWAYS)) as (told, task):
            await looks.some()
            assert told == []
            assert not task.done()

    run(work())
    assert f"the maintenance command {command!r} cannot be run" in caplog.text


def test_a_command_that_hangs_is_ended_and_is_no_notice(looks, caplog, monkeypatch, sleeper):
    command, mark = sleeper
    monkeypatch.setattr(module, "ASK_SECONDS", 0.1)

    async def work():
        async with watching(Maintenance(command=command, every_seconds=ALWAYS)) as (told, task):
            await looks.some()
            assert told == []
            assert not task.done()

    run(work())
    assert "took longer than 0.1 s" in caplog.text
    assert not children(mark)


def test_an_agent_that_ends_leaves_no_command_behind(sleeper):
    command, mark = sleeper

    async def work():
        async with watching(Maintenance(command=command, every_seconds=ALWAYS)):
            await until(lambda: children(mark))

    run(work())
    assert not children(mark)


def test_without_either_nothing_is_told_and_nothing_ends():
    async def work():
        async with watching(Maintenance()) as (told, task):
            for _ in range(10):
                await asyncio.sleep(0)
            assert not task.done()
            assert told == []

    run(work())


def test_a_file_that_cannot_be_looked_at_is_no_notice(looks):
    async def work():
        async with watching(Maintenance(file=str(Path("/dev/null/x")), every_seconds=ALWAYS)) as (told, task):
            await looks.some()
            assert told == []
            assert not task.done()

    run(work())


def test_a_repeated_failure_is_told_once_until_it_changes(tmp_path, looks, caplog):
    program = tmp_path / "ask"

    async def work():
        async with watching(Maintenance(command=str(program), every_seconds=ALWAYS)) as (told, _):
            await looks.some()
            assert len(caplog.records) == 1
            program.touch(mode=0o600)  # there is another reason now
            await looks.some()
            assert len(caplog.records) == 2
            program.write_text("#!/bin/sh\nexit 1\n")
            program.chmod(0o700)
            await looks.some()
            program.unlink()
            await looks.some()
            assert told == []
        words = [record.getMessage() for record in caplog.records]
        assert len(words) == 3
        assert ["No such file" in one for one in words] == [True, False, True]
        assert "Permission denied" in words[1]

    run(work())
