"""Decisions by majority, over a simulated network that loses, doubles, delays and reorders, with crashes everywhere."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.supervisor.quorum import (
    NEVER,
    Accepted,
    Acceptor,
    AskAccept,
    AskPromise,
    Decision,
    Promise,
    Proposer,
    QuorumError,
    Refusal,
    Term,
    Vote,
)

NAMES = ("a", "b", "c", "d", "e", "f", "g")
VOTERS = NAMES[:5]


def genesis(voters=VOTERS):
    return Decision.genesis({"log": []}, voters)


class Monitor:
    """Sees every vote, and so knows what was chosen before any proposer does."""

    def __init__(self, first):
        self.votes = {}
        self.chosen = {0: first}
        self.fenced = []

    def accepted(self, voter, term, decision):
        who = self.votes.setdefault((term, decision.sequence), (decision, set()))
        assert who[0] == decision, "one term proposed two decisions of one number"
        before = decision.has_majority(who[1])
        who[1].add(voter)
        if before or not decision.has_majority(who[1]):
            return
        for higher, adopted in self.fenced:
            # What the higher term has adopted, the lower one may still see through: it is the same decision.
            assert term >= higher or decision.sequence <= adopted, f"{term} decided after {higher} had its majority"
        there = self.chosen.setdefault(decision.sequence, decision)
        assert there == decision, f"two decisions of number {decision.sequence}"
        log = decision.value["log"]
        for sequence, earlier in self.chosen.items():
            shorter = min(sequence, decision.sequence)
            assert earlier.value["log"][:shorter] == log[:shorter], "a chosen decision was lost"

    def adopted(self, proposer):
        """It has a majority's promises."""
        newest = proposer.pending or proposer.chosen
        before = [s for (term, s), (d, who) in self.votes.items() if term < proposer.term and d.has_majority(who)]
        assert newest.sequence >= max([0, *before]), "a chosen decision was overlooked"
        self.fenced.append((proposer.term, newest.sequence))


class Simulation:
    def __init__(self, seed, changes_voters):
        self.random = random.Random(seed)
        self.changes_voters = changes_voters
        self.monitor = Monitor(genesis())
        self.stored = {name: json.dumps(Acceptor(name).to_json()) for name in NAMES}
        self.acceptors = {name: Acceptor(name) for name in NAMES}
        self.proposers = {}
        self.network = []
        self.born = 0
        self.decided = 0

    def start(self, slot):
        self.born += 1
        known = self.random.choice(list(self.monitor.chosen.values()))
        heard = [p.highest_refusal for p in self.proposers.values()] or [NEVER]
        self.proposers[slot] = Proposer.start(
            f"p{self.born}", known, self.random.choice([NEVER, *heard, max(heard), max(heard)])
        )

    def pump(self, slot):
        for name, ask in self.proposers[slot].asks().items():
            self.network.append((name, ask))

    def deliver(self, index):
        to, message = self.network.pop(index)
        if isinstance(message, AskPromise | AskAccept):
            acceptor, reply = self.acceptors[to].answer(message)
            if acceptor != self.acceptors[to]:
                self.stored[to] = json.dumps(acceptor.to_json())
                self.acceptors[to] = acceptor
            if isinstance(reply, Accepted):
                self.monitor.accepted(to, message.term, message.decision)
            if reply is not None:
                self.network.append((reply.term.proposer, reply))
            return
        for slot, proposer in self.proposers.items():
            if proposer.term.proposer != to:
                continue  # of a proposer that crashed
            after = proposer.heard(message)
            new = after.pending or after.chosen
            if new is not None and (proposer.pending or proposer.chosen) is None:
                self.monitor.adopted(after)
            if after.chosen is not None:
                assert self.monitor.chosen[after.chosen.sequence] == after.chosen, "believed to be chosen, but is not"
            self.proposers[slot] = after

    def propose(self, slot):
        proposer = self.proposers[slot]
        if not proposer.leading or proposer.pending is not None:
            return
        self.decided += 1
        voters = None
        if self.changes_voters and self.random.random() < 0.5:
            voters = self.random.sample(NAMES, self.random.randint(1, len(NAMES)))
        log = [*proposer.chosen.value["log"], self.decided]
        self.proposers[slot] = proposer.propose({"log": log}, voters)

    def restart_voter(self):
        name = self.random.choice(NAMES)
        self.acceptors[name] = Acceptor.from_json(json.loads(self.stored[name]))

    def step(self, loss):
        slot = self.random.randrange(2)
        what = self.random.random()
        if slot not in self.proposers or what < 0.01:
            self.start(slot)
        elif what < 0.03:
            self.restart_voter()
        elif what < 0.13:
            self.propose(slot)
        elif what < 0.23 or not self.network:
            self.pump(slot)
        else:
            index = self.random.randrange(len(self.network))
            chance = self.random.random()
            if chance < loss:
                self.network.pop(index)
            elif chance < loss + 0.1:
                self.network.append(self.network[index])
            else:
                self.deliver(index)

    def heal(self):
        """All voters are there and one proposer tries, also after it lost to a message that was still under way."""
        above = NEVER
        for _ in range(100):
            self.born += 1
            known = self.random.choice(list(self.monitor.chosen.values()))
            self.proposers = {0: Proposer.start(f"p{self.born}", known, above)}
            self.drain()
            if self.proposers[0].leading:
                return
            above = self.proposers[0].highest_refusal
        raise AssertionError("a connected majority did not get on")

    def drain(self):
        for _ in range(1000):
            if not self.network and (self.proposers[0].deposed or not self.proposers[0].asks()):
                return
            self.pump(0)
            while self.network:
                self.deliver(self.random.randrange(len(self.network)))
        raise AssertionError("voters that are all there leave a proposer without an answer")


