"""How a coordinator starts: on which port, in what folder, with which hosts, for which model; and on a full disk."""

import asyncio
import errno
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from histories import History, ScriptedJudge, table_judge

from jaxscale import cli
from jaxscale.axes import AXES
from jaxscale.config import CheckpointConfig, Config, ModelConfig, RunConfig
from jaxscale.run_directory import open_run
from jaxscale.supervisor import journal as journal_module
from jaxscale.supervisor import witness as witness_module
from jaxscale.supervisor.admission import check_shape
from jaxscale.supervisor.coordinator import Coordinator
from jaxscale.supervisor.coordinator_options import CoordinatorOptions
from jaxscale.supervisor.facts import Host
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.journal import WAITING_LINES, Journal
from jaxscale.supervisor.judge import AUDIT_SECONDS, PATIENCE_SECONDS
from jaxscale.supervisor.quorum import Acceptor, AskPromise, Term
from jaxscale.supervisor.refusals import KNOWN, QUIET_SECONDS, Refusals
from jaxscale.supervisor.rpc import VERSION, CannotListen, Refused, check_free
from jaxscale.supervisor.states import State
from jaxscale.supervisor.transitions import REFUSED, STOPPED
from jaxscale.supervisor.voter import Voter
from jaxscale.supervisor.witness import Witness
from jaxscale.supervisor.worlds import Request
from jaxscale.testing.cluster import launched

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
FOUR = ("host-0", "host-1", "host-2", "host-3")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def taken():
    """An address at which another process listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def token_file(tmp_path, monkeypatch):
    """A token for commands that are run in this process, or started with this environment."""
    path = tmp_path / "token"
    write_token(path, new_token())
    for name, value in child_environment(path).items():
        monkeypatch.setenv(name, value)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The port, and the folder


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("192.0.2.1:0", "no address of this machine; choose another port .* with --listen"),
        ("127.0.0.1:70000", "give host:port"),
        ("127.0.0.1", "give host:port"),
        ("no such host:1", "cannot listen on no such host:1"),
    ],
)
def test_where_nobody_can_listen(address, words):
    with pytest.raises(CannotListen, match=words):
        check_free(address)


def test_where_somebody_can_listen(taken):
    check_free("127.0.0.1:0")
    with pytest.raises(CannotListen, match="another process listens there; choose another port"):
        check_free(taken)


def test_a_coordinator_whose_port_is_taken_says_one_line_and_leaves_nothing(taken, tmp_path, token_file):
    del token_file
    command = ["coordinator", str(NANO), "--listen", taken, "--run.dir", str(tmp_path / "runs" / "mine")]
    done = subprocess.run(
        [sys.executable, "-m", "jaxscale", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot listen on {taken}: another process listens there; choose another port")
    assert files(tmp_path) == ["token"]


@pytest.mark.parametrize(("name", "is_told"), [("ours", True), ("localhost", False), ("127.0.0.1", False)])
def test_a_coordinator_whose_name_is_one_of_loopback_says_who_reaches_it(
    name, is_told, tmp_path, token_file, monkeypatch, capsys
):
    del token_file
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.1.1" if host == "ours" else host, *a, **k)
    )

    def stop(*_, **__):
        raise CannotListen("it went on")

    monkeypatch.setattr("jaxscale.run_directory.open_run", stop)
    assert cli.main(["coordinator", str(NANO), "--listen", f"{name}:0", "--run.dir", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "error: it went on"
    words = "warning: --listen ours:0 is 127.0.1.1: only agents on this machine reach it; give an address"
    assert [line.startswith(words) for line in told[:-1]] == [True] * is_told


def directory_at(path):
    return SimpleNamespace(
        path=path, checkpoints=path / "checkpoints", metrics=path / "metrics.jsonl", epoch=1, is_unused=False
    )


def coordinator_at(listen, directory, **options):
    memory = SimpleNamespace(every=10, generations=2, replicas=1)
    made = CoordinatorOptions("job-1", new_token(), listen, "recipe.py", (), **options)
    config = SimpleNamespace(steps=100, memory=memory, checkpoint=CheckpointConfig(every=0, keep=2, milestones=0))
    return Coordinator(made, config, ScriptedJudge(1), directory)


def test_nor_does_one_whose_port_is_taken_at_the_last_moment(taken, tmp_path):
    coordinator = coordinator_at(taken, directory_at(tmp_path))
    with pytest.raises(CannotListen, match="another process listens there"):
        asyncio.run(coordinator.run())
    assert files(tmp_path) == []


def settings(path):
    return Config("test", ModelConfig(), run=RunConfig(dir=str(path)))


def started(path, source="coordinator"):
    """What a supervised start that ends before its first worker leaves. Returns its epoch."""
    directory = open_run(settings(path), job="mine x")
    directory.event("coordinator_started", source=source)
    Voter(path / "witness-mine.json", "witness")
    (path / "logs" / "host-0.out").write_text("Traceback")
    epoch = directory.epoch
    directory.close()
    return epoch


def test_a_supervised_start_that_ended_before_its_first_worker_can_be_made_again(tmp_path):
    assert [started(tmp_path), started(tmp_path)] == [1, 2]
    directory = open_run(settings(tmp_path))
    assert (directory.is_new, directory.epoch) == (True, 3)
    directory.begin({})
    directory.close()
    assert not open_run_is_new(tmp_path)


def open_run_is_new(path):
    directory = open_run(settings(path))
    directory.close()
    return directory.is_new


def test_how_it_went_is_kept_and_its_votes_are_not(tmp_path):
    started(tmp_path)
    assert {"events.jsonl", "logs/host-0.out"} <= set(files(tmp_path))
    open_run(settings(tmp_path)).close()
    assert {"events.jsonl", "logs/host-0.out"} <= set(files(tmp_path))


def test_a_witness_alone_is_tidied_up(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    Voter(path / "witness-mine.json", "witness")
    open_run(settings(path)).close()
    assert not path.exists()


def test_what_workers_wrote_is_no_failed_start(tmp_path):
    started(tmp_path, source="worker")
    with pytest.raises(ValueError, match=r"it holds events.jsonl and no config.json"):
        open_run(settings(tmp_path))


def test_a_coordinator_that_ends_leaves_the_folder_to_the_others_of_its_job(tmp_path):
    path = tmp_path / "run"
    one, other = (open_run(settings(path), job="mine x") for _ in range(2))
    Voter(path / "witness-mine.json", "witness")
    other.close()
    assert {".lock", "witness-mine.json"} <= set(files(path))
    one.close()
    assert not path.exists()


# The model, and its mesh


class Audit:
    """An audit whose answer comes when the test says."""

    def __init__(self, text="", is_answered=False):
        self.text, self.is_answered = text, is_answered

    def why(self, sizes):
        assert set(sizes) == set(AXES)
        return self.text if self.is_answered else ""


WRONG = "1 problem (fsdp 3):\n  - mesh axis 'fsdp' (3) does not divide embed (128); use 1, 2, 4"


def test_the_first_world_waits_for_the_audit():
    audit = Audit()
    history = History(judge=table_judge(audit=audit))
    assert history.run(5).state is State.WAITING
    audit.is_answered = True
    assert len(history.until_running(1).members) == 4


def test_but_not_for_ever():
    history = History(judge=table_judge(audit=Audit()))
    assert history.run(AUDIT_SECONDS - 2).state is State.WAITING
    assert len(history.until_running(1).members) == 4


@pytest.mark.parametrize("hosts", [0, 1, 4])
def test_a_world_that_cannot_be_divided_is_refused_in_the_audits_words(hosts):
    audit = Audit(WRONG)
    history = History(judge=table_judge(audit=audit), come=False)
    for name in FOUR[:hosts]:
        history.connect(name)
    history.run(3, State.WAITING)
    audit.is_answered = True
    history.run(1)
    assert (history.finish.code, history.finish.text) == (REFUSED, WRONG)
    assert history.states() == ["ESCALATED"]
    assert [(host, m["code"]) for host, m in history.orders("end")] == [(name, REFUSED) for name in FOUR[:hosts]]


def test_an_answer_that_comes_late_does_not_disturb_a_world_that_trains():
    audit = Audit(WRONG)
    history = History(judge=table_judge(audit=audit)).run(AUDIT_SECONDS - 2).until_running(1)
    audit.is_answered = True
    history.kill_worker("host-1")
    history.until_running(2)
    assert history.finish is None


@pytest.mark.parametrize("comes_back", [True, False])
def test_nor_does_the_answer_to_a_coordinator_that_takes_over(comes_back):
    history = History(judge=table_judge()).until_running(1).run(1)
    found = History(judge=table_judge(audit=Audit(WRONG, is_answered=True)), come=False, epoch=1)
    if comes_back:  # else it finds nothing but what was decided
        for name, fake in history.hosts.items():
            found.hosts[name] = fake
    found.machine.take_over(history.machine.to_json(), found.now)
    for name in FOUR:
        found.connect(name)
    found.run(8)
    assert found.finish is None
    assert found.state is State.RUNNING


def test_launch_refuses_a_world_that_cannot_be_divided(tmp_path):
    with launched(NANO, tmp_path / "run", "--slices", 1, "--hosts-per-slice", 3, "--steps", 5) as run:
        assert run.finish() == REFUSED
        last = run.output[run.output.index("error: ") :]
        assert not run.events("worker_started")
    assert "mesh axis 'fsdp' (3) does not divide embed (128)" in last
    assert "use 1, 2, 4" in last
    assert "Traceback" not in last


# The hosts


def host(name="host-0", slice=0, devices=2, is_connected=True):
    return Host(name, slice, devices, is_connected=is_connected)


def request(devices=2):
    return Request(2, 2, devices, {axis: {"data": 2, "fsdp": 2 * devices}.get(axis, 1) for axis in AXES})


@pytest.mark.parametrize("good", [host(), host(slice=1), host(slice=-1), host(devices=0)])
def test_a_host_that_has_a_place(good):
    check_shape(good, request(), {})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (host(slice=2), r"is of slice 2, and this run has slices 0 to 1; start the agent with one of these as --slice"),
        (host(slice=-2), r"is of slice -2, .* with more --slices"),
        (host(devices=4), r"emulates 4 devices, and this run has 2 .* --devices 2, .* --devices-per-host 4"),
        (host(devices=-1), r"emulates -1 devices"),
    ],
)
def test_a_host_that_has_none_is_told_why(bad, words):
    with pytest.raises(Refused, match=words):
        check_shape(bad, request(), {})


def test_a_coordinator_asks_each_agent_for_its_place(tmp_path):
    coordinator = coordinator_at("127.0.0.1:0", directory_at(tmp_path), request=request())
    hello = {"version": VERSION, "job": "job-1", "host": "host-0", "slice": 1, "devices": 2, "pid": 7, "peer": "a:1"}
    hello |= {"control": "a:2", "acceptor": Acceptor("host-0#1").to_json(), "fenced": 0, "copies": [], "committed": -1}
    hello |= {"work": None, "took": [], "ready": True, "leaving": False}
    assert coordinator._admit(hello)[0].devices == 2
    for bad in ({"slice": 2}, {"devices": 1}):
        with pytest.raises(Refused, match="and this run has"):
            coordinator._admit(hello | bad)


def test_real_devices_and_emulated_ones_make_no_world():
    there = {"host-1": host("host-1", devices=0)}
    with pytest.raises(Refused, match="host-0 has emulated devices and host-1 has real ones"):
        check_shape(host(), request(), there)
    check_shape(host(devices=0), request(), there)
    check_shape(host(), request(), {"host-0": host(devices=0)})  # the same host, started anew
    check_shape(host(), request(), {"host-1": host("host-1", devices=0, is_connected=False)})


@pytest.mark.parametrize("alone", ["127.0.0.1:5", "127.0.1.1:5", "[::1]:5"])
def test_hosts_that_only_their_own_machines_reach_make_no_world_with_others(alone):
    """Each in turn is the one that comes last."""
    hidden, reached = host(), host("host-1")
    hidden.peer, reached.peer = alone, "10.0.0.2:5"
    words = f"agent host-0 listens at {re.escape(alone)}, where only its own machine .* host-1 at 10.0.0.2:5.*--listen"
    with pytest.raises(Refused, match=words):
        check_shape(hidden, request(), {"host-1": reached})
    with pytest.raises(Refused, match=words):
        check_shape(reached, request(), {"host-0": hidden})
    before = host()
    before.peer = "10.0.0.1:5"
    check_shape(hidden, request(), {"host-0": before})  # the same host, started anew
    reached.is_connected = False
    check_shape(hidden, request(), {"host-1": reached})
    others = {f"host-{n}": host(f"host-{n}") for n in (2, 3)}
    for n, other in enumerate(others.values()):
        other.peer = f"127.0.0.1:{7 + n}"
    check_shape(hidden, request(), others)


@pytest.mark.parametrize(("devices", "told"), [(1, 4), (0, 0)])
def test_workers_use_the_devices_that_their_agents_have(devices, told):
    history = History(judge=table_judge(), come=False)
    for name in FOUR:
        history.connect(name, devices=devices)
    history.until_running(1)
    assert [order["devices"] for _, order in history.orders("work")] == [told] * 4
    assert history.machine.epoch.world.mesh["fsdp"] == 2
    later = table_judge()
    later.take_over(history.judge.to_json())
    assert later.smaller().devices == told // 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("coordinator", str(NANO), "--devices-per-host", "0"), "--devices-per-host is 0; use 1 or more"),
        (("coordinator", str(NANO), "--slices", "0"), "--slices is 0; use 1 or more"),
        (("coordinator", str(NANO), "--hosts-per-slice", "-1"), "--hosts-per-slice is -1; use 1 or more"),
        (("coordinator", str(NANO), "--spares", "-1"), "--spares is -1; use 0 or more"),
        (("agent", "--coordinator", "x:1", "--host", "a", "--slice", "-2"), "--slice is -2; use -1 or more"),
        (("agent", "--coordinator", "x:1", "--host", "a", "--devices", "-1"), "--devices is -1; use 0 or more"),
    ],
)
def test_numbers_that_make_no_cluster(arguments, words, capsys, token_file):
    del token_file
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["coordinator", "--help"]) == 0
    assert "usage: jaxscale coordinator RECIPE.py" in capsys.readouterr().out
    assert cli.main(["coordinator", str(NANO), "--help"]) == 0
    examples = capsys.readouterr().out.partition("examples:")[2]
    assert examples.count(".py") == 1


# Told to end before the others have come


def test_one_host_that_is_told_to_end_does_not_end_the_run_while_others_are_expected():
    history = History(judge=table_judge(), come=False)
    history.connect("host-0")
    history.preempt("host-0")
    assert history.run(5).state is State.WAITING
    for name in FOUR[1:]:
        history.connect(name)
    assert history.run(1).state is State.WAITING
    history.connect("host-0", new_agent=True)
    assert len(history.until_running(1).members) == 4


@pytest.mark.parametrize("judge", [table_judge, lambda: ScriptedJudge(4)])
def test_all_of_them_do(judge):
    history = History(judge=judge(), come=False)
    for name in FOUR:
        history.hosts[name].ready = False
        history.connect(name)
        assert history.finish is None
        history.preempt(name)
    assert history.finish.code == STOPPED
    assert "all hosts were told to end" in history.finish.text


def test_and_so_does_one_when_no_other_has_come_for_long():
    history = History(judge=table_judge(), come=False)
    history.connect("host-0")
    history.preempt("host-0")
    assert history.run(PATIENCE_SECONDS - 1).finish is None
    history.run(2)
    assert history.finish.code == STOPPED


# A full disk


class Disk:
    """A run directory that takes lines only while there is room."""

    def __init__(self):
        self.epoch, self.room, self.lines, self.is_unused = 7, 10**9, [], False
        self.metrics = Path("nowhere")

    def event(self, kind, source, **fields):
        if not self.room:
            raise FULL
        self.room -= 1
        self.lines.append((kind, {"source": source, "epoch": self.epoch, **fields}))


def test_events_that_find_no_room_are_written_later_in_order_and_said_once(caplog):
    disk = Disk()
    journal = Journal(disk)
    journal.event("a", n=1)
    disk.room = 0
    before = time.time()
    for n in (2, 3, 4):
        journal.event("a", n=n)
    disk.epoch = 8
    after = time.time()
    journal.retry(at_once=True)
    disk.room = 2
    journal.retry()  # not yet
    assert len(disk.lines) == 1
    journal.retry(at_once=True)
    assert [fields["n"] for _, fields in disk.lines] == [1, 2, 3]
    journal.event("a", n=5)
    disk.room = 9
    journal.retry(at_once=True)
    journal.event("a", n=6)
    assert [fields["n"] for _, fields in disk.lines] == [1, 2, 3, 4, 5, 6]
    assert {fields["source"] for _, fields in disk.lines} == {"coordinator"}
    assert [fields["epoch"] for _, fields in disk.lines] == [7, 7, 7, 7, 8, 8]  # of when it was said
    assert before <= disk.lines[1][1]["time"] <= disk.lines[3][1]["time"] <= after
    began, ended = (record.message for record in caplog.records)
    assert "No space left on device; the run goes on" in began
    assert "events can be written again" in ended


def test_a_disk_that_stays_full_costs_the_oldest_events_and_no_memory(caplog):
    disk = Disk()
    disk.room = 0
    journal = Journal(disk)
    for n in range(WAITING_LINES + 5):
        journal.event("a", n=n)
    disk.room = 10**9
    journal.retry(at_once=True)
    assert [fields["n"] for _, fields in disk.lines] == list(range(5, WAITING_LINES + 5))
    assert "and 5 older ones were lost" in caplog.records[-1].message


def test_what_another_thread_says_is_written_too():
    disk = Disk()
    journal = Journal(disk)
    journal.post("alarm", what="x")
    assert disk.lines == []
    journal.retry()
    assert [kind for kind, _ in disk.lines] == ["alarm"]


def full(monkeypatch):
    """From here on no voter can keep anything. Returns what gives the room back."""
    patch = pytest.MonkeyPatch()
    monkeypatch.setattr(witness_module, "AGAIN_SECONDS", 0.0)

    def write_text(self, _):
        self.touch()
        raise FULL

    patch.setattr(Path, "write_text", write_text)
    return patch.undo


def test_a_witness_that_cannot_keep_a_promise_does_not_give_it(tmp_path, monkeypatch, caplog):
    witness = Witness(tmp_path, "job-1")
    first, second = Term(1, "a"), Term(2, "b")
    assert witness.answer(AskPromise(first))[0]
    undo = full(monkeypatch)
    try:
        assert witness.answer(AskPromise(second)) == (False, None)
        assert witness.answer(AskPromise(second)) == (False, None)
        assert witness.vote() is None  # it can still be read
    finally:
        undo()
    assert witness.acceptor.promised == first
    assert not list(tmp_path.glob("*.partial"))
    could, reply = witness.answer(AskPromise(second))
    assert (could, reply.term) == (True, second)
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        f"the witness in {tmp_path} cannot vote",
        f"the witness in {tmp_path} votes again",
    ]


def test_a_voter_that_cannot_keep_a_promise_has_not_promised(tmp_path, monkeypatch):
    voter = Voter(tmp_path / "vote.json", "host-0#1")
    undo = full(monkeypatch)
    try:
        with pytest.raises(OSError, match="No space left"):
            voter.answer(AskPromise(Term(5, "a")))
    finally:
        undo()
    assert voter.acceptor == voter.look() == Acceptor("host-0#1")


def test_a_coordinator_is_elected_once_its_witness_can_write(tmp_path, monkeypatch):
    disk = Disk()
    disk.path, disk.checkpoints = tmp_path, tmp_path / "checkpoints"
    monkeypatch.setattr(journal_module, "AGAIN_SECONDS", 0.0)
    Voter(tmp_path / "witness-job-1.json", "witness")  # of the coordinator before, which died
    coordinator = coordinator_at("127.0.0.1:0", disk)

    async def work():
        async with asyncio.timeout(60):
            disk.room, undo = 0, full(monkeypatch)
            running = asyncio.create_task(coordinator.run())
            try:
                await asyncio.sleep(0.3)  # it asks its witness twenty times a second
                assert not running.done()
                assert not coordinator._ballot.leading
                assert not disk.lines
                undo()
                disk.room = 10**9
                while not coordinator._ballot.leading:
                    await asyncio.sleep(0.01)
            finally:
                undo()
                disk.room = 10**9
                coordinator.drain("the test is over")
                await asyncio.wait([running])
            return running.result()

    assert asyncio.run(work()).code == STOPPED
    assert [kind for kind, _ in disk.lines][:2] == ["coordinator_started", "elected"]


# Strangers


def test_one_stranger_is_one_alarm_a_minute():
    refusals = Refusals()
    assert refusals.refused("ipv4:10.0.0.1:5001", "no token", 0.0) == "ipv4:10.0.0.1:5001: no token"
    for port in range(1000):
        assert refusals.refused(f"ipv4:10.0.0.1:{port}", "no token", port / 1000) == ""
    assert refusals.refused("ipv4:10.0.0.1:7", "another version", 2.0)
    assert refusals.refused("ipv4:10.0.0.2:7", "no token", 2.0)
    assert refusals.due(QUIET_SECONDS - 1) == []
    assert refusals.due(QUIET_SECONDS) == ["ipv4:10.0.0.1: no token (1000 more times in 60 s)"]
    assert refusals.refused("ipv4:10.0.0.1:9", "no token", QUIET_SECONDS + 1) == ""
    assert refusals.due(2 * QUIET_SECONDS) == ["ipv4:10.0.0.1: no token (1 more times in 60 s)"]
    assert refusals.due(3 * QUIET_SECONDS) == []
    assert refusals.refused("ipv4:10.0.0.1:9", "no token", 3 * QUIET_SECONDS)


def test_a_coordinator_does_not_write_down_each_stranger(caplog):
    disk = Disk()
    disk.path = disk.checkpoints = Path("nowhere")
    coordinator = coordinator_at("127.0.0.1:0", disk)
    for port in range(500):
        coordinator._refused(f"ipv4:10.0.0.1:{port}", "wrong or missing token")
    assert [kind for kind, _ in disk.lines] == ["alarm"]
    assert len(caplog.records) == 1


def test_nor_do_many_strangers_fill_the_disk():
    refusals = Refusals()
    said = [refusals.refused(f"ipv6:[::{n}]:1", "no token", 0.0) for n in range(10 * KNOWN)]
    assert sum(map(bool, said)) == KNOWN + 1
    assert len(refusals.due(QUIET_SECONDS)) == 1
