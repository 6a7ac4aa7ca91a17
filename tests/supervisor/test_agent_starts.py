"""How an agent starts and leaves: what it refuses, whose folder it takes and removes, and that it never hangs alone."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from loops import run, until

from jaxscale.commands import supervise
from jaxscale.commands.parse import UsageError
from jaxscale.supervisor import host_folder, zygote_keeper
from jaxscale.supervisor.children import Exit, Zygote, ZygoteDied, ZygoteFailed
from jaxscale.supervisor.departure import ALONE_SECONDS, NOTICE_SECONDS, Departure
from jaxscale.supervisor.estate import Estate, heir_of
from jaxscale.supervisor.host_folder import MARK, HostFolder, HostFolderError
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.slot_files import own_slot
from jaxscale.supervisor.zygote import free_port
from jaxscale.supervisor.zygote_keeper import DEATHS, ZygoteKeeper
from jaxscale.testing.cluster import launched

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
STOPPED = 75


# What the command refuses


@pytest.fixture
def no_agent(monkeypatch):
    """Nothing that an agent needs is there: only what is refused before can be told."""

    def read_token():
        pytest.fail("it went on")

    monkeypatch.setattr("jaxscale.supervisor.job_token.read_token", read_token)
    monkeypatch.setattr(supervise, "quiet_terminal", lambda: None)


def refused(*flags):
    """What `jaxscale agent` with these flags instead of good ones says."""
    good = {"--coordinator": "127.0.0.1:1", "--host": "host-0"}
    given = {**good, **dict(zip(flags[::2], flags[1::2], strict=True))}
    with pytest.raises(UsageError) as failure:
        supervise.run_agent([word for pair in given.items() for word in pair])
    return str(failure.value)


@pytest.mark.usefixtures("no_agent")
@pytest.mark.parametrize("host", ["", "/tmp/precious", "../../x", "..", ".", "a/b", "host-0#1", "x ", "h" * 65])
def test_a_host_whose_name_is_no_name_is_refused(host):
    words = refused("--host", host)
    assert words.startswith(f"--host {host[:80]!a} is no host's name: 1 to 64 letters")
    assert "as in --host host-0" in words


@pytest.mark.usefixtures("no_agent")
@pytest.mark.parametrize("address", ["", "host", "host:", ":8476", "host:0", "host:65536", "host:http", "host:٣"])
def test_a_coordinator_that_is_no_address_is_refused(address):
    assert f"--coordinator: an address is host:port, not {address!r}; a port is a number" in refused(
        "--coordinator", address
    )


@pytest.mark.usefixtures("no_agent")
def test_an_address_of_another_host_is_refused():
    words = refused("--listen", "203.0.113.1")  # of a network that is for documents alone
    assert "--listen 203.0.113.1: " in words
    assert "203.0.113.1 is no address of this host; name one of its own" in words
    assert "another port" not in words


@pytest.fixture
def own_name(monkeypatch):
    """`ours` is a name of this machine, and as on many an address of the loopback interface."""
    resolve = socket.getaddrinfo

    def resolving(host, *more, **options):
        return resolve("127.0.1.1" if host == "ours" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolving)
    monkeypatch.setattr("jaxscale.supervisor.peer_server.check_own", lambda _: None)  # it does not ask Python
    return "ours"


@pytest.mark.usefixtures("no_agent")
def test_a_name_that_others_cannot_use_is_refused_where_the_coordinator_is_elsewhere(own_name):
    words = refused("--listen", own_name, "--coordinator", "203.0.113.1:8476")
    assert words.startswith(
        "--listen ours, which is 127.0.1.1 here, is no address that hosts on other machines can use"
    )
    assert "the coordinator at 203.0.113.1:8476 is on another one; give an address of this host" in words
    words = refused("--listen", "127.0.0.1", "--coordinator", "203.0.113.1:8476")
    assert words.startswith("--listen 127.0.0.1 is no address that hosts on other machines can use")


@pytest.mark.usefixtures("no_agent")
@pytest.mark.parametrize("coordinator", ["127.0.0.1:8476", "no-such-machine.invalid:8476"])
def test_and_may_be_used_where_it_is_here_or_nobody_knows(own_name, coordinator):
    with pytest.raises(pytest.fail.Exception, match="it went on"):
        refused("--listen", own_name, "--coordinator", coordinator)


@pytest.mark.usefixtures("no_agent")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("nosuchcmd --flag", "there is no program 'nosuchcmd'"),
        ("/tmp", "there is no program '/tmp'"),
        ("sh -c 'open", "quote it as for a shell"),
        ("  ", "is empty"),
    ],
)
def test_a_maintenance_command_that_cannot_be_run_is_refused(command, words):
    assert words in refused("--maintenance-command", command)


# Whose folder it is


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_made_marked_and_removed(tmp_path):
    place = HostFolder(tmp_path / "memory", "host-0", "job")
    assert place.is_new
    assert place.path.stat().st_mode & 0o777 == 0o700
    assert json.loads((place.path / MARK).read_text()) == {"job": "job", "host": "host-0", "pid": os.getpid()}
    (place.path / "own").mkdir()
    (place.path / own_slot(0)).write_bytes(b"1")
    (place.path / "estate.json").touch()
    place.remove()
    assert tree(tmp_path) == ["memory"]


@pytest.mark.parametrize("name", ["precious.txt", "own/photo.png", "copies/host-1/letter", "copies/.git/gen-0", "vote"])
def test_a_folder_that_no_agent_made_is_refused_and_left_as_it_is(tmp_path, name):
    path = tmp_path / "host-0" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(HostFolderError, match=r"was not made by an agent \(.* is in it\).*give another"):
        HostFolder(tmp_path, "host-0", "job")
    assert tree(tmp_path) == before
    assert path.read_text() == "mine"


def test_a_link_to_a_folder_is_refused(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "host-0").symlink_to(tmp_path / "precious")
    with pytest.raises(HostFolderError, match="no folder but a link"):
        HostFolder(tmp_path, "host-0", "job")
    assert tree(tmp_path) == ["host-0", "precious"]


def test_what_another_job_left_is_refused_and_left_as_it_is(tmp_path):
    left(tmp_path, job="other")
    with pytest.raises(
        HostFolderError, match=r"the memory of job 'other', and this is job 'job'; .*remove that folder"
    ):
        HostFolder(tmp_path, "host-0", "job")
    assert (tmp_path / "host-0" / own_slot(0)).exists()


def left(memory, job="job", mark=True):
    """The folder of an agent that was killed."""
    folder = memory / "host-0"
    for name in ("own", "copies/host-1"):
        (folder / name).mkdir(parents=True)
    (folder / own_slot(0)).write_bytes(b"slot")
    (folder / "copies/host-1/.incoming-0").touch()
    for name in ("vote.json", "vote.json.lock", "job-3.json", "progress", "agent.sock"):
        (folder / name).touch()
    if mark:
        (folder / MARK).write_text(json.dumps({"job": job, "host": "host-0", "pid": 1}))
    return folder


@pytest.mark.parametrize("mark", [True, False], ids=["marked", "half removed"])
def test_what_a_killed_agent_left_is_taken_over(tmp_path, mark):
    folder = left(tmp_path, mark=mark)
    place = HostFolder(tmp_path, "host-0", "job")
    assert not place.is_new
    assert (folder / own_slot(0)).read_bytes() == b"slot"
    place.remove()
    assert tree(tmp_path) == []


def test_a_folder_that_a_living_agent_serves_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(host_folder, "LOCK_SECONDS", 0.1)
    first = HostFolder(tmp_path, "host-0", "job")
    with pytest.raises(HostFolderError, match=rf"another agent \(pid {os.getpid()}\) serves .*end that one first"):
        HostFolder(tmp_path, "host-0", "job")
    assert first.path.exists()
    first.remove()
    HostFolder(tmp_path, "host-0", "job").remove()


def test_a_folder_that_was_made_anew_meanwhile_is_not_removed(tmp_path):
    first = HostFolder(tmp_path, "host-0", "job")
    shutil.rmtree(first.path)
    second = HostFolder(tmp_path, "host-0", "job")
    first.remove()
    assert (second.path / MARK).exists()
    second.remove()


# When it leaves by itself


SILENT = 1000.0


def test_who_was_not_told_to_end_stays():
    assert Departure().reason(SILENT, SILENT, has_worker=False) == ""


def test_who_has_a_coordinator_waits_for_its_word():
    departure = Departure()
    departure.notice(0)
    assert departure.signal(1, is_alone=False, has_worker=True) == ""
    for has_worker in (False, True):
        assert departure.reason(SILENT, 0.5, has_worker) == ""


@pytest.mark.parametrize(("has_worker", "seconds"), [(False, ALONE_SECONDS), (True, NOTICE_SECONDS)])
def test_without_a_coordinator_it_leaves_after_its_time(has_worker, seconds):
    departure = Departure()
    assert f"has {seconds:g} s to come" in departure.signal(100, is_alone=True, has_worker=has_worker)
    assert departure.reason(100 + seconds - 0.1, SILENT, has_worker) == ""
    assert "told to end, no coordinator for 1000 s" in departure.reason(100 + seconds + 0.1, SILENT, has_worker)
    departure.notice(100 + seconds)  # a file says it every second
    assert departure.reason(100 + seconds + 0.1, SILENT, has_worker)
    assert departure.reason(100 + seconds + 0.1, seconds - 0.1, has_worker) == ""  # it fell silent only then


def test_a_second_signal_ends_it_at_once_but_only_alone():
    departure = Departure()
    departure.notice(100)
    departure.signal(100, is_alone=False, has_worker=True)
    assert departure.reason(100, 2.0, has_worker=True) == ""
    departure.signal(101, is_alone=True, has_worker=True)
    assert "told to end twice" in departure.reason(101, 3.0, has_worker=True)


# Real agents


class RealAgents:
    """Agents of one machine, with nobody to coordinate them unless a test does."""

    def __init__(self, folder, tmp_path):
        self.folder, self.tmp_path, self.started = folder, tmp_path, []
        write_token(tmp_path / "token", new_token())

    def start(self, *flags, host="host-0", memory=None):
        words = ["--coordinator", f"127.0.0.1:{free_port('127.0.0.1')}", "--devices", "1", "--host", host]
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxscale", "agent", *words, "--shared-memory", str(memory or self.folder), *flags],
            env={**os.environ, **child_environment(self.tmp_path / "token")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def serves(self, process, host="host-0"):
        """Waits until it listens and handles signals."""
        deadline = time.monotonic() + 60
        mail = self.folder / host / "agent.sock"
        catches = 0
        while not (mail.exists() and catches >> (signal.SIGTERM - 1) & 1):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
            status = Path(f"/proc/{process.pid}/status").read_text()
            catches = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)


@pytest.fixture
def agents(tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="jaxscale-agents-", dir="/dev/shm"))
    found = RealAgents(folder, tmp_path)
    yield found
    for process in found.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_with_somebodys_files_survives_an_agent_of_its_name(agents):
    precious = agents.folder / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    agent = agents.start(host="precious")
    _, said = agent.communicate(timeout=60)
    assert agent.returncode == 2
    (line,) = said.strip().splitlines()
    assert "was not made by an agent (thesis.tex is in it)" in line
    assert tree(precious) == ["thesis.tex"]


def test_an_agent_alone_can_be_stopped(agents):
    """SIGTERM ends it in seconds, with a line that says why; nothing of it is left."""
    agent = agents.start()
    agents.serves(agent)
    agent.send_signal(signal.SIGTERM)
    _, said = agent.communicate(timeout=30)
    assert agent.returncode == STOPPED
    assert "host-0 leaves the run: told to end, no coordinator for" in said.strip().splitlines()[-1]
    assert tree(agents.folder) == []


def leave_worker(folder):
    """A worker, and what an agent that was killed wrote of it into its host's folder."""
    worker = subprocess.Popen(["sleep", "900"], start_new_session=True)
    (folder / "host-0").mkdir(mode=0o700)
    Estate(1, 0, heir_of(worker.pid, 1), None, {"peers": {}, "copies_to": [], "epoch": 1}).write(folder / "host-0")
    (folder / "host-0" / MARK).write_text(json.dumps({"job": "job", "host": "host-0", "pid": 1}))
    return worker


