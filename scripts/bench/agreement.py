"""What it costs a step to ask whether any process of a world wants to stop: ours, and other ways to ask.

    python scripts/bench/agreement.py [--steps 2000] [--rounds 5]

A world of 2 processes over loopback, one CPU device each. The ways take turns; medians of rounds are printed, in
microseconds a step on process 0, and their ratio to ours.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

from jaxscale.testing.processes import run_world

WAYS = {
    "ours": "a look at a variable (`world.Agreement`)",
    "polled": "reading a key of the store (`key_value_try_get`)",
    "barrier": "a barrier of the coordination service",
    "allgather": "`multihost_utils.process_allgather` of a flag",
}
EXPENSIVE = 10
"""The others are asked this many times less often."""


def member(place: str, steps: int, rounds: int) -> None:
    """One process of the world; process 0 prints the medians as JSON."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxscale import world as world_library
    from jaxscale.train.stop import AgreedStop, StopFlag

    with world_library.membership(world_library.parse_distributed(place)) as world:
        client = world_library._state().client
        agreement = world_library.Agreement(world)
        stop = AgreedStop(StopFlag(), agreement)
        number = iter(range(10**9))

        def polled() -> None:
            try:
                client.key_value_try_get("jaxscale/bench/stop")
            except jax.errors.JaxRuntimeError:
                return  # not set: nobody asks

        ways: dict[str, Callable[[], object]] = {
            "ours": stop.requested,
            "polled": polled,
            "barrier": lambda: client.wait_at_barrier(f"jaxscale/bench/{next(number)}", 60_000),
            "allgather": lambda: multihost_utils.process_allgather(np.zeros(1, np.int32)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, ask in ways.items():
                count = steps if name == "ours" else max(1, steps // EXPENSIVE)
                world_library.barrier(world, name)
                start = time.perf_counter()
                for _ in range(count):
                    ask()
                times[name] += [(time.perf_counter() - start) / count * 1e6] * (turn > 0)  # the first one warms up
        agreement.close()
        if world.is_writer:
            print(json.dumps({name: statistics.median(values) for name, values in times.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--member", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        member(options.member, options.steps, options.rounds)
        return
    given = ["--steps", str(options.steps), "--rounds", str(options.rounds)]
    outcomes = run_world([__file__, "--member", "{distributed}", *given], processes=2)
    medians = json.loads(next(line for line in outcomes[0].stdout.splitlines() if line.startswith("{")))
    print(f"{'us a step, world of 2':<56}{'measured':>10}{'ratio to ours':>15}")
    for name, what in WAYS.items():
        print(f"{what:<56}{medians[name]:>10.1f}{medians[name] / medians['ours']:>15.0f}")


if __name__ == "__main__":
    sys.exit(main())
