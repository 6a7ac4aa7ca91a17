"""An agent's tie to its coordinators: whom it obeys, whom it follows, and when its host starts one itself."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
from types import SimpleNamespace

import pytest
from loops import SECONDS, run, until

from jaxscale.supervisor import link as link_module
from jaxscale.supervisor.ballot import voter_name
from jaxscale.supervisor.job_token import new_token
from jaxscale.supervisor.link import LASTED_SECONDS, SILENT_SECONDS, STAGGER_SECONDS, Link, LinkOptions
from jaxscale.supervisor.orders import FIELDS
from jaxscale.supervisor.quorum import Acceptor, Decision, Term
from jaxscale.supervisor.rpc import NameTaken, Refused, Server, Session, Tls, ask
from jaxscale.supervisor.voter import Voter

TOKEN = new_token()
VOTERS = ("host-0#1", "host-1#1", "host-2#1")
PATIENCE = 2.0


class Clock:
    """The link's clock; the test moves it."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Pauses:
    """asyncio, but what the link sleeps is short, and counted."""

    def __init__(self):
        self.seconds = []

    @property
    def count(self):
        return len(self.seconds)

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0.001)

    async def some(self):
        """Until whoever sleeps has looked again."""
        before = self.count
        await until(lambda: self.count > before + 2)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(link_module, "SILENT_SECONDS", SECONDS)  # only tests of silence can hear it
    return clock


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    pauses = Pauses()
    monkeypatch.setattr(link_module, "asyncio", pauses)
    return pauses


COMMAND = ["coordinator", "recipe.py", "--steps", "3"]
WELCOME = {"run": "run", "recipe": "recipe.py", "arguments": [], "command": COMMAND}


class Fake:
    """A coordinator that says what the test wants to the agent that came last."""

    def __init__(self, refusals=()):
        self.hellos, self.open, self._send = [], 0, None
        self.greets = None
        """The term in which it welcomes whoever comes."""
        self.said = asyncio.Queue()
        self._refusals = list(refusals)

    async def session(self, incoming, send):
        if self._refusals:
            raise self._refusals.pop(0)
        self.hellos.append(await anext(incoming))
        self._send = send
        self.open += 1
        if self.greets is not None:
            await self.welcome(self.greets)
        try:
            async for message in incoming:
                self.said.put_nowait(message)
        finally:
            self.open -= 1

    async def tell(self, do, number, **fields):
        """Says it; fields of an order that the test does not care about have some value of their type."""
        kinds = FIELDS.get(do, {}).items()
        some = {name: kind() if isinstance(kind, type) else None for name, kind in kinds}
        await self._send({"do": do, "term": [number, "x"], **some, **fields})

    async def welcome(self, number, times=1):
        """Waits for the agent, `times` of them, and becomes its coordinator."""
        await until(lambda: len(self.hellos) >= times and self.open)
        await self.tell("welcome", number, **WELCOME)


async def ask_nothing(_):
    return {}


@contextlib.asynccontextmanager
async def coordinator(refusals=(), listen="127.0.0.1:0"):
    """Yields a fake one and its address."""
    fake = Fake(refusals)
    server = Server(TOKEN, fake.session, ask_nothing, lambda *_: None)
    try:
        yield fake, await server.start(listen)
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def linked(tmp_path, address, host="host-1", takeover_after=0.0):
    """Yields a link, the task that keeps it, what it obeyed, and whom it turned away."""
    obeyed, refused = [], []

    async def obey(message):
        obeyed.append(message["do"])
        if agent.trouble:
            raise agent.trouble.pop(0)

    voter = Voter(tmp_path / "vote.json", voter_name(host, "1"))
    options = LinkOptions(address, "127.0.0.1", TOKEN, None, takeover_after)
    link = Link(options, voter, lambda: {"kind": "hello"}, obey, lambda _, reason: refused.append(reason))
    await link.start()
    keeping = asyncio.ensure_future(link.stay_connected())
    agent = SimpleNamespace(link=link, keeping=keeping, obeyed=obeyed, refused=refused, trouble=[])
    try:
        yield agent
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await link.close()


