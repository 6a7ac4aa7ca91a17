#!/usr/bin/env python3
"""Parallelisms against one device and against their closed forms, on 8 emulated devices.

    python scripts/bench/parallel.py                          schedules and steps
    python scripts/bench/parallel.py --rows parity            every combination of axes and schedules: long, resumable
    python scripts/bench/parallel.py --rows parity --part 1/4 a quarter of them
    python scripts/bench/parallel.py --rows parity --recipe moe_parity        the same of a model with experts

    schedules   bubble and live activations of each schedule beside the closed form, and its cost in lockstep
    parity      `lm_parity` in float32: gradients of step 1 and losses of 5 steps beside one device; a combination that
                is in the results file (of this commit) is not run again. `moe_parity` is compared at the same number
                of microbatches, since its balance loss is one of microbatches
    steps       seconds of a step with 4 stages and 8 microbatches beside the same devices without stages, rounds
                alternated, medians

Read next: `jaxscale/parallel/schedules.py`.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxscale.audit import AuditError, audit
from jaxscale.axes import AXES
from jaxscale.config import PipelineConfig
from jaxscale.data.corpora import open_corpora
from jaxscale.data.loader import Loader
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.buffers import peak_live
from jaxscale.parallel.costs import OpCosts, asynchronous_cost, bubble, closed_form, lockstep_cost, make_table
from jaxscale.parallel.schedules import SCHEDULES, make_orders, one_at_a_time
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICES = 8
MICROBATCHES = 4
CHUNKS = {"interleaved": 2}


def _parity_module():
    """What the parity tests run: they are no package."""
    spec = importlib.util.spec_from_file_location("parity_run", ROOT / "tests" / "parity" / "parity_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARITY = _parity_module()


def schedules() -> bool:
    """Whether every bubble is the closed form."""
    stages, microbatches = 4, 8
    unit, split, real = OpCosts(1, 0.5, 0.5), OpCosts(1, 1, 1), OpCosts(1, 1, 1, recompute=1)
    print(f"{stages} stages, {microbatches} microbatches; costs with F = 1, B = 2 and recomputation of F")
    print("schedule       bubble  closed form  live activations  lockstep  asynchronous  bubble in lockstep")
    good = True
    for name in SCHEDULES:
        chunks = CHUNKS.get(name, 1)
        table = one_at_a_time(name, stages, microbatches, chunks)
        found, wanted = bubble(table, split if name == "zero-bubble" else unit), closed_form(name, 4, 8, chunks)
        good &= abs(found - wanted) < 1e-9
        best = make_table(name, stages, microbatches, chunks, real)
        alone = asynchronous_cost(make_orders(name, stages, microbatches, chunks), real, chunks)
        print(
            f"{name:<14} {found:.4f}  {wanted:<11.4f}  {peak_live(table)!s:<16}  "
            f"{lockstep_cost(best, real):<8.1f}  {alone:<12.1f}  {bubble(best, real):.3f}"
        )
    return good


def combinations() -> list[tuple[dict[str, int], str]]:
    """(sizes of the axes, schedule): every way to share 8 devices out, with at most 4 stages."""
    found = []
    for exponents in itertools.product(range(4), repeat=len(AXES)):
        sizes = {axis: 2**exponent for axis, exponent in zip(AXES, exponents, strict=True)}
        if sum(exponents) == 3 and sizes["stage"] <= 4:
            found += [(sizes, name) for name in (SCHEDULES if sizes["stage"] > 1 else ("1f1b",))]
    return found


def config_of(sizes: dict[str, int], schedule: str, recipe: str = "lm_parity"):
    chunks = CHUNKS.get(schedule, 1) if sizes["stage"] > 1 else 1
    schedule = schedule if sizes["stage"] > 1 else "1f1b"
    config = PARITY.parity_config("sgd", microbatches=MICROBATCHES, recipe=recipe)
    return dataclasses.replace(config, pipeline=PipelineConfig(schedule, chunks))


def parity(options: argparse.Namespace) -> bool:
    """Whether all combinations that the audit allows agree."""
    head = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = {line["name"]: line for line in map(json.loads, lines) if line["commit"] == commit and "dirty" not in commit}
    part, parts = map(int, options.part.split("/"))
    reference = None
    results, refused = [], 0
    for number, (sizes, schedule) in enumerate(combinations()):
        if number % parts != part - 1:
            continue
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        name += f", {schedule}" if sizes["stage"] > 1 else ""
        name = name if options.recipe == "lm_parity" else f"{options.recipe}: {name}"
        config = config_of(sizes, schedule, options.recipe)
        try:
            audit(config.model.task(config).parameters, sizes, config)
        except AuditError:
            refused += 1
            continue
        if name not in done:
            microbatches = MICROBATCHES if config.model.experts.count else 1
            plain = PARITY.parity_config("sgd", microbatches=microbatches, recipe=options.recipe)
            reference = reference or PARITY.parity_run(plain, {})
            began = time.monotonic()
            found = PARITY.parity_run(config, sizes)
            done[name] = {
                "commit": commit,
                "name": name,
                "gradient": max(_apart(found[p], reference[p]) for p in reference if p.startswith("grad/")),
                "loss": float(np.max(np.abs(found["losses"] / reference["losses"] - 1))),
                "seconds": round(time.monotonic() - began, 1),
            }
            with options.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            jax.clear_caches()
        line = done[name]
        results.append(line)
        print(f"{name:<60} gradient {line['gradient']:.1e}  loss {line['loss']:.1e}", flush=True)
    gradient, loss = (max(line[key] for line in results) for key in ("gradient", "loss"))
    print(
        f"{len(results)} combinations, {refused} refused by the audit; largest difference of a gradient {gradient:.1e} "
    )
    print(f"of its norm (limit 1e-5), of a loss {loss:.1e} (limit 1e-6)")
    return gradient <= 1e-5 and loss <= 1e-6


def _apart(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def steps(options: argparse.Namespace) -> bool:
    """Always true: reports only."""
    sides = {"no stages": ({"fsdp": 4}, "1f1b")}
    sides |= {name: ({"stage": 4}, name) for name in SCHEDULES}
    programs = {}
    for name, (sizes, schedule) in sides.items():
        config = dataclasses.replace(
            config_of({"stage": 1, **sizes}, schedule), remat=PARITY.parity_config(remat="full").remat
        )
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=8))
        mesh = PARITY.mesh_of(sizes)
        with jax.set_mesh(mesh):
            task = config.model.task(config)
            optimizer = make_optimizer(config.optim, task.parameters, config.steps)
            state = jax.jit(lambda c=config, t=task, o=optimizer: init_state(c, t, o))()
            with Loader(config, open_corpora(config), mesh) as loader:
                batch = next(iter(loader))[3]
            began = time.monotonic()
            step = make_step(config, task, optimizer).lower(state, batch, np.int32(0)).compile()
            print(f"{name}: compiled in {time.monotonic() - began:.1f} s", flush=True)
        programs[name] = [mesh, step, state, batch]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, program in programs.items():
            mesh, step, state, batch = program
            with jax.set_mesh(mesh):
                began = time.monotonic()
                state, metrics = step(state, batch, np.int32(0))
                jax.block_until_ready(metrics)
                seconds[name].append(time.monotonic() - began)
            program[2] = state
    real = OpCosts(1, 1, 1, recompute=1)
    base = statistics.median(seconds["no stages"])
    print("side           seconds  to no stages  cost in lockstep to the work of one stage")
    for name in sides:
        middle = statistics.median(seconds[name])
        cost = ""
        if name in SCHEDULES:
            table = make_table(name, 4, 8, CHUNKS.get(name, 1), real)
            cost = f"{lockstep_cost(table, real) / (8 * 4):.3f}"
        print(f"{name:<14} {middle:.4f}   {middle / base:<12.3f}  {cost}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["schedules", "steps"], choices=["schedules", "parity", "steps"])
    parser.add_argument("--results", type=Path, default=ROOT / "runs/bench/parity.jsonl", help="a line per combination")
    parser.add_argument("--recipe", default="lm_parity", choices=["lm_parity", "moe_parity"], help="of parity")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th combination, beginning with the K-th")
    parser.add_argument("--rounds", type=int, default=20, help="of steps")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    good = True
    for row in options.rows:
        print(f"== {row}")
        good &= schedules() if row == "schedules" else parity(options) if row == "parity" else steps(options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
