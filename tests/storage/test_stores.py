"""Stores alike: a folder, fsspec's memory, and S3 over HTTP (moto's server on loopback), sound and misbehaving."""

import errno
import secrets
import threading
import time
from pathlib import Path

import pytest

from jaxscale.retry import RetryConfig
from jaxscale.storage.addresses import open_store
from jaxscale.storage.deadline import LateAnswer
from jaxscale.storage.guarded import Bounds, GuardedStore
from jaxscale.storage.s3_store import S3Error, S3Unreachable
from jaxscale.storage.store import PART_BYTES, Conflict, StoreError
from jaxscale.testing.http_faults import faulty_proxy
from jaxscale.testing.s3_server import s3_server, variables

QUICK = RetryConfig(first_seconds=0.01, longest_seconds=0.02, open_seconds=0.1, successes=1)


@pytest.fixture(scope="module", name="server")
def _server():
    with s3_server() as server:
        yield server


@pytest.fixture(name="bucket")
def _bucket(server, monkeypatch):
    """An address in a new bucket."""
    import botocore.session

    for name, value in variables(server.address).items():
        monkeypatch.setenv(name, value)
    name = f"b{secrets.token_hex(6)}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/runs"


@pytest.fixture(name="store", params=["folder", "memory", "s3"])
def _store(request, tmp_path):
    if request.param == "s3":
        return open_store(request.getfixturevalue("bucket"))
    return open_store(str(tmp_path / "far") if request.param == "folder" else f"memory://{secrets.token_hex(6)}")


def test_a_store_keeps_files(store):
    assert (store.names(), store.files("a")) == ([], {})
    store.write("a/1/x", b"hello")
    large = secrets.token_bytes(PART_BYTES + 5)
    store.write_chunks("a/2/deep/y", lambda: [large[:7], large[7:]], len(large))
    assert (store.names("a"), store.names("a/1")) == (["1", "2"], ["x"])
    assert store.files("a") == {"1/x": 5, "2/deep/y": len(large)}
    assert store.read("a/1/x", 1, 3) == b"ell"
    assert store.read("a/2/deep/y") == large
    assert store.size("a/1/x") == 5
    store.delete("a/1/x")
    store.delete("a/1/x")
    with pytest.raises(FileNotFoundError):
        store.read("a/1/x")


def test_a_file_is_copied_at_the_place_itself_where_that_can_be(store):
    store.write("a/x", b"hello")
    could = store.copy("a/x", "b/deep/x", 5)
    assert could == (not store.address.startswith("memory"))
    assert store.files("b") == ({"deep/x": 5} if could else {})
    if could:
        store.write("a/x", b"other")
        store.delete("a/x")
        assert store.read("b/deep/x") == b"hello"
        assert store.copy("b/deep/x", "b/deep/x2", 5)
        assert store.copy("b/deep/x", "b/deep/x2", 5), "again"
    assert store.copy("none", "b/none", 5) is False
    assert store.copy("b/deep/x", "b/other", 4) is False, "of another size"
    assert not {"none", "other"} & store.files("b").keys()


def test_a_write_that_fails_in_between_leaves_nothing(store):
    def chunks():
        yield b"x"
        raise OSError(errno.EIO, "bad disk")

    with pytest.raises(OSError, match="bad disk"):
        store.write_chunks("a/x", chunks, 2)
    assert store.files("a") == {}


def test_a_conditional_write_is_one(store):
    first = store.create("owner", b"1")
    with pytest.raises(Conflict):
        store.create("owner", b"2")
    assert store.read_versioned("owner").version == first
    store.replace("owner", b"3", first)
    with pytest.raises(Conflict):
        store.replace("owner", b"4", first)
    assert store.read("owner") == b"3"
    with pytest.raises(Conflict):
        store.replace("nobody", b"4", first)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_of_many_that_write_at_one_moment_one_does(kind, request, tmp_path):
    address = str(tmp_path) if kind == "folder" else request.getfixturevalue("bucket")
    start, won = threading.Barrier(8), []

    def race(number):
        store = open_store(address)
        start.wait()
        try:
            store.create("owner", str(number).encode())
            won.append(number)
        except Conflict:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert open_store(address).read("owner") == str(won[0]).encode()


def heal_after(proxy, requests):
    """Ends a fault once so many have met it: more than open a breaker."""
    deadline = time.monotonic() + 15
    while proxy.met < requests and time.monotonic() < deadline:
        time.sleep(0.01)
    proxy.heal()


@pytest.mark.parametrize(
    ("fault", "kind"), [("503", S3Error), ("slow-down", S3Error), ("reset", S3Unreachable), ("cut", S3Unreachable)]
)
def test_an_s3_that_fails_for_a_moment_is_asked_again(fault, kind, bucket, server, monkeypatch):
    with faulty_proxy(server.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        plain = open_store(bucket)
        plain.write("x", b"0123456789")
        proxy.begin(fault)
        with pytest.raises(kind):
            plain.read("x")
        changes = []
        guarded = GuardedStore(plain, Bounds(call_seconds=20), changes.append, QUICK)
        timer = threading.Thread(target=heal_after, args=(proxy, 8))
        timer.start()
        assert guarded.read("x") == b"0123456789"
        timer.join()
        assert proxy.met > 2
        assert [change.after for change in changes][-1] == "closed", "the breaker opened and closed again by itself"


def test_an_s3_that_does_not_answer_is_given_up_in_time(bucket, server, monkeypatch):
    with faulty_proxy(server.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        proxy.begin("stall")
        store = GuardedStore(open_store(bucket), Bounds(attempt_seconds=0.3, call_seconds=0.5), retry=QUICK)
        with pytest.raises(LateAnswer):
            store.names()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_place_is_asked_once(number):
    asked = []

    class Full:
        address = "full"

        def write(self, name, data):
            asked.append((name, data))
            raise OSError(number, "no")

    with pytest.raises(OSError, match="no"):
        GuardedStore(Full(), retry=QUICK).write("x", b"")
    assert len(asked) == 1


def test_no_more_than_a_few_calls_hang():
    hang, began = threading.Event(), []

    class Hung:
        address = "hung"

        def names(self, _):
            began.append(1)
            hang.wait()

    store = GuardedStore(Hung(), Bounds(attempt_seconds=0.02, call_seconds=0.3), retry=QUICK)
    for _ in range(3):
        with pytest.raises((LateAnswer, RuntimeError)):
            store.names()
    hang.set()
    assert len(began) <= 4


@pytest.mark.parametrize("address", ["s3://", "file://x", "nosuch://x"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(StoreError):
        open_store(address)


def test_a_path_is_a_folder(tmp_path):
    assert open_store(f"file://{tmp_path}").address == open_store(str(tmp_path)).address == str(Path(tmp_path))
