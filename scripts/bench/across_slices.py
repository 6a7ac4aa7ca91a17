"""What crosses slices and what it does to the loss and to the speed: `lm_nano` on two slices, Shakespeare's works.

    python scripts/bench/across_slices.py [--rows loss bytes link] [--steps 600] [--kinds int8 top-k ...]

loss   one process, two emulated devices, a slice each: loss on held-out text after `--steps`, beside uncompressed.
bytes  two processes in network namespaces, a slice each: what the kernel counts on the link between them, per step.
link   the same, with the link throttled by `tc tbf` to 1 % of what it gives unthrottled: tokens a second of two slices
       against twice those of one slice that runs beside another one, which talk to nobody.

`bytes` and `link` need root and iproute2. Each side has all that the other has, so that what else the machine does
falls on both alike.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxscale.testing.namespaces import Network, network, unavailable
from jaxscale.track.jsonl import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = ROOT / "recipes/data/shakespeare.jsonl.gz"
DILOCO = ["--local.every", "30", "--local.learning-rate", "0.9", "--local.momentum", "0.4"]
"""Outer steps for a run that has twenty of them."""
KINDS: dict[str, list[str]] = {
    "float32": ["--across.gradients", "float32"],
    "direct": [],
    "bfloat16": ["--across.gradients", "bfloat16"],
    "int8": ["--across.gradients", "int8"],
    "top-k": ["--across.gradients", "top-k"],
    "random-k": ["--across.gradients", "random-k"],
    "power-sgd": ["--across.gradients", "power-sgd"],
    "diloco": [*DILOCO],
    "diloco int8": [*DILOCO, "--local.exchange", "int8"],
    "diloco int4": [*DILOCO, "--local.exchange", "int4"],
    "streaming": [*DILOCO, "--local.fragments", "3", "--local.exchange", "int8"],
    "streaming delay": [
        *DILOCO,
        *("--local.fragments", "3", "--local.exchange", "int8"),
        *("--local.delay", "2", "--local.mixing", "0.5"),
    ],
}
"""By name: overrides of `lm_nano`. The first is what the others are compared with."""
LINK_KINDS = ("float32", "int8", "diloco", "diloco int8")
WARM, COUNTED = 30, 90
"""Steps before the counted ones, and counted ones: whole periods of DiLoCo."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["loss", "bytes", "link"], choices=["loss", "bytes", "link"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--kinds", nargs="+", default=[], choices=list(KINDS))
    parser.add_argument("--rate", type=float, default=0.0, help="MB/s of the throttled link; 0: 1 %% of the measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxscale-slices-") as folder:
        if "loss" in options.rows:
            losses(Path(folder), options.kinds or list(KINDS), options.steps)
        if {"bytes", "link"} & set(options.rows) and (missing := unavailable()):
            raise SystemExit(f"rows bytes and link cannot be measured here: {missing}")
        if "bytes" in options.rows:
            sent(Path(folder), options.kinds or list(KINDS))
        if "link" in options.rows:
            throttled(Path(folder), options.kinds or list(LINK_KINDS), options.rate)


def command(run: Path, steps: int, *flags: object) -> list[str]:
    recipe = ["-m", "jaxscale", "train", str(ROOT / "recipes/lm_nano.py"), "--data.path", str(TEXT)]
    return [sys.executable, *recipe, "--steps", str(steps), "--run.dir", str(run), *map(str, flags)]


