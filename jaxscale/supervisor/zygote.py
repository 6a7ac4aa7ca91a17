"""The zygote: a process that has imported JAX and the recipe, made no backend and no thread, and forks workers in ms.

Importing JAX, Orbax, Grain and a recipe takes seconds; a fork of a process that has done so takes milliseconds. Forks
are doubled, so that a worker becomes a child of the agent (a subreaper), which so gets exit codes at once and keeps its
workers when the zygote dies. A zygote that has more than one thread refuses to fork: the child might hang for ever.

    agent -> zygote     {"do": "worker", "job": FILE}   {"do": "service", "processes": N, "host": HOST}
    zygote -> agent     {"pid": PID}                    {"pid": PID, "address": ADDRESS}     or {"error": TEXT}

Read next: `worker_process.py`, what the forked worker does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxscale.supervisor.records import MAILBOX_VARIABLE

MESSAGE_BYTES = 65536
TEXT_CHARACTERS = 5000
"""Of a traceback that is told: a character may take twelve bytes as JSON."""
SERVICE_TRIES = 5


class ForkError(RuntimeError):
    """A fork that was refused or did not come about."""


def main(arguments: list[str]) -> int:
    """`zygote.py FD RECIPE [overrides]`: imports, says that it is ready, and forks on demand until FD is closed."""
    commands = socket.socket(fileno=int(arguments[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the agent decides
    signal.signal(signal.SIGTERM, tell_preempted)
    try:
        recipe, config = _import(arguments[1:])
    except BaseException as error:
        # The end is what tells; a message that is cut short is none.
        _send(commands, {"error": type(error).__name__, "traceback": traceback.format_exc()[-TEXT_CHARACTERS:]})
        return 1
    _send(commands, {"ready": os.getpid(), "threads": _threads()})
    while data := commands.recv(MESSAGE_BYTES):
        request = json.loads(data)
        try:
            reply = _answer(request, commands, recipe, config)
        except (ForkError, OSError) as error:
            reply = {"error": str(error)}
        _send(commands, reply)
        if request["do"] == "worker" and "pid" in reply:
            _prepare(Path(request["job"]), config)
    return 0


def _prepare(job: Path, config: Any) -> None:
    """Traces now, while a worker of this world compiles, what the workers of later epochs need of the same world."""
    from jaxscale.supervisor.jobs import read_job
    from jaxscale.supervisor.worker_process import config_of
    from jaxscale.train.state import remember_state

    try:
        remember_state(config_of(read_job(job), config))
    except Exception:
        traceback.print_exc()  # the worker will say it better


def _import(arguments: list[str]) -> tuple[Any, Any]:
    """Everything that workers import, and the recipe with its overrides."""
    from jaxscale.commands.train import read

    recipe, command = read(arguments)
    import grain  # type: ignore[import-untyped]  # noqa: F401 - no stubs; imported for the children, as what follows
    import jax.experimental.multihost_utils
    import jax.experimental.serialize_executable  # noqa: F401

    import jaxscale.supervisor.ahead
    import jaxscale.supervisor.memory_restore
    import jaxscale.supervisor.supervised_run
    import jaxscale.supervisor.worker_process
    import jaxscale.track.sinks
    import jaxscale.train.samples
    import jaxscale.worker  # noqa: F401
    from jaxscale.checkpoint.durable import load_orbax
    from jaxscale.environment import remember_code
    from jaxscale.supervisor.sources import sources_digest

    command.config.model.task(command.config)  # imports the model
    load_orbax()
    sources_digest()
    remember_code()
    return recipe, command.config


def _answer(request: dict[str, Any], commands: socket.socket, recipe: Any, config: Any) -> dict[str, Any]:
    if request["do"] == "worker":
        from jaxscale.supervisor import worker_process

        def body(report: int) -> int:
            os.close(report)
            return worker_process.main(Path(request["job"]), recipe, config)

        return {"pid": fork(body, commands)[0]}
    if request["do"] == "service":
        return _service(request["processes"], request["host"], commands)
    raise ForkError(f"a zygote forks workers and services, not {request['do']!r}")


def _service(processes: int, host: str, commands: socket.socket) -> dict[str, Any]:
    """Forks an epoch host and returns when its service listens at `host`, on a port that the kernel chose."""

    def body(report: int) -> None:
        from jaxscale.jax_private import serve

        held, error = None, ""
        for _ in range(SERVICE_TRIES):
            try:
                port = free_port(host)
                held = serve(f"{bracketed(host)}:{port}", processes)
                break
            except (OSError, RuntimeError) as failure:
                error = str(failure)
        os.write(report, json.dumps({"port": port} if held is not None else {"error": error}).encode())
        os.close(report)
        while held is not None:
            signal.pause()  # returns after each signal that has a handler

    pid, said = fork(body, commands)
    if "port" not in said:
        raise ForkError(f"the epoch's coordination service could not listen: {said.get('error', 'it died')}")
    return {"pid": pid, "address": f"{bracketed(host)}:{said['port']}"}


def bracketed(host: str) -> str:
    """As it stands before a port: addresses of version 6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def fork(body: Callable[[int], Any], commands: socket.socket) -> tuple[int, dict[str, Any]]:
    """Runs `body` in a grandchild, in a session of its own. Returns its pid and what it wrote, as JSON, into the pipe
    that `body` gets; {} when it closed the pipe without a word. Raises ForkError.
    """
    if (threads := _threads()) != 1:
        raise ForkError(f"the zygote has {threads} threads; a fork could hang: start workers by spawn")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            if os.fork():
                os._exit(0)
            os.setsid()
            commands.close()
            os.write(writer, f"{os.getpid()}\n".encode())
            _run(body, writer)
        finally:
            os._exit(70)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        first = pipe.readline()
        rest = pipe.read()
    if not first:
        raise ForkError("the forked process died before it said its pid")
    return int(first), json.loads(rest) if rest else {}


def _run(body: Callable[[int], Any], writer: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 70
    try:
        code = body(writer) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def tell_preempted(_number: int, _frame: object) -> None:
    """SIGTERM to any process of a host means that the host is to end: the agent is told, and what runs goes on."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mail:
        mail.setblocking(False)
        mail.sendto(json.dumps({"kind": "preempted", "pid": os.getpid()}).encode(), os.environ[MAILBOX_VARIABLE])


def free_port(host: str) -> int:
    """A port that nobody listens on now at this address of the machine. Raises OSError where it is none of its own."""
    family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(place)
        return int(probe.getsockname()[1])


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        import threading

        return threading.active_count()


def _send(commands: socket.socket, message: dict[str, Any]) -> None:
    commands.send(json.dumps(message | {"mono": time.monotonic()}).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
