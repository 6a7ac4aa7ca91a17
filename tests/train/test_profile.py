"""A trace holds whole steps: the devices are waited for before it starts and before it stops."""

import jax
import pytest

from jaxscale.train.profile import Profiler, note, steps_to_trace


@pytest.fixture(name="said")
def _said(monkeypatch):
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: said.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    return said


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_it_waits_before_it_starts_and_stops(steps, said, tmp_path):
    with Profiler((2, 3), tmp_path, lambda: said.append("wait")) as profiler:
        for step in range(steps):
            profiler.before(step)
            said.append(step + 1)
    traced, after = range(2, min(steps, 3) + 1), range(4, steps + 1)
    assert said == [1, "wait", "start", *traced, "wait", "stop", *after]


def test_after_an_error_it_stops_without_waiting(said, tmp_path):
    profiler = Profiler((1, 9), tmp_path, lambda: said.append("wait"))
    profiler.before(0)
    profiler.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert said == ["wait", "start", "stop"]


@pytest.mark.parametrize(
    ("profile", "start", "steps", "expected"),
    [
        ("", 0, 100, None),
        ("early", 0, 100, (10, 13)),
        ("early", 0, 12, (9, 12)),
        ("early", 0, 4, (1, 4)),
        ("early", 0, 1, (1, 1)),
        ("early", 60, 100, (70, 73)),
        ("early", 60, 70, (67, 70)),
        ("early", 60, 61, (61, 61)),
        ("early", 60, 60, None),
        ("10:13", 0, 100, (10, 13)),
        ("10:13", 11, 100, (10, 13)),
        ("10:13", 13, 100, None),
    ],
)
def test_early_steps_are_those_of_this_start(profile, start, steps, expected):
    assert steps_to_trace(profile, start, steps) == expected
    assert bool(note(profile, start, steps)) == (profile == "10:13" and start == 13)


def test_processes_of_one_host_have_folders_of_their_own(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", folders.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    for count, index in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with Profiler((1, 1), tmp_path, lambda: None) as profiler:
            profiler.before(0)
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == [
        "profile",
        "profile/process-0",
        "profile/process-1",
    ]
