"""The witness: the voter in the run directory, whose disk may be full or gone for a while.

A witness that cannot keep a promise does not give it. For the others that is one vote that is missing, as of a host
that does not answer; it is asked again. Read next: `voter.py`, `ballot.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from jaxscale.run_directory import WITNESS as FILES
from jaxscale.supervisor.ballot import WITNESS
from jaxscale.supervisor.quorum import Acceptor, Ask, Reply, Vote
from jaxscale.supervisor.voter import Voter

AGAIN_SECONDS = 1.0
"""After which a witness that could not write is asked again."""

logger = logging.getLogger(__name__)


class Witness:
    """Speaks for the voter of one job in a run directory."""

    def __init__(self, folder: Path, job: str) -> None:
        """Also deletes those of jobs that are over, whose lock this one holds. Raises OSError and QuorumError."""
        path = folder / f"{FILES}{job}.json"
        self._folder, self._pattern = folder, f"{path.name}*"
        for old in set(folder.glob(f"{FILES}*")) - set(folder.glob(self._pattern)):
            old.unlink(missing_ok=True)
        self._voter = Voter(path, WITNESS)
        self._failed = 0.0
        """When it could not write; 0: it could the last time."""

    @property
    def acceptor(self) -> Acceptor:
        """What it has promised and accepted, as it was last seen."""
        return self._voter.acceptor

    def vote(self) -> Vote | None:
        """What the file says that it has accepted; where it cannot be read, what it said before."""
        return self._try(lambda: self._voter.look().vote, self._voter.acceptor.vote)

    def answer(self, ask: Ask) -> tuple[bool, Reply | None]:
        """Whether it could answer at all, and its reply."""
        if self._failed and time.monotonic() - self._failed < AGAIN_SECONDS:
            return False, None
        none: list[Reply | None] = []
        replies = self._try(lambda: [self._voter.answer(ask)], none)
        if replies and self._failed:
            self._failed = 0.0
            logger.warning("the witness in %s votes again", self._folder)
        return bool(replies), replies[0] if replies else None

    def delete(self) -> None:
        """The run is over, and nobody votes any more."""
        for mine in self._folder.glob(self._pattern):
            mine.unlink(missing_ok=True)

    def _try[Value](self, do: Callable[[], Value], otherwise: Value) -> Value:
        try:
            return do()
        except OSError as error:
            if not self._failed:
                logger.warning("the witness in %s cannot vote: %s; training goes on", self._folder, error)
            self._failed = time.monotonic()
            return otherwise
