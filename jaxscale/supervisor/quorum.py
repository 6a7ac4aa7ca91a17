"""No single point of failure: a sequence of decisions, each accepted by a majority of the voters before it is acted on.

Voters are the agents and one witness at the coordinator's own place. Whoever wants to coordinate chooses a *term* that
is higher than all it heard of and collects promises from a majority of voters not to serve a lower one (`Proposer`).
With the promises come the newest accepted decisions; the newest of all may have been acted on already, so the new
coordinator makes it its own before it decides anything itself. An old coordinator finds a majority neither for promises
nor for decisions. This is Paxos for one register whose value is numbered and replaced; the numbers are sequences.

- Every decision holds the *whole* state that must not be lost (epoch, members, newest committed step, ...): a voter
  keeps only the last one that it accepted.
- Voters are part of a decision. One that changes them needs a majority of the old and of the new ones, and is followed
  by another under the new ones alone (`settled`): until then, losing the old voters would stop the new.
- A voter that lost what it had stored is not that voter any more: it comes back under another name, by a decision. The
  name of a proposer (`Term.proposer`) is never used twice, not even by the same process after a restart.
- A voter that is known to have lost what it had stored (`gone`) can answer nobody any more and is not counted, so a job
  outlives the loss of a majority at once. That is the one place where the proof needs a condition: two proposers must
  not be at work just then.

Nothing here sends or stores: `Proposer.asks` are the messages to send, again and again until they are answered, and an
`Acceptor` must be on disk before its answer leaves. Read next: `domains.py` for what the decisions are about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple


class QuorumError(ValueError):
    """A message, a stored state or a call that cannot be right. The message says what of it."""


class Term(NamedTuple):
    """Who coordinates: the higher number, and among equals the later name. Two proposers never share one."""

    number: int
    proposer: str


NEVER = Term(0, "")
"""Lower than every term that is used."""


@dataclass(frozen=True)
class Decision:
    """One of the sequence. Sequence 0 is how the job began; all know it."""

    sequence: int
    value: Mapping[str, Any]
    """JSON-safe; never changed."""
    voters: tuple[str, ...]
    """Of the decisions that follow, in growing order."""
    previous_voters: tuple[str, ...]
    """Of the decision before, which have to accept this one too."""

    @classmethod
    def genesis(cls, value: Mapping[str, Any], voters: Collection[str]) -> Decision:
        """What everyone knows at the start."""
        names = tuple(sorted(set(voters)))
        if not names:
            raise QuorumError("a job needs at least one voter")
        return cls(0, value, names, names)

    @property
    def electorate(self) -> tuple[str, ...]:
        """Everyone who is asked about it."""
        return tuple(sorted({*self.voters, *self.previous_voters}))

    def has_majority(self, names: Collection[str], gone: Collection[str] = ()) -> bool:
        """Of its own voters and of those before, in both cases of those that are not `gone`."""
        return _majority(names, self.voters, gone) and _majority(names, self.previous_voters, gone)

    def to_json(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "value": dict(self.value),
            "voters": list(self.voters),
            "previous_voters": list(self.previous_voters),
        }

    @classmethod
    def from_json(cls, data: Any) -> Decision:
        """Raises QuorumError for anything that `to_json` cannot have written."""
        try:
            decision = cls(
                _whole(data["sequence"]), dict(data["value"]), _names(data["voters"]), _names(data["previous_voters"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QuorumError(f"this is no decision: {str(data)[:80]} ({error!r})") from error
        return decision


@dataclass(frozen=True)
class Vote:
    """A decision, and the term under which a voter accepted it."""

    term: Term
    decision: Decision

    @property
    def order(self) -> tuple[Term, int]:
        """The highest of a majority's votes is the one that may be chosen."""
        return (self.term, self.decision.sequence)


# Messages


@dataclass(frozen=True)
class AskPromise:
    """To a voter: `acceptor.promise(term)`."""

    term: Term


@dataclass(frozen=True)
class AskAccept:
    """To a voter: `acceptor.accept(term, decision)`."""

    term: Term
    decision: Decision


@dataclass(frozen=True)
class Promise:
    """The voter will not serve a lower term any more."""

    voter: str
    term: Term
    vote: Vote | None
    """Its last one."""


@dataclass(frozen=True)
class Accepted:
    """The voter has stored the decision."""

    voter: str
    term: Term
    sequence: int


@dataclass(frozen=True)
class Refusal:
    """The voter serves a higher term."""

    voter: str
    term: Term
    """That was refused."""
    promised: Term


