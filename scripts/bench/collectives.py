"""The cost model of all-reduces against real ones: two processes in network namespaces, a link of limited bandwidth.

    python scripts/bench/collectives.py [--rates 200 20] [--rounds 5]

For each rate (MB/s; 0 = as it is) `jaxscale bench collectives` measures all-gathers over the link and fits latency and
bandwidth; then all-reduces of other sizes are measured, and compared with what the model says of a ring and of a tree.
Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from jaxscale.plan.collective_costs import Link, best_flat, ring, tree
from jaxscale.testing.namespaces import Network, network, unavailable

AT = """
import sys
from jaxscale import cli, jax_private
jax_private.gloo_at(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""
"""Gloo would listen where the host's name leads, which is the namespace's own loopback."""
FIT, TEST = (4096, 65536, 1048576), (16384, 262144, 2097152)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[200.0, 20.0], help="MB/s")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if missing := unavailable():
        raise SystemExit(f"namespaces cannot be made here: {missing}")
    with tempfile.TemporaryDirectory(prefix="jaxscale-collectives-") as folder, network(2) as net:
        for rate in options.rates:
            if rate:
                limit(net, rate * 1e6)
            found = measured(net, Path(folder), "all-gather", FIT, options.rounds)
            link = Link(found["latency_seconds"], found["bandwidth_bytes_per_second"])
            print(f"\n{rate:g} MB/s: fitted latency {link.latency * 1e3:.3f} ms, {link.bandwidth / 1e6:.2f} MB/s")
            print(f"{'bytes':>12}{'measured ms':>14}{'ring':>10}{'tree':>10}   chosen, error")
            again = measured(net, Path(folder), "all-reduce", TEST, options.rounds)
            for nbytes, took in again["measured"]["all-reduce"]:
                name, seconds = best_flat(nbytes, 2, link)
                ways = f"{ring(nbytes, 2, link) * 1e3:>10.2f}{tree(nbytes, 2, link) * 1e3:>10.2f}"
                print(
                    f"{nbytes:>12,}{took * 1e3:>14.2f}{ways}   {name}, {100 * (seconds / took - 1):+.0f} %", flush=True
                )


def limit(net: Network, rate: float) -> None:
    """Each host sends `rate` bytes a second at most from now on."""
    for index, name in enumerate(net.names):
        device = f"jxi{os.getpid()}-{index}"[:15]
        words = ["rate", f"{round(rate * 8)}bit", "burst", "64kb", "latency", "400ms"]
        replace = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", *words]
        subprocess.run(["ip", "netns", "exec", name, *replace], check=True)


def measured(net: Network, folder: Path, kind: str, sizes: tuple[int, ...], rounds: int) -> dict[str, dict]:
    """The table of axis `data` of a measurement by two processes."""
    out = folder / "links.toml"
    started = []
    for i in range(2):
        place = ["--distributed", f"{net.address(0)}:{net.port},2,{i}", "--devices", "2", "--mesh.data", "2"]
        what = ["--kinds", kind, "--sizes", *map(str, sizes), "--rounds", str(rounds), "--out", str(out)]
        command = [*net.inside(i), sys.executable, "-c", AT, net.address(i), "bench", "collectives", *place, *what]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=300)[0].decode(errors="replace") for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(said))
    return tomllib.loads(out.read_text())["data"]


if __name__ == "__main__":
    main()