def kept(tmp_path):
    """What the host's voter has promised, for good."""
    return Acceptor.from_json(json.loads((tmp_path / "vote.json").read_text()))


# Until it finds one


def test_it_tries_again_later_and_later_and_at_once_after_it_had_one(tmp_path, pauses, clock):
    doubled = (0.1, 0.2, 0.4, 0.8, 1.0, 1.0)

    async def work():
        async with linked(tmp_path, "127.0.0.1:1") as agent:
            await until(lambda: pauses.count >= len(doubled))
            tried = pauses.seconds[: len(doubled)]
            assert all(least <= wait <= 1.2 * least for least, wait in zip(doubled, tried, strict=True)), tried
            async with coordinator() as (fake, address):
                await invite(SimpleNamespace(agent=agent), 5, leads=True, address=address)
                await fake.welcome(5)
                await until(lambda: agent.obeyed)
                clock.now += LASTED_SECONDS + 0.1
                before = pauses.count
            await until(lambda: pauses.count > before)
            assert 0.1 <= pauses.seconds[before] <= 0.12

    run(work())


# Whom it obeys


def test_orders_are_obeyed_in_turn_and_a_word_goes_the_other_way(tmp_path):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            agent.link.say({"kind": "lost"})  # nobody is there yet: the hello says what matters
            await fake.welcome(5)
            await fake.tell("serve", 5)
            await fake.tell("work", 5)
            await until(lambda: len(agent.obeyed) == 3)
            assert agent.obeyed == ["welcome", "serve", "work"]
            agent.link.say({"kind": "started"})
            assert await fake.said.get() == {"kind": "started"}
            assert fake.hellos == [{"kind": "hello"}]

    run(work())


def test_votes_are_kept_before_they_are_given(tmp_path):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await fake.tell("promise", 6)
            promised = await fake.said.get()
            assert (promised["answer"], promised["voter"], promised["term"]) == ("promised", "host-1#1", [6, "x"])
            assert kept(tmp_path).promised == Term(6, "x")
            decision = Decision(1, {"epoch": 1}, VOTERS, VOTERS)
            await fake.tell("accept", 6, decision=decision.to_json())
            accepted = await fake.said.get()
            assert (accepted["answer"], accepted["sequence"]) == ("accepted", 1)
            assert kept(tmp_path).vote.decision == decision
            assert agent.obeyed == ["welcome"]

    run(work())


@pytest.mark.parametrize("do", ["fence", "work", "welcome", "beat", "promise", "verdict", "drain", "handover"])
def test_a_word_of_an_older_term_than_was_promised_is_refused_and_not_obeyed(tmp_path, do):
    async def work():
        Voter(tmp_path / "vote.json", "host-1#1").answer(link_module.AskPromise(Term(7, "newer")))
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await until(lambda: fake.open)
            await fake.tell(do, 6, leads=True, command=[], epoch=1)
            told = await fake.said.get()
            assert told == {"answer": "refused", "voter": "host-1#1", "term": [6, "x"], "promised": [7, "newer"]}
            await until(lambda: len(fake.hellos) == 2)  # it left, and looks again who is there
            assert agent.obeyed == []
            assert kept(tmp_path).promised == Term(7, "newer")

    run(work())


def test_after_a_word_of_a_higher_term_an_older_one_is_refused(tmp_path):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await fake.tell("beat", 8, leads=True)
            await until(lambda: kept(tmp_path).promised == Term(8, "x"))
            await fake.tell("fence", 5, epoch=1)
            told = await fake.said.get()
            assert (told["answer"], told["term"], told["promised"]) == ("refused", [5, "x"], [8, "x"])
            await fake.welcome(8, times=2)
            await until(lambda: agent.obeyed == ["welcome", "welcome"])

    run(work())


