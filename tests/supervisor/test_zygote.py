"""The zygote as a real process: what it forks belongs to the agent, and what it cannot do it says."""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from jaxscale.supervisor import zygote as zygote_module
from jaxscale.supervisor.children import PR_SET_CHILD_SUBREAPER, Child, Exit, Zygote, ZygoteFailed, become_subreaper
from jaxscale.supervisor.records import MAILBOX_VARIABLE
from jaxscale.supervisor.zygote import ForkError, fork

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "lm_nano.py"
SECONDS = 120


def run(work):
    """Runs a coroutine with a limit that only a hang reaches."""

    async def limited():
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


@pytest.fixture
def subreaper():
    """This process as an agent; at the end nothing that it did not have before is left below it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    become_subreaper()
    yield
    for child in psutil.Process().children(recursive=True):
        if child.pid not in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait(10)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def mailbox(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mail:
        mail.bind(str(tmp_path / "mail"))
        mail.settimeout(SECONDS)
        yield mail


def listens(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        return False
    return True


def adopt(pid):
    return Child(pid, 1, lambda *_: None)


@pytest.mark.usefixtures("subreaper")
def test_the_life_of_a_zygote(tmp_path, mailbox):
    """One history, because a zygote takes seconds to start: it forks, is told to end, is asked nonsense, and dies."""

    async def history():
        zygote = Zygote(
            [str(RECIPE)], tmp_path / "log", {MAILBOX_VARIABLE: str(tmp_path / "mail"), "JAX_PLATFORMS": "cpu"}
        )
        try:
            await zygote.start()
            await told_to_end(zygote)
            await service(zygote)
            await worker(zygote)
            await nonsense(zygote)
            await death(zygote)
        finally:
            zygote.close()

    async def told_to_end(zygote):
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for the agent to judge, SIGTERM for it to hear of
            os.kill(zygote.pid, number)
        message = json.loads(await asyncio.to_thread(mailbox.recv, 1 << 16))
        assert message == {"kind": "preempted", "pid": zygote.pid}

    async def service(zygote):
        """Listens before the answer, is the agent's child in a session of its own, and dies with its fence."""
        said = await zygote.request({"do": "service", "processes": 2, "host": "127.0.0.1"})
        assert listens(said["address"])
        forked = psutil.Process(said["pid"])
        assert forked.ppid() == os.getpid()
        assert os.getsid(said["pid"]) == said["pid"]
        forked.send_signal(signal.SIGTERM)  # means that the host is to end: it goes on
        message = json.loads(await asyncio.to_thread(mailbox.recv, 1 << 16))
        assert message == {"kind": "preempted", "pid": said["pid"]}
        assert listens(said["address"])
        child = adopt(said["pid"])
        child.kill()
        assert await child.wait() == Exit(None, signal.SIGKILL)
        assert not listens(said["address"])

    async def worker(zygote):
        """One whose job cannot be read: the agent gets its exit code, its traceback is in the log."""
        said = await zygote.request({"do": "worker", "job": str(tmp_path / "nowhere.json")})
        assert await adopt(said["pid"]).wait() == Exit(70, None)
        log = (tmp_path / "log").read_text()
        assert "FileNotFoundError" in log
        assert "nowhere.json" in log

    async def nonsense(zygote):
        with pytest.raises(ForkError, match="not 'dance'"):
            await zygote.request({"do": "dance"})
        assert (await zygote.request({"do": "service", "processes": 1, "host": "127.0.0.1"}))["pid"]

    async def death(zygote):
        """What it forked lives on, and the agent learns that it needs another, even if a request came first."""
        said = await zygote.request({"do": "service", "processes": 1, "host": "127.0.0.1"})
        assert not zygote.has_died()
        os.kill(zygote.pid, signal.SIGKILL)
        with pytest.raises(ZygoteFailed):
            await zygote.request({"do": "service", "processes": 1, "host": "127.0.0.1"})
        assert listens(said["address"])
        assert zygote.has_died()
        assert not zygote.has_died()  # said once
        child = adopt(said["pid"])
        child.kill()
        await child.wait()

    run(history())


