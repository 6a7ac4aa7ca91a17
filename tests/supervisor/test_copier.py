"""Copies to peers, and shards from them, where a peer fails: for a moment, for good, or because it is a stranger."""

import contextlib
import queue
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from peer_samples import JOB, slot_bytes, verify, write_slot

from jaxscale.checkpoint.cover import Location, Source
from jaxscale.checkpoint.slot import SlotError, digest_of
from jaxscale.retry import Change, RetryConfig, State
from jaxscale.supervisor import memory_restore
from jaxscale.supervisor.copier import ATTEMPTS, Copier, Sealed
from jaxscale.supervisor.copies import CopyStore
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.peer_server import PeerServer

SECONDS = 30
TOKEN = new_token()
FAILURES = RetryConfig().failures


@contextlib.contextmanager
def peer(folder, token=TOKEN):
    """A slot server of another host; yields its address and its store of copies."""
    folder.mkdir(exist_ok=True)
    copies = CopyStore(folder, JOB, verify)
    server = PeerServer(folder, JOB, token, copies)
    try:
        yield server.address, copies
    finally:
        server.close()


class Unsteady:
    """In front of `address`: hangs up on the first connections, then lets them through. Counts them."""

    def __init__(self, address, failures):
        self._target, self._left, self.count = address, failures, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open, self._threads = [], [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                self.count += 1
                if self.count <= self._left:
                    near.close()
                    continue
                host, _, port = self._target.rpartition(":")
                far = socket.create_connection((host, int(port)), SECONDS)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._copy, args=pair))
                    self._threads[-1].start()

    @staticmethod
    def _copy(source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(SECONDS)


@contextlib.contextmanager
def copying(peers, token=TOKEN):
    """Yields the copier, a queue of what it reports (step, holder, reason), and the changes of its breakers."""
    reports, changes = queue.Queue(), []
    copier = Copier("host-0", JOB, token, peers, 1, lambda _, *told: reports.put(told), changes.append)
    try:
        yield copier, reports, changes
    finally:
        copier.stop()
        for thread in copier._threads:
            thread.join(SECONDS)


def sealed(folder, step):
    return Sealed(1, step, write_slot(folder, step % 2, step=step, nbytes=1000), step % 2)


def test_a_failure_that_passes_is_retried_and_told_nobody(tmp_path):
    with peer(tmp_path / "peer") as (address, _), Unsteady(address, ATTEMPTS - 1) as door:
        with copying({"host-1": door.address}) as (copier, reports, changes):
            copier.sealed(sealed(tmp_path, 1))
            assert reports.get(timeout=SECONDS) == (1, "host-1", "")
            assert changes == []
        assert door.count == ATTEMPTS
        assert (tmp_path / "peer" / "copies" / "host-0" / "gen-1").exists()


def test_a_peer_that_fails_again_and_again_is_left_alone_and_that_is_told_once(tmp_path):
    with Unsteady("127.0.0.1:1", 1000) as door, copying({"host-1": door.address}) as (copier, reports, changes):
        copier.sealed(sealed(tmp_path, 1))
        step, holder, reason = reports.get(timeout=SECONDS)
        assert (step, holder, bool(reason)) == (1, "host-1", True)
        assert (door.count, changes) == (ATTEMPTS, [])
        for step in (2, 3):
            copier.sealed(sealed(tmp_path, step))
            assert reports.get(timeout=SECONDS)[0] == step
        assert door.count == FAILURES  # of the last step it was not even asked
        copier.sealed(sealed(tmp_path, 4))
        step, _, reason = reports.get(timeout=SECONDS)
        assert step == 4
        assert "slot server of host-1 was not asked" in reason
        (change,) = changes
        assert change == Change("slot server of host-1", State.CLOSED, State.OPEN, change.reason)
        assert f"{FAILURES} failures in a row" in change.reason
        assert door.count == FAILURES


def test_a_peer_that_fails_costs_the_others_nothing(tmp_path):
    with peer(tmp_path / "peer") as (address, _), Unsteady("127.0.0.1:1", 1000) as door:
        peers = {"bad": door.address, "good": address}
        with copying(peers) as (copier, reports, changes):
            for step in range(1, 4):
                copier.sealed(sealed(tmp_path, step))
                told = {holder: not reason for _, holder, reason in (reports.get(timeout=SECONDS) for _ in peers)}
                assert told == {"bad": False, "good": True}
            assert [change.name for change in changes] == ["slot server of bad"]


def test_a_stranger_at_a_peers_address_is_told_each_time_and_asked_once(tmp_path):
    """Another job's slot server, at a port that a dead one had: another attempt at once would have the same answer."""
    with peer(tmp_path / "peer", new_token()) as (address, _), Unsteady(address, 0) as door:
        with copying({"host-1": door.address}) as (copier, reports, changes):
            for step in (1, 2):
                copier.sealed(sealed(tmp_path, step))
                told, _, reason = reports.get(timeout=SECONDS)
                assert told == step
                assert "could not prove that it has this job's token" in reason
            assert changes == []
        assert door.count == 2


def test_stop_ends_a_pause_between_two_attempts(tmp_path):
    with Unsteady("127.0.0.1:1", 1000) as door, copying({"host-1": door.address}) as (copier, reports, _):
        copier.sealed(sealed(tmp_path, 1))
        copier.stop()
        for thread in copier._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert reports.empty()


# Shards for a worker that starts


@pytest.fixture
def fetching(tmp_path, monkeypatch):
    """Fetches the first 1000 bytes of `own/gen-0` of a host; yields that, given the address, and the host's folder."""
    write_token(tmp_path / "token", TOKEN)
    for name, value in child_environment(tmp_path / "token").items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "peer"
    data = slot_bytes(nbytes=2000)
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "gen-0").write_bytes(data)
    part = np.frombuffer(data[:1000], np.uint8)
    source = Source("table", ((0, 1000),), 1000, digest_of(part), (Location("host-1", "own/gen-0", 0),))

    with contextlib.ExitStack() as stack:
        changes = []

        def begin(peers):
            job = SimpleNamespace(host="host-0", job=JOB, folder=str(tmp_path), peers=peers)
            fetcher = stack.enter_context(memory_restore._Fetcher(job, {"table": "uint8"}, changes.append))
            fetcher.changes = changes
            return fetcher, lambda: fetcher.fetch(source.locations[0], source)

        yield begin, folder, part