def test_a_host_that_cannot_write_gives_no_vote_and_obeys_nobody_new_but_stays(tmp_path, monkeypatch):
    """Shared memory may be full; that must cost a vote, and no agent."""

    def full(*_):
        raise OSError(28, "No space left on device")

    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await until(lambda: agent.obeyed == ["welcome"])
            monkeypatch.setattr(Voter, "_keep", full)
            await fake.tell("accept", 5, decision=Decision(1, {"epoch": 1}, VOTERS, VOTERS).to_json())
            await fake.tell("serve", 5)
            await until(lambda: agent.obeyed == ["welcome", "serve"])
            await fake.tell("fence", 8, epoch=1)
            await until(lambda: len(fake.hellos) == 2)  # it left, and looks again who is there
            assert agent.obeyed == ["welcome", "serve"]
            assert fake.said.empty()
            assert kept(tmp_path).promised == Term(5, "x")
            monkeypatch.undo()
            await fake.welcome(8, times=2)
            await until(lambda: agent.obeyed == ["welcome", "serve", "welcome"])
            assert kept(tmp_path).promised == Term(8, "x")

    run(work())


# Coordinators that go and come


def test_a_coordinator_that_says_nothing_is_left_and_tried_again(tmp_path, monkeypatch):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await until(lambda: agent.obeyed)
            fake.greets = 5
            monkeypatch.setattr(link_module, "SILENT_SECONDS", 0.2)
            await fake.tell("serve", 5)  # from here on it waits in vain
            await until(lambda: len(agent.obeyed) >= 4)
            assert agent.obeyed[:4] == ["welcome", "serve", "welcome", "welcome"]

    run(work())


def test_a_coordinator_that_is_started_again_at_its_address_is_found(tmp_path):
    async def work():
        async with contextlib.AsyncExitStack() as stack:
            fake, address = await stack.enter_async_context(coordinator())
            async with linked(tmp_path, address) as agent:
                await fake.welcome(5)
                await until(lambda: agent.obeyed)
                await stack.aclose()
                async with coordinator(listen=address) as (again, _):
                    await again.welcome(6)
                    await until(lambda: agent.obeyed == ["welcome", "welcome"])

    run(work())


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"do": "work"},
        {"do": "work", "term": 5},
        {"term": [5, "x"]},
        {"do": "beat", "term": [5, "x"]},
        {"do": "welcome", "term": [5, "x"]},
        {"do": "welcome", "term": [5, "x"], "command": 3},
        {"do": "welcome", "term": [5, "x"], **WELCOME, "run": None},
        {"do": "work", "term": [5, "x"]},
        {"do": "work", "term": [5, "x"], "epoch": "2"},
        {"do": "serve", "term": [5, "x"], "epoch": 2},
        {"do": "fence", "term": [5, "x"]},
        {"do": "fence", "term": [5, "x"], "epoch": True},
        {"do": "verdict", "term": [5, "x"], "committed": 3},
        {"do": "end", "term": [5, "x"]},
        {"do": "end", "term": [5, "x"], "code": "0"},
        {"do": "accept", "term": [5, "x"]},
        {"do": "accept", "term": [5, "x"], "decision": {"sequence": "no"}},
    ],
)
def test_a_coordinator_that_says_what_cannot_be_read_ends_no_agent(tmp_path, words, caplog):
    caplog.set_level("INFO", "jaxscale.supervisor.link")

    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await until(lambda: agent.obeyed)
            await fake._send(words)
            await fake.welcome(6, times=2)  # the agent has left, and is there again
            await until(lambda: agent.obeyed == ["welcome", "welcome"])
            assert not agent.keeping.done()
            assert "which cannot be read" in caplog.text
            assert kept(tmp_path).promised == Term(6, "x")

    run(work())


def test_nor_one_whose_orders_cannot_be_obeyed_and_it_is_not_asked_again_at_once(tmp_path, pauses):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            agent.trouble = [KeyError("run"), TypeError("unhashable type: 'list'"), ValueError("no address")]
            for times in range(1, 5):
                await fake.welcome(5, times)
            await until(lambda: len(agent.obeyed) == 4)
            assert not agent.keeping.done()
            assert pauses.seconds[2] >= 0.4  # each time later: to be let in and thrown out is no tie

    run(work())