Ask = AskPromise | AskAccept
Reply = Promise | Accepted | Refusal


@dataclass(frozen=True)
class Acceptor:
    """What one voter has promised and accepted. Store the new state (`to_json`) before the reply is sent."""

    voter: str
    promised: Term = NEVER
    vote: Vote | None = None

    def answer(self, ask: Ask) -> tuple[Acceptor, Reply | None]:
        """The new state and the reply; None for a message that came too late to matter."""
        return self.promise(ask.term) if isinstance(ask, AskPromise) else self.accept(ask.term, ask.decision)

    def promise(self, term: Term) -> tuple[Acceptor, Promise | Refusal]:
        """Not to serve a lower term than this. Asking again gives the same answer."""
        if term < self.promised:
            return self, Refusal(self.voter, term, self.promised)
        return replace(self, promised=term), Promise(self.voter, term, self.vote)

    def accept(self, term: Term, decision: Decision) -> tuple[Acceptor, Accepted | Refusal | None]:
        """The decision replaces the one before, unless a higher term was promised."""
        if term < self.promised:
            return self, Refusal(self.voter, term, self.promised)
        if self.vote is not None and self.vote.order >= (term, decision.sequence):
            # Sent again, or overtaken by its successor of the same term, which was only sent once this one was chosen.
            same = self.vote.order == (term, decision.sequence)
            return self, Accepted(self.voter, term, decision.sequence) if same else None
        return replace(self, promised=term, vote=Vote(term, decision)), Accepted(self.voter, term, decision.sequence)

    def to_json(self) -> dict[str, Any]:
        vote = None if self.vote is None else {"term": list(self.vote.term), "decision": self.vote.decision.to_json()}
        return {"voter": self.voter, "promised": list(self.promised), "vote": vote}

    @classmethod
    def from_json(cls, data: Any) -> Acceptor:
        """Raises QuorumError for anything that `to_json` cannot have written: better no vote than a forgotten one."""
        try:
            vote = data["vote"]
            return cls(
                _name(data["voter"]),
                term_from_json(data["promised"]),
                None if vote is None else vote_from_json(vote),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QuorumError(
                f"a stored vote is damaged ({error!r}): {str(data)[:80]}; the voter must come back under another name"
            ) from error


@dataclass(frozen=True)
class Proposer:
    """One attempt to coordinate, under one term, from the first request for promises until a higher term wins.

    Send `asks()` to the voters, repeat what is not answered, and give each reply to `heard`. Once `leading`, `propose`
    one decision after another; act on each when it is `chosen`, never before. Once `deposed`, start anew or follow.
    """

    term: Term
    known: Decision
    """The newest decision that is known to be chosen, or the genesis: where to start asking."""
    hint: Vote | None = None
    """The newest vote heard of: it may be chosen or not, and says who else must be asked."""
    gone: frozenset[str] = frozenset()
    """Voters that have lost what they had stored, for certain."""
    promises: Mapping[str, Vote | None] = field(default_factory=dict)
    chosen: Decision | None = None
    """The newest one that a majority accepted under this term (or the genesis, if nothing was decided before)."""
    pending: Decision | None = None
    """Being accepted; it may yet be lost."""
    accepted_by: frozenset[str] = frozenset()
    refused_by: Mapping[str, Term] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        proposer: str,
        known: Decision,
        above: Term = NEVER,
        hint: Vote | None = None,
        gone: Collection[str] = (),
    ) -> Proposer:
        """A new attempt. proposer: a name that was never used before. above: the highest term heard of."""
        return cls(Term(above.number + 1, proposer), known, hint, frozenset(gone))

    @property
    def leading(self) -> bool:
        """Whether a majority has promised and the newest old decision is chosen under this term."""
        return self.chosen is not None and not self.deposed

    @property
    def settled(self) -> bool:
        """Whether the voters of the last decision alone can go on. If not: propose another one soon, even the same."""
        return self.chosen is not None and self.chosen.voters == self.chosen.previous_voters

    @property
    def deposed(self) -> bool:
        """Whether so many serve a higher term that no majority is left for anything: time for another attempt."""
        waiting = self.pending or self.chosen or self._newest().decision
        return not waiting.has_majority([name for name in waiting.electorate if name not in self.refused_by], self.gone)

    @property
    def highest_refusal(self) -> Term:
        """For `start(above=...)`."""
        return max([self.term, *self.refused_by.values()])

    def asks(self) -> dict[str, Ask]:
        """Voter -> what to send it now. Empty when there is nothing to wait for."""
        if self.pending is not None:
            ask = AskAccept(self.term, self.pending)
            return {name: ask for name in self.pending.electorate if name not in self.accepted_by | self._refusing()}
        if self.chosen is not None:
            return {}
        names = {*self.known.electorate, *self._newest().decision.electorate}
        return {name: AskPromise(self.term) for name in sorted(names - self.promises.keys() - self._refusing())}

    def heard(self, reply: Reply) -> Proposer:
        """After one reply. Replies to other terms and decisions, and repeated ones, change nothing."""
        if reply.term != self.term:
            return self
        match reply:
            case Refusal():
                return replace(self, refused_by={**self.refused_by, reply.voter: reply.promised})
            case Promise() if self.chosen is None and self.pending is None:
                return replace(self, promises={**self.promises, reply.voter: reply.vote})._adopting()
            case Accepted() if self.pending is not None and reply.sequence == self.pending.sequence:
                return replace(self, accepted_by=self.accepted_by | {reply.voter})._choosing()
        return self

    def propose(self, value: Mapping[str, Any], voters: Collection[str] | None = None) -> Proposer:
        """Starts the next decision. voters: those of the decisions after it, if they change.

        Raises QuorumError when this proposer does not lead, or has a decision under way.
        """
        if not self.leading or self.chosen is None:
            raise QuorumError(
                f"{self.term.proposer} does not lead in term {self.term.number}; it cannot decide anything"
            )
        if self.pending is not None:
            raise QuorumError(f"decision {self.pending.sequence} is under way; decisions are made one after another")
        now = self.chosen.voters
        names = now if voters is None else tuple(sorted(set(voters)))
        if not names:
            raise QuorumError("a decision without voters could never be followed by another; keep at least one")
        decision = Decision(self.chosen.sequence + 1, value, names, now)
        return replace(self, pending=decision, accepted_by=frozenset())

    def _newest(self) -> Vote:
        """The highest vote heard of; without any, what was known."""
        votes = [vote for vote in (self.hint, *self.promises.values()) if vote is not None]
        return max([Vote(NEVER, self.known), *votes], key=lambda vote: vote.order)

    def _adopting(self) -> Proposer:
        """With the newest old decision under way, once a majority of those who may have accepted a newer one spoke."""
        newest = self._newest()
        if not newest.decision.has_majority(self.promises.keys(), self.gone):
            return self
        if newest.decision.sequence < self.known.sequence:
            raise QuorumError(
                f"decision {self.known.sequence} was chosen, but a majority of {', '.join(newest.decision.electorate)} "
                f"knows of {newest.decision.sequence} only: voters lost what they had stored and kept their names"
            )
        if newest.decision.sequence == 0:
            return replace(self, chosen=newest.decision)
        return replace(self, pending=newest.decision, accepted_by=frozenset())

    def _choosing(self) -> Proposer:
        if self.pending is None or not self.pending.has_majority(self.accepted_by, self.gone):
            return self
        return replace(self, chosen=self.pending, pending=None, accepted_by=frozenset())

    def without(self, gone: Collection[str]) -> Proposer:
        """After these voters turned out to have lost what they had stored."""
        return replace(self, gone=self.gone | set(gone))._adopting_or_choosing()

    def _adopting_or_choosing(self) -> Proposer:
        if self.pending is not None:
            return self._choosing()
        return self if self.chosen is not None else self._adopting()

    def _refusing(self) -> frozenset[str]:
        return frozenset(self.refused_by)


def term_from_json(data: Any) -> Term:
    """Raises QuorumError."""
    if not isinstance(data, list | tuple) or len(data) != 2:
        raise QuorumError(f"a term is a number and a name, not {str(data)[:80]}")
    return Term(_whole(data[0]), data[1] if data[1] == "" else _name(data[1]))


def vote_from_json(data: Any) -> Vote:
    """Raises QuorumError."""
    return Vote(term_from_json(data["term"]), Decision.from_json(data["decision"]))


def _majority(names: Collection[str], voters: Collection[str], gone: Collection[str] = ()) -> bool:
    asked = set(voters).difference(gone)
    return 2 * len(asked.intersection(names)) > len(asked) or not asked


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise QuorumError(f"a sequence or term is a whole number, not {str(value)[:80]}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise QuorumError(f"a name is a text, not {str(value)[:80]}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise QuorumError(f"voters are a list of names, not {str(value)[:80]}")
    return tuple(_name(item) for item in value)
