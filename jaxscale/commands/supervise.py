"""`jaxscale coordinator` and `jaxscale agent`: the pieces of a supervised run one by one, for clusters.

`jaxscale launch` starts the same on one machine. Read next: `../supervisor/coordinator.py`, `../supervisor/agent.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscale.commands import launch
from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import Config, MeshConfig
from jaxscale.recipe import load_recipe
from jaxscale.train.logs import quiet_terminal

if TYPE_CHECKING:
    from jaxscale.checkpoint.locations import Locations
    from jaxscale.supervisor.rpc import Tls


@dataclass(frozen=True)
class CoordinatorCommand:
    """Flags of `coordinator`: those of the config, the shape of the cluster, and where to listen."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    listen: str = "127.0.0.1:0"
    """host:port for the agents; port 0 lets the kernel choose."""
    job: str = "job"
    """Name of the job; agents of other jobs are refused."""
    slices: int = 1
    """Groups of hosts that fail together; the mesh axis `data` runs across them."""
    hosts_per_slice: int = 2
    devices_per_host: int = 1
    """Devices of each host: as many real ones as it has, or as many as its agent emulates with --devices."""
    spares: int = 0
    """Hosts that wait to stand in for one that is lost; their agents have --slice -1."""
    invite: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Address of an agent that may not know of this coordinator; an agent that starts one gives those of all."""
    elected_within: float = 0.0
    """Seconds after which it gives up if no majority of the voters has promised to serve it; 0 = never."""
    tls_key: Path | None = None
    """Private key of this side, PEM; with a certificate and an authority, control messages are TLS on both sides."""
    tls_certificate: Path | None = None
    """Certificate of this side, PEM; it must name the addresses that it is reached at."""
    tls_authority: Path | None = None
    """Certificate of the authority that signed the other sides' certificates, PEM."""


@dataclass(frozen=True)
class AgentCommand:
    coordinator: str
    """host:port of the coordinator."""
    host: str
    """Name of this host, one of its own."""
    slice: int = 0
    """Slice that it belongs to; -1 = a spare for any."""
    devices: int = 0
    """CPU devices to emulate, as many as the coordinator's --devices-per-host; 0 = the real ones."""
    job: str = "job"
    shared_memory: str = "/dev/shm/jaxscale"
    """Folder in shared memory; the agent makes one of its own below it."""
    listen: str = "127.0.0.1"
    """Address of this host at which the other hosts and the coordinator reach it."""
    takeover_after: float = 2.0
    """Seconds without any coordinator after which this host starts one in its place; 0 = never."""
    maintenance_file: str = ""
    """File whose existence says that this host is to end: the run goes on without it, as after SIGTERM."""
    maintenance_command: str = ""
    """Command that says so by exit code 0, for clouds that must be asked; run every second, without a shell."""
    tls_key: Path | None = None
    """Private key of this side, PEM; with a certificate and an authority, control messages are TLS on both sides."""
    tls_certificate: Path | None = None
    """Certificate of this side, PEM; it must name the addresses that it is reached at."""
    tls_authority: Path | None = None
    """Certificate of the authority that signed the other sides' certificates, PEM."""


PLACE = ("--listen", "--invite", "--elected-within", "--tls-key", "--tls-certificate", "--tls-authority")
"""Flags of one coordinator of a run; another one at another host has its own."""

COORDINATOR_EXAMPLES = """\
  for 2 slices of 4 hosts, listening on a known port:
    {prog} --listen 0.0.0.0:8476 --job mine --slices 2 --hosts-per-slice 4
The token is read from the file that JAXSCALE_TOKEN_FILE names (mode 0600, the same on every host)."""

AGENT_EXAMPLES = """\
  on the second host of slice 0, with its real devices:
    jaxscale agent --coordinator 10.0.0.1:8476 --job mine --host host-1 --slice 0 --listen 10.0.0.2
  with 2 emulated devices, for a coordinator with --devices-per-host 2:
    jaxscale agent --coordinator 10.0.0.1:8476 --job mine --host host-1 --slice 0 --listen 10.0.0.2 \\
      --devices 2
The token is read from the file that JAXSCALE_TOKEN_FILE names (mode 0600, the same on every host)."""


