"""The peer transport over real sockets: exact bytes, refusals that leave the rest unharmed, and nothing left behind."""

import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import peer_samples
import pytest
from peer_samples import HEADER, JOB, Recorder, all_bytes, files, slot_bytes, stranger, verify, write_slot

from jaxscale.checkpoint import slot
from jaxscale.supervisor import channel as channel_module
from jaxscale.supervisor import copies as copies_module
from jaxscale.supervisor import frames
from jaxscale.supervisor.channel import Channel
from jaxscale.supervisor.copies import CopyStore, Held
from jaxscale.supervisor.frames import FrameError, FrameWriter, Kind
from jaxscale.supervisor.handshake import AuthenticationError, ClientHandshake
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.peer_client import PeerClient
from jaxscale.supervisor.peer_server import Limits, PeerServer
from jaxscale.supervisor.peers import Announcement, Code, PeerGone, PeerTimeout, PushResult, Refused, Stopped
from jaxscale.supervisor.rate import TokenBucket
from jaxscale.supervisor.slot_files import parts_of

SECONDS = 30


def eventually(condition, what):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.005)


def descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return sorted(link for link in found.values() if link.startswith(("socket:", "pipe:")) or "/gen-" in link)


@pytest.fixture(autouse=True)
def nothing_is_left():
    threads, opened = set(threading.enumerate()), descriptors()
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, "threads are left")
    eventually(lambda: descriptors() == opened, "descriptors are left")


@pytest.fixture(scope="module")
def token():
    return new_token()


class Agent:
    """A host's folder, its store of copies and its server, and what the server told."""

    def __init__(self, folder, token, check=verify, **options):
        self.folder, self.token = folder, token
        folder.mkdir(exist_ok=True)
        self.refused, self.received = [], []
        self.copies = CopyStore(folder, JOB, check)
        self.server = PeerServer(
            folder,
            JOB,
            token,
            self.copies,
            status=lambda: {"host": "host-1", "epoch": 7},
            refused=lambda address, reason: self.refused.append((address, reason)),
            received=lambda *copy: self.received.append(copy),
            **options,
        )
        self.address = self.server.address
        self._clients = []

    def client(self, token=None, address=None, job=JOB):
        made = PeerClient(address or self.address, job, token or self.token, "host-0")
        self._clients.append(made)
        return made

    def close(self):
        for client in self._clients:
            client.close()
        self.server.close()


@pytest.fixture
def agent(tmp_path, token):
    made = Agent(tmp_path / "agent", token)
    yield made
    made.close()