def test_an_agent_alone_says_whom_it_misses_and_ends_its_worker_at_a_second_sigterm(agents):
    worker = leave_worker(agents.folder)
    try:
        agent = agents.start()
        warning = agent.stderr.readline()
        assert "no coordinator at 127.0.0.1:" in warning
        assert "cannot be reached" in warning
        agent.send_signal(signal.SIGTERM)
        assert "told to end; a coordinator has 30 s to come" in agent.stderr.readline()
        assert (agent.poll(), worker.poll()) == (None, None)
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=20)
        assert agent.returncode == STOPPED
        assert "host-0 leaves the run: told to end twice" in said.strip().splitlines()[-1]
        assert worker.wait(10) == -signal.SIGKILL
        assert tree(agents.folder) == []
    finally:
        worker.kill()
        worker.wait()


# Zygotes that die


@pytest.mark.slow
def test_a_zygote_that_is_killed_before_the_run_begins_costs_the_run_nothing(tmp_path):
    """As the kernel does where memory is short while several hosts import at once."""
    flags = ("--hosts-per-slice", 1, "--steps", 5, "--checkpoint.every", 0)
    with launched(NANO, tmp_path / "run", *flags) as cluster:

        def importing():
            with contextlib.suppress(IndexError, StopIteration, OSError):
                return cluster.zygote("host-0")
            return None

        for _ in range(2):
            pid = cluster.wait_for(importing, "a zygote")
            os.kill(pid, signal.SIGKILL)
            cluster.wait_for(lambda pid=pid: True if importing() not in (None, pid) else None, "the next zygote")
        assert cluster.finish() == 0
        alarms = [event["detail"] for event in cluster.events("alarm") if event["what"] == "zygote"]
        assert len(alarms) == 2
        assert all("ended by SIGKILL" in detail for detail in alarms)
        assert not cluster.events("fault")
        assert [line["step"] for line in cluster.metrics()] == list(range(1, 6))


