"""Which steps stay, and why: what must always hold, whatever there is."""

from hypothesis import example, given
from hypothesis import strategies as st

from jaxscale.checkpoint.retention import DAY, LEAST, Facts, Rules, Step, decide, squeezed

NOW = 100 * DAY
STEP = st.builds(
    Step,
    st.integers(0, 30),
    st.booleans(),
    st.floats(0, NOW),
    st.none() | st.floats(0, 9, allow_nan=False),
)
STEPS = st.lists(STEP, max_size=12, unique_by=lambda one: one.step)
RULES = st.builds(Rules, st.integers(1, 6), st.sampled_from([0.0, 1.0, 30.0, 99.0]), st.sampled_from([0, 1, 4, 10]))
SOME = st.sets(st.integers(0, 30), max_size=4)
FACTS = st.builds(
    lambda versions, holds, refused: Facts(NOW, {s: ["a"] for s in versions}, {s: ["b"] for s in holds}, refused),
    SOME,
    SOME,
    SOME,
)
NEWEST = st.none() | st.integers(0, 30)


def goes(steps, rules, facts, newest=None):
    return {step for step, because in decide(steps, rules, facts, newest).items() if not because}


@given(STEPS, RULES, FACTS, NEWEST)
def test_what_must_never_go(steps, rules, facts, newest):
    gone = goes(steps, rules, facts, newest)
    good = sorted(one.step for one in steps if one.is_sealed and one.step not in facts.refused)
    upto = [step for step in good if newest is None or step <= newest]
    assert gone.isdisjoint(upto[-rules.keep :]), "the newest good ones"
    assert gone.isdisjoint(facts.holds), "read"
    assert gone.isdisjoint(facts.versions), "tagged"
    if rules.milestones:
        assert gone.isdisjoint(step for step in good if step and step % rules.milestones == 0), "milestones"
    if not upto:
        assert not gone, "without a good step nothing goes"
    losses = [(one.loss, one.step) for one in steps if one.step in good and one.loss is not None]
    if losses:
        assert min(losses)[1] not in gone, "the best evaluation"
    if rules.keep_days:
        assert gone.isdisjoint(
            one.step for one in steps if one.step in good and NOW - one.time <= rules.keep_days * DAY
        ), "young"
    if newest is not None:
        assert not any(step > newest for step in gone), "training comes by there"


@given(STEPS, RULES, FACTS, NEWEST)
def test_nothing_else_stays(steps, rules, facts, newest):
    """An independent account of it, for steps that are good and not beyond the newest."""
    gone = goes(steps, rules, facts, newest)
    good = sorted((one for one in steps if one.is_sealed and one.step not in facts.refused), key=lambda one: one.step)
    upto = [one for one in good if newest is None or one.step <= newest]
    best = min((one for one in good if one.loss is not None), key=lambda one: (one.loss, one.step), default=None)
    for one in upto[: -rules.keep]:
        is_wanted = (
            one is best
            or one.step in facts.holds
            or one.step in facts.versions
            or (one.step > 0 and rules.milestones > 0 and one.step % rules.milestones == 0)
            or (rules.keep_days > 0 and NOW - one.time <= rules.keep_days * DAY)
        )
        assert (one.step in gone) is not is_wanted
    for one in steps:
        is_claimed = one.step in facts.holds or one.step in facts.versions
        if one not in good and upto and one.step < upto[-rules.keep :][0].step and not is_claimed:
            assert one.step in gone, "what cannot be read is no milestone"


@given(STEPS, RULES, FACTS, NEWEST)
def test_damage_pushes_nobody_out(steps, rules, facts, newest):
    """Without its unreadable steps a run keeps the same good ones."""
    good = [one for one in steps if one.is_sealed and one.step not in facts.refused]
    if newest is None:
        kept = {one.step for one in good} - goes(steps, rules, facts)
        assert kept == {one.step for one in good} - goes(good, rules, facts)


def sealed(*steps):
    return [Step(step) for step in steps]


def test_what_expires():
    facts = Facts()
    assert goes(sealed(1, 2, 3), Rules(2), facts, 3) == {1}
    assert goes([Step(1), Step(2, is_sealed=False), Step(3)], Rules(2), facts, 3) == set()
    assert goes(sealed(1, 2, 3, 9), Rules(1), facts, 3) == {1, 2}, "9 was refused: it pushes nobody out"
    assert goes([Step(1, is_sealed=False), Step(2, is_sealed=False)], Rules(1), facts, 2) == set()


def test_refused_steps_do_not_count_and_go():
    assert goes(sealed(2, 4, 6), Rules(2), Facts(refused=[4]), 6) == {4}, "2 is the second newest that can be read"
    assert goes(sealed(2, 4, 5, 6), Rules(2), Facts(refused=[6]), 5) == {2}, "6 may come again"
    assert goes(sealed(2, 4, 6, 7), Rules(3), Facts(refused=[6]), 7) == {6}


def test_damaged_steps_go_when_good_ones_are_newer():
    steps = [Step(1, is_sealed=False), Step(2), Step(3, is_sealed=False), Step(4)]
    assert goes(steps, Rules(2), Facts()) == {1}
    assert goes(steps, Rules(1), Facts()) == {1, 2, 3}


def test_reasons_are_told():
    steps = [Step(10, loss=1.0), Step(20), Step(30, loss=2.0)]
    facts = Facts(versions={10: ["v1 (production)"]}, holds={20: ["a start (pid 7)"]})
    assert decide(steps, Rules(1, milestones=20), facts) == {
        10: ("version v1 (production)", "best evaluation (1.0000)"),
        20: ("held by a start (pid 7)", "milestone of 20 steps"),
        30: ("newest",),
    }


@given(st.integers(1, 12), st.lists(st.integers(1, 100), max_size=12), st.integers(0, 500))
@example(10, [10] * 10, 0)
def test_a_full_disk_keeps_fewer_and_never_too_few(keep, sizes, free):
    found = squeezed(keep, sizes, free)
    assert min(keep, LEAST) <= found <= keep
    if sizes and found < keep:
        assert free + sum(sizes[found + 1 : keep]) < 2 * sizes[0], "one more would not have left enough room"
    if found > LEAST:
        assert not sizes or free + sum(sizes[found:keep]) >= 2 * sizes[0]
