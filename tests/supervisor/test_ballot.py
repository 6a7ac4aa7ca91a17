"""Nothing is done before a majority has it, and of two coordinators one at most can do anything."""

import json
import random

import pytest

from jaxscale.supervisor.ballot import WITNESS, Ballot, voter_name
from jaxscale.supervisor.quorum import Acceptor, QuorumError
from jaxscale.supervisor.voter import (
    Voter,
    ask_from_json,
    ask_to_json,
    host_voter,
    reply_from_json,
    reply_to_json,
)

HOSTS = ("a", "b", "c", "d")


class Town:
    """Voters and coordinators; `reach` says who hears whom. All messages go through JSON, as on a wire."""

    def __init__(self, hosts=HOSTS):
        self.acceptors = {WITNESS: Acceptor(WITNESS)} | {host: Acceptor(voter_name(host, "1")) for host in hosts}

    def lose(self, host):
        """Its memory is gone: it comes back as another voter."""
        number = int(self.acceptors[host].voter.partition("#")[2])
        self.acceptors[host] = Acceptor(voter_name(host, str(number + 1)))

    def coordinator(self, name, reach):
        ballot = Ballot(name)
        for who in reach:
            ballot.meet(Acceptor.from_json(json.loads(json.dumps(self.acceptors[who].to_json()))))
        return ballot

    def obey(self, host, ballot, count, before):
        """A host obeys, as `link.py` does, who has the highest term that it heard of."""
        acceptor = self.acceptors[host]
        if ballot.term < acceptor.promised:
            return before
        self.acceptors[host], _ = acceptor.promise(ballot.term)
        assert count > before, "a decision was made twice, or forgotten"
        return count

    def talk(self, ballot, reach):
        """Asks and answers until nothing is left to ask of those in reach. False: it was deposed."""
        for _ in range(100):
            names = {self.acceptors[who].voter: who for who in reach}
            asks = {voter: ask for voter, ask in ballot.asks().items() if voter in names}
            if not asks:
                return True
            for voter, ask in asks.items():
                who = names[voter]
                told = ask_from_json(json.loads(json.dumps(ask_to_json(ask))))
                self.acceptors[who], reply = self.acceptors[who].answer(told)
                if reply is not None and not ballot.heard(
                    reply_from_json(json.loads(json.dumps(reply_to_json(reply))))
                ):
                    return False
        raise AssertionError("it asks for ever")


def test_the_first_coordinator_needs_the_witness_only_and_then_a_majority_of_the_hosts():
    town = Town()
    ballot = town.coordinator("x", [WITNESS])
    assert town.talk(ballot, [WITNESS])
    assert ballot.leading
    assert ballot.value == {}
    for host in HOSTS:
        ballot.meet(town.acceptors[host])
    ballot.hold(["serve"], {"epoch": 1}, HOSTS)
    town.talk(ballot, [WITNESS, "a"])
    assert ballot.release() == []  # two of five
    town.talk(ballot, [WITNESS, "a", "b"])
    assert ballot.release() == ["serve"]
    assert ballot.release() == []


def test_what_follows_from_no_new_decision_waits_for_the_ones_before_it_only():
    town = Town(["a"])
    ballot = town.coordinator("x", [WITNESS, "a"])
    town.talk(ballot, [WITNESS, "a"])
    ballot.hold(["one"], {"epoch": 1}, ["a"])
    ballot.hold(["two"], {"epoch": 1}, ["a"])
    ballot.hold(["three"], {"epoch": 2}, ["a"])
    assert ballot.release() == []
    town.talk(ballot, [WITNESS])
    assert ballot.release() == ["one", "two", "three"]
    ballot.hold(["four"], {"epoch": 2}, ["a"])
    assert ballot.release() == ["four"]


def led_town(members=HOSTS):
    town = Town(members)
    first = town.coordinator("x", [WITNESS, *members])
    town.talk(first, [WITNESS])
    first.hold(["work"], {"epoch": 1}, members)
    town.talk(first, [WITNESS, *members])
    assert first.release() == ["work"]
    return town, first


def test_another_host_takes_over_with_what_was_decided_and_the_old_one_can_do_nothing():
    town, first = led_town()
    rest = ["b", "c", "d"]  # the coordinator's host is gone, and the witness with it
    second = town.coordinator("y", rest)
    assert town.talk(second, rest)
    assert second.leading
    assert second.value == {"epoch": 1}
    assert second.term > first.term
    first.hold(["fence"], {"epoch": 1, "is_over": True}, HOSTS)
    assert not town.talk(first, HOSTS)
    assert first.release() == []
    second.hold(["fence too"], {"epoch": 1, "is_over": True}, HOSTS)
    town.talk(second, rest)
    assert second.release() == ["fence too"]


def test_a_minority_neither_leads_nor_decides():
    town, first = led_town()
    minority = ["a", "b"]
    other = town.coordinator("y", minority)
    town.talk(other, minority)
    assert not other.leading
    first.hold(["fence"], {"epoch": 1, "is_over": True}, HOSTS)
    town.talk(first, minority)
    assert first.release() == []


def test_a_decision_of_which_only_some_heard_is_found_by_the_next_coordinator():
    town, first = led_town()
    first.hold(["fence"], {"epoch": 1, "is_over": True}, HOSTS)
    town.talk(first, ["a", "b", "c"])
    assert first.release() == ["fence"]
    second = town.coordinator("y", ["c", "d", WITNESS])  # of those only c has it
    town.talk(second, ["c", "d", WITNESS])
    assert second.value == {"epoch": 1, "is_over": True}