def test_what_is_no_message_ends_no_agent(tmp_path):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await until(lambda: agent.obeyed)
            await fake._send(["x"])
            await fake.welcome(6, times=2)
            await until(lambda: agent.obeyed == ["welcome", "welcome"])

    run(work())


def test_an_invitation_ends_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "pause", lambda *_: SECONDS)
    monkeypatch.setattr(link_module, "asyncio", asyncio)

    async def work():
        async with linked(tmp_path, "127.0.0.1:1") as agent, coordinator() as (fake, address):
            await until(lambda: "127.0.0.1:1" in agent.link._trouble)
            await invite(SimpleNamespace(agent=agent), 5, leads=True, address=address)
            await fake.welcome(5)  # in less than the pause, which is as long as the test may be
            await until(lambda: agent.obeyed)

    run(work())


def test_a_coordinator_that_refuses_ends_the_agent(tmp_path):
    async def work():
        async with coordinator([Refused("another version")]) as (_, address), linked(tmp_path, address) as agent:
            with pytest.raises(Refused, match="another version"):
                await agent.keeping

    run(work())


def test_a_name_that_is_taken_is_waited_for_and_not_for_ever(tmp_path, clock):
    taken = NameTaken("there is an agent called host-1 already")

    async def work():
        async with coordinator([taken] * 3) as (fake, address), linked(tmp_path, address) as agent:
            await fake.welcome(5)
            await until(lambda: agent.obeyed)
        async with coordinator([taken] * 10_000) as (fake, address), linked(tmp_path, address) as agent:
            await until(lambda: len(fake._refusals) < 9_995)
            assert not agent.keeping.done()
            clock.now += link_module.NAME_SECONDS + 1
            with pytest.raises(NameTaken, match="called host-1 already"):
                await agent.keeping

    run(work())


# Whom it follows


@contextlib.asynccontextmanager
async def two(tmp_path):
    """Two coordinators; the agent is the first one's, who leads in term 5."""
    async with coordinator() as (own, own_at), coordinator() as (other, other_at), linked(tmp_path, own_at) as agent:
        await own.welcome(5)
        await own.tell("beat", 5, leads=True)
        await own.tell("serve", 5)
        await until(lambda: agent.obeyed == ["welcome", "serve"])
        yield SimpleNamespace(own=own, own_at=own_at, other=other, other_at=other_at, agent=agent)


async def invite(town, number, leads, address=None):
    question = {"ask": "follow", "coordinator": address or town.other_at, "term": [number, "y"], "leads": leads}
    return (await ask(town.agent.link.control, TOKEN, question))["follows"]


async def is_loyal(town):
    """Whether it still obeys the first one, on the stream that it had."""
    await town.own.tell("work", 5)
    await until(lambda: town.agent.obeyed[-1] == "work")
    return (len(town.own.hellos), len(town.other.hellos)) == (1, 0)


@pytest.mark.parametrize(
    ("number", "leads"), [(6, False), (5, False), (4, True), (4, False)], ids=["candidate", "equal", "older", "both"]
)
def test_who_is_led_follows_no_candidate_and_no_leader_of_an_older_term(tmp_path, number, leads):
    async def work():
        async with two(tmp_path) as town:
            assert await invite(town, number, leads) == town.own_at
            assert await is_loyal(town)

    run(work())


def test_a_leader_of_a_higher_term_is_followed_at_once(tmp_path):
    async def work():
        async with two(tmp_path) as town:
            assert await invite(town, 6, leads=True) == town.other_at
            await town.other.welcome(6)
            await until(lambda: town.agent.obeyed == ["welcome", "serve", "welcome"])
            await until(lambda: not town.own.open)

    run(work())