SEEDS = st.integers(0, 1 << 32)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.booleans(), st.sampled_from([0.02, 0.1, 0.3]))
def test_never_two_decisions_never_one_lost_never_an_old_term(seed, changes_voters, loss):
    simulation = Simulation(seed, changes_voters)
    for _ in range(400):
        simulation.step(loss)
        if len(simulation.network) > 60:
            simulation.network = simulation.random.sample(simulation.network, 40)
    simulation.heal()
    last = max(simulation.monitor.chosen)
    assert simulation.proposers[0].chosen.sequence == last
    simulation.propose(0)
    simulation.drain()
    assert simulation.proposers[0].chosen.sequence == last + 1


def test_the_simulation_reaches_what_it_is_for():
    """Several terms, many decisions, changes of voters: else the test above would prove nothing."""
    decided, terms, changed = 0, set(), 0
    for seed in range(30):
        simulation = Simulation(seed, changes_voters=True)
        for _ in range(400):
            simulation.step(0.02)
        decided += max(simulation.monitor.chosen)
        terms |= {term.number for term, _ in simulation.monitor.votes}
        changed += sum(d.voters != d.previous_voters for d in simulation.monitor.chosen.values())
    assert decided > 60
    assert len(terms) > 3
    assert changed > 10


# By hand


def settle(proposer, acceptors, up=None):
    """Delivers everything to the voters that are up, until nothing changes."""
    while True:
        before = proposer
        for name, ask in proposer.asks().items():
            if up is not None and name not in up:
                continue
            acceptors[name], reply = acceptors[name].answer(ask)
            if reply is not None:
                proposer = proposer.heard(reply)
        if proposer == before:
            return proposer


def voters(names=NAMES):
    return {name: Acceptor(name) for name in names}


