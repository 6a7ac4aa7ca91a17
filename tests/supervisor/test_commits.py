"""When a memory checkpoint exists: sealed by all, and copied often enough."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor.commits import SEALED_SECONDS, MemoryCommits

MEMBERS = ("a", "b", "c")


def seal_all(commits, step, members=MEMBERS, copies=True):
    for host in members:
        commits.sealed(host, step)
        if copies:
            commits.copied(host, step, "elsewhere")


def test_a_step_is_committed_when_all_have_sealed_it_and_all_copies_are_there():
    commits = MemoryCommits(MEMBERS, 1)
    for host in MEMBERS:
        assert not commits.sealed(host, 10)
    assert not commits.copied("a", 10, "b")
    assert not commits.copied("b", 10, "c")
    assert (commits.committed, commits.decided) == (-1, -1)
    assert commits.copied("c", 10, "a")
    assert (commits.committed, commits.decided) == (10, 10)


def test_copies_may_come_before_the_last_seal():
    commits = MemoryCommits(MEMBERS, 1)
    for host in MEMBERS:
        commits.copied(host, 10, "elsewhere")
    commits.sealed("a", 10)
    commits.sealed("b", 10)
    assert commits.sealed("c", 10)
    assert commits.committed == 10


def test_two_replicas_are_two_different_holders():
    commits = MemoryCommits(("a",), 2)
    commits.sealed("a", 10)
    commits.copied("a", 10, "b")
    commits.copied("a", 10, "b")
    assert commits.committed == -1
    commits.copied("a", 10, "c")
    assert commits.committed == 10


def test_a_world_without_copies_commits_what_is_sealed():
    commits = MemoryCommits(("a",), 0)
    assert commits.sealed("a", 10)
    assert commits.committed == 10


@pytest.mark.parametrize("how", ["skipped", "uncopied"])
def test_a_step_that_cannot_be_whole_is_dropped_and_frees_its_slots(how):
    commits = MemoryCommits(MEMBERS, 1, committed=0)
    commits.sealed("a", 10)
    assert getattr(commits, how)("b", 10)
    assert (commits.committed, commits.decided) == (0, 10)
    seal_all(commits, 10)  # what comes late changes nothing
    assert (commits.committed, commits.decided) == (0, 10)


def test_an_open_step_holds_up_the_later_ones_only_until_one_of_them_is_whole():
    commits = MemoryCommits(MEMBERS, 1)
    commits.sealed("a", 10)
    commits.skipped("a", 20)
    assert commits.decided == -1  # 10 may still come
    seal_all(commits, 30)
    assert (commits.committed, commits.decided) == (30, 30)


def test_a_step_of_somebody_who_is_no_member_does_not_count_as_a_members():
    commits = MemoryCommits(("a", "b"), 0)
    commits.sealed("a", 10)
    commits.sealed("stranger", 10)
    assert commits.committed == -1


def test_the_start_counts_as_committed_and_older_steps_as_decided():
    commits = MemoryCommits(MEMBERS, 1, committed=50)
    seal_all(commits, 40)
    assert (commits.committed, commits.decided) == (50, 50)


def test_the_event_of_a_commit_has_the_sum_of_bytes_and_the_slowest_host_and_is_no_flood():
    commits = MemoryCommits(("a", "b"), 0)
    commits.sealed("a", 10, 100, 0.1, 0.02)
    assert commits.news(0.0) is None
    commits.sealed("b", 10, 50, 0.3, 0.01)
    expected = {"step": 10, "bytes": 150, "seconds": 0.3, "blocked_seconds": 0.02}
    assert commits.news(0.0) == expected
    assert commits.news(9.0) is None  # told already
    seal_all(commits, 20, ("a", "b"))
    assert commits.news(SEALED_SECONDS / 2) is None
    assert commits.news(SEALED_SECONDS)["step"] == 20


STEPS = (10, 20, 30, 40)
OUTCOMES = st.sampled_from(["whole", "whole", "whole", "skipped", "uncopied"])
PLANS = st.fixed_dictionaries(dict.fromkeys(itertools.product(MEMBERS, STEPS), OUTCOMES))
CHOICES = st.lists(st.integers(0, 99), min_size=60, max_size=60)


def reports(plans, choices, replicas):
    """(kind, arguments) as hosts report: of seals and of each holder's copies in the order of steps, interleaved."""
    steps = {host: list(STEPS) for host in MEMBERS}
    copies = {(host, f"holder-{i}"): [] for host in MEMBERS for i in range(max(1, replicas))}
    for choice in choices:
        can = [*(host for host in MEMBERS if steps[host]), *(pair for pair, queue in copies.items() if queue)]
        if not can:
            return
        event = can[choice % len(can)]
        if event in copies:
            yield copies[event].pop(0)
            continue
        step = steps[event].pop(0)
        how = plans[event, step]
        yield ("skipped" if how == "skipped" else "sealed"), (event, step)
        for (host, holder), queue in copies.items():
            if host == event and how == "uncopied":
                queue.append(("uncopied", (host, step)))
            elif host == event and how == "whole" and replicas:
                queue.append(("copied", (host, step, holder)))


@given(PLANS, CHOICES, st.integers(0, 2), st.sampled_from([-1, 0, 15]))
def test_any_history_of_reports(plans, choices, replicas, start):
    """Against what is plain from all reports together."""
    if not replicas:  # nothing is copied then
        plans = {place: how if how == "skipped" else "whole" for place, how in plans.items()}
    commits = MemoryCommits(MEMBERS, replicas, start)
    told = []
    for kind, arguments in reports(plans, choices, replicas):
        before = (commits.committed, commits.decided)
        changed = getattr(commits, kind)(*arguments)
        after = (commits.committed, commits.decided)
        told.append((kind, arguments))
        assert changed == (before != after)
        assert after[0] >= before[0]
        assert after[1] >= before[1]
        assert after[0] <= after[1]
        if after[0] != before[0]:
            for host in MEMBERS:
                assert ("sealed", (host, after[0])) in told
                assert sum(k == "copied" and a[:2] == (host, after[0]) for k, a in told) >= replicas
        for step in STEPS:
            if before[1] < step <= after[1] and step > after[0]:  # dropped
                assert any(k in ("skipped", "uncopied") and a[1] == step for k, a in told)
        assert all(step > commits.decided for step in commits._steps)  # nothing is kept of what is decided
    assert commits.decided == max(STEPS)  # a slot that is never decided can never be written again
    whole = [step for step in STEPS if {plans[host, step] for host in MEMBERS} == {"whole"} and step > start]
    assert commits.committed == max(whole, default=start)


@given(st.lists(st.tuples(st.sampled_from(["sealed", "skipped", "uncopied"]), st.sampled_from(STEPS)), max_size=30))
def test_reports_of_old_steps_and_twice_the_same_never_take_anything_back(events):
    commits = MemoryCommits(("a",), 0)
    best = (-1, -1)
    for kind, step in events:
        getattr(commits, kind)("a", step)
        now = (commits.committed, commits.decided)
        assert now[0] >= best[0]
        assert now[1] >= best[1]
        best = now
