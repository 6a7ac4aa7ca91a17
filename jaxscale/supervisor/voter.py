"""A voter with its memory: an acceptor whose every promise is in a file before it is spoken.

An agent keeps the file in its host's shared memory: it outlives the agent, and is lost with the host, which then comes
back as another voter. The witness's file lies in the run directory. Read next: `quorum.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.supervisor.ballot import voter_name
from jaxscale.supervisor.quorum import (
    Accepted,
    Acceptor,
    Ask,
    AskAccept,
    AskPromise,
    Decision,
    Promise,
    QuorumError,
    Refusal,
    Reply,
    Term,
    term_from_json,
    vote_from_json,
)


class Voter:
    """One acceptor, kept in `path`. Several processes may speak for it: the file is what counts."""

    def __init__(self, path: Path, name: str) -> None:
        """`name`: of the voter, if there is none in `path` yet. Raises QuorumError for a damaged file, and OSError."""
        self._path = path
        self.acceptor = Acceptor(name)
        with self._locked():
            if not path.exists():
                self._keep(self.acceptor)
        self.look()

    def look(self) -> Acceptor:
        """What the file says now. Raises QuorumError and OSError."""
        try:
            self.acceptor = Acceptor.from_json(json.loads(self._path.read_bytes()))
        except ValueError as error:
            raise QuorumError(f"{self._path}: {error}") from error
        return self.acceptor

    def answer(self, ask: Ask) -> Reply | None:
        """The reply, once what it promises is kept. Raises OSError where it cannot be."""
        with self._locked():
            before = self.look()
            after, reply = before.answer(ask)
            if after != before:
                self._keep(after)
            self.acceptor = after  # not before: what is not kept was not promised
        return reply

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self._path.with_name(f"{self._path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _keep(self, acceptor: Acceptor) -> None:
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            fresh.write_text(json.dumps(acceptor.to_json()))
            os.replace(fresh, self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def host_voter(folder: Path, host: str) -> Voter:
    """The voter of a host: a new one where its memory is new, or cannot be read."""
    path, name = folder / "vote.json", voter_name(host, secrets.token_hex(4))
    try:
        return Voter(path, name)
    except QuorumError:
        path.unlink()
        return Voter(path, name)


# Messages, as they travel


def ask_to_json(ask: Ask) -> dict[str, Any]:
    if isinstance(ask, AskPromise):
        return {"do": "promise", "term": list(ask.term)}
    return {"do": "accept", "term": list(ask.term), "decision": ask.decision.to_json()}


def ask_from_json(message: Mapping[str, Any]) -> Ask:
    """Raises QuorumError."""
    try:
        term = term_from_json(message["term"])
        if message["do"] == "promise":
            return AskPromise(term)
        return AskAccept(term, Decision.from_json(message["decision"]))
    except (KeyError, TypeError) as error:
        raise QuorumError(f"this asks for no vote: {str(message)[:80]}") from error


def reply_to_json(reply: Reply) -> dict[str, Any]:
    fields: dict[str, Any] = {"voter": reply.voter, "term": list(reply.term)}
    match reply:
        case Promise():
            vote = reply.vote
            told = None if vote is None else {"term": list(vote.term), "decision": vote.decision.to_json()}
            return {"answer": "promised", "vote": told, **fields}
        case Accepted():
            return {"answer": "accepted", "sequence": reply.sequence, **fields}
        case Refusal():
            return {"answer": "refused", "promised": list(reply.promised), **fields}


def reply_from_json(message: Mapping[str, Any]) -> Reply:
    """Raises QuorumError."""
    try:
        voter, term = str(message["voter"]), term_from_json(message["term"])
        match message["answer"]:
            case "promised":
                vote = message["vote"]
                return Promise(voter, term, None if vote is None else vote_from_json(vote))
            case "accepted":
                return Accepted(voter, term, int(message["sequence"]))
            case "refused":
                return Refusal(voter, term, term_from_json(message["promised"]))
    except (KeyError, TypeError, ValueError) as error:
        raise QuorumError(f"this answers no vote: {str(message)[:80]}") from error
    raise QuorumError(f"this answers no vote: {str(message)[:80]}")


def refusal(voter: Voter, term: Term) -> Refusal:
    """What an old coordinator is told."""
    return Refusal(voter.acceptor.voter, term, voter.acceptor.promised)
