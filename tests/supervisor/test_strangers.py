"""A real run among strangers: what it shows of its secret, where it listens, and what noise on its doors does to it."""

import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from jaxscale.supervisor.job_token import ENVIRONMENT
from jaxscale.supervisor.records import MAILBOX
from jaxscale.testing.cluster import launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
FLAGS = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 2)

pytestmark = pytest.mark.usefixtures("one_cache")


def family(run):
    """Every process of a run; workers lead sessions of their own, but remain descendants."""
    launch = psutil.Process(run.process.pid)
    return [launch, *launch.children(recursive=True)]


def doors(processes):
    """(address, port) of everything that listens for TCP; addresses as version 4 has them where both serve."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found |= {(place.ip.removeprefix("::ffff:"), place.port) for place in listening}
    return found


def secret_of(processes):
    paths = {process.environ().get(ENVIRONMENT) for process in processes} - {None}
    assert len(paths) == 1, "every process of a job has the same token"
    return bytes.fromhex(Path(paths.pop()).read_text())


def knock(address, port, draw):
    """Random bytes, as many as are taken."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1) as stranger:
        stranger.sendall(draw.randbytes(draw.randrange(1, 4000)))


def test_a_run_shows_no_secret_listens_on_loopback_alone_and_takes_no_harm_from_noise(tmp_path):
    draw = random.Random(5)
    with launched(NANO, tmp_path / "run", *FLAGS, "--steps", 60) as run:
        run.wait_for_step(8)
        processes = family(run)
        secret = secret_of(processes)
        command_lines = [" ".join(process.cmdline()) for process in processes]
        found = doors(processes)
        assert {address for address, _ in found} == {"127.0.0.1"}
        assert len(found) >= 4, "coordinator, two agents, an epoch's service"
        for _ in range(5):
            for address, port in found:
                knock(address, port, draw)
            for host in ("host-0", "host-1"):
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mail:
                    mail.sendto(draw.randbytes(200), str(run.memory(host) / MAILBOX))
            time.sleep(0.2)
        assert run.finish() == 0
        assert [line["step"] for line in run.lines()] == list(range(1, 61)), "one epoch, no step twice"
        assert run.events("fault") == []
        assert any(event["what"] == "connection refused" for event in run.events("alarm")), "somebody heard the noise"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for shown in (secret, secret.hex().encode(), secret.hex().upper().encode()):
        assert not any(shown in text for text in [*written, *map(os.fsencode, command_lines)])
    assert not left_behind(tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_to_its_end_without_the_process_that_launched_it(tmp_path):
    with launched(NANO, tmp_path / "run", *FLAGS, "--steps", 80) as run:
        run.wait_for_step(8)
        others = family(run)[1:]
        os.kill(run.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(others, timeout=120)
        assert alive == []
        assert run.events("state")[-1]["to"] == "DONE"
        assert [line["step"] for line in run.lines()] == list(range(1, 81)), "one epoch, no step twice"
        assert run.events("fault") == []


@pytest.mark.slow
@pytest.mark.parametrize("durable", [0, 10])
def test_a_host_that_is_lost_with_the_only_holder_of_its_copy_costs_steps_and_not_the_run(tmp_path, durable):
    """With one copy of each part, two losses are one too many for the memory tier."""
    shape = ("--slices", 2, "--hosts-per-slice", 2, "--memory.every", 2, "--restart-after", 1)
    with launched(NANO, tmp_path / "run", *shape, "--checkpoint.every", durable, "--steps", 60) as run:
        run.wait_for_step(25)
        for host in ("host-0", "host-2"):
            run.kill_host(host)
        assert run.finish(300) == 0
        assert [line["step"] for line in run.metrics()] == list(range(1, 61))
        restored = [event for event in run.events("restored") if event["step"] < 30]
        first = min((line["step"] for line in run.lines() if line["epoch"] == 2), default=0)
    if durable:
        assert [set(event["sources"]) for event in restored] == [{"durable"}]
        assert first in (11, 21)
    else:
        assert first == 1, "there was nothing to go on from"
    assert not left_behind(tmp_path / "run")
