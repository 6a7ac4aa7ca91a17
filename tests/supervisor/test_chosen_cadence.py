"""A real run that is not told how often to save into memory: it measures, decides, and does it."""

import itertools
from pathlib import Path

import pytest

from jaxscale.supervisor.cadence import FIRST_STEPS
from jaxscale.testing.cluster import launched

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"


@pytest.mark.slow
def test_the_cadence_follows_from_measured_cost(tmp_path):
    with launched(NANO, tmp_path / "run", "--slices", 2, "--hosts-per-slice", 1, "--steps", 300) as run:
        assert run.finish(300) == 0
        changes = run.events("cadence")
        sealed = [event["step"] for event in run.events("sealed") if event["tier"] == "memory"]
    assert changes, "nothing was decided"
    assert changes[0]["every"] > FIRST_STEPS, "a copy costs milliseconds, a failure comes once an hour"
    bounds = [*((change["since"], change["every"]) for change in changes), (301, 0)]
    assert all(step % FIRST_STEPS == 0 for step in sealed if step < bounds[0][0])
    for (since, every), (until, _) in itertools.pairwise(bounds):
        later = [step for step in sealed if since <= step < until]
        assert [b - a for a, b in itertools.pairwise(later)] == [every] * max(0, len(later) - 1)
