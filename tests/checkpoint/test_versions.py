"""Versions: names that stay, a gate, one production, a way back; and what a model card says."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kept_runs import LOSSES, checkpoints, said
from states import SHAPES, make_mesh, make_record, make_state

from jaxscale.checkpoint import layout, versions
from jaxscale.checkpoint.card import card
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.lineage import digest_of, lineage_of
from jaxscale.checkpoint.locations import Locations
from jaxscale.checkpoint.promotion import PromotionRefused, promoted, retired, rolled_back
from jaxscale.checkpoint.step_copy import StepCopy
from jaxscale.checkpoint.versions import STATES, Evaluation, Registry, Version, fold
from jaxscale.cli import main
from jaxscale.storage.local_store import LocalStore
from jaxscale.testing.checkpoints import flip

NAMES = ("a", "b", "c", "d")


def tagged(name, step=1, loss=2.0, tokens=100, digest="x"):
    evaluation = None if loss is None else {"loss": loss, "tokens": tokens}
    fields = {"name": name, "step": step, "digest": digest, "evaluation": evaluation, "lineage": {}, "time": 0}
    return {"kind": "tagged", **fields}


def moved(moves, back=False):
    return {"kind": "moved", "moves": moves, "back": back}


LOSS = st.none() | st.sampled_from([1.0, 1.1, 1.2, 1.5])
TAGS = st.tuples(*(st.tuples(st.just("tag"), st.just(name), st.integers(1, 4), LOSS) for name in NAMES))
PROMOTE = st.tuples(st.just("promote"), st.sampled_from(NAMES))
ACTIONS = st.lists(
    st.one_of(
        *([PROMOTE] * 5),
        st.tuples(st.just("retire"), st.sampled_from(NAMES)),
        st.tuples(st.just("back")),
        st.tuples(st.just("tag"), st.sampled_from(NAMES), st.integers(1, 4), LOSS),
    ),
    min_size=10,
    max_size=30,
)


@given(TAGS, ACTIONS)
def test_whatever_is_done(tags, actions):
    """At most one is in production; names stay what they are; a retired one comes back by a rollback alone."""
    journal, served = [], []
    some = [("promote", name) for name in "aabb"]  # so that it is not left to chance
    for action in [*tags, *some, *actions]:
        before = fold(journal)
        try:
            match action:
                case ("tag", name, step, loss):
                    journal.append(tagged(name, step, loss))
                case ("promote", name):
                    journal.append(moved(promoted(before, name, 0.2)))
                    if before.versions[name].state == "canary":
                        served.append(name)
                case ("retire", name):
                    journal.append(moved(retired(before, name)))
                case _:
                    journal.append(moved(rolled_back(before), back=True))
                    served.pop()
        except PromotionRefused:
            continue
        now = fold(json.loads(json.dumps(journal)))
        in_production = [one.name for one in now.versions.values() if one.state == "production"]
        assert in_production == served[-1:]
        assert now.production is (now.versions[served[-1]] if served else None)
        for name, was in before.versions.items():
            one = now.versions[name]
            assert (one.step, one.digest, one.evaluation) == (was.step, was.digest, was.evaluation)
            if was.state == "retired" and one.state != "retired":
                assert action == ("back",)
            if one.state in ("canary", "production") and one.state != was.state and action != ("back",):
                assert one.evaluation is not None
                if before.production is not None:
                    assert one.evaluation.loss <= before.production.evaluation.loss + 0.2


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([*NAMES, *STATES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LINES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["tagged", "moved", "other"]) | ANYTHING},
    optional=dict.fromkeys(("name", "step", "digest", "time", "evaluation", "lineage", "moves", "back"), ANYTHING),
)


@given(st.lists(LINES, max_size=6))
def test_no_line_of_a_journal_makes_it_fail(lines):
    good = [tagged("a", 7), moved([["a", "canary"]])]
    found = fold([*lines, *good])
    assert found.versions["a"].state in STATES
    assert isinstance(found.by_step(), dict)
    assert fold([*good, {"kind": "moved", "moves": [["a", "nonsense"]], "back": False}]).versions["a"].state == "canary"


def registry(mine, theirs):
    return fold([tagged("new", 2, *mine), tagged("old", 1, *theirs), moved([["old", "production"]])])


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        ((2.0, 100), (2.0, 100), ""),
        ((2.01, 100), (2.0, 100), ""),
        ((1.0, 100), (2.0, 100), ""),
        ((2.011, 100), (2.0, 100), "worse by 0.0110; 0.01 is allowed"),
        ((1.0, 100), (2.0, 101), "evaluations of other documents cannot be compared"),
        ((None,), (2.0, 100), "has no evaluation"),
        ((math.nan, 100), (2.0, 100), "evaluation loss of nan"),
    ],
)
def test_the_gate(mine, theirs, words):
    if not words:
        assert promoted(registry(mine, theirs), "new") == [("new", "canary")]
        return
    with pytest.raises(PromotionRefused, match=words):
        promoted(registry(mine, theirs), "new")


def test_the_margin_is_checked_at_each_stage():
    found = fold(
        [tagged("new", 2, 2.0), moved([["new", "canary"]]), tagged("old", 1, 1.0), moved([["old", "production"]])]
    )
    with pytest.raises(PromotionRefused, match=r"worse by 1\.0000"):
        promoted(found, "new")
    assert promoted(found, "new", 1.0) == [("old", "retired"), ("new", "production")]
    for margin in (-1.0, math.nan, math.inf):
        with pytest.raises(PromotionRefused, match="--margin"):
            promoted(found, "new", margin)


def test_a_whole_life(run, capsys):
    def do(*arguments, code=0):
        assert main(["checkpoints", *map(str, arguments)]) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    assert "has no version yet" in do("versions", run)
    assert do("tag", run, 10, "first") == "first is step 10 (candidate), evaluation loss 3.0000\n"
    do("tag", run, 30, "second")
    do("tag", run, 40, "third", "--eval-loss", 3.5, "--eval-tokens", 1000)
    assert do("tag", run, 10, "first") == "first is step 10 (candidate), evaluation loss 3.0000\n", "once more"
    assert "is step 10 and stays that" in do("tag", run, 20, "first", code=2)
    assert "cannot name a version" in do("tag", run, 20, "../x", code=2)
    assert "has no checkpoint of step 11" in do("tag", run, 11, "x", code=2)
    assert "there are: first, second, third" in do("promote", run, "forth", code=2)
    do("promote", run, "first")
    assert do("promote", run, "first") == "first (step 10): canary -> production\n"
    assert "worse by 0.5000" in do("promote", run, "third", code=2)
    assert "nothing to roll back to" in do("rollback", run, code=2)
    do("promote", run, "second")
    assert do("promote", run, "second").splitlines() == [
        "first (step 10): production -> retired",
        "second (step 30): canary -> production",
    ]
    assert "in production; promote another" in do("retire", run, "second", code=2)
    do("retire", run, "third")
    assert do("rollback", run).splitlines() == [
        "first (step 10): retired -> production",
        "second (step 30): production -> retired",
    ]
    found = {one["name"]: one for one in json.loads(do("versions", run, "--json"))}
    assert {name: one["state"] for name, one in found.items()} == {
        "first": "production",
        "second": "retired",
        "third": "retired",
    }
    assert found["second"]["evaluation"] == {"loss": LOSSES[30], "tokens": 1000}
    table = do("versions", run).splitlines()
    assert table[1].split()[:4] == ["first", "10", "production", "3.0000"]
    listed = {one["step"]: one["kept_because"] for one in json.loads(do("list", run, "--json"))}
    assert "version first (production)" in listed[10]
    do("prune", run, "--keep", 1, "--days", 0)
    assert layout.list_steps(run / "checkpoints") == [10, 20, 30, 40], "20 is the best, the others have names"


def test_what_was_saved_anew_is_not_the_version(run, capsys):
    """A run that went back trains step 30 again: the name does not move to what is there now."""
    main(["checkpoints", "tag", str(run), "30", "v"])
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        again = DurableCheckpoints(run / "checkpoints", every=1, keep=9)
        line = {"step": 30, "epoch": 1, "eval_loss": 1.0, "eval_tokens": 1}
        again.offer(30, make_state(mesh, seed=99), make_record(30, metrics_line=line), final=True)
        again.close()
    capsys.readouterr()
    assert main(["checkpoints", "promote", str(run), "v"]) == 1
    assert "saved anew" in capsys.readouterr().err
    assert main(["checkpoints", "tag", str(run), "30", "v"]) == 2
    assert "is another save of that step and stays that" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["tag", "promote", "rollback"])
def test_a_damaged_step_is_not_used(run, what, capsys):
    for step, name in ((10, "old"), (30, "new")):
        assert main(["checkpoints", "tag", str(run), str(step), name]) == 0
        if not (what == "promote" and name == "new"):
            main(["checkpoints", "promote", str(run), name])
            main(["checkpoints", "promote", str(run), name])
    step, arguments = {"tag": (20, ["20", "x"]), "promote": (30, ["new"]), "rollback": (10, [])}[what]
    flip(run / "checkpoints" / str(step) / "state" / "params.embed" / "c" / "0" / "2", 8)
    before = (run / "checkpoints" / versions.VERSIONS).read_bytes()
    capsys.readouterr()
    assert main(["checkpoints", what, str(run), *arguments]) == 1
    assert f"step {step} is not whole: " in capsys.readouterr().err
    assert (run / "checkpoints" / versions.VERSIONS).read_bytes() == before


def test_lineage_and_card(run):
    events = [
        {"kind": "restored", "step": 10, "epoch": 1, "sources": {"durable": 9}},
        {"kind": "restored", "step": 25, "epoch": 2, "sources": {"memory": 9}},
        {"kind": "restored", "step": 20, "epoch": 2, "sources": {"durable": 9}},
        {"kind": "restored", "step": 15, "epoch": 3, "sources": {"durable": 9}},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = lineage_of(run, 30)
    assert [(one["step"], one["digest"]) for one in found["parents"]] == [
        (20, digest_of(run, 20)),
        (10, digest_of(run, 10)),
    ], "of the starts up to the one that saved it, from durable steps"
    assert found["data"] == make_record(30).data
    assert found["packages"] == {"jax": "1"}
    version = Version("v", 30, "abc", 0.0, "canary", Evaluation(2.0, 1000), found)
    other = Version("p", 10, "abd", 0.0, "production", Evaluation(1.5, 1000), found)
    config = {"model": {"kind": "TransformerConfig", "layers": 4, "tied": True}}
    sizes = {path: math.prod(shape) for path, (shape, _) in SHAPES.items()}
    text = card(Registry({"v": version, "p": other}, ("p",)), "v", config, sizes)
    for words in (
        "# test v",
        "| state | canary |",
        "| parameters | 917 |",
        "Loss 2.0000 nats per token on 1,000 tokens",
        "p, in production: 1.5000 (+0.5000)",
        f"run step 20 (`{digest_of(run, 20)}`); run step 10",
        "jax 1",
        '"sources": {"a": "123"}',
        "TransformerConfig, layers 4",
    ):
        assert words in text
    checkpoints("tag", run, 30, "v")
    assert "| step | 30 |" in checkpoints("card", run, "v")
    assert said("versions", run)[0]["lineage"]["parents"][0]["step"] == 20


def test_the_parent_of_a_run_that_began_with_other_weights(run, tmp_path):
    from jaxscale.testing.checkpoints import rewrite

    path = run / "checkpoints" / "30"
    config = json.loads((path / "config.json").read_text()) | {"init_from": f"{run}@20"}
    rewrite(path, "config.json", json.dumps(config))
    assert lineage_of(run, 30)["parents"] == [{"run": str(run), "step": 20, "digest": digest_of(run, 20)}]
    rewrite(path, "config.json", json.dumps(config | {"init_from": str(tmp_path / "gone")}))
    assert lineage_of(run, 30)["parents"] == [{"run": str(tmp_path / "gone"), "step": None, "digest": None}]


def test_a_torn_line_is_passed_over(run):
    checkpoints("tag", run, 10, "a")
    path = run / "checkpoints" / versions.VERSIONS
    with open(path, "ab") as file:
        file.write(b'{"kind": "tagged", "name": "b", "st')
    assert [one["name"] for one in said("versions", run)] == ["a"]
    checkpoints("tag", run, 20, "c")
    assert [one["name"] for one in said("versions", run)] == ["a", "c"]


def test_two_who_promote_at_once(run):
    """Of two processes that promote a canary at one moment, one does, and the other is told."""
    for step, name in ((10, "a"), (30, "b")):
        checkpoints("tag", run, step, name)
        checkpoints("promote", run, name)
    command = [sys.executable, "-m", "jaxscale", "checkpoints", "promote", str(run), "b"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for one in both:
        one.communicate(timeout=60)
    assert sorted(one.returncode for one in both) == [0, 2]
    assert versions.read(run / "checkpoints").served == ("b",)


def test_who_decides_is_alone(run):
    """What a decision was made of is still so when it is written down."""
    folder, inside, go = run / "checkpoints", threading.Event(), threading.Event()
    for name in ("a", "b"):
        versions.tag(folder, Version(name, 10, "x", 0.0))

    def slowly(now):
        inside.set()
        go.wait(20)
        return [("a", "canary")] if now.versions["b"].state == "candidate" else []

    first = threading.Thread(target=versions.change, args=(folder, slowly))
    second = threading.Thread(target=versions.change, args=(folder, lambda _: [("b", "canary")]))
    first.start()
    assert inside.wait(20)
    second.start()
    second.join(0.3)
    assert versions.read(folder).versions["b"].state == "candidate"
    go.set()
    first.join(20)
    second.join(20)
    assert [one.state for one in versions.read(folder).versions.values()] == ["canary", "canary"]


def test_further_locations_know_the_versions(run, tmp_path, capsys):
    far = tmp_path / "far"
    StepCopy(LocalStore(far), run / "checkpoints" / "30").run(lambda: None)
    (run / "config.json").write_text(json.dumps({"name": "test", "checkpoint": {"locations": [str(far)]}}))
    assert main(["checkpoints", "tag", str(run), "30", "v"]) == 0
    assert versions.read(far / "checkpoints").versions.keys() == {"v"}
    (run / "config.json").write_text(json.dumps({"checkpoint": {"locations": [str(far), "nowhere://at/all"]}}))
    assert main(["checkpoints", "promote", str(run), "v"]) == 1
    assert "done here, and nowhere://at/all was not told" in capsys.readouterr().err
    assert versions.read(far / "checkpoints").versions["v"].state == "canary"
    shutil.rmtree(run)
    run.mkdir()
    checkpoint = SimpleNamespace(locations=(str(far),), keep=2, milestones=0, alarm_after=900.0)
    made = Locations(run, SimpleNamespace(name="test", checkpoint=checkpoint), "job")
    assert made.fetch() == 30
    made.close()
    assert versions.read(run / "checkpoints").versions["v"].state == "canary", "the run directory was gone"


def test_a_kill_while_it_tags(run):
    """Before the line is on the disk there is no version, after it there is; nothing between."""
    code = (
        "import os, sys; from jaxscale.track import jsonl; from jaxscale.cli import main\n"
        "commit = jsonl.Appender.commit\n"
        "def die(self): (sys.argv[1] == 'after' and commit(self), os.kill(os.getpid(), 9))\n"
        "append = jsonl.Appender.append\n"
        "def dying(self, line): (sys.argv[1] == 'before' and os.kill(os.getpid(), 9), append(self, line))\n"
        "jsonl.Appender.append, jsonl.Appender.commit = dying, die\n"
        "main(['checkpoints', 'tag', sys.argv[2], '30', sys.argv[1]])"
    )
    for point in ("before", "after"):
        died = subprocess.run([sys.executable, "-c", code, point, str(run)], check=False, capture_output=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert [one["name"] for one in said("versions", run)] == ["after"]
    assert said("prune", run, "--keep", 1, "--days", 0)["deleted"] == [10]


@pytest.mark.parametrize(
    "arguments",
    [["tag", "--help"], ["versions", "--help"], ["promote", "--help"], ["rollback", "--help"], ["card", "-h"]],
)
def test_help_teaches(arguments, capsys):
    assert main(["checkpoints", *arguments]) == 0
    assert f"jaxscale checkpoints {arguments[0]} runs/mine" in capsys.readouterr().out.partition("examples:")[2]