@pytest.fixture
def make_agent(tmp_path, token):
    made = []

    def make(**options):
        made.append(Agent(tmp_path / f"agent-{len(made)}", token, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def push(client, path, step=1, epoch=1, generation=0, owner="host-0", **options):
    return client.push(path, owner, generation, epoch, step, seconds=SECONDS, **options)


def push_partly(client, announced, data, sent):
    """A push of `announced` bytes that then says that `data` come, sends `sent` of them, and waits for what happens."""
    body = {"operation": "push", "owner": "host-0", "generation": 0, "epoch": 1, "step": 1, "sender_epoch": 1}
    with client._exchange(SECONDS, None) as (channel, deadline):
        channel.send(Kind.REQUEST, body | {"nbytes": announced}, deadline)
        assert channel.receive(deadline).body == {"go": True}
        channel.send(Kind.DATA, {}, deadline, data)
        channel.send_raw(bytes(sent), deadline)
        channel.receive(deadline)


def test_a_fetch_gives_exactly_the_range(agent):
    content = write_slot(agent.folder).read_bytes()
    client = agent.client()
    for seed in range(50):
        start, stop = sorted(random.Random(seed).sample(range(len(content) + 1), 2))
        assert client.fetch("own/gen-0", start, stop - start, seconds=SECONDS) == content[start:stop]
    assert client.fetch("own/gen-0", len(content), 0, seconds=SECONDS) == b""
    buffer = bytearray(300)
    client.fetch("own/gen-0", 5000, 300, seconds=SECONDS, into=buffer)
    assert buffer == content[5000:5300]
    with pytest.raises(ValueError, match="buffer of 300 bytes cannot take 301"):
        client.fetch("own/gen-0", 5000, 301, seconds=SECONDS, into=buffer)
    assert client.ping(seconds=SECONDS) == {"host": "host-1", "epoch": 7}
    assert agent.server.refusals == 0


def test_a_push_becomes_a_copy_that_can_be_fetched(agent, source):
    path = write_slot(source, step=3)
    client = agent.client()
    assert push(client, path, step=3) == PushResult(True, epoch=1, step=3)
    assert agent.received == [("host-0", 0, Held(1, 3))]
    assert agent.copies.held() == {("host-0", 0): Held(1, 3)}
    assert client.fetch("copies/host-0/gen-0", 0, path.stat().st_size, seconds=SECONDS) == path.read_bytes()
    path = write_slot(source, step=5, nbytes=50_000)  # a shorter one over a longer one
    assert push(client, path, step=5).accepted
    assert (agent.folder / "copies/host-0/gen-0").read_bytes() == path.read_bytes()
    path = write_slot(source, step=6, nbytes=200_000)
    assert push(client, path, step=6).accepted
    assert (agent.folder / "copies/host-0/gen-0").read_bytes() == path.read_bytes()
    assert files(agent.folder) == ["copies/host-0/gen-0"]


def test_64_mb_of_a_real_slot(token):
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="jaxscale-test-") as name:
        folder = Path(name)
        (folder / "owner/own").mkdir(parents=True)
        size = 16 << 20
        arrays = {"params/embed": slot.ArrayInfo((size,), "float32")}
        path = folder / "owner/own/gen-1"
        writer = slot.SlotWriter(path, JOB, "host-0", 0, arrays, [("params/embed", ((0, size),))])
        writer.begin(2, 9)
        writer.view(0)[:] = random.Random(0).random()
        table = writer.seal({"step": 9})
        agent = Agent(folder / "agent", token, slot.verify)
        try:
            client = agent.client()
            result = push(client, path, step=9, epoch=2, generation=1)
            assert (result.accepted, result.step, result.epoch, result.reason) == (True, 9, 2, "")
            copy = agent.folder / "copies/host-0/gen-1"
            assert slot.verify(copy, JOB) == table
            assert copy.stat().st_size > 64 << 20
            shard = table.shards[0]
            data = client.fetch("copies/host-0/gen-1", shard.offset, shard.nbytes, seconds=SECONDS)
            slot.check_shard(data, shard, "float32", agent.address)
            writer.begin(2, 10)  # the worker goes on: what lies there now is void
            assert push(client, path, step=9, epoch=2, generation=0).code == Code.DAMAGED
        finally:
            agent.close()
            writer.close()


# Strangers


def test_a_wrong_token_is_refused_on_both_sides(agent):
    with pytest.raises(AuthenticationError, match="server could not prove"):
        agent.client(new_token()).ping(seconds=SECONDS)
    eventually(lambda: agent.server.refusals == 1, "not counted")
    with stranger(agent.address) as connection:  # one that does not mind who the server is
        connection.sendall(ClientHandshake(JOB, new_token(), "host-0", "agent").hello())
        connection.recv(1 << 16)
        connection.sendall(FrameWriter().frame(Kind.PROOF, {"proof": bytes(32).hex()}))
        assert b"could not prove" in all_bytes(connection)
    assert agent.server.refusals == 2
    assert "agent 'host-0' could not prove that it has this job's token" in agent.refused[1][1]
    assert agent.client().ping(seconds=SECONDS)["epoch"] == 7


def test_another_job_is_refused(agent):
    with pytest.raises(AuthenticationError, match="belongs to job 'other'; this is job '0123abcd'"):
        agent.client(job="other").ping(seconds=SECONDS)
    assert agent.server.refusals == 1


def test_a_client_refuses_a_server_that_is_none(token):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = PeerClient(f"127.0.0.1:{listener.getsockname()[1]}", JOB, token, "host-0")

        def serve():
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(100))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(FrameError, match="another protocol"):
            client.ping(seconds=SECONDS)
        thread.join()