def fails_to_start(tmp_path, text):
    """The words of a zygote whose recipe is `text`."""
    recipe = tmp_path / "broken.py"
    recipe.write_text(text)

    async def start():
        zygote = Zygote([str(recipe)], tmp_path / "log", {"JAX_PLATFORMS": "cpu"})
        try:
            with pytest.raises(ZygoteFailed) as failure:
                await zygote.start()
            return str(failure.value)
        finally:
            zygote.close()

    return run(start())


def test_a_recipe_that_raises_at_import_is_told_with_its_traceback(tmp_path):
    words = fails_to_start(tmp_path, "def load():\n    raise ValueError('no such corpus')\nload()\n")
    assert words.startswith("Traceback")
    assert "broken.py" in words
    assert words.rstrip().endswith("no such corpus")


def test_an_error_of_any_length_and_alphabet_is_told(tmp_path):
    words = fails_to_start(tmp_path, "raise ValueError('\U0001f525' * 200_000 + ' the end')\n")
    assert words.rstrip().endswith("the end")


def test_a_recipe_that_ends_the_process_is_told_too(tmp_path):
    assert "SystemExit" in fails_to_start(tmp_path, "import sys\nsys.exit(3)\n")
    assert "log" in fails_to_start(tmp_path, "import os\nos._exit(3)\n")


def test_with_a_second_thread_nothing_is_forked():
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs, pytest.raises(ForkError, match=r"\d+ threads; a fork could hang: start workers by spawn"):
            fork(lambda _: pytest.fail("forked"), theirs)
    finally:
        over.set()
        thread.join()


def test_a_preemption_without_an_agent_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv(MAILBOX_VARIABLE, str(tmp_path / "nobody"))
    zygote_module.tell_preempted(signal.SIGTERM, None)


# The agent's side


def test_a_child_that_belongs_to_somebody_else_ends_with_an_unknown_code():
    """One that an agent adopts from an agent that died: its exit code goes elsewhere."""
    with subprocess.Popen(["sh", "-c", "sleep 100 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        try:
            pid = int(shell.stdout.readline())

            async def watch():
                ends = []
                child = Child(pid, 1, lambda child, end: ends.append((child.pid, end)))
                child.send(signal.SIGTERM)
                await child.wait()
                child.kill()  # nothing happens any more
                return ends

            assert run(watch()) == [(pid, Exit(None, None))]
        finally:
            shell.kill()


def test_killing_a_child_ends_its_whole_session():
    code = (
        "import os, subprocess; os.setsid(); p = subprocess.Popen(['sleep', '900']); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        below = psutil.Process(int(process.stdout.readline()))
        try:

            async def end():
                child = adopt(process.pid)
                child.kill()
                return await child.wait()

            assert run(end()) == Exit(None, signal.SIGKILL)
            _, living = psutil.wait_procs([below], timeout=30)
            assert not living or below.status() == psutil.STATUS_ZOMBIE
        finally:
            process.kill()
            with contextlib.suppress(psutil.NoSuchProcess):
                below.kill()


def test_a_process_that_is_gone_cannot_be_watched():
    process = subprocess.Popen(["true"])
    process.wait()

    async def watch():
        with pytest.raises(ProcessLookupError):
            adopt(process.pid)

    run(watch())


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (Exit(3, None), "exit code 3"),
        (Exit(None, signal.SIGKILL), "ended by SIGKILL"),
        (Exit(None, None), "ended, nobody knows how"),
    ],
)
def test_an_end_in_words(end, words):
    assert str(end) == words


def test_what_forks_and_what_is_forked_have_no_grpc():
    """Its threads and locks do not survive a fork; it belongs to the coordinator and the agents."""
    modules = "zygote, worker_process, supervised_run, memory_restore, ahead, programs"
    code = f"import sys; from jaxscale.supervisor import {modules}; print([m for m in sys.modules if m == 'grpc'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.strip() == "[]"