def run_coordinator(args: Sequence[str], prog: str | None = None) -> int:
    """Coordinates a run to its end and returns its exit code."""
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print("usage: jaxscale coordinator RECIPE.py [--listen HOST:PORT] [--slices N] [overrides]\n")
            print("`jaxscale coordinator RECIPE.py --help` shows the flags of a recipe, their defaults and examples.")
            raise SystemExit(0)
        raise UsageError("coordinator needs a recipe first: jaxscale coordinator recipes/lm_nano.py --listen HOST:PORT")
    recipe = load_recipe(args[0])
    prog = prog or f"jaxscale coordinator {args[0]}"
    command = parse(
        CoordinatorCommand,
        args[1:],
        prog=prog,
        description=recipe.description,
        examples=COORDINATOR_EXAMPLES.format(prog=prog),
        default=CoordinatorCommand(recipe.config),
    )
    _check_ranges(command, slices=1, hosts_per_slice=1, devices_per_host=1, spares=0, elected_within=0)
    launch.check_packages()
    quiet_terminal()
    from jaxscale.run_directory import open_run
    from jaxscale.supervisor.addresses import is_loopback, resolved
    from jaxscale.supervisor.coordinator import Coordinator
    from jaxscale.supervisor.coordinator_options import CoordinatorOptions
    from jaxscale.supervisor.job_token import read_token
    from jaxscale.supervisor.judge import TableJudge
    from jaxscale.supervisor.legal import LegalMeshes
    from jaxscale.supervisor.rpc import CannotListen, check_free
    from jaxscale.supervisor.sizes import resolved_sizes
    from jaxscale.supervisor.worlds import Request, layouts

    sizes = resolved_sizes(command.config, command.slices, command.hosts_per_slice * command.devices_per_host)
    legal = LegalMeshes()
    request = Request(command.slices, command.hosts_per_slice, command.devices_per_host, sizes, legal)
    token = read_token()
    options = CoordinatorOptions(
        job=command.job,
        token=token,
        listen=command.listen,
        recipe=str(recipe.path),
        arguments=tuple(launch.overrides(args[1:])),
        command=(
            "coordinator",
            str(recipe.path),
            *launch.without(args[1:], PLACE),
        ),
        invite=command.invite,
        elected_within=command.elected_within or float("inf"),
        tls=_tls(command),
        request=request,
        hosts=command.slices * command.hosts_per_slice + command.spares,
    )
    try:
        check_free(command.listen)  # before anything is made or asked that would be in vain
        host = command.listen.rpartition(":")[0].strip("[]")
        if is_loopback(host) and host not in (resolved(host), "localhost"):  # a name, which promises more
            print(
                f"warning: --listen {command.listen} is {resolved(host)}: only agents on this machine reach it; give "
                "an address of this machine for agents on others",
                file=sys.stderr,
            )
        directory = open_run(
            dataclasses.replace(command.config, mesh=MeshConfig(**sizes)), job=f"{command.job} {token.digest}"
        )
        try:
            judge = TableJudge(request, command.config.memory.on_loss, legal, f"{command.job} {token.digest}")
            locations = _locations(command, directory.path, f"{command.job} {token.digest}")
            coordinator = Coordinator(options, command.config, judge, directory, locations)
            legal.ask(str(recipe.path), options.arguments, layouts(request), coordinator.not_audited)
            return asyncio.run(_coordinate(coordinator))
        finally:
            directory.close()
    except CannotListen as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _locations(command: CoordinatorCommand, run: Path, owner: str) -> Locations:
    """Whose the run is, and its further places, with what they have fetched; refused where another job has it.

    A coordinator that starts again while its run trains finds in the run directory what it needs.
    """
    from jaxscale.checkpoint import layout
    from jaxscale.checkpoint.locations import Locations

    locations = Locations(run, command.config, owner)
    locations.look()
    if not locations.is_ours() or layout.newest_step(run / "checkpoints") is None:
        locations.fetch()
    return locations


def _check_ranges(command: CoordinatorCommand | AgentCommand, **least: int) -> None:
    """Raises UsageError for a number that is too small."""
    for name, number in least.items():
        if getattr(command, name) < number:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(command, name)}; use {number} or more")