def test_a_majority_decides_and_a_minority_does_not():
    acceptors = voters()
    leader = settle(Proposer.start("one", genesis()), acceptors, "abc")
    assert leader.leading
    leader = settle(leader.propose({"epoch": 1}), acceptors, "abc")
    assert (leader.chosen.sequence, leader.chosen.value) == (1, {"epoch": 1})
    leader = settle(leader.propose({"epoch": 2}), acceptors, "de")
    assert leader.pending.sequence == 2
    assert leader.chosen.sequence == 1
    assert set(leader.asks()) == {"a", "b", "c"}


def test_a_new_coordinator_first_makes_the_last_decision_its_own():
    acceptors = voters()
    old = settle(Proposer.start("old", genesis()), acceptors)
    old = settle(old.propose({"epoch": 1}), acceptors, "a")  # one vote: not chosen, but who knows
    new = settle(Proposer.start("new", genesis(), old.term), acceptors, "abc")
    assert new.chosen.value == {"epoch": 1}
    assert {acceptors[name].vote.term for name in "abc"} == {new.term}
    # Had the new one not met that voter, it would have decided otherwise, and that would stand.
    acceptors = voters()
    old = settle(settle(Proposer.start("old", genesis()), acceptors).propose({"epoch": 1}), acceptors, "a")
    new = settle(Proposer.start("new", genesis(), old.term), acceptors, "bcd")
    new = settle(new.propose({"epoch": "other"}), acceptors, "bcd")
    again = settle(Proposer.start("again", genesis(), new.term), acceptors, "abc")
    assert again.chosen.value == {"epoch": "other"}


def test_an_old_coordinator_gets_neither_promises_nor_decisions():
    acceptors = voters()
    old = settle(Proposer.start("old", genesis()), acceptors)
    new = settle(Proposer.start("new", genesis(), old.term), acceptors, "abc")
    old = settle(old.propose({"epoch": 1}), acceptors)
    assert old.deposed
    assert not old.leading
    assert old.highest_refusal == new.term
    assert old.chosen.sequence == 0
    late = settle(Proposer.start("late", genesis()), acceptors, "abc")
    assert late.deposed
    assert late.asks().keys() == {"d", "e"}
    with pytest.raises(QuorumError, match="late does not lead in term 1"):
        late.propose({})
    assert settle(new.propose({"epoch": 2}), acceptors, "abc").chosen.value == {"epoch": 2}


def test_one_refusal_deposes_nobody():
    acceptors = voters()
    leader = settle(Proposer.start("leader", genesis()), acceptors)
    settle(Proposer.start("cut off", genesis(), Term(9, "")), acceptors, "e")
    leader = settle(leader.propose({"epoch": 1}), acceptors)
    assert leader.leading
    assert leader.chosen.value == {"epoch": 1}


def test_the_coordinators_own_host_is_a_voter_like_others():
    """Four agents and a witness: with the witness and the first agent gone for good, the others take over."""
    names = ("agent-0", "agent-1", "agent-2", "agent-3", "witness")
    acceptors, start = voters(names), genesis(names)
    first = settle(Proposer.start("first", start), acceptors)
    first = settle(first.propose({"epoch": 1}), acceptors, names)
    left = names[1:4]
    second = settle(Proposer.start("second", start, acceptors["agent-1"].promised), acceptors, left)
    assert second.chosen.value == {"epoch": 1}
    second = settle(second.propose({"epoch": 2}, left), acceptors, left)
    assert not second.settled
    second = settle(second.propose({"epoch": 2}), acceptors, left)
    assert second.settled
    # Now two of these three are enough.
    third = settle(Proposer.start("third", start, second.term), acceptors, left[1:])
    # It started from the oldest voters, of whom too few are left to show the way by themselves, but one told it more.
    assert third.chosen.value == {"epoch": 2}
    assert third.chosen.sequence == 3


def test_a_change_of_voters_needs_both_majorities():
    acceptors = voters()
    leader = settle(Proposer.start("one", genesis("abc")), acceptors)
    change = leader.propose({"epoch": 1}, "cdefg")
    assert settle(change, acceptors, "abc").pending is not None  # the old ones alone
    assert settle(change, acceptors, "cdefg").pending is not None  # the new ones alone
    assert settle(change, acceptors, "bcdef").chosen.voters == tuple("cdefg")


