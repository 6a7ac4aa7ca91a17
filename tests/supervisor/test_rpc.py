"""Control messages: who may speak, what counts as a message, and that no stranger harms the server."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import time
from types import SimpleNamespace

import pytest
from histories import ScriptedJudge
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.config import CheckpointConfig
from jaxscale.supervisor import rpc
from jaxscale.supervisor.ballot import WITNESS, voter_name
from jaxscale.supervisor.coordinator import Coordinator
from jaxscale.supervisor.coordinator_options import CoordinatorOptions
from jaxscale.supervisor.job_token import new_token
from jaxscale.supervisor.quorum import Acceptor, Decision, Term
from jaxscale.supervisor.rpc import VERSION, NameTaken, Refused, Server, Session, Unreachable, ask, decode, encode
from jaxscale.supervisor.takeover import decided
from jaxscale.supervisor.voter import ask_from_json, reply_to_json

TOKEN = new_token()
SECONDS = 60


def run(work):
    """Runs a coroutine with a limit that only a hang reaches."""

    async def limited():
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


@contextlib.asynccontextmanager
async def serving(listen="127.0.0.1:0"):
    """A server that sends every message back. Yields its address and whom it refused."""
    refused = []

    async def echo(incoming, send):
        async for message in incoming:
            await send({"echo": message})

    async def answer(message):
        return {"answer": message}

    server = Server(TOKEN, echo, answer, lambda _, reason: refused.append(reason))
    try:
        yield await server.start(listen), refused
    finally:
        await server.stop(0)


async def is_unharmed(address):
    return await ask(address, TOKEN, {"ask": 1}) == {"answer": {"ask": 1}}


# Messages


def test_messages_arrive_in_order_and_unchanged():
    async def work():
        async with serving() as (address, _), Session(address, TOKEN) as session:
            for number in range(50):
                session.send({"number": number, "text": "\u20ac\n\0", "nested": {"list": [1.5, None, True]}})
            for number in range(50):
                told = await session.receive()
                assert told["echo"] == {"number": number, "text": "\u20ac\n\0", "nested": {"list": [1.5, None, True]}}

    run(work())


def test_a_question_is_answered():
    async def work():
        async with serving() as (address, _):
            assert await is_unharmed(address)

    run(work())


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_are_a_message_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        assert isinstance(decode(data), dict)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


@given(JSON)
def test_what_is_sent_is_what_is_read_and_only_objects_are_messages(value):
    if isinstance(value, dict):
        assert decode(encode(value)) == value
    else:
        with pytest.raises(ValueError, match="a message is a JSON object"):
            decode(json.dumps(value).encode())


def test_a_message_that_is_nested_without_end_is_none():
    with pytest.raises(ValueError, match="nested"):
        decode(b'{"a":' + b"[" * 200_000)


# Strangers


def test_a_wrong_token_is_refused_without_a_word_about_the_right_one():
    async def work():
        async with serving() as (address, refused):
            with pytest.raises(Refused, match="the token is not this job's") as failure:
                await ask(address, new_token(), {"ask": 1})
            assert TOKEN.secret.hex() not in str(failure.value)
            async with Session(address, new_token()) as session:
                session.send({"kind": "hello"})
                with pytest.raises(Refused, match="the token is not this job's"):
                    await session.receive()
            assert refused == ["wrong or missing token"] * 2
            assert await is_unharmed(address)

    run(work())


@pytest.mark.parametrize("metadata", [(), (("authorization", ""),), (("authorization", "Bearer"),), (("x", "y"),)])
def test_a_missing_token_is_refused(metadata, monkeypatch):
    async def work():
        async with serving() as (address, refused):
            monkeypatch.setattr(rpc, "_metadata", lambda _: metadata)
            with pytest.raises(Refused):
                await ask(address, TOKEN, {"ask": 1})
            assert refused == ["wrong or missing token"]

    run(work())


FOREIGN = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "zeros": bytes(10_000),
    "preface and junk": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_bytes_on_the_port_disturb_nobody(what):
    async def work():
        async with serving() as (address, _), Session(address, TOKEN) as session:
            host, _, port = address.rpartition(":")
            for _ in range(3):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(FOREIGN[what])
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                with contextlib.suppress(OSError):  # the server may have hung up already
                    writer.write_eof()
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await asyncio.wait_for(reader.read(), 0.2)
                writer.close()
            session.send({"still": "there"})
            assert await session.receive() == {"echo": {"still": "there"}}

    run(work())


@pytest.mark.parametrize("data", [b"nonsense", b"[1]", b'{"a":', b"\xff\xfe", b'{"a":' + b"[" * 100_000])
def test_what_is_no_message_ends_the_stream_of_who_sent_it_and_no_other(data, monkeypatch):
    async def work():
        async with serving() as (address, refused), Session(address, TOKEN) as good:
            async with Session(address, TOKEN) as bad:
                monkeypatch.setattr(rpc, "encode", lambda _: data)
                bad.send({})
                monkeypatch.undo()
                with pytest.raises(Refused):
                    await bad.receive()
            (reason,) = refused
            assert reason.startswith("not a message")
            good.send({"n": 1})
            assert await good.receive() == {"echo": {"n": 1}}

    run(work())


def test_a_message_that_is_too_large_is_refused_with_its_size(monkeypatch):
    small = (("grpc.max_receive_message_length", 10_000), *rpc.OPTIONS[1:])

    async def work():
        monkeypatch.setattr(rpc, "OPTIONS", small)
        async with serving() as (address, _), Session(address, TOKEN) as session:
            monkeypatch.undo()
            session.send({"text": "x" * 9_000})
            assert len((await session.receive())["echo"]["text"]) == 9_000
            session.send({"text": "x" * 11_000})
            with pytest.raises((Refused, Unreachable), match="larger than max"):
                await session.receive()
            assert await is_unharmed(address)

    run(work())


# The server goes and comes


def test_nobody_there():
    async def work():
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))  # bound, and nobody listens
            address = f"127.0.0.1:{held.getsockname()[1]}"
            with pytest.raises(Unreachable, match=address):
                await ask(address, TOKEN, {"ask": 1}, seconds=5)
            async with Session(address, TOKEN) as session:
                with pytest.raises(Unreachable, match=address):
                    await session.receive()

    run(work())


def test_a_port_that_is_taken_is_a_clear_error():
    async def work():
        async with serving() as (address, _):
            with pytest.raises(OSError, match="choose another port"):
                async with serving(address):
                    pass

    run(work())


def test_a_server_that_is_started_again_at_its_address():
    """The stream is opened anew until it holds, as an agent does it."""

    async def attempt(address):
        async with Session(address, TOKEN) as session:
            session.send({"n": 2})
            return await session.receive()

    async def work():
        async with serving() as (address, _):
            assert await attempt(address) == {"echo": {"n": 2}}
        with pytest.raises(Unreachable):
            await attempt(address)
        async with serving(address):
            told = None
            while told is None:
                with contextlib.suppress(Unreachable):
                    told = await attempt(address)
                await asyncio.sleep(0.05)
            assert told == {"echo": {"n": 2}}

    run(work())


def test_a_stream_whose_server_stops_is_told_so():
    async def work():
        async with contextlib.AsyncExitStack() as stack:
            address, _ = await stack.enter_async_context(serving())
            async with Session(address, TOKEN) as session:
                session.send({"n": 1})
                await session.receive()
                await stack.aclose()
                with contextlib.suppress(Unreachable):
                    assert await session.receive() is None  # or it ended the stream in order

    run(work())


# A coordinator and its agents


class Directory:
    """A run directory that keeps events in memory."""

    def __init__(self, path):
        self.is_unused = False
        self.path, self.checkpoints, self.epoch, self.events = path, path / "checkpoints", 1, []
        self.metrics = path / "metrics.jsonl"
        self.is_full = False

    def event(self, kind, source, **fields):
        del source
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.events.append((kind, fields))

    def kinds(self, kind):
        return [fields for name, fields in self.events if name == kind]


@contextlib.asynccontextmanager
async def coordinating(tmp_path, is_elected=True, hosts=0):
    memory = SimpleNamespace(every=10, generations=2, replicas=1)
    config = SimpleNamespace(steps=100, memory=memory, checkpoint=CheckpointConfig(every=0, keep=2, milestones=0))
    directory = Directory(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = CoordinatorOptions("job-1", TOKEN, address, "recipe.py", ("--steps", "3"), hosts=hosts)
    coordinator = Coordinator(options, config, ScriptedJudge(9), directory)
    running = asyncio.create_task(coordinator.run())
    try:
        await until(lambda: directory.kinds("elected" if is_elected else "coordinator_started") or running.done())
        yield coordinator, address, directory
        assert coordinator._wants_end or not running.done()
    finally:
        settings = coordinator.machine.settings
        if not running.done():  # these agents say no last word, and are not waited for
            coordinator.machine.settings = dataclasses.replace(settings, lease_seconds=0.0)
        if is_elected:
            coordinator.drain("the test is over")
        else:
            coordinator._depose("the test is over")
        await running


def acceptor(host):
    return Acceptor(voter_name(host, "1"))


def led_by_another(tmp_path, *hosts):
    """A witness who has accepted what another coordinator decided: a majority of these hosts elects the next one."""
    value = decided(0, None, True, ScriptedJudge(9), [], "", None, {})
    voters = tuple(acceptor(host).voter for host in hosts)
    vote, _ = Acceptor(WITNESS).accept(Term(3, "another"), Decision(1, value, voters, voters))
    (tmp_path / "witness-job-1.json").write_text(json.dumps(vote.to_json()))


def hello(host="host-0", **more):
    return {
        "kind": "hello",
        "version": VERSION,
        "job": "job-1",
        "host": host,
        "slice": 0,
        "devices": 1,
        "pid": 7,
        "peer": "127.0.0.1:1",
        "control": "127.0.0.1:2",
        "acceptor": acceptor(host).to_json(),
        "fenced": 0,
        "copies": [],
        "committed": -1,
        "work": None,
        "took": [],
        "ready": True,
        "leaving": False,
    } | more


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def order(session):
    """The next message that is more than a sign of life."""
    while (message := await session.receive()) is not None and message["do"] == "beat":
        pass
    return message


async def end(session):
    while await session.receive() is not None:
        pass


async def vote(session, host, is_elected):
    """Answers what the voter of a host is asked, until the coordinator is elected."""
    voter = acceptor(host)
    while not is_elected():
        message = await session.receive()
        if message["do"] in ("promise", "accept"):
            voter, reply = voter.answer(ask_from_json(message))
            session.send(reply_to_json(reply))


def test_an_agent_is_welcome(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, directory):
            async with Session(address, TOKEN) as agent:
                agent.send(hello())
                told = await order(agent)
                assert (told["do"], told["recipe"], told["arguments"]) == ("welcome", "recipe.py", ["--steps", "3"])
                status = await ask(address, TOKEN, {"ask": "status"})
                assert status["hosts"]["host-0"]["connected"]
            assert ("agent_started", {"pid": 7, "host": "host-0", "slice": 0}) in directory.events
            await until(lambda: not coordinator.machine.hosts["host-0"].is_connected)

    run(work())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": VERSION + 1}, f"speaks version {VERSION + 1}, this coordinator {VERSION}"),
        ({"job": "job-2"}, "is of job job-2, this is job job-1"),
        ({"pid": "seven"}, "lacks something"),
        ({"copies": None}, "lacks something"),
        ({"version": None, "host": None}, "version None"),
        ({"acceptor": {"voter": "host-0#1"}}, "a stored vote is damaged"),
        ({"work": {"epoch": 3}}, "lacks something"),
    ],
)
def test_an_agent_that_cannot_take_part_is_told_why(tmp_path, change, words):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, directory):
            async with Session(address, TOKEN) as agent:
                agent.send(hello(**change))
                with pytest.raises(Refused, match=words):
                    await agent.receive()
            assert not coordinator.machine.hosts
            alarms = [fields["detail"] for kind, fields in directory.events if kind == "alarm"]
            assert any(words in detail for detail in alarms)
            assert (await ask(address, TOKEN, {"ask": "status"}))["state"] == "WAITING"

    run(work())


@pytest.mark.parametrize("field", sorted(hello().keys() - {"kind"}))
def test_a_hello_that_lacks_a_field_is_refused(field):
    coordinator = object.__new__(Coordinator)
    message = hello()
    del message[field]
    with pytest.raises(Refused, match=field):
        coordinator._admit(message)


def test_two_agents_of_one_name(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _):
            async with Session(address, TOKEN) as first, Session(address, TOKEN) as second:
                first.send(hello())
                await order(first)
                second.send(hello(pid=8))
                with pytest.raises(NameTaken, match="called host-0 already"):
                    await second.receive()
                assert coordinator.machine.hosts["host-0"].pid == 7
                assert coordinator.machine.hosts["host-0"].is_connected
                first.send({"kind": "alarm", "what": "x", "detail": "first is heard"})
                await until(lambda: any(note for note in coordinator._directory.events if note[0] == "alarm"))
            await until(lambda: not coordinator.machine.hosts["host-0"].is_connected)
            async with Session(address, TOKEN) as later:  # the name is free again
                later.send(hello(pid=8))
                assert (await order(later))["do"] == "welcome"

    run(work())


def test_the_same_agent_may_connect_again_before_its_old_stream_is_known_to_be_dead(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _), Session(address, TOKEN) as second:
            async with Session(address, TOKEN) as first:
                first.send(hello())
                await order(first)
                second.send(hello())
                assert (await order(second))["do"] == "welcome"
            await asyncio.sleep(0.3)  # the end of the old stream is not the end of the new one
            assert coordinator.machine.hosts["host-0"].is_connected
            coordinator.drain("enough")
            assert (await order(second))["do"] == "end"

    run(work())


def is_gone(tmp_path):
    """Whether the coordinator has left: it takes its witness with it."""
    return not (tmp_path / "witness-job-1.json").exists()


def test_an_agent_whose_stream_breaks_as_the_run_ends_is_told_of_it_when_it_comes_again(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _):
            async with Session(address, TOKEN) as first:
                first.send(hello())
                await order(first)
            await until(lambda: not coordinator._sends)
            coordinator.drain("enough")
            await asyncio.sleep(0.3)
            assert not is_gone(tmp_path)
            async with Session(address, TOKEN) as again:
                again.send(hello())
                assert [(await order(again))["do"] for _ in range(2)] == ["welcome", "end"]
                again.send({"kind": "ended", "host": "host-0"})
                assert (await order(again))["do"] == "goodbye"
                assert not is_gone(tmp_path), "its stream is still there"
            await until(lambda: is_gone(tmp_path))

    run(work())


def test_who_never_comes_again_is_not_waited_for_for_ever(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _):
            async with Session(address, TOKEN) as agent:
                agent.send(hello())
                await order(agent)
            coordinator.drain("enough")
            await until(lambda: is_gone(tmp_path))

    run(work())


def test_a_host_that_has_not_come_yet_is_told_of_the_end_too(tmp_path):
    """Another host's agent may see within a tenth of a second that the recipe is no good."""

    async def work():
        async with coordinating(tmp_path, hosts=1) as (coordinator, address, _):
            coordinator.drain("enough")
            await asyncio.sleep(0.3)
            assert not is_gone(tmp_path)
            async with Session(address, TOKEN) as late:
                late.send(hello())
                assert [(await order(late))["do"] for _ in range(2)] == ["welcome", "end"]
                late.send({"kind": "ended", "host": "host-0"})
            await until(lambda: is_gone(tmp_path))

    run(work())