def test_a_shard_is_asked_for_again_after_a_failure_that_passes(fetching):
    begin, folder, part = fetching
    with peer(folder) as (address, _), Unsteady(address, 2) as door:
        fetcher, fetch = begin({"host-1": door.address})
        assert np.array_equal(fetch(), part)
        assert door.count == 3
        assert fetcher.sources == {"peer": 1}


def test_a_holder_that_is_gone_is_left_alone_also_for_the_other_shards(fetching):
    begin, _, _ = fetching
    with Unsteady("127.0.0.1:1", 1000) as door:
        fetcher, fetch = begin({"host-1": door.address})
        for _ in range(3):  # as assemble does: each shard asks on its own
            with pytest.raises((SlotError, OSError)):
                fetch()
        assert door.count == FAILURES
        assert [(change.name, change.after) for change in fetcher.changes] == [("slot server of host-1", "open")]
        with pytest.raises(SlotError, match="host-1 does not give it: slot server of host-1 was not asked"):
            fetch()


def test_a_holder_that_is_a_stranger_or_unknown_is_a_source_that_fails(fetching):
    """So that `assemble` takes the next one."""
    begin, folder, _ = fetching
    with peer(folder, new_token()) as (address, _):
        _, fetch = begin({"host-1": address})
        with pytest.raises(SlotError, match=r"host-1 does not give it: .*could not prove that it has this job's token"):
            fetch()
    _, fetch = begin({})
    with pytest.raises(SlotError, match="host-1 does not give it"):
        fetch()