def test_a_replayed_connection_is_refused(agent, source):
    path = write_slot(source)
    recorder = Recorder(agent.address)
    with agent.client(address=recorder.address) as client:
        assert push(client, path).accepted
    recorder.join()
    (agent.folder / "copies/host-0/gen-0").unlink()
    assert len(recorder.sent) > path.stat().st_size
    with stranger(agent.address) as connection:
        connection.sendall(recorder.sent[:5000])
        all_bytes(connection)
    assert agent.server.refusals == 1
    assert "could not prove" in agent.refused[0][1]
    assert files(agent.folder) == []


def test_a_changed_request_is_refused(agent):
    client = agent.client()
    client.ping(seconds=SECONDS)
    request = bytearray(client._channel._writer.frame(Kind.REQUEST, {"operation": "ping"}))
    request[-1] ^= 1
    client._channel._socket.send(request)
    eventually(lambda: agent.server.refusals == 1, "not counted")
    assert "seal" in agent.refused[0][1]


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_refused(agent, seed):
    with stranger(agent.address) as connection:
        connection.sendall(random.Random(seed).randbytes(1000))
        all_bytes(connection)
    eventually(lambda: agent.server.refusals == 1, "not counted")
    assert "another protocol" in agent.refused[0][1]
    assert agent.client().ping(seconds=SECONDS)["epoch"] == 7


def test_a_stranger_may_announce_little(agent):
    with stranger(agent.address) as connection:
        connection.sendall(struct.pack("!4sHHIQ", frames.MAGIC, frames.VERSION, Kind.HELLO, 1 << 20, 0) + bytes(32))
        assert b"at most 4096 are taken here" in all_bytes(connection)
    with stranger(agent.address) as connection:
        connection.sendall(struct.pack("!4sHHIQ", frames.MAGIC, frames.VERSION, Kind.HELLO, 2, 1 << 60) + bytes(32))
        assert b"bulk bytes; at most 0" in all_bytes(connection)
    assert agent.server.refusals == 2


def test_a_stranger_that_trickles_is_cut_off(make_agent):
    agent = make_agent(limits=Limits(handshake_seconds=0.3))
    hello = ClientHandshake(JOB, agent.token, "host-0", "agent").hello()
    with stranger(agent.address) as connection:
        for byte in hello[:-1]:
            try:
                connection.sendall(bytes([byte]))
            except ConnectionError:
                break
            if agent.refused:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the whole HELLO was waited for")
    assert "the handshake was not done within 0.3 s" in agent.refused[0][1]


def test_a_peer_that_trickles_a_request_is_cut_off(make_agent):
    agent = make_agent(limits=Limits(message_seconds=0.2))
    client = agent.client()
    client.ping(seconds=SECONDS)
    client._channel._socket.send(b"J")
    eventually(client._channel.closed_by_peer, "still open")
    assert client.ping(seconds=SECONDS)["epoch"] == 7  # on a new connection


def test_strangers_make_room_for_peers(make_agent):
    agent = make_agent(limits=Limits(connections=2))
    strangers = [stranger(agent.address) for _ in range(2)]
    try:
        first, second = agent.client(), agent.client()
        for client in (first, second):
            assert client.ping(seconds=SECONDS)["epoch"] == 7
        with pytest.raises(Refused, match="2 connections are open") as caught:
            agent.client().ping(seconds=SECONDS)
        assert caught.value.code == Code.BUSY
        first.close()
        eventually(lambda: len(agent.server._guests) == 1, "its place is still taken")
        assert agent.client().ping(seconds=SECONDS)["epoch"] == 7
    finally:
        for connection in strangers:
            connection.close()


def test_an_idle_connection_ends_and_comes_back(make_agent):
    agent = make_agent(limits=Limits(idle_seconds=0.05))
    client = agent.client()
    for _ in range(3):
        client.ping(seconds=SECONDS)
        eventually(client._channel.closed_by_peer, "still open")
    assert agent.server.refusals == 0


# Bad requests of authenticated peers


