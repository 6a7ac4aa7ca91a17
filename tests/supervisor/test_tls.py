"""TLS on both sides of the control messages: who has no certificate of the job's authority does not get a word in."""

import asyncio
import contextlib
import dataclasses
import datetime
import importlib.util
import ipaddress
import os
import shutil
import signal
import subprocess
from pathlib import Path

import grpc
import pytest

from jaxscale.commands import supervise
from jaxscale.commands.parse import UsageError
from jaxscale.commands.supervise import AgentCommand
from jaxscale.supervisor import rpc
from jaxscale.supervisor.job_token import new_token
from jaxscale.supervisor.rpc import Refused, Server, Session, Tls, Unreachable, ask
from jaxscale.testing.cluster import left_behind
from jaxscale.testing.separated import separated

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
TOKEN = new_token()
SECONDS = 60


def run(work):
    """Runs a coroutine with a limit that only a hang reaches."""

    async def limited():
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


# Authorities


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=SECONDS)


class ByProgram:
    """An authority, made by the `openssl` program."""

    KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.certificate = folder, folder / "authority.pem"
        openssl("req", "-x509", *self.KEY, "-keyout", folder / "key.pem", "-out", self.certificate, "-subj", "/CN=us")

    def sign(self, name, address="127.0.0.1"):
        key, request, certificate = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        openssl("req", *self.KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        names = self.folder / f"{name}.ext"
        names.write_text(f"subjectAltName=IP:{address}\n")
        signed = ("-CA", self.certificate, "-CAkey", self.folder / "key.pem", "-CAcreateserial", "-extfile", names)
        openssl("x509", "-req", "-in", request, "-out", certificate, *signed)
        return Tls(key, certificate, self.certificate)


class ByPackage:
    """An authority, made by the Python package `cryptography`."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.certificate, self._key = folder, folder / "authority.pem", None
        self._key = self._issue("us", "authority", folder / "key.pem", self.certificate)

    def sign(self, name, address="127.0.0.1"):
        key, certificate = (self.folder / f"{name}.{kind}" for kind in ("key", "crt"))
        self._issue(name, address, key, certificate)
        return Tls(key, certificate, self.certificate)

    def _issue(self, name, address, key_path, path):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        pem = serialization.Encoding.PEM
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "us"))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        day = datetime.timedelta(days=1)
        builder = builder.not_valid_before(now - day).not_valid_after(now + day)
        is_authority = self._key is None
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        if not is_authority:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            builder = builder.add_extension(names, critical=False)
        path.write_bytes(builder.sign(self._key or key, hashes.SHA256()).public_bytes(pem))
        none = serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
        return key


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Makes authorities, each with certificates of its own."""
    if shutil.which("openssl"):
        make = ByProgram
    elif importlib.util.find_spec("cryptography"):
        make = ByPackage
    else:
        pytest.skip(
            "certificates are made by the program `openssl` or the Python package `cryptography`; neither is here"
        )
    return make(tmp_path_factory.mktemp("ours") / "authority"), make(tmp_path_factory.mktemp("theirs") / "authority")


@pytest.fixture(scope="module")
def ours(authority):
    return authority[0].sign("ours")


@pytest.fixture(scope="module")
def theirs(authority):
    return authority[1].sign("theirs")


# Who is heard


@contextlib.asynccontextmanager
async def serving(tls):
    """A server that sends every message back; yields its address."""

    async def echo(incoming, send):
        async for message in incoming:
            await send({"echo": message})

    async def answer(message):
        return {"answer": message}

    server = Server(TOKEN, echo, answer, lambda *_: None, tls)
    try:
        yield await server.start("127.0.0.1:0")
    finally:
        await server.stop(0)


async def speak(address, tls, token=TOKEN):
    """A question and a message; each alone must fail where one does."""
    async with Session(address, token, tls) as session:
        session.send({"n": 1})
        try:
            told = await session.receive()
        except (Unreachable, Refused):
            with pytest.raises((Unreachable, Refused)):
                await ask(address, token, {"n": 2}, tls=tls)
            raise
    assert told == {"echo": {"n": 1}}
    assert await ask(address, token, {"n": 2}, tls=tls) == {"answer": {"n": 2}}


def test_both_sides_with_certificates_of_one_authority_speak(authority, ours):
    async def work():
        async with serving(ours) as address:
            await speak(address, authority[0].sign("another-host"))

    run(work())


def test_a_certificate_does_not_replace_the_token(ours):
    async def work():
        async with serving(ours) as address:
            with pytest.raises(Refused, match="the token is not this job's"):
                await speak(address, ours, new_token())

    run(work())


def test_without_tls_a_server_that_has_it_is_not_reached(ours):
    async def work():
        async with serving(ours) as address:
            with pytest.raises(Unreachable, match=f"{address} cannot be reached without TLS"):
                await speak(address, None)
            await speak(address, ours)

    run(work())


def test_with_tls_a_server_that_has_none_is_not_reached(ours):
    async def work():
        async with serving(None) as address:
            with pytest.raises(Unreachable, match=f"{address} cannot be reached with TLS"):
                await speak(address, ours)
            await speak(address, None)

    run(work())


def test_a_server_of_another_authority_is_not_believed(ours, theirs):
    async def work():
        async with serving(theirs) as address:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await speak(address, ours)

    run(work())


def test_a_client_with_a_certificate_of_another_authority_is_not_heard(ours, theirs):
    """It believes the server; the server does not believe it."""

    async def work():
        async with serving(ours) as address:
            with pytest.raises(Unreachable, match=f"{address} cannot be reached with TLS"):
                await speak(address, dataclasses.replace(theirs, authority=ours.authority))
            await speak(address, ours)

    run(work())


def test_a_client_without_a_certificate_is_not_heard(ours, monkeypatch):
    def anonymous(address, tls):
        credentials = grpc.ssl_channel_credentials(tls.authority.read_bytes())
        return grpc.aio.secure_channel(address, credentials, options=rpc.OPTIONS)

    async def work():
        async with serving(ours) as address:
            with monkeypatch.context() as patch:
                patch.setattr(rpc, "channel", anonymous)
                with pytest.raises(Unreachable, match=f"{address} cannot be reached with TLS"):
                    await speak(address, ours)
            await speak(address, ours)

    run(work())


def test_a_certificate_for_another_address_is_not_believed(authority, ours):
    async def work():
        async with serving(authority[0].sign("elsewhere", "10.1.2.3")) as address:
            with pytest.raises(Unreachable, match="Hostname Verification Check failed"):
                await speak(address, ours)

    run(work())


def test_files_that_hold_no_certificate_are_a_clear_error(ours, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")

    async def work():
        with pytest.raises(OSError, match=r"junk\.pem"):
            async with serving(dataclasses.replace(ours, certificate=junk)):
                pass

    run(work())


# The flags


def files(tmp_path):
    made = {}
    for name in ("key", "certificate", "authority"):
        made[f"tls_{name}"] = tmp_path / f"{name}.pem"
        made[f"tls_{name}"].write_text(name)
    return made


def test_without_flags_there_is_no_tls_and_with_all_three_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert supervise._tls(AgentCommand("127.0.0.1:1", "host-0")) is None
    given = {name: path.relative_to(tmp_path) for name, path in files(tmp_path).items()}
    wanted = Tls(tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "authority.pem")
    assert supervise._tls(AgentCommand("127.0.0.1:1", "host-0", **given)) == wanted  # whatever the folder later


@pytest.mark.parametrize("missing", ["key", "certificate", "authority"])
def test_two_of_three_flags_are_a_usage_error_that_names_the_third(tmp_path, missing):
    given = files(tmp_path)
    del given[f"tls_{missing}"]
    with pytest.raises(UsageError, match=f"a key, a certificate and an authority; --tls-{missing} is missing"):
        supervise._tls(AgentCommand("127.0.0.1:1", "host-0", **given))


@pytest.mark.parametrize("name", ["key", "certificate", "authority"])
@pytest.mark.parametrize(("make", "words"), [(None, "No such file"), ("mkdir", "Is a directory")])
def test_a_file_that_cannot_be_read_is_a_usage_error_that_names_it(tmp_path, name, make, words):
    given = files(tmp_path)
    path = given[f"tls_{name}"]
    path.unlink()
    if make is not None:
        path.mkdir()
    with pytest.raises(UsageError) as failure:
        supervise._tls(AgentCommand("127.0.0.1:1", "host-0", **given))
    assert f"--tls-{name} {path} cannot be read: {words}" in str(failure.value)


@pytest.mark.parametrize(
    "command",
    [("run_coordinator", "recipes/lm_nano.py", "--help"), ("run_agent", "--help")],
    ids=["coordinator", "agent"],
)
def test_the_help_shows_the_flags(command, capsys, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setenv("COLUMNS", "200")
    name, *arguments = command
    with contextlib.suppress(SystemExit):
        getattr(supervise, name)(arguments)
    text = capsys.readouterr().out
    for flag in ("--tls-key", "--tls-certificate", "--tls-authority"):
        assert flag in text


# A real run


def flags_of(tls):
    return ("--tls-key", tls.key, "--tls-certificate", tls.certificate, "--tls-authority", tls.authority)


@pytest.mark.slow
@pytest.mark.usefixtures("one_cache")
def test_a_run_with_tls_recovers_from_kills_and_takes_no_harm_from_a_stranger(tmp_path, authority, theirs):
    """Each process has a certificate of its own. A worker is killed, then the coordinator, with its files, for good."""
    first = authority[0].sign("coordinator")
    own = {name: authority[0].sign(name) for name in ("host-0", "host-1")} | {"stranger": theirs}

    def flags(host):
        return flags_of(own[host]) if host in own else ()

    options = ("--memory.every", 2, "--steps", 300, *flags_of(first))
    with separated(NANO, tmp_path / "run", *options, shape=(2, 1), by_proxy=True, flags=flags) as cluster:
        for index, name in enumerate(("naked", "stranger")):
            cluster.start_agent(name, index)
        cluster.wait_for_step(10)
        for how in ("without TLS", f"with TLS, {theirs.certificate}"):
            words = f"cannot be reached {how}"
            cluster.wait_for(lambda words=words: words in cluster.output or None, words)
        for name in ("naked", "stranger"):
            cluster.end_agent(name)
        assert {e["host"] for e in cluster.events("agent_started")} == {"host-0", "host-1"}
        assert not cluster.events("fault")
        os.kill(cluster.worker(1)[1], signal.SIGKILL)
        cluster.wait_for_step(0, epoch=2)
        for path in (first.key, first.certificate):
            path.unlink()
        os.killpg(cluster.process.pid, signal.SIGKILL)
        cluster.wait_for(lambda: cluster.events("elected")[1:] or None, "an election")
        assert cluster.finish() == 0
        assert [line["step"] for line in cluster.metrics()] == list(range(1, 301))
        (fault,) = cluster.events("fault")
        assert (fault["class"], fault["host"]) == ("recoverable", "host-1")
        assert {line["epoch"] for line in cluster.metrics()} == {1, 2}
    assert not left_behind(tmp_path / "run")