def test_who_starts_from_old_voters_finds_the_new_ones():
    acceptors = voters()
    leader = settle(Proposer.start("one", genesis("abc")), acceptors)
    leader = settle(leader.propose({"n": 1}, "cde"), acceptors)
    leader = settle(leader.propose({"n": 2}, "efg"), acceptors)
    leader = settle(leader.propose({"n": 3}), acceptors)
    late = Proposer.start("late", genesis("abc"), leader.term)
    assert set(late.asks()) == {"a", "b", "c"}
    late = settle(late, acceptors)
    assert late.chosen.value == {"n": 3}
    assert late.chosen.voters == tuple("efg")
    assert settle(Proposer.start("cut off", genesis("abc"), late.term), acceptors, "abcd").chosen is None


def test_late_and_repeated_messages_change_nothing():
    acceptor = Acceptor("a")
    one, two = (Decision(n, {"n": n}, ("a",), ("a",)) for n in (1, 2))
    low, high = Term(1, "x"), Term(2, "x")
    acceptor, _ = acceptor.accept(low, one)
    acceptor, _ = acceptor.accept(low, two)
    assert acceptor.accept(low, one) == (acceptor, None)
    assert acceptor.accept(low, two) == (acceptor, Accepted("a", low, 2))
    promised, reply = acceptor.promise(high)
    assert reply == Promise("a", high, Vote(low, two))
    assert promised.promise(high) == (promised, reply)
    assert promised.promise(low) == (promised, Refusal("a", low, high))
    assert promised.accept(low, two) == (promised, Refusal("a", low, high))
    assert promised.promise(Term(2, "w"))[1] == Refusal("a", Term(2, "w"), high)  # the same number, a lower name
    proposer = Proposer.start("x", genesis("a"))
    assert proposer.heard(Promise("a", high, None)) is proposer
    assert proposer.heard(Accepted("a", proposer.term, 1)) is proposer


def test_voters_that_forgot_are_noticed():
    chosen = Decision(3, {}, tuple("abc"), tuple("abc"))
    stale = Vote(Term(1, "x"), Decision(2, {}, tuple("abc"), tuple("abc")))
    proposer = Proposer.start("y", chosen, Term(1, "x")).heard(Promise("a", Term(2, "y"), stale))
    with pytest.raises(QuorumError, match="decision 3 was chosen, but a majority of a, b, c knows of 2 only"):
        proposer.heard(Promise("b", Term(2, "y"), stale))


@pytest.mark.parametrize(
    "damage",
    [
        None,
        [],
        {},
        {"voter": "", "promised": [0, ""], "vote": None},
        {"voter": "a", "promised": [-1, ""], "vote": None},
        {"voter": "a", "promised": [True, "x"], "vote": None},
        {"voter": "a", "promised": [1], "vote": None},
        {"voter": "a", "promised": [1, "x"]},
        {"voter": "a", "promised": [1, "x"], "vote": {"term": [1, "x"]}},
        {"voter": "a", "promised": [1, "x"], "vote": {"term": [1, "x"], "decision": {"sequence": 1}}},
    ],
)
def test_a_damaged_vote_is_not_taken_for_none(damage):
    with pytest.raises(QuorumError):
        Acceptor.from_json(damage)


def test_misuse_is_refused():
    acceptors = voters()
    leader = settle(Proposer.start("one", genesis()), acceptors)
    with pytest.raises(QuorumError, match="one after another"):
        leader.propose({}).propose({})
    with pytest.raises(QuorumError, match="keep at least one"):
        leader.propose({}, [])
    with pytest.raises(QuorumError, match="at least one voter"):
        Decision.genesis({}, [])