@pytest.mark.parametrize(
    "name",
    [
        *["", "/", "own", "own/", "own/gen-", "own/gen-x", "own/gen-00", "own/gen-0/", "/own/gen-0", "own//gen-0"],
        *["../own/gen-0", "own/../own/gen-0", "copies/../own/gen-0", "copies/./gen-0", "copies//gen-0"],
        *["copies/host/../gen-0", "copies/a/b/gen-0", "copies/.host/gen-0", "own/gen-0\0", "own/gen-0\n"],
        *["copies/h\ud800st/gen-0", "own/gen-٣", "copies/host-0/.incoming-0", "x" * 100_000, "own/gen-12345"],
    ],
)
def test_names_that_are_no_slots(agent, name):
    write_slot(agent.folder)
    client = agent.client()
    with pytest.raises(Refused, match="is no slot: the names are") as caught:
        client.fetch(name, 0, 10, seconds=SECONDS)
    assert caught.value.code == Code.MALFORMED
    assert len(client.fetch("own/gen-0", 0, 10, seconds=SECONDS)) == 10  # the connection goes on


def test_names_of_slots():
    assert parts_of("own/gen-0") == ("own", "gen-0")
    assert parts_of("copies/host-0.rack_1/gen-12") == ("copies", "host-0.rack_1", "gen-12")


def test_links_are_not_followed(agent, tmp_path):
    secret = tmp_path / "secret"
    (secret / "host-0").mkdir(parents=True)
    (secret / "host-0/gen-0").write_bytes(b"secret" * 100)
    (agent.folder / "own").mkdir()
    (agent.folder / "own/gen-0").symlink_to(secret / "host-0/gen-0")
    (agent.folder / "own/gen-1").mkdir()
    os.mkfifo(agent.folder / "own/gen-2")
    (agent.folder / "copies").symlink_to(secret)
    client = agent.client()
    for name in ("own/gen-0", "own/gen-1", "own/gen-2", "own/gen-3", "copies/host-0/gen-0"):
        with pytest.raises(Refused, match="there is no slot") as caught:
            client.fetch(name, 0, 6, seconds=SECONDS)
        assert caught.value.code == Code.MISSING


def test_a_range_beyond_the_end(agent):
    size = write_slot(agent.folder).stat().st_size
    with pytest.raises(Refused, match=f"own/gen-0 has {size} bytes; asked for were 2 bytes from byte {size - 1} on"):
        agent.client().fetch("own/gen-0", size - 1, 2, seconds=SECONDS)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"operation": "destroy"},
        {"operation": ["fetch"]},
        {"operation": "fetch"},
        {"operation": "fetch", "file": "own/gen-0", "offset": -1, "nbytes": 1},
        {"operation": "fetch", "file": "own/gen-0", "offset": True, "nbytes": 1},
        {"operation": "fetch", "file": "own/gen-0", "offset": 0, "nbytes": 1 << 63},
        {"operation": "fetch", "file": "own/gen-0", "offset": 0.0, "nbytes": 1},
        {"operation": "fetch", "file": None, "offset": 0, "nbytes": 1},
        {"operation": "push"},
        {
            "operation": "push",
            "owner": "../x",
            "generation": 0,
            "epoch": 1,
            "step": 1,
            "nbytes": 9999,
            "sender_epoch": 1,
        },
        {
            "operation": "push",
            "owner": "x/y",
            "generation": 0,
            "epoch": 1,
            "step": 1,
            "nbytes": 9999,
            "sender_epoch": 1,
        },
        {"operation": "push", "owner": "", "generation": 0, "epoch": 1, "step": 1, "nbytes": 9999, "sender_epoch": 1},
        {"operation": "push", "owner": "h", "generation": 2, "epoch": 1, "step": 1, "nbytes": 9999, "sender_epoch": 1},
        {"operation": "push", "owner": "h", "generation": 0, "epoch": 1, "step": 1, "nbytes": 4095, "sender_epoch": 1},
    ],
)
def test_requests_that_make_no_sense(agent, body):
    client = agent.client()
    with client._exchange(SECONDS, None) as (channel, deadline):
        channel.send(Kind.REQUEST, body, deadline)
        answer = channel.receive(deadline)
    assert (answer.kind, answer.body["code"]) == (Kind.REFUSAL, Code.MALFORMED)
    assert client.ping(seconds=SECONDS)["epoch"] == 7
    assert files(agent.folder) == []


