"""A worker's state from the memory of the hosts: its own host's slots as files, the others' through their agents.

Read next: `../checkpoint/assemble.py`, which puts the shards together.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.checkpoint.assemble import assemble
from jaxscale.checkpoint.cover import Location, Source, choice_from_json
from jaxscale.checkpoint.slot import SlotError, check_shard, read_shard
from jaxscale.retry import BreakerOpen, Change, Retry
from jaxscale.supervisor.frames import FrameError
from jaxscale.supervisor.handshake import AuthenticationError
from jaxscale.supervisor.job_token import read_token
from jaxscale.supervisor.jobs import WorkerJob
from jaxscale.supervisor.peer_client import PeerClient
from jaxscale.supervisor.peers import WORKER, Refused
from jaxscale.train.protocols import Record

FETCH_SECONDS = 20.0
RETRY_SECONDS = 2.0
"""Other hosts may have the same shard; and a host that is gone for longer is found by its lease."""

Rejected = Callable[[Source, Location, str], None]


def restore_from_memory(
    job: WorkerJob, abstract: Mapping[str, Any], rejected: Rejected, changed: Callable[[Change], None]
) -> tuple[dict[str, Any], Record, dict[str, int]]:
    """The state that the coordinator chose, its record, and how many shards came from `memory` and from a `peer`.

    `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings. Raises NoGoodCopy where a shard cannot be had
    whole from any host, StateMismatch where the state is of another model. `changed` is told, in any thread, of
    a breaker that opened or closed.
    """
    assert job.choice is not None
    choice = choice_from_json(job.choice).seen_from(job.host)
    with _Fetcher(job, {path: info.dtype for path, info in choice.arrays.items()}, changed) as fetcher:
        state = assemble(abstract, choice, fetcher.fetch, rejected)
    return state, Record(**choice.record), dict(fetcher.sources)


class _Fetcher:
    """Reads shards, each thread over a connection of its own."""

    def __init__(self, job: WorkerJob, dtypes: Mapping[str, str], changed: Callable[[Change], None]) -> None:
        self._job, self._dtypes, self._changed = job, dtypes, changed
        self._local = threading.local()
        self._clients: list[PeerClient] = []
        self._retries: dict[str, Retry] = {}
        self.sources: Counter[str] = Counter()

    def fetch(self, location: Location, source: Source) -> np.ndarray[Any, Any]:
        """Raises SlotError and OSError."""
        shard, dtype = source.at(location), self._dtypes[source.path]
        if location.holder == self._job.host:
            data = read_shard(Path(self._job.folder) / location.file, shard, dtype)
            self.sources["memory"] += 1
            return data
        try:
            client = self._client(location.holder)
            fetch = functools.partial(client.fetch, location.file, shard.offset, shard.nbytes, seconds=FETCH_SECONDS)
            raw = self._retry(location.holder).call(fetch, seconds=RETRY_SECONDS)
        except (Refused, AuthenticationError, FrameError, KeyError, BreakerOpen) as error:
            raise SlotError(f"{location.holder} does not give it: {error}") from error
        data = check_shard(raw, shard, dtype, f"{location.holder}:{location.file}")
        self.sources["peer"] += 1
        return data

    def _retry(self, holder: str) -> Retry:
        """Of this holder, for all threads: one that is gone costs RETRY_SECONDS once, and not for each shard."""
        return self._retries.setdefault(holder, Retry(f"slot server of {holder}", changed=self._changed))

    def _client(self, holder: str) -> PeerClient:
        clients: dict[str, PeerClient] = self._local.__dict__
        if holder not in clients:
            token = read_token(environment=os.environ)
            clients[holder] = PeerClient(self._job.peers[holder], self._job.job, token, self._job.host, WORKER)
            self._clients.append(clients[holder])
        return clients[holder]

    def __enter__(self) -> _Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