def losses(folder: Path, kinds: list[str], steps: int) -> None:
    print(f"\nloss on held-out text after {steps} steps, relative to the first", flush=True)
    first = None
    for kind in kinds:
        run = folder / f"loss-{kind}".replace(" ", "-")
        evaluated = ("--data.held-out-documents", 2, "--evaluate.batches", 40)
        done = subprocess.run(
            command(run, steps, "--devices", 2, "--mesh.data", 2, *evaluated, *KINDS[kind]),
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = read_metrics(run / "metrics.jsonl")
        loss = lines[-1]["eval_loss"]
        first = first or loss
        print(f"{kind:>16} {lines[0]['loss']:8.3f} -> {loss:7.4f}   {100 * (loss / first - 1):+6.2f} %", flush=True)


AT = """
import sys
from jaxscale import cli, jax_private
if sys.argv[1]:
    jax_private.gloo_at(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""
"""Gloo would listen where the host's name leads, which is the namespace's own loopback."""


class World:
    """Two slices in namespaces: one world of two processes, or two worlds of one."""

    def __init__(self, net: Network, folder: Path, name: str, steps: int, flags: list[str], together: bool) -> None:
        self.net = net
        self.runs = [folder / f"{name}-{i}" for i in range(1 if together else 2)]
        self.processes = []
        for i in range(2):
            run = self.runs[0 if together else i]
            if together:
                place = ["--distributed", f"{net.address(0)}:{net.port},2,{i}", "--devices", "2", "--mesh.data", "2"]
            else:
                place = ["--devices", "1", "--data.batch", "4"]
            words = command(run, steps, *place, *flags)[3:]
            out = open(folder / f"{name}-{i}.out", "wb")  # noqa: SIM115 - as long as the process
            self.processes.append(
                subprocess.Popen(
                    [*net.inside(i), sys.executable, "-c", AT, net.address(i) if together else "", *words],
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
        self._folder, self._name = folder, name

    def lines(self) -> list[list[dict[str, float]]]:
        return [read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else [] for run in self.runs]

    def wait(self, steps: int, seconds: float = 600) -> None:
        """Until all runs have so many steps; 0: until all have ended."""
        deadline = time.monotonic() + seconds
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes) or time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
                said = (self._folder / f"{self._name}-0.out").read_text(errors="replace")[-3000:]
                raise SystemExit(f"{self._name} failed, exit codes {codes}:\n{said}")
            if (None not in codes) if not steps else all(len(lines) >= steps for lines in self.lines()):
                return
            time.sleep(0.1)


def received(net: Network, index: int) -> int:
    """Bytes that came in over a namespace's link, by the kernel's count."""
    text = subprocess.run([*net.inside(index), "cat", "/proc/net/dev"], capture_output=True, text=True, check=True)
    rows = [line.split(":") for line in text.stdout.splitlines() if ":" in line]
    return sum(int(fields.split()[0]) for name, fields in rows if name.strip() != "lo")


def count(net: Network, folder: Path, name: str, flags: list[str]) -> tuple[float, float]:
    """(bytes a step from slice to slice, seconds a step) of the counted steps."""
    world = World(net, folder, name.replace(" ", "-"), WARM + COUNTED, flags, together=True)
    world.wait(WARM)
    first, begin = len(world.lines()[0]), received(net, 0)
    world.wait(WARM + COUNTED)
    end = received(net, 0)
    world.wait(0)
    lines = world.lines()[0]
    seconds = (lines[-1]["time"] - lines[WARM - 1]["time"]) / COUNTED
    return (end - begin) / (len(lines) - first), seconds


def sent(folder: Path, kinds: list[str]) -> None:
    print("\nbytes a step from slice to slice, by the kernel's count, protocol and all", flush=True)
    first = None
    with network(2) as net:
        for kind in kinds:
            size, _ = count(net, folder, f"bytes-{kind}", KINDS[kind])
            first = first or size
            print(f"{kind:>16} {size / 1e3:10.1f} kB   {size / first:6.3f}", flush=True)


def throttle(net: Network, rate: float) -> None:
    """Each host sends `rate` bytes a second at most from now on."""
    for index, name in enumerate(net.names):
        device = f"jxi{os.getpid()}-{index}"[:15]
        limit = ["rate", f"{round(rate * 8)}bit", "burst", "64kb", "latency", "400ms"]
        replace = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", *limit]
        subprocess.run(["ip", "netns", "exec", name, *replace], check=True)


SPEED = """
import socket, sys, time
kind, address = sys.argv[1:]
if kind == "take":
    with socket.create_server((address, 9000)) as server:
        taken, _ = server.accept()
        with taken:
            begin, size = time.perf_counter(), 0
            while got := taken.recv(1 << 20):
                size += len(got)
        print(size / (time.perf_counter() - begin))
else:
    for _ in range(100):
        try:
            with socket.create_connection((address, 9000)) as line:
                end = time.perf_counter() + 2
                while time.perf_counter() < end:
                    line.sendall(bytes(1 << 20))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""


def speed(net: Network) -> float:
    """Bytes a second that the link gives to one connection."""
    begin = [sys.executable, "-c", SPEED]
    commands = [[*net.inside(i), *begin, kind, net.address(0)] for i, kind in enumerate(("take", "give"))]
    taker = subprocess.Popen(commands[0], stdout=subprocess.PIPE, text=True)
    subprocess.run(commands[1], check=True)
    return float(taker.communicate(timeout=30)[0])


def throttled(folder: Path, kinds: list[str], rate: float) -> None:
    with network(2) as net:
        whole = speed(net)
        rate = rate * 1e6 or whole / 100
        throttle(net, rate)
        now = speed(net)
        print(f"\nthe link gives {whole / 1e6:.0f} MB/s, throttled {now / 1e6:.2f} (asked for {rate / 1e6:.2f})")
        alone = World(net, folder, "alone", WARM + COUNTED, [], together=False)
        alone.wait(0)
        # Only while both run each has its half of the machine.
        spans = [[line["time"] for line in lines] for lines in alone.lines()]
        begin, end = max(span[WARM - 1] for span in spans), min(span[-1] for span in spans)
        steps = [sum(begin < at <= end for at in span) for span in spans]
        one = (end - begin) / (sum(steps) / 2)
        print(f"{'alone':>16} {one * 1e3:8.1f} ms a step of half the batch, two side by side", flush=True)
        for kind in kinds:
            _, seconds = count(net, folder, f"link-{kind}", KINDS[kind])
            print(f"{kind:>16} {seconds * 1e3:8.1f} ms a step   efficiency {100 * one / seconds:5.1f} %", flush=True)


if __name__ == "__main__":
    main()