def test_a_slot_above_the_limit(make_agent, source):
    agent = make_agent(limits=Limits(slot_nbytes=50_000))
    result = push(agent.client(), write_slot(source))
    assert (result.accepted, result.code) == (False, Code.TOO_LARGE)
    assert "above this agent's limit of 50000 bytes" in result.reason


def test_other_bytes_than_announced(agent):
    for nbytes in (9_999, 10_001, 1 << 60):
        with pytest.raises(PeerGone):
            push_partly(agent.client(), announced=10_000, data=nbytes, sent=0)
    assert agent.server.refusals == 3
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")


# Pushes that are refused


def test_a_damaged_slot_is_refused_and_leaves_nothing(agent, source):
    path = write_slot(source)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    client = agent.client()
    result = push(client, path)
    assert (result.accepted, result.code) == (False, Code.DAMAGED)
    assert result.reason == f"{agent.address}: .incoming-0: the digest of embed/table is wrong"
    assert files(agent.folder) == []
    assert agent.copies.held() == {}
    path.write_bytes(slot_bytes())
    assert push(client, path).accepted  # on the same connection


def test_a_failed_push_gives_up_the_copy_that_it_replaces(agent, source):
    client = agent.client()
    assert push(client, write_slot(source)).accepted
    path = write_slot(source, step=2)
    path.write_bytes(path.read_bytes()[:-1])
    assert push(client, path, step=2).code == Code.DAMAGED
    assert (agent.copies.held(), files(agent.folder)) == ({}, [])


def test_a_slot_of_another_step_epoch_host_or_job_is_refused(agent, source):
    client = agent.client()
    for facts in ({"step": 2}, {"epoch": 2}, {"host": "host-3"}, {"job": "other"}):
        result = push(client, write_slot(source, **facts))
        assert (result.accepted, result.code) == (False, Code.DAMAGED), facts
    assert files(agent.folder) == []


def test_a_slot_that_becomes_shorter_while_it_is_sent(agent, source):
    path = write_slot(source, nbytes=300_000)
    client = agent.client()
    rate = TokenBucket(400_000)
    take = rate.take

    def cut(nbytes):
        os.truncate(path, 10_000)
        return take(nbytes)

    rate.take = cut
    with pytest.raises(PeerGone, match="the file ended"):
        push(client, path, rate=rate)
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")
    path.write_bytes(slot_bytes())
    assert push(client, path).accepted


def test_older_steps_are_refused_and_later_epochs_are_newer(agent, source):
    client = agent.client()
    assert push(client, write_slot(source, step=5), step=5).accepted
    result = push(client, write_slot(source, step=4), step=4)
    assert (result.accepted, result.code) == (False, Code.OUTDATED)
    assert "step 4 of epoch 1 is older than what is held as copies/host-0/gen-0: step 5 of epoch 1" in result.reason
    assert push(client, write_slot(source, step=4), step=4, generation=1).accepted  # another generation's is its own
    assert push(client, write_slot(source, step=4, epoch=2), step=4, epoch=2).accepted
    assert push(client, write_slot(source, step=9), step=9, sender_epoch=2).code == Code.OUTDATED
    assert agent.copies.held() == {("host-0", 0): Held(2, 4), ("host-0", 1): Held(1, 4)}


def test_the_same_state_is_not_sent_twice_unless_it_was_damaged(agent, source):
    path, client = write_slot(source), agent.client()
    assert not push(client, path).already_held
    copy = agent.folder / "copies/host-0/gen-0"
    before = copy.stat().st_mtime_ns
    assert push(client, path) == PushResult(True, epoch=1, step=1, already_held=True)
    assert copy.stat().st_mtime_ns == before
    with open(copy, "r+b") as file:
        file.seek(HEADER + 500)
        file.write(b"damage")
    assert push(client, path) == PushResult(True, epoch=1, step=1)
    assert copy.read_bytes() == path.read_bytes()


