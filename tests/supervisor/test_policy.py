"""The policy table: every row decides what it says, every evidence has a row, and survivors pay for nothing."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscale.audit
import jaxscale.checkpoint.restore
import jaxscale.commands.parse
import jaxscale.generate.sample
import jaxscale.mesh_file
import jaxscale.run_directory  # noqa: F401
from jaxscale.config import ConfigError
from jaxscale.supervisor.budget import History, Mark
from jaxscale.supervisor.causes import CANNOT_START, cause_of
from jaxscale.supervisor.domains import group
from jaxscale.supervisor.evidence import (
    SECTIONS,
    AgentRefused,
    EpochHostLost,
    HostLost,
    PhaseExpired,
    ShardRejected,
    WorkerError,
    WorkerExit,
    WorkerHung,
)
from jaxscale.supervisor.policy import (
    RULES,
    PolicyConfig,
    Replace,
    Retry,
    Shrink,
    Situation,
    Stop,
    Wait,
    decide,
    welcome,
)
from jaxscale.supervisor.worlds import Host, Request, plan

HOSTS = tuple(Host(f"host-{i}", i // 2) for i in range(4))
SLICES = {host.name: host.slice for host in HOSTS}
REQUEST = Request(2, 2, 1, {"data": 2, "fsdp": 2})
WORLD = plan(REQUEST, HOSTS)
SPARE = Host("spare-0", None)


def situation(step=50, spares=(), world=WORLD, request=REQUEST):
    return Situation(world, tuple(spares), request, Mark(step, float(step)))


def killed(index, number=9, **more):
    more = {"section": "step", "step": 50, **more}
    return WorkerExit(f"host-{index}", index, 1, signal=number, **more)


def ended(index, code=1, name="", text="", **more):
    more = {"section": "step", "step": 50, **more}
    return WorkerExit(f"host-{index}", index, 1, code, None, name, text, **more)


def raised(index, name="ValueError", text="loss is a string", **more):
    more = {"section": "step", "step": 50, **more}
    return WorkerError(f"host-{index}", index, 1, name, text, **more)


def reset(index):
    return raised(index, "JaxRuntimeError", "Gloo all-reduce failed: Connection reset by peer", collective=True)


def hung(index, section="step", step=50):
    return WorkerHung(f"host-{index}", index, 1, section, step, 2.0, 1.0)


def stopped(index, section):
    return dataclasses.replace(hung(index, section), stopped=True)


def lost(index):
    return HostLost(f"host-{index}", 1, 2.0)


def run(*failures, steps=(), spares=(), config=None, world=WORLD, request=REQUEST):
    """Decisions on failures that follow each other. steps: how far training had come at each; default no progress."""
    history, decisions = History(), []
    for index, evidence in enumerate(failures):
        seen = evidence if isinstance(evidence, tuple) else (evidence,)
        here = situation(steps[index] if steps else 50, spares, world, request)
        decisions.append(decide(group(seen, SLICES), history, here, config))
        history = decisions[-1].history
    return decisions


def rows(*args, **kwargs):
    return [(d.rule, d.fault_class, type(d.action)) for d in run(*args, **kwargs)]


KILLED = ("killed", "recoverable", Retry)

# Every row: failures that follow each other without progress -> what the last of them leads to.
ROWS = {
    "code cannot start": [
        ([ended(0, 1, "ModuleNotFoundError", "No module named 'grain'", section="start", step=0)], Stop),
        ([raised(0, "SyntaxError", "invalid syntax", section="start", step=0)], Stop),
        ([raised(0, "jaxscale.config.ConfigError", "steps", section="restore", step=0)], Stop),
        ([raised(0, "MeshError", "no", section="compile", step=0)], Stop),
        ([ended(0, 2, section="start", step=0)], Stop),
    ],
    "same error twice": [
        ([raised(0), raised(3)], Stop),
        ([raised(0), ended(2, 1, "ValueError", "loss is a string")], Stop),
        ([ended(0, 1), ended(1, 1)], Stop),
        ([raised(0), lost(2), raised(0)], Stop),  # what happened in between was no progress
    ],
    "same crash again and again": [([killed(0, 11), killed(1, 11), killed(2, 11)], Stop)],
    "too often without progress": [
        ([killed(0, out_of_memory=True)] * 2, Stop),
        ([raised(0, "XlaRuntimeError", "RESOURCE_EXHAUSTED: 1 GB"), raised(1, "MemoryError", "", step=49)], Stop),
        ([raised(0, "BrokenPipeError", section="data")] * 4, Stop),
        ([(reset(0), reset(1))] * 4, Stop),
        ([raised(i % 4, text=text) for i, text in enumerate("abcde")], Stop),
        ([PhaseExpired(1, "FORMING", 9.0)] * 9, Stop),
    ],
    "host lost": [([lost(0)], Shrink), ([(lost(0), reset(1), killed(2))], Shrink)],
    "second strike of a host": [
        ([killed(1), killed(1, step=51)], Shrink),
        ([killed(1), hung(1)], Shrink),
        ([PhaseExpired(1, "FORMING", 9.0, ("host-1",))] * 2, Shrink),
        ([AgentRefused("host-1", 1, "busy")] * 2, Shrink),
        ([raised(1, text="one"), raised(1, text="another")], Shrink),
    ],
    "killed": [([killed(1)], Retry), ([(killed(1), reset(0), hung(3))], Retry), ([killed(0), killed(1)], Retry)],
    "hung": [([hung(1)], Retry), ([stopped(1, "data")], Retry), ([tuple(hung(i) for i in range(4))] * 2, Retry)],
    "out of memory": [([killed(0, out_of_memory=True)], Retry), ([ended(0, 137, out_of_memory=True)], Retry)],
    "error": [([raised(0)], Retry), ([ended(0, 1)], Retry), ([raised(0), raised(1, text="another")], Retry)],
    "ended early": [([ended(0, 0)], Retry), ([ended(0, 75)], Retry)],
    "coordination service": [
        ([EpochHostLost("host-0", 1, signal=9)] * 3, Retry),
        ([(EpochHostLost("host-0", 1, signal=9), *(killed(i, 6) for i in range(4)))], Retry),
    ],
    "data worker": [
        ([raised(0, "RuntimeError", "Grain worker process 12 died", section="data")] * 3, Retry),
        ([hung(0, "data")], Retry),
    ],
    "collective": [([(reset(0), reset(1))] * 3, Retry)],
    "damaged shard": [([ShardRejected("host-0", 1, "memory", 49, "params/w", "0:8", "digest")] * 3, Retry)],
    "refused": [([AgentRefused("host-1", 1, "busy")], Retry)],
    "took too long": [
        ([PhaseExpired(1, "RESTORING", 9.0)] * 8, Retry),
        ([PhaseExpired(1, "FORMING", 9.0, ("host-1",))], Retry),
    ],
}


@pytest.mark.parametrize(
    ("rule", "failures", "action"), [(rule, *case) for rule, cases in ROWS.items() for case in cases]
)
def test_each_row_decides_what_it_says(rule, failures, action):
    name, fault_class, kind = rows(*failures)[-1]
    assert (name, kind) == (rule, action)
    assert fault_class == next(r.fault_class for r in RULES if r.name == rule)


def test_every_row_is_tested():
    assert list(ROWS) == [rule.name for rule in RULES]


def everything():
    """Every kind of evidence in every section."""
    for section in SECTIONS:
        here = {"section": section, "step": 3}
        for number in (6, 9, 11, 15):
            yield killed(0, number, **here)
        yield killed(0, out_of_memory=True, **here)
        for code in (0, 1, 2, 75, 134, 137, 255):
            yield ended(0, code, **here)
        for name in ("ValueError", "ImportError", "ConfigError", "OSError", "MemoryError", "KeyboardInterrupt", "X"):
            yield raised(0, name, **here)
            yield ended(0, 1, name, **here)
        yield raised(0, "JaxRuntimeError", "Gloo", collective=True, **here)
        yield ended(0, 1, "JaxRuntimeError", "Gloo", collective=True, **here)
        yield hung(0, section)
    for state in ("FORMING", "RESTORING", "WARMING", "RUNNING", "FENCING", "DECIDING", "DRAINING", "ANYTHING"):
        yield PhaseExpired(1, state, 9.0)
        yield PhaseExpired(1, state, 9.0, ("host-1", "host-2"))
    yield lost(0)
    yield AgentRefused("host-0", 1, "another version")
    yield ShardRejected("host-0", 1, "peer", 3, "params/w", "0:8", "digest")
    yield EpochHostLost("host-0", 1, exit_code=1)


EVERYTHING = list(everything())


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig(on_loss="wait")])
@pytest.mark.parametrize("spares", [(), (SPARE,)])
def test_every_evidence_in_every_section_gets_an_action_and_an_end(spares, config):
    for evidence in EVERYTHING:
        decisions = run(*[evidence] * 12, spares=spares, config=config)
        assert decisions[0].cause == cause_of(evidence)
        # Nothing is tried forever without progress: in the end the run stops, or somebody leaves it.
        assert not isinstance(decisions[-1].action, Retry), evidence


def test_what_progress_separates_is_forgiven():
    far = range(0, 4000, 100)
    for evidence in (killed(1), raised(0), hung(2), reset(3), PhaseExpired(1, "WARMING", 9.0, ("host-1",))):
        actions = {kind for _, _, kind in rows(*[evidence] * 40, steps=list(far))}
        assert actions == {Retry}


def test_six_hundred_kills_with_ten_steps_between_them_never_end_a_run():
    failures = [killed(i % 4, 9, step=10 * i) for i in range(600)]
    steps = [10 * i for i in range(600)]
    assert set(rows(*failures, steps=steps)) == {KILLED}


def test_a_spare_is_taken_before_the_world_gets_smaller():
    replaced = run(lost(0), spares=[SPARE])[0].action
    assert replaced == Replace((("host-0", "spare-0"),))
    second = run(killed(1), killed(1, step=51), spares=[SPARE])[1].action
    assert second == Replace((("host-1", "spare-0"),))
    assert isinstance(run((lost(0), lost(1)), spares=[SPARE])[0].action, Shrink)


def test_a_lost_slice_leaves_whole():
    decision = run((lost(2), lost(3), reset(0)))[0]
    assert decision.action.hosts == ("host-2", "host-3")
    assert decision.action.slices == (1,)
    assert decision.action.world.names == ("host-0", "host-1")
    assert decision.hosts == ("host-2", "host-3")


def test_a_lost_host_takes_its_slice_along_and_in_one_slice_only_itself():
    assert run(lost(0))[0].action.world.names == ("host-2", "host-3")
    request = Request(1, 4, 1, {"data": 1, "fsdp": 4})
    world = plan(request, [dataclasses.replace(h, slice=0) for h in HOSTS])
    action = run(lost(0), world=world, request=request)[0].action
    assert action.world.names == ("host-1", "host-2", "host-3")
    assert action.slices == ()


def test_a_recipe_may_wait_and_what_cannot_shrink_has_to():
    wait = PolicyConfig(on_loss="wait")
    assert run(lost(0), config=wait)[0].action == Wait(("host-0",))
    assert isinstance(run(lost(0), spares=[SPARE], config=wait)[0].action, Replace)
    least = dataclasses.replace(REQUEST, least_hosts=4)
    assert run(lost(0), request=least)[0].action == Wait(("host-0",))
    # A host that is only suspicious is no reason to stand still.
    assert isinstance(run(killed(1), killed(1, step=51), config=wait)[1].action, Retry)


def test_losing_hosts_is_never_too_often():
    # Each loss is answered by other members or by waiting, which ends by itself; nothing is tried in vain.
    assert set(rows(*[lost(0)] * 30)) == {("host lost", "recoverable", Shrink)}


def test_spares_that_are_too_few_to_replace_still_make_the_smaller_world_larger():
    request = Request(1, 4, 1, {"data": 1, "fsdp": 4})
    world = plan(request, [dataclasses.replace(h, slice=0) for h in HOSTS])
    action = run((lost(0), lost(1)), spares=[SPARE], world=world, request=request)[0].action
    assert action.world.names == ("host-2", "host-3", "spare-0")


def test_survivors_are_never_charged():
    decision = run((killed(1), reset(0), reset(2), hung(3), killed(2, fenced=True)))[0]
    assert decision.history.hosts.keys() == {"host-1"}
    assert decision.hosts == ("host-1",)
    assert run((reset(0), reset(1)))[0].history.hosts == {}
    assert run(EpochHostLost("host-0", 1, signal=9))[0].history.hosts == {}


def test_no_host_pays_for_what_all_of_them_raise():
    assert run(tuple(raised(i) for i in range(4)))[0].history.hosts == {}
    assert run(tuple(raised(i) for i in range(3)))[0].history.hosts.keys() == {"host-0", "host-1", "host-2"}


def test_the_worst_of_two_causes_decides_and_both_are_charged():
    decision = run((killed(0), lost(2)))[0]
    assert decision.rule == "host lost"
    assert decision.action.hosts == ("host-2",)
    assert decision.history.hosts.keys() == {"host-0", "host-2"}
    assert decision.history.causes.keys() == {"host", "signal"}


def test_a_struck_host_leaves_together_with_a_lost_one():
    decision = run(killed(3), (killed(3, step=51), lost(2)))[1]
    assert decision.action.hosts == ("host-2", "host-3")
    assert decision.action.slices == (1,)


DOUBLED = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


def test_the_first_retry_is_at_once_and_then_it_waits_longer_and_longer():
    waits = [d.action.wait_seconds for d in run(*[PhaseExpired(1, "FORMING", 9.0)] * 8)]
    assert waits[0] == 0.0
    assert all(least <= wait <= 1.2 * least for least, wait in zip(DOUBLED, waits[1:], strict=True))
    assert len({round(wait / least, 6) for least, wait in zip(DOUBLED, waits[1:], strict=True)}) == len(DOUBLED)
    # Each phase has its own count.
    other = run(PhaseExpired(1, "FORMING", 9.0), PhaseExpired(1, "FORMING", 9.0), PhaseExpired(1, "RESTORING", 9.0))
    assert other[-1].action == Retry(0.0)


def test_a_stop_tells_what_happened_with_the_traceback_last():
    trace = "Traceback (most recent call last):\n  in loss\nValueError: loss is a string\n"
    failures = [tuple(raised(i, traceback=trace) for i in range(4))] * 2
    stop = run(*failures)[1].action
    lines = stop.text.splitlines()
    assert lines[0].startswith("same error twice: worker of host-0 raised ValueError in step after 50 updates: loss is")
    assert len(stop.evidence) == 4
    assert stop.text.endswith("ValueError: loss is a string")
    assert stop.text.count("Traceback") == 1


def test_a_host_is_welcome_again_when_progress_has_paid_its_strikes():
    history = run(killed(1), killed(1, step=51))[1].history
    assert not welcome("host-1", history, Mark(50, 50.0))
    assert not welcome("host-1", history, Mark(69, 50.0))
    assert welcome("host-1", history, Mark(70, 50.0))
    assert welcome("host-0", history, Mark(50, 50.0))
    assert welcome("host-0", run(lost(0))[0].history, Mark(50, 50.0))  # lost once: it may come back


def test_only_our_own_killing_is_nothing_to_decide():
    with pytest.raises(ValueError, match="the group has no causes"):
        decide(group([killed(0, fenced=True)], SLICES), History(), situation())


def test_all_config_errors_are_known_to_be_final():
    def below(kind):
        return {kind.__name__}.union(*(below(sub) for sub in kind.__subclasses__()))

    ours = {name for name in below(ConfigError) if not name.startswith("_")}
    assert ours <= CANNOT_START


def test_an_error_before_the_first_step_is_not_mistaken_for_one_in_it():
    assert rows(raised(0, "ImportError", section="step"))[0] == ("error", "recoverable", Retry)
    for section in ("step", "compile"):  # once it runs, 2 is an exit code like others
        assert rows(ended(0, 2, section=section))[0] == ("error", "recoverable", Retry)


GROUPS = st.lists(st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=4, unique=True), max_size=12)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.lists(st.integers(0, 30), min_size=12, max_size=12), st.booleans())
def test_any_sequence_of_failures_is_decided(groups, progress, spare):
    steps = [sum(progress[: i + 1]) for i in range(len(groups))]
    spares = [SPARE] if spare else []
    for decision in run(*map(tuple, groups), steps=steps, spares=spares):
        assert (decision.fault_class == "fatal") == isinstance(decision.action, Stop)
        charged = decision.history.hosts.keys()
        assert charged <= set(WORLD.names)
        if isinstance(decision.action, Replace):
            assert {old for old, _ in decision.action.pairs} <= set(WORLD.names)
        if isinstance(decision.action, Shrink):
            assert not set(decision.action.hosts) & set(decision.action.world.names)