NONSENSE = [{}, {"kind": "fenced"}, {"kind": "fenced", "epoch": "x", "copies": []}, {"kind": "alarm"}]


@pytest.mark.parametrize("message", [*NONSENSE, {"kind": 5}])
def test_a_message_that_makes_no_sense_costs_its_sender_the_stream_at_most(tmp_path, message):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _), Session(address, TOKEN) as good:
            good.send(hello("host-1", pid=9))
            await order(good)
            async with Session(address, TOKEN) as bad:
                bad.send(hello())
                await order(bad)
                bad.send(message)
                assert (await ask(address, TOKEN, {"ask": "status"}))["state"] == "WAITING"
            await until(lambda: not coordinator.machine.hosts["host-0"].is_connected)
            assert coordinator.machine.hosts["host-1"].is_connected
            async with Session(address, TOKEN) as again:
                again.send(hello())
                assert (await order(again))["do"] == "welcome"

    run(work())


@pytest.mark.parametrize("message", NONSENSE)
def test_nor_does_it_before_the_election(tmp_path, message):
    """What is heard then waits for the election; it must not be taken for a fault of whoever votes last."""

    async def work():
        led_by_another(tmp_path, "host-0", "host-1", "host-2")
        async with contextlib.AsyncExitStack() as stack:
            coordinator, address, directory = await stack.enter_async_context(coordinating(tmp_path, is_elected=False))
            agents = {}
            for host in ("host-0", "host-1", "host-2"):
                agents[host] = await stack.enter_async_context(Session(address, TOKEN))
                agents[host].send(hello(host))
                assert (await order(agents[host]))["do"] == "welcome"
            bad = agents.pop("host-0")
            bad.send(message)
            bad.send({"kind": "alarm", "what": "x", "detail": "it goes on"})
            await until(lambda: len(coordinator._backlog) == 5)
            assert not directory.kinds("elected")
            await asyncio.gather(
                *(vote(agent, host, lambda: directory.kinds("elected")) for host, agent in agents.items())
            )
            bad.send({"kind": "ready"})
            with pytest.raises(Unreachable):
                await end(bad)
            await until(lambda: not coordinator.machine.hosts["host-0"].is_connected)
            for host, agent in agents.items():
                agent.send({"kind": "unready"})
                await until(lambda host=host: not coordinator.machine.hosts[host].is_ready)
                assert coordinator.machine.hosts[host].is_connected

    run(work())