class FakeZygote:
    """A zygote of which the test says how it ends."""

    def __init__(self, ends):
        self.ready, self.exit, self.pid, self.closed = False, None, 7, False
        self._ends = ends

    async def start(self):
        end = self._ends.pop(0) if self._ends else None
        if isinstance(end, signal.Signals):
            self.exit = Exit(None, end)
            raise ZygoteDied(f"it was still importing: {self.exit}")
        if isinstance(end, Exception):
            raise end
        self.ready = True

    def has_died(self):
        return not self.ready

    def close(self):
        self.ready, self.closed = False, True


class Pauses:
    """asyncio for the keeper: its pauses are counted and short."""

    def __init__(self):
        self.seconds = []

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0.001)


@pytest.fixture
def pauses(monkeypatch):
    found = Pauses()
    monkeypatch.setattr(zygote_keeper, "asyncio", found)
    return found


class Kept:
    """A keeper with zygotes that end like this, and what it says."""

    def __init__(self, tmp_path, ends):
        self.said, self.preempted, self.made = [], [], []
        self._ends = list(ends)
        self.keeper = ZygoteKeeper(
            tmp_path / "host-0",
            1,
            lambda kind, **fields: self.said.append((kind, fields)),
            self.preempted.append,
            self.make,
        )
        self._welcome = {"run": str(tmp_path / "run"), "recipe": "r.py", "arguments": []}

    def make(self, *_):
        self.made.append(FakeZygote(self._ends))
        return self.made[-1]

    def kinds(self):
        return [kind for kind, _ in self.said]

    async def __aenter__(self):
        self.keeper.start(self._welcome)
        return self

    async def __aexit__(self, *_):
        await self.keeper.close()