@pytest.mark.parametrize("leads", [False, True])
def test_who_hears_nothing_follows_anyone(tmp_path, clock, monkeypatch, leads):
    """A candidate of a low term too: it learns of the higher one from the votes."""

    async def work():
        async with two(tmp_path) as town:
            monkeypatch.setattr(link_module, "SILENT_SECONDS", SILENT_SECONDS)
            clock.now += SILENT_SECONDS + 0.1
            assert await invite(town, 1, leads) == town.other_at
            await until(lambda: town.other.hellos)

    run(work())


@pytest.mark.parametrize(("leads", "is_followed"), [(True, True), (False, False)])
def test_who_hears_a_coordinator_that_leads_no_more_follows_leaders_only(
    tmp_path, clock, monkeypatch, leads, is_followed
):
    async def work():
        async with two(tmp_path) as town:
            clock.now += SILENT_SECONDS + 0.1
            await town.own.tell("beat", 5, leads=False)
            await town.own.tell("work", 5)  # it has heard the beat once it obeyed this
            await until(lambda: town.agent.obeyed[-1] == "work")
            monkeypatch.setattr(link_module, "SILENT_SECONDS", SILENT_SECONDS)
            assert town.agent.link.silence == 0.0
            assert town.agent.link.unled > SILENT_SECONDS
            follows = await invite(town, 4, leads)
            assert follows == (town.other_at if is_followed else town.own_at)
            if is_followed:
                await until(lambda: town.other.hellos)

    run(work())


def test_an_invitation_of_the_own_coordinator_does_not_cut_its_stream(tmp_path):
    async def work():
        async with two(tmp_path) as town:
            assert await invite(town, 9, leads=True, address=town.own_at) == town.own_at
            assert await is_loyal(town)

    run(work())


def test_who_has_no_coordinator_follows_whoever_invites_and_falls_back(tmp_path):
    async def work():
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))  # bound, and nobody listens
            nobody = f"127.0.0.1:{held.getsockname()[1]}"
            async with coordinator() as (fake, address), linked(tmp_path, nobody) as agent:
                town = SimpleNamespace(agent=agent)
                assert await invite(town, 1, leads=False, address=address) == address
                await fake.welcome(1)
                await until(lambda: agent.obeyed)
            async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
                await until(lambda: fake.open)
                town = SimpleNamespace(agent=agent)
                assert await invite(town, 1, leads=False, address=nobody) == nobody
                await fake.welcome(1, times=2)  # the one that it knew before
                await until(lambda: agent.obeyed)

    run(work())


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({}, "can be asked to follow, not None"),
        ({"ask": "status"}, "can be asked to follow, not 'status'"),
        ({"coordinator": None}, "an invitation lacks 'coordinator'"),
        ({"term": None}, "an invitation lacks 'term'"),
        ({"leads": None}, "an invitation lacks 'leads'"),
        ({"term": 6}, "a term is a number and a name, not 6"),
        ({"term": ["6", "y"]}, "whole number, not 6"),
        ({"term": [-6, "y"]}, "whole number, not -6"),
        ({"coordinator": ""}, "an address is host:port, not ''"),
        ({"coordinator": 5}, "an address is host:port, not '5'"),
        ({"coordinator": "here"}, "an address is host:port, not 'here'"),
        ({"coordinator": "here:there"}, "an address is host:port, not 'here:there'"),
    ],
)
def test_an_invitation_that_is_none_changes_nothing(tmp_path, question, words):
    async def work():
        async with two(tmp_path) as town:
            if question.keys() - {"ask"}:
                whole = {"ask": "follow", "coordinator": town.other_at, "term": [6, "y"], "leads": True} | question
                sent = {name: value for name, value in whole.items() if value is not None}
            else:
                sent = question
            with pytest.raises(Refused, match=words):
                await ask(town.agent.link.control, TOKEN, sent)
            assert await is_loyal(town)

    run(work())