def test_a_fenced_epoch_is_refused(agent, source):
    client = agent.client()
    agent.copies.fence(3)
    agent.copies.fence(2)
    path = write_slot(source, epoch=2)
    result = push(client, path, epoch=2)
    assert (result.accepted, result.code) == (False, Code.OUTDATED)
    assert "the sender lives in epoch 2; all below 3 are fenced here" in result.reason
    assert files(agent.folder) == []
    assert push(client, path, epoch=2, sender_epoch=3).accepted  # an older slot, copied anew in this epoch


def test_an_epoch_fenced_in_the_middle_of_a_push_is_refused(make_agent, source):
    def check(path, job):
        agent.copies.fence(2)
        return verify(path, job)

    agent = make_agent(check=check)
    result = push(agent.client(), write_slot(source))
    assert (result.accepted, result.code) == (False, Code.OUTDATED)
    assert files(agent.folder) == []
    assert agent.copies.held() == {}


def test_two_pushes_at_once_to_one_generation(agent, source):
    path = write_slot(source)
    first, results = agent.client(), []
    thread = threading.Thread(target=lambda: results.append(push(first, path, rate=TokenBucket(200_000))))
    thread.start()
    eventually(lambda: files(agent.folder) == ["copies/host-0/.incoming-0"], "the first push has not begun")
    second = push(agent.client(), path)
    assert (second.accepted, second.code) == (False, Code.BUSY)
    assert push(agent.client(), path, generation=1).accepted
    thread.join()
    assert results == [PushResult(True, epoch=1, step=1)]
    assert files(agent.folder) == ["copies/host-0/gen-0", "copies/host-0/gen-1"]


def test_no_memory(agent, source, monkeypatch):
    path, client = write_slot(source), agent.client()
    assert push(client, path).accepted
    real = os.statvfs(agent.folder)
    full = os.statvfs_result((*real[:4], 1, *real[5:]))
    monkeypatch.setattr(copies_module.os, "statvfs", lambda _: full)
    result = push(client, write_slot(source, step=2, nbytes=10_000_000), step=2)
    assert (result.accepted, result.code) == (False, Code.NO_MEMORY)
    assert "no memory for copies/host-0/gen-0: it needs 9.9 MB, 0.0 MB are free" in result.reason
    assert agent.copies.held() == {("host-0", 0): Held(1, 1)}  # what was held is held
    assert push(client, write_slot(source, step=3), step=3).accepted  # in the same memory


def test_memory_that_runs_out_in_the_middle(agent, source, monkeypatch):
    splice, path = os.splice, write_slot(source, nbytes=20_000_000)

    def full(source, target, count, **options):
        if options.get("offset_dst", 0) > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return splice(source, target, count, **options)

    monkeypatch.setattr(channel_module.os, "splice", full)
    client = agent.client()
    result = push(client, path)
    assert (result.accepted, result.code) == (False, Code.NO_MEMORY)
    assert "it became full meanwhile" in result.reason
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")
    monkeypatch.undo()
    assert push(client, path).accepted


def test_a_verifier_that_fails_in_any_way_is_a_refusal(make_agent, source):
    def check(path, job):
        raise RuntimeError(f"unforeseen in {path.name} of {job}")

    agent = make_agent(check=check)
    result = push(agent.client(), write_slot(source))
    assert (result.code, result.reason) == (Code.DAMAGED, f"{agent.address}: unforeseen in .incoming-0 of {JOB}")


# What earlier agents left