def test_voters_follow_the_world():
    town, ballot = led_town()
    ballot.hold(["work"], {"epoch": 2}, ["a", "b"])
    town.talk(ballot, [WITNESS, *HOSTS])
    assert ballot.release() == ["work"]
    ballot.hold(["more"], {"epoch": 3}, ["a", "b"])
    town.talk(ballot, ["a", WITNESS])  # a majority of a, b and the witness; c and d do not count any more
    assert ballot.release() == ["more"]


def test_one_host_alone_needs_the_witness_and_not_itself():
    town, ballot = led_town(["a", "b"])
    ballot.hold(["work"], {"epoch": 2}, ["a"])
    town.talk(ballot, [WITNESS, "a"])
    assert ballot.release() == ["work"]
    ballot.hold(["more"], {"epoch": 3}, ["a"])
    town.talk(ballot, [WITNESS])
    assert ballot.release() == ["more"]


def test_a_majority_that_lost_its_memory_does_not_end_the_run():
    town, ballot = led_town()
    ballot.hold(["fence"], {"epoch": 1, "is_over": True}, HOSTS)
    town.talk(ballot, [])
    assert ballot.release() == []
    for host in ("a", "b", "c", "d"):
        town.lose(host)
        ballot.meet(town.acceptors[host])
    town.talk(ballot, [WITNESS, *HOSTS])
    assert ballot.release() == ["fence"]
    second = town.coordinator("y", [WITNESS, *HOSTS])  # and so does not the coordinator's death then
    town.talk(second, [WITNESS, *HOSTS])
    assert second.leading
    assert second.value == {"epoch": 1, "is_over": True}


def test_a_candidate_that_asked_in_vain_does_not_end_the_leader():
    """Raft's disruptive server: cut off, it made some promise it a higher term, and was never elected."""
    town, first = led_town()
    other = town.coordinator("y", ["a"])
    town.talk(other, ["a"])
    first.hold(["fence"], {"epoch": 1, "is_over": True}, HOSTS)
    assert town.talk(first, HOSTS)
    assert first.release() == ["fence"]
    assert first.term > other.term


def test_two_candidates_end_with_one_leader():
    town, _ = led_town()
    one, two = (town.coordinator(name, [WITNESS, *HOSTS]) for name in ("y", "z"))
    town.talk(one, ["a", "b"])
    town.talk(two, ["c", "d", WITNESS])
    assert (one.leading, two.leading) == (False, True)
    town.talk(one, HOSTS)  # refused, it tries a higher term and wins: it was never elected, so nothing is lost
    assert one.leading
    two.hold(["x"], {"epoch": 9}, HOSTS)
    assert not town.talk(two, HOSTS)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_decisions_follow_one_another(seed):
    """Coordinators come and go, messages reach some: no host does first what was decided later, or anything twice."""
    dice = random.Random(seed)
    town, ballots, done = Town(), [], dict.fromkeys(HOSTS, 0)
    for number in range(60):
        if not ballots or dice.random() < 0.15:
            reach = dice.sample([WITNESS, *HOSTS], dice.randint(3, 5))
            ballots.append(town.coordinator(f"c{number}", reach))
        ballot = dice.choice(ballots[-3:])
        for host in dice.sample(HOSTS, 2):
            ballot.meet(town.acceptors[host])
        reach = dice.sample([WITNESS, *HOSTS], dice.randint(1, 5))
        is_well = town.talk(ballot, reach)
        if is_well and ballot.leading and not ballot.asks():
            known = dict(ballot.value).get("count", 0)
            ballot.hold([known + 1], {"count": known + 1, "by": number}, HOSTS)
            is_well = town.talk(ballot, reach)
            for count in ballot.release():
                for host in dice.sample(HOSTS, 3):
                    done[host] = town.obey(host, ballot, count, done[host])
        if not is_well:
            ballots.remove(ballot)
    assert max(done.values()) > 3


def test_a_voter_keeps_what_it_promised(tmp_path):
    voter = host_voter(tmp_path, "a")
    ballot = Ballot("x")
    ballot.meet(voter.acceptor)
    assert voter.acceptor.voter.startswith("a#")
    witness = Voter(tmp_path / "witness.json", WITNESS)
    ask = ballot.asks()[WITNESS]
    assert witness.answer(ask) is not None
    assert Voter(tmp_path / "witness.json", "other").acceptor == witness.acceptor
    assert host_voter(tmp_path, "a").acceptor.voter == voter.acceptor.voter


def test_a_damaged_file_makes_another_voter_and_a_damaged_witness_is_told(tmp_path):
    before = host_voter(tmp_path, "a").acceptor.voter
    (tmp_path / "vote.json").write_text('{"voter": ')
    assert host_voter(tmp_path, "a").acceptor.voter != before
    (tmp_path / "witness.json").write_text("[]")
    with pytest.raises(QuorumError, match=r"witness\.json"):
        Voter(tmp_path / "witness.json", WITNESS)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"do": "promise"},
        {"do": "promise", "term": [1]},
        {"do": "accept", "term": [1, "x"], "decision": {}},
        {"do": 3},
    ],
)
def test_asks_that_are_none(message):
    with pytest.raises(QuorumError):
        ask_from_json(message)


@pytest.mark.parametrize(
    "message",
    [
        {"answer": "promised", "voter": "a", "term": [1, "x"]},
        {"answer": "accepted", "voter": "a", "term": [1, "x"], "sequence": "y"},
        {"answer": "refused", "voter": "a", "term": [1, "x"], "promised": 3},
        {"answer": "maybe", "voter": "a", "term": [1, "x"]},
        {"answer": "promised", "voter": "a", "term": [1, "x"], "vote": {"term": [1, "x"]}},
    ],
)
def test_answers_that_are_none(message):
    with pytest.raises(QuorumError):
        reply_from_json(message)
