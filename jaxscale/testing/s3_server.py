"""A real S3 server on loopback for tests: moto, in a process of its own. Needs `pip install moto[s3] flask flask-cors`.

It speaks S3's HTTP, conditional writes and multipart uploads included, and keeps everything in memory. Read next:
`http_faults.py`, a proxy before it that misbehaves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

START_SECONDS = 60.0
PROGRAM = "import sys; from moto.server import main; main(sys.argv[1:])"


class S3Server:
    """A running one. `address`: http://host:port."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self.address, self._process = address, process

    def pause(self) -> None:
        """From now on nothing is answered, and nothing refused."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def variables(address: str) -> dict[str, str]:
    """Environment that leads S3's tools to a server, with keys that it does not look at."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts one, waits until it listens, and ends it on the way out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "1000"},
    )
    try:
        _wait(process, port)
        yield S3Server(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()  # also one that is paused
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start (exit code {process.poll()}); is moto installed?")