@pytest.mark.parametrize("answer", ["maybe", "promised"])
def test_an_answer_that_is_none_is_refused(tmp_path, answer):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, _), Session(address, TOKEN) as good:
            good.send(hello("host-1", pid=9))
            await order(good)
            async with Session(address, TOKEN) as bad:
                bad.send(hello())
                await order(bad)
                bad.send({"answer": answer, "voter": "host-0#1", "term": [1, "x"]})
                with pytest.raises(Refused, match="this answers no vote"):
                    await end(bad)
            await until(lambda: not coordinator.machine.hosts["host-0"].is_connected)
            assert coordinator.machine.hosts["host-1"].is_connected

    run(work())


def test_a_full_disk_while_an_agent_connects_disturbs_nobody_and_its_events_come_later(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (coordinator, address, directory):
            directory.is_full = True
            async with Session(address, TOKEN) as agent:
                agent.send(hello())
                assert (await order(agent))["do"] == "welcome"
                agent.send({"kind": "alarm", "what": "x", "detail": "while it is full"})
                await until(lambda: len(coordinator._journal._waiting) == 2)
                assert not directory.kinds("agent_started")
                before = time.time()
                directory.is_full = False
                await until(lambda: directory.kinds("alarm"))
            kinds = [kind for kind, _ in directory.events]
            assert kinds.index("agent_started") < kinds.index("alarm")
            (started,) = directory.kinds("agent_started")
            assert started["host"] == "host-0"
            assert started["time"] < before  # when it was, not when it could be written

    run(work())


def test_what_a_coordinator_cannot_be_asked(tmp_path):
    async def work():
        async with coordinating(tmp_path) as (_, address, _):
            with pytest.raises(Refused, match="status and drain"):
                await ask(address, TOKEN, {"ask": "everything"})

    run(work())
