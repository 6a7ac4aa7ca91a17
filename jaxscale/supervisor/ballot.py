"""Nothing is done before a majority has it: what the coordinator wants to do waits here for the vote on why. Pure.

The coordinator's state (`Transitions.to_json`) is one value; every change of it is proposed to the voters, and the
actions that follow from it are released once a majority has accepted it. So whatever an agent was ever told to do
follows from a decision that any later coordinator will hear of. Reports of facts (what is committed) change nothing
that is decided and need no vote, only the term. Read next: `quorum.py`, the rules; `voter.py`, the other side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxscale.supervisor.quorum import (
    NEVER,
    Acceptor,
    Ask,
    Decision,
    Promise,
    Proposer,
    Refusal,
    Reply,
    Term,
    Vote,
)

WITNESS = "witness"
"""The voter that lies in the run directory; hosts come and go, and an even number of them needs one more."""

GENESIS = Decision.genesis({}, [WITNESS])
"""How every job begins: nothing is decided, and no host is known."""


def voter_name(host: str, incarnation: str) -> str:
    """A host whose memory is lost comes back as another voter."""
    return f"{host}#{incarnation}"


def host_of(voter: str) -> str:
    return voter.rpartition("#")[0]


class Ballot[Action]:
    """One coordinator's attempts to lead, and the actions that wait for votes."""

    def __init__(self, proposer: str) -> None:
        """`proposer`: a name that was never used before."""
        self._name = proposer
        self._above = NEVER
        self._hint: Vote | None = None
        self._voters: dict[str, str] = {}
        """Host -> the voter that it is now."""
        self._proposer = Proposer.start(proposer, GENESIS)
        self._wanted: tuple[int, dict[str, Any], tuple[str, ...]] = (0, {}, ())
        """Version, value and voters of the newest state."""
        self._proposed = self._chosen = 0
        """Versions."""
        self._held: list[tuple[int, Action]] = []
        self._led = NEVER
        """The last term under which this one led."""
        self._decided: Decision | None = None
        """The last decision that it knows to be chosen."""

    @property
    def term(self) -> Term:
        return self._proposer.term

    @property
    def leading(self) -> bool:
        return self._proposer.leading

    @property
    def value(self) -> Mapping[str, Any]:
        """What was decided last; {} before the first decision. Only of one who leads."""
        assert self._proposer.chosen is not None
        return self._proposer.chosen.value

    def meet(self, acceptor: Acceptor) -> None:
        """A voter has come, and says what it promised and accepted."""
        name, host = acceptor.voter, host_of(acceptor.voter)
        electorate = {*GENESIS.voters, *(self._hint.decision.electorate if self._hint else ())}
        self._voters[host] = name
        if acceptor.vote is not None:
            electorate |= set(acceptor.vote.decision.electorate)
            if self._hint is None or acceptor.vote.order > self._hint.order:
                self._hint = acceptor.vote
        chosen = self._proposer.chosen
        electorate |= set(chosen.electorate) if chosen is not None else set()
        gone = {voter for voter in electorate if host and host_of(voter) == host and voter != name}
        self._above = max(self._above, acceptor.promised)
        if self.leading:
            if gone - self._proposer.gone:
                self._proposer = self._proposer.without(gone)
                self._advance()
        elif acceptor.promised > self.term or self._hint != self._proposer.hint or gone - self._proposer.gone:
            self._again(gone)

    def asks(self) -> dict[str, Ask]:
        """Voter -> what it is to be asked now, again and again until it answers."""
        return self._proposer.asks()

    def heard(self, reply: Reply) -> bool:
        """After one reply. False: another one was elected since, and this one must stop.

        A voter may serve a higher term only because somebody on the wrong side of a partition asked it to, in vain; so
        who is refused asks again, under a higher term still, and stops where it finds that another one has decided.
        """
        if reply.term != self.term:
            return True
        if isinstance(reply, Refusal):
            self._above = max(self._above, reply.promised)
            self._again(())
            return True
        if isinstance(reply, Promise) and self.is_succeeded(reply.vote):
            return False
        self._proposer = self._proposer.heard(reply)
        self._advance()
        return True

    def is_succeeded(self, vote: Vote | None) -> bool:
        """Whether this vote shows that another one was elected after this one had led."""
        has_led, others = self._led != NEVER, vote is not None and vote.term.proposer != self._name
        return has_led and others and vote is not None and vote.term > self._led

    def hold(self, actions: Collection[Action], value: Mapping[str, Any], members: Collection[str]) -> None:
        """Actions that follow from this state; `members`: the hosts whose votes count from it on."""
        _, old, voters = self._wanted
        names = self._electorate(members) or voters
        if dict(value) != old or names != voters:
            self._wanted = (self._wanted[0] + 1, dict(value), names)
        self._held += [(self._wanted[0], action) for action in actions]
        self._advance()

    def release(self) -> list[Action]:
        """Actions whose reason a majority has accepted, in order."""
        if not self.leading:
            return []
        free = [action for version, action in self._held if version <= self._chosen]
        self._held = [(version, action) for version, action in self._held if version > self._chosen]
        return free

    @property
    def missing(self) -> list[str]:
        """Voters that have not answered what is asked just now."""
        return sorted(self.asks())

    def _again(self, gone: Collection[str]) -> None:
        gone = self._proposer.gone | set(gone)
        if self._decided is not None and (self._hint is None or (self._led, self._decided.sequence) > self._hint.order):
            self._hint = Vote(self._led, self._decided)
        self._proposed = self._chosen  # what was under way is proposed once more
        self._proposer = Proposer.start(self._name, GENESIS, max(self._above, self.term), self._hint, gone)

    def _electorate(self, members: Collection[str]) -> tuple[str, ...]:
        """The voters of a world: its hosts, and the witness where their number is even, or one."""
        before = self._decided.electorate if self._decided is not None else ()
        known = {host_of(voter): voter for voter in before} | self._voters
        names = [known[host] for host in members if host in known]
        if len(names) == 1:
            return (WITNESS,)
        return tuple(sorted([*names, WITNESS] if names and len(names) % 2 == 0 else names))

    def _advance(self) -> None:
        proposer = self._proposer
        if not proposer.leading or proposer.pending is not None:
            return
        self._led, self._decided = self.term, proposer.chosen
        self._chosen = max(self._chosen, self._proposed)
        version, value, voters = self._wanted
        if version > self._proposed or not proposer.settled:
            self._proposed = version
            assert proposer.chosen is not None
            self._proposer = proposer.propose(value if version else proposer.chosen.value, voters or None)