def test_a_zygote_that_is_killed_while_it_imports_is_started_again_and_an_alarm_says_so(tmp_path, pauses):
    async def work():
        async with Kept(tmp_path, [signal.SIGKILL, OSError("no process to be had"), signal.SIGKILL]) as kept:
            await until(lambda: kept.keeper.ready)
            assert kept.kinds() == ["alarm"] * 3 + ["ready"]
            assert all(zygote.closed for zygote in kept.made[:-1])
            details = [fields["detail"] for kind, fields in kept.said if kind == "alarm"]
            assert details[0] == "host-0: it was still importing: ended by SIGKILL; another one is started in 0.1 s"
            assert "no process to be had" in details[1]
            assert pauses.seconds[:3] == pytest.approx([0.1, 0.2, 0.4], rel=0.2)
            assert all(seconds >= least for seconds, least in zip(pauses.seconds, (0.1, 0.2, 0.4), strict=False))
            assert not kept.preempted
        assert kept.made[-1].closed

    run(work())


def test_deaths_in_a_row_are_told_as_what_they_are_and_do_not_end_the_attempts(tmp_path, pauses):
    async def work():
        async with Kept(tmp_path, [signal.SIGKILL] * 9) as kept:
            await until(lambda: kept.keeper.ready)
            assert kept.kinds() == ["alarm"] * (DEATHS - 1) + ["zygote_failed"] * (10 - DEATHS) + ["ready"]
            fields = kept.said[DEATHS - 1][1]
            assert fields["raised"] is False
            assert "died 5 times in a row, the last time: it was still importing: ended by SIGKILL" in fields["text"]
            assert pauses.seconds[:9] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0], rel=0.2)

    run(work())


