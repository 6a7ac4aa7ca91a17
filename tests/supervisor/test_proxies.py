"""The proxy of partitions without namespaces, and a run of which one host cannot reach the coordinator for a while."""

import socket
import threading
import time
from pathlib import Path

import pytest

from jaxscale.testing.proxies import Proxy
from jaxscale.testing.separated import separated

RECIPE = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
FLAGS = ("--memory.every", 2, "--checkpoint.every", 0)


@pytest.fixture(name="echo")
def _echo():
    """Address of a server that says everything again."""
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def answer(connection):
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def serve():
        while not ended.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield "{}:{}".format(*server.getsockname())
    ended.set()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


@pytest.fixture(name="proxy")
def _proxy(echo):
    proxy = Proxy(echo)
    yield proxy
    proxy.close()


def connect(proxy):
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def received(connection, size):
    found = b""
    while len(found) < size and (data := connection.recv(size - len(found))):
        found += data
    return found


def test_bytes_arrive_as_they_were_sent(proxy):
    sent = bytes(range(256)) * 4000
    with connect(proxy) as connection:
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        assert received(connection, len(sent)) == sent


def test_while_it_is_cut_nothing_is_refused_and_nothing_arrives(proxy):
    with connect(proxy) as before:
        before.sendall(b"one")
        assert received(before, 3) == b"one"
        proxy.cut()
        time.sleep(0.2)
        with connect(proxy) as after:
            for connection, words in ((before, b"two"), (after, b"three")):
                connection.sendall(words)
                connection.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(10)
            proxy.heal()
            assert received(before, 3) == b"two"
            assert received(after, 5) == b"three"


def test_the_end_of_one_side_is_the_end_of_the_other(proxy):
    with connect(proxy) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        assert received(connection, 100) in (b"last", b"")


def test_nobody_behind_it_is_the_end_of_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = "{}:{}".format(*server.getsockname())
    proxy = Proxy(nobody)
    try:
        with connect(proxy) as connection:
            assert received(connection, 1) == b""
    finally:
        proxy.close()


@pytest.mark.slow
@pytest.mark.usefixtures("one_cache")
def test_a_host_that_alone_loses_the_coordinator_is_done_without_and_comes_back(tmp_path):
    """It reaches the other hosts all the time, starts a coordinator of its own, and must not be elected."""
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 400, by_proxy=True) as cluster:
        cluster.wait_for_step(20)
        cluster.net.cut([3], [0, 1, 2])
        cluster.wait_for_step(40, epoch=2, seconds=60)
        members = {e["host"] for e in cluster.events("worker_started", epoch=cluster.epoch)}
        assert "host-3" not in members
        assert [e["term"][0] for e in cluster.events("elected")] == [1]
        cluster.net.heal()
        cluster.wait_for(lambda: True if cluster.members() == 4 else None, "a world of 4", 90)
        assert cluster.finish() == 0
        lines = cluster.lines()
        assert [line["step"] for line in cluster.metrics()] == list(range(1, 401))
    epochs = [line["epoch"] for line in lines]
    assert epochs == sorted(epochs), "a world that was over went on writing"