def test_copies_are_adopted_after_they_were_checked(tmp_path):
    for owner in ("host-0", "host-1", "host-2"):
        (tmp_path / "copies" / owner).mkdir(parents=True)
        (tmp_path / "copies" / owner / "gen-1").write_bytes(slot_bytes(host=owner, step=4))
    (tmp_path / "copies/host-1/gen-1").write_bytes(slot_bytes(host="host-1")[:-1])
    (tmp_path / "copies/host-2/gen-1").write_bytes(slot_bytes(host="host-1"))
    (tmp_path / "copies/host-2/.incoming-0").write_bytes(b"half")
    store = CopyStore(tmp_path, JOB, verify)
    assert not (tmp_path / "copies/host-2/.incoming-0").exists()
    assert store.held() == {}
    assert store.adopt() == [
        "copies/host-1/gen-1: gen-1: the digest of embed/table is wrong",
        "copies/host-2/gen-1: the slot was written by host 'host-1', not by 'host-2'",
    ]
    assert store.held() == {("host-0", 1): Held(1, 4)}


def test_what_is_held_is_found_without_adoption(tmp_path):
    (tmp_path / "copies/host-0").mkdir(parents=True)
    (tmp_path / "copies/host-0/gen-0").write_bytes(slot_bytes(step=4))
    with pytest.raises(Refused, match="is older than what is held"):
        CopyStore(tmp_path, JOB, verify).begin(Announcement("host-0", 0, 1, 3, 10_000, 1))


# Peers that die, stall, or are told to stop


def test_a_peer_that_is_killed_in_the_middle_of_a_push(agent, source, tmp_path):
    path = write_slot(source, nbytes=3_000_000)
    write_token(tmp_path / "token", agent.token)
    command = [sys.executable, Path(__file__).with_name("push_slowly.py"), agent.address, JOB, path]
    process = subprocess.Popen(command, env=os.environ | child_environment(tmp_path / "token"))
    try:
        incoming = agent.folder / "copies/host-0/.incoming-0"
        eventually(lambda: incoming.exists() and incoming.stat().st_size > 0, "the push has not begun")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")
    assert push(agent.client(), path).accepted


def test_a_peer_that_falls_silent_in_the_middle_of_a_push(make_agent):
    agent = make_agent(limits=Limits(stall_seconds=0.2))
    with pytest.raises(PeerGone):
        push_partly(agent.client(), announced=10_000, data=10_000, sent=5_000)
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")


def test_a_server_that_closes_in_the_middle_of_a_push(agent, source):
    path, client = write_slot(source, nbytes=3_000_000), agent.client()
    caught = []

    def run():
        with pytest.raises(PeerGone) as error:
            push(client, path, rate=TokenBucket(100_000))
        caught.append(str(error.value))

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: files(agent.folder) == ["copies/host-0/.incoming-0"], "the push has not begun")
    agent.server.close()
    assert files(agent.folder) == []
    assert [name.name for name in threading.enumerate() if name.name.startswith("peer")] == []
    thread.join()
    assert agent.address in caught[0]
    with pytest.raises(PeerGone, match=f"{agent.address} cannot be reached: Connection refused"):
        client.ping(seconds=SECONDS)
    agent.server.close()


def test_stop_gives_a_push_up(agent, source):
    path, client, stop = write_slot(source, nbytes=3_000_000), agent.client(), threading.Event()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped, match=f"the exchange with {agent.address} was stopped"):
        push(client, path, rate=TokenBucket(10_000), stop=stop)
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")
    assert client.ping(seconds=SECONDS)["epoch"] == 7  # stop was that push's


def test_stop_gives_up_a_push_to_a_peer_that_takes_nothing(token, source):
    path, stop = write_slot(source), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = PeerClient(f"127.0.0.1:{listener.getsockname()[1]}", JOB, token, "host-0")
        ended = []

        def run():
            with pytest.raises(Stopped):
                client.push(path, "host-0", 0, 1, 1, seconds=600, stop=stop)
            ended.append(True)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        with listener.accept()[0] as connection:
            connection.recv(1)
            time.sleep(0.2)  # by now it waits for an answer
            stop.set()
            eventually(lambda: ended, "the push waits for its deadline")
        thread.join()


def test_a_peer_that_never_answers_costs_the_deadline(token):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        client = PeerClient(address, JOB, token, "host-0")
        with pytest.raises(PeerTimeout, match=f"{address} was"):
            client.ping(seconds=0.2)