@pytest.mark.usefixtures("pauses")
def test_a_ready_one_between_them_makes_deaths_none_in_a_row(tmp_path):
    async def work():
        async with Kept(tmp_path, [*[signal.SIGKILL] * 4, None, *[signal.SIGKILL] * 4]) as kept:
            await until(lambda: kept.keeper.ready)
            kept.made[-1].ready = False  # it dies in its work
            await until(lambda: kept.kinds().count("ready") == 2)
            assert kept.kinds() == [*["alarm"] * 4, "ready", "unready", *["alarm"] * 4, "ready"]

    run(work())


def test_a_zygote_that_raises_is_told_with_its_words(tmp_path, pauses):
    async def work():
        async with Kept(tmp_path, [ZygoteFailed("Traceback: no corpus")]) as kept:
            await until(lambda: kept.keeper.ready)  # a later attempt may find the file mended
            assert kept.said[0] == ("zygote_failed", {"text": "Traceback: no corpus", "raised": True})
            assert kept.kinds() == ["zygote_failed", "ready"]
            assert pauses.seconds[0] == zygote_keeper.RAISED_SECONDS

    run(work())


@pytest.mark.usefixtures("pauses")
def test_sigterm_to_a_zygote_that_cannot_tell_it_yet_is_the_hosts_notice(tmp_path):
    async def work():
        async with Kept(tmp_path, [signal.SIGKILL, signal.SIGTERM]) as kept:
            await until(lambda: kept.preempted)
            assert kept.preempted == ["SIGTERM to the zygote"]
            await asyncio.sleep(0.05)
            assert len(kept.made) == 2  # a host that leaves needs no other
            assert kept.kinds() == ["alarm"]

    run(work())


def imports(tmp_path, text):
    """A real zygote whose recipe is this, after `start` has failed: it, and with what."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(textwrap.dedent(text))

    async def work():
        zygote = Zygote([str(recipe)], tmp_path / "log", {"JAX_PLATFORMS": "cpu"})
        try:
            with pytest.raises(ZygoteFailed) as failure:
                await zygote.start()
            assert zygote.has_died()
            assert not zygote.has_died()  # said once
            return zygote, failure.value
        finally:
            zygote.close()

    return run(work())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_zygote_that_is_ended_while_it_imports_says_by_what(tmp_path, number):
    zygote, failure = imports(
        tmp_path,
        f"import os, signal\nif {number == signal.SIGTERM}:\n    signal.signal({number:d}, signal.SIG_DFL)\n"
        f"os.kill(os.getpid(), {number:d})\n",
    )
    assert isinstance(failure, ZygoteDied)
    assert zygote.exit == Exit(None, number)
    assert f"was still importing: ended by {number.name}; what it printed is in {tmp_path / 'log'}" in str(failure)


def test_a_real_zygote_that_raises_did_not_die(tmp_path):
    _, failure = imports(tmp_path, "raise ValueError('no corpus')")
    assert not isinstance(failure, ZygoteDied)
    assert str(failure).rstrip().endswith("ValueError: no corpus")


def test_the_end_of_a_zygote_that_was_closed_is_nobodys_signal(tmp_path):
    async def work():
        zygote = Zygote([str(tmp_path / "none.py")], tmp_path / "log", {})
        starting = asyncio.ensure_future(zygote.start())
        await until(lambda: zygote.pid is not None)
        zygote.close()
        assert zygote.exit is None
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)

    run(work())
