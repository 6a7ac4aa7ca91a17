"""Mixtures and phases as pure functions: every window once per pass, exact weights, exact positions across borders."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.config import Config, DataConfig, ModelConfig, PhaseConfig, SourceConfig, TrainConfig, to_dict
from jaxscale.data.mixture import Proportions, make_references, source_seed
from jaxscale.data.position import changed_order, phase_at_step, phases, row_at_step


def config(steps=100, changes=(), **data):
    data = {"path": "" if "mixture" in data else "a", "sequence": 16, "batch": 4, **data}
    return Config("test", ModelConfig(), steps=steps, data=DataConfig(**data), phases=tuple(changes))


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**9), data=st.data())
def test_proportions_deal_rows_without_gap_or_repeat(weights, start, data):
    consumed = tuple(data.draw(st.integers(0, 1000)) for _ in weights)
    mixture = Proportions(tuple(weights), consumed)
    before = list(mixture.counts(start))
    assert sum(before) - sum(consumed) == start
    for row in range(start, start + 20):
        source, index = mixture[row]
        assert index == before[source]
        before[source] += 1
        assert list(mixture.counts(row + 1)) == before


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, rows=st.integers(1000, 10**7))
def test_realised_weights(weights, rows):
    """Within 1 % of each share, and within a few rows at any time."""
    counts = Proportions(tuple(weights), (0,) * len(weights)).counts(rows)
    for weight, count in zip(weights, counts, strict=True):
        expected = rows * weight / sum(weights)
        assert abs(count - expected) <= len(weights)
        assert abs(count - expected) <= max(0.01 * expected, len(weights))


def test_realised_weights_of_rows_as_read():
    references = make_references([500, 700, 900], [1, 2, 3], Proportions((0.5, 0.3, 0.2), (0, 0, 0)), True)
    borders = [0, 500, 1200, 2100]
    window = np.array([references[r] for r in range(10_000)])
    share = np.histogram(window, borders)[0] / len(window)
    assert np.abs(share - [0.5, 0.3, 0.2]).max() < 0.01 * 0.2
    # Also early on: no source is late by more than a few rows.
    for n in (10, 100, 1000):
        assert np.abs(np.histogram(window[:n], borders)[0] - n * np.array([0.5, 0.3, 0.2])).max() <= 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_window_once_per_pass_in_a_new_order(shuffle):
    references = make_references([37, 53], [5, 6], Proportions((1.0, 2.0), (0, 0)), shuffle)
    by_source = collections.defaultdict(list)
    for row in range(1000):
        window = references[row]
        by_source[window >= 37].append(window)
    for windows, number in ((by_source[False], 37), (by_source[True], 53)):
        passes = [windows[i : i + number] for i in range(0, len(windows) - number, number)]
        assert len(passes) >= 5
        assert all(len(set(one)) == number for one in passes)
        assert len({tuple(one) for one in passes}) == (len(passes) if shuffle else 1)


def test_seeds_follow_content_generation_and_run():
    assert len({source_seed(s, c, g) for s in (0, 1) for c in ("a", "b") for g in (0, 1)}) == 8


def test_first_phase():
    [phase] = phases(config())
    assert (phase.start, phase.row, phase.sequence, phase.batch, phase.generation) == (0, 0, 16, 4, 0)


A, B, C = SourceConfig("a", 1.0), SourceConfig("b", 3.0), SourceConfig("c", 1.0)


def test_phase_table():
    table = phases(
        config(
            mixture=(A, B),
            changes=[
                PhaseConfig(10, batch=8),
                PhaseConfig(20, mixture=(C, A)),
                PhaseConfig(30, mixture=(B, A)),
                PhaseConfig(40, sequence=32, batch=2),
                PhaseConfig(50, sequence=16),
            ],
        )
    )
    assert [p.row for p in table] == [0, 40, 120, 200, 280, 300]
    assert [(p.sequence, p.batch) for p in table] == [(16, 4), (16, 8), (16, 8), (16, 8), (32, 2), (16, 2)]
    assert [p.generation for p in table] == [0, 0, 0, 0, 1, 2]
    assert table[1].consumed == (10, 30)  # 40 rows at 1 : 3
    assert table[2].consumed == (0, 30)  # c is new, a went on to 10 + 20
    assert table[3].consumed == (90, 70)  # b where it paused, a 30 + 40
    assert table[4].consumed == table[5].consumed == (0, 0)  # windows of another length: new passes
    assert [s.path for s in table[4].sources] == ["b", "a"]


CHANGES = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.sampled_from([0, 4, 8, 12]),
        st.sampled_from([0, 16, 32]),
        st.sampled_from([(), (A, B), (B, C), (C,)]),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(changes=CHANGES)
def test_positions_across_borders(changes):
    start, made = 0, []
    for gap, batch, sequence, mixture in changes:
        start += gap
        made.append(PhaseConfig(start, sequence, batch, mixture))
    table = phases(config(mixture=(A, B), changes=made))
    row = 0
    drawn = collections.Counter()  # by (generation, source): what a reader from the start has taken
    for step in range(start + 10):
        phase = phase_at_step(table, step)
        assert row_at_step(table, step) == row
        for r in range(row, row + phase.batch):
            source, index = phase.proportions[r - phase.row]
            key = (phase.generation, phase.sources[source].path)
            assert index == drawn[key], "a window was repeated or dropped at a border"
            drawn[key] += 1
        row += phase.batch


def test_what_may_change_on_a_resume():
    """Paths, what comes later, and everything that decides no row."""
    mixture = (SourceConfig("a", 0.7), SourceConfig("b", 0.3))
    base = Config("t", ModelConfig(), data=DataConfig(mixture=mixture), phases=(PhaseConfig(10, batch=16),))

    def changed(step, **changes):
        return changed_order(to_dict(base), to_dict(dataclasses.replace(base, **changes)), step)

    assert changed(5) == []
    assert changed(5, phases=(PhaseConfig(5, sequence=512),), steps=7, train=TrainConfig(z_loss=1e-4)) == []
    moved = tuple(dataclasses.replace(source, path="elsewhere/" + source.path) for source in mixture)
    assert changed(5, data=DataConfig(mixture=moved)) == []
    assert changed(11, phases=()) == ["phases: [[10, 0, 16, []]] -> []"]
    assert changed(5, seed=1) == ["seed: 0 -> 1"]
    assert changed(5, train=TrainConfig(microbatches=2)) == ["train.microbatches: 1 -> 2"]
    assert changed(5, data=DataConfig(mixture=mixture, sequence=64)) == ["data.sequence: 256 -> 64"]
    heavier = (mixture[0], dataclasses.replace(mixture[1], weight=0.6))
    assert changed(5, data=DataConfig(mixture=heavier)) == ["data.mixture weights: [0.7, 0.3] -> [0.7, 0.6]"]