async def _coordinate(coordinator: object) -> int:
    from jaxscale.supervisor.coordinator import Coordinator
    from jaxscale.supervisor.transitions import REFUSED

    assert isinstance(coordinator, Coordinator)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, coordinator.drain, number.name)
    finish = await coordinator.run()
    if finish.text:
        print(f"error: {finish.text}" if finish.code == REFUSED else finish.text, file=sys.stderr)
    return finish.code


def run_agent(args: Sequence[str], prog: str | None = None) -> int:
    """Serves a host until the coordinator ends the run."""
    command = parse(
        AgentCommand,
        args,
        prog=prog or "jaxscale agent",
        description="Serves one host of a supervised run: starts its workers, keeps their memory.",
        examples=AGENT_EXAMPLES,
    )
    _check_ranges(command, slice=-1, devices=0, takeover_after=0)
    launch.check_packages()
    quiet_terminal()
    from jaxscale.supervisor.agent import Agent
    from jaxscale.supervisor.agent_options import AgentOptions
    from jaxscale.supervisor.job_token import read_token
    from jaxscale.supervisor.maintenance import Maintenance

    _check_agent(command)
    options = AgentOptions(
        job=command.job,
        host=command.host,
        slice=command.slice,
        devices=command.devices,
        coordinator=command.coordinator,
        token=read_token(),
        shared_memory=Path(command.shared_memory),
        listen=command.listen,
        takeover_after=command.takeover_after,
        maintenance=Maintenance(command.maintenance_file, command.maintenance_command),
        tls=_tls(command),
    )

    async def serve() -> int:
        return await Agent(options).run()

    return asyncio.run(serve())


def _check_agent(command: AgentCommand) -> None:
    """Raises UsageError for what cannot work, before anything is touched."""
    from jaxscale.supervisor.addresses import is_elsewhere, is_loopback, resolved
    from jaxscale.supervisor.link import checked_address
    from jaxscale.supervisor.maintenance import check_command
    from jaxscale.supervisor.peer_server import CannotListen, check_own
    from jaxscale.supervisor.peers import Refused
    from jaxscale.supervisor.slot_files import check_host

    try:
        check_host(command.host)
    except Refused as error:
        raise UsageError(f"--host {error}; give the host's own name, as in --host host-0") from error
    try:
        checked_address(command.coordinator)
    except ValueError as error:
        raise UsageError(f"--coordinator: {error}; give the one that the coordinator listens on") from error
    if command.listen in ("0.0.0.0", "::", ""):
        raise UsageError(f"--listen {command.listen!r} is no address that others can use; give this host's own")
    try:
        check_own(command.listen)
    except CannotListen as error:
        raise UsageError(f"--listen {command.listen}: {error}") from error
    if is_loopback(command.listen) and is_elsewhere(command.coordinator.rpartition(":")[0]):
        meant = resolved(command.listen)
        words = f"--listen {command.listen}" + ("" if meant == command.listen else f", which is {meant} here,")
        raise UsageError(
            f"{words} is no address that hosts on other machines can use, and the coordinator at {command.coordinator} "
            "is on another one; give an address of this host that they reach, `ip address` shows them"
        )
    if command.maintenance_command:
        try:
            check_command(command.maintenance_command)
        except ValueError as error:
            raise UsageError(f"--maintenance-command {error}") from error


def _tls(command: CoordinatorCommand | AgentCommand) -> Tls | None:
    """Raises UsageError for files that cannot be read, or a set that is not whole."""
    from jaxscale.supervisor.rpc import Tls

    files = {"key": command.tls_key, "certificate": command.tls_certificate, "authority": command.tls_authority}
    if not any(files.values()):
        return None
    for name, path in files.items():
        if path is None:
            raise UsageError(f"TLS needs a key, a certificate and an authority; --tls-{name} is missing")
        try:
            path.read_bytes()
        except OSError as error:
            raise UsageError(f"--tls-{name} {path} cannot be read: {error.strerror}") from error
    return Tls(**{name: path.absolute() for name, path in files.items() if path is not None})