def test_a_stranger_at_the_agents_port_is_refused_and_told_of(tmp_path):
    async def work():
        async with two(tmp_path) as town:
            question = {"ask": "follow", "coordinator": town.other_at, "term": [9, "y"], "leads": True}
            with pytest.raises(Refused, match="the token is not this job's"):
                await ask(town.agent.link.control, new_token(), question)
            assert town.agent.refused == ["wrong or missing token"]
            async with Session(town.agent.link.control, TOKEN) as lost:
                lost.send({"kind": "hello"})
                with pytest.raises(Refused, match="this is an agent, not a coordinator"):
                    await lost.receive()
            assert await is_loyal(town)

    run(work())


# A coordinator of its own


class Processes:
    """What the link starts, without starting anything."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self):
        self.started = []

    def Popen(self, command, **_):
        process = SimpleNamespace(command=command, code=None, calls=[])
        process.poll = lambda: process.code
        process.kill = lambda: process.calls.append("kill")
        process.wait = lambda: process.calls.append("wait")
        self.started.append(process)
        return process


@pytest.fixture
def processes(monkeypatch):
    processes = Processes()
    monkeypatch.setattr(link_module, "subprocess", processes)
    monkeypatch.setattr(link_module, "LEAVE_SECONDS", 0.05)
    return processes


@contextlib.asynccontextmanager
async def abandoned(tmp_path, host="host-0", takeover_after=PATIENCE, is_welcome=True, has_voted=True):
    """A link whose coordinator has just spoken for the last time, and the task that may start another one."""
    async with coordinator() as (fake, address), linked(tmp_path, address, host, takeover_after) as agent:
        await until(lambda: fake.open)
        if is_welcome:
            await fake.welcome(5)
        if has_voted:
            agents = {"host-0": "10.0.0.1:1", "host-2": "10.0.0.3:1"}
            decision = Decision(1, {"epoch": 1, "agents": agents}, VOTERS, VOTERS)
            await fake.tell("accept", 5, decision=decision.to_json())
            await fake.said.get()
        await fake.tell("serve", 5)
        await until(lambda: "serve" in agent.obeyed)
        agent.keeping.cancel()
        await asyncio.gather(agent.keeping, return_exceptions=True)
        agent.watching = asyncio.ensure_future(agent.link.take_over())
        try:
            yield agent
        finally:
            agent.watching.cancel()
            await asyncio.gather(agent.watching, return_exceptions=True)


@pytest.mark.parametrize(("host", "place"), [("host-0", 0), ("host-1", 1), ("host-2", 2), ("stranger", 3)])
def test_a_host_starts_one_coordinator_when_its_turn_comes(tmp_path, clock, pauses, processes, host, place):
    async def work():
        async with abandoned(tmp_path, host):
            clock.now += PATIENCE + place * STAGGER_SECONDS - 0.01
            await pauses.some()
            assert processes.started == []
            clock.now += 0.02
            await until(lambda: processes.started)
            clock.now += 1000
            await pauses.some()
            assert len(processes.started) == 1

    run(work())


def test_the_coordinator_is_started_like_the_first_one_and_told_of_all_agents(tmp_path, clock, processes):
    async def work():
        async with abandoned(tmp_path) as agent:
            clock.now += 1000
            await until(lambda: processes.started)
            _, *command = processes.started[0].command
            assert command[:5] == ["-m", "jaxscale", "coordinator", "recipe.py", "--steps"]
            flags = list(zip(command[6::2], command[7::2], strict=True))
            assert flags[0] == ("--listen", "127.0.0.1:0")
            assert flags[1][0] == "--elected-within"
            invited = [value for flag, value in flags[2:] if flag == "--invite"]
            assert sorted(invited) == sorted([agent.link.control, "10.0.0.1:1", "10.0.0.3:1"])

    run(work())


def test_and_with_the_certificates_of_this_host(tmp_path, clock, processes):
    async def work():
        async with abandoned(tmp_path) as agent:
            own = Tls(*(tmp_path / name for name in ("key", "certificate", "authority")))
            agent.link._options = dataclasses.replace(agent.link._options, tls=own)
            clock.now += 1000
            await until(lambda: processes.started)
            command = processes.started[0].command
            for name in ("key", "certificate", "authority"):
                assert command[command.index(f"--tls-{name}") + 1] == str(tmp_path / name)

    run(work())


def test_a_coordinator_that_was_not_elected_is_followed_by_another_after_a_pause(tmp_path, clock, pauses, processes):
    async def work():
        async with abandoned(tmp_path):
            clock.now += 1000
            await until(lambda: processes.started)
            processes.started[0].code = 77
            await pauses.some()
            clock.now += PATIENCE - 0.01
            await pauses.some()
            assert len(processes.started) == 1
            clock.now += 0.02
            await until(lambda: len(processes.started) == 2)

    run(work())


@pytest.mark.parametrize("lack", ["is_welcome", "has_voted"])
def test_who_knows_nothing_of_the_run_starts_no_coordinator(tmp_path, clock, pauses, processes, lack):
    async def work():
        async with abandoned(tmp_path, **{lack: False}):
            clock.now += 1000
            await pauses.some()
            assert processes.started == []

    run(work())


def test_with_0_no_host_ever_starts_a_coordinator(tmp_path, clock, processes):
    async def work():
        async with abandoned(tmp_path, takeover_after=0.0) as agent:
            clock.now += 1000
            await asyncio.sleep(0.3)
            assert processes.started == []
            assert not agent.watching.done()  # its end would end the agent

    run(work())


def test_an_agent_that_ends_waits_for_its_coordinator_and_not_for_ever(tmp_path, clock, processes):
    async def work():
        async with abandoned(tmp_path):
            clock.now += 1000
            await until(lambda: processes.started)
            assert processes.started[0].calls == []
        assert processes.started[0].calls == ["kill", "wait"]
        (tmp_path / "vote.json").unlink()
        async with abandoned(tmp_path):
            clock.now += 1000
            await until(lambda: len(processes.started) == 2)
            processes.started[1].code = 0
        assert processes.started[1].calls == []

    run(work())


# Silence


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_silence_is_told_of_at_growing_intervals_and_its_end_too(tmp_path, clock, pauses, caplog, monkeypatch):
    monkeypatch.setattr(link_module, "SILENT_SECONDS", SILENT_SECONDS)

    async def work():
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            gone = f"127.0.0.1:{nobody.getsockname()[1]}"
        async with linked(tmp_path, gone) as agent:
            telling = asyncio.ensure_future(agent.link.tell_silence())
            try:
                told_at = []
                for second in range(1, 51):
                    before = len(warnings(caplog))
                    clock.now += 1.0
                    await pauses.some()
                    told_at += [second] * (len(warnings(caplog)) - before)
                assert told_at == [5, 10, 20, 40]
                assert f"no coordinator at {gone} for 5 s" in warnings(caplog)[0]
                assert agent.link.is_alone
                agent.link._heard = clock.now
                await until(lambda: len(warnings(caplog)) == 5)
                assert warnings(caplog)[-1] == f"a coordinator at {gone} is there"
                clock.now += link_module.FIRST_WORD_SECONDS
                await until(lambda: len(warnings(caplog)) == 6)
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)

    run(work())


def test_who_hears_its_coordinator_is_not_alone_and_says_nothing(tmp_path, pauses, caplog):
    async def work():
        async with coordinator() as (fake, address), linked(tmp_path, address) as agent:
            assert agent.link.is_alone
            telling = asyncio.ensure_future(agent.link.tell_silence())
            await fake.welcome(5)
            await until(lambda: agent.obeyed)
            assert not agent.link.is_alone
            await pauses.some()
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            assert warnings(caplog) == []

    run(work())


def test_an_agent_that_leaves_alone_waits_for_no_coordinator(tmp_path, clock, processes, monkeypatch):
    async def work():
        async with abandoned(tmp_path) as agent:
            clock.now += 1000
            await until(lambda: processes.started)
            monkeypatch.setattr(link_module, "LEAVE_SECONDS", SECONDS)
            await asyncio.wait_for(agent.link.close(waits=False), SECONDS / 2)
            assert processes.started[0].calls == ["kill", "wait"]
            processes.started[0].code = 0

    run(work())