def test_closing_a_client_ends_what_another_thread_does(token):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = PeerClient(f"127.0.0.1:{listener.getsockname()[1]}", JOB, token, "host-0")
        caught = []

        def run():
            with pytest.raises(PeerGone):
                client.ping(seconds=SECONDS)
            caught.append(True)

        thread = threading.Thread(target=run)
        thread.start()
        with listener.accept()[0] as connection:
            connection.recv(1000)
            client.close()
            thread.join()
    assert caught == [True]


def test_stop_gives_up_a_connection_that_nobody_takes(token, source):
    """A full queue of a listener swallows a connection as a network that drops everything does."""
    path, stop = write_slot(source), threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        name = listener.getsockname()
        waiting = []
        try:
            for _ in range(8):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(name)
            client = PeerClient(f"127.0.0.1:{name[1]}", JOB, token, "host-0")
            threading.Timer(0.1, stop.set).start()
            with pytest.raises(Stopped):
                push(client, path, stop=stop)
            with pytest.raises(PeerTimeout, match="while taking the connection"):
                client.ping(seconds=0.1)
        finally:
            for connection in waiting:
                connection.close()


def test_a_slow_push_ends_at_its_deadline(agent, source):
    path = write_slot(source, nbytes=3_000_000)
    with pytest.raises(PeerTimeout, match=rf"{agent.address} was not done taking 3004096 bytes \(\d+ so far\)"):
        agent.client().push(path, "host-0", 0, 1, 1, seconds=0.5, rate=TokenBucket(100_000))
    eventually(lambda: files(agent.folder) == [], "a part of a slot is left")


def test_several_clients_at_once(agent, source):
    write_slot(agent.folder, nbytes=500_000)
    content = (agent.folder / "own/gen-0").read_bytes()
    paths = [write_slot(source / str(n), host=f"host-{n}", nbytes=500_000) for n in range(4)]
    wrong = []

    def run(n):
        client = agent.client()
        for _ in range(5):
            if client.fetch("own/gen-0", n, 400_000, seconds=SECONDS) != content[n : n + 400_000]:
                wrong.append(n)
        if not push(client, paths[n], owner=f"host-{n}").accepted:
            wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert files(agent.folder) == [*[f"copies/host-{n}/gen-0" for n in range(4)], "own/gen-0"]


def test_a_port_that_is_taken_is_a_clear_error(agent, tmp_path, token):
    port = int(agent.address.rpartition(":")[2])
    with pytest.raises(
        OSError, match=f"cannot listen on port {port} of 127.0.0.1: Address already in use; name another"
    ):
        PeerServer(tmp_path, JOB, token, agent.copies, port=port)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:٣"])
def test_what_is_no_address(address, token):
    with pytest.raises(ValueError, match="is no address of a peer server"):
        PeerClient(address, JOB, token, "host-0")


def test_importing_the_transport_imports_neither_jax_nor_numpy():
    code = (
        "import sys, jaxscale.supervisor.peer_server, jaxscale.supervisor.peer_client, jaxscale.retry;"
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_rate_is_kept_and_pauses_are_not_saved_up():
    now = [0.0]
    bucket = TokenBucket(1000.0, clock=lambda: now[0])
    assert bucket.burst == 50
    sent = 0
    while now[0] < 10:
        now[0] += bucket.take(bucket.burst)
        sent += bucket.burst
    assert sent == pytest.approx(10_000, rel=0.02)
    now[0] += 1000
    assert bucket.take(1000) == pytest.approx(0.95)
    with pytest.raises(ValueError, match="lets nothing through"):
        TokenBucket(0)


def test_the_samples_find_damage(tmp_path):
    path = write_slot(tmp_path)
    assert verify(path, JOB) == peer_samples.Table("host-0", 1, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(peer_samples.Damaged):
        verify(path, JOB)


def test_a_channel_is_a_client_of_no_one_else(agent):
    """A client's own connection survives a refusal, but not an error."""
    client = agent.client()
    client.ping(seconds=SECONDS)
    kept = client._channel
    assert isinstance(kept, Channel)
    with pytest.raises(Refused):
        client.fetch("own/gen-0", 0, 1, seconds=SECONDS)
    assert client._channel is kept
