"""Weights of another model: every difference is told, and the map says what becomes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.checkpoint.renames import Renames
from jaxscale.config import ConfigError

A, B = ((4, 2), "float32"), ((3,), "bfloat16")
SAVED = {"embed": A, "layers/mlp/up": A, "layers/mlp/down": A, "layers/norm": B, "norm": B}


def taken(entries, wanted, saved=SAVED):
    found, lines = Renames(tuple(entries)).taken(wanted, saved)
    return dict(found.sources), found.fresh, lines


def test_the_same_weights_need_no_map():
    assert taken([], SAVED) == ({path: path for path in SAVED}, (), [])


def test_an_array_and_all_below_a_path_are_renamed():
    wanted = {"wte": A, "blocks/mlp/up": A, "blocks/mlp/down": A, "blocks/norm": B, "norm": B}
    sources, fresh, lines = taken(["wte=embed", "blocks=layers"], wanted)
    assert (fresh, lines) == ((), [])
    assert sources == {
        "wte": "embed",
        "blocks/mlp/up": "layers/mlp/up",
        "blocks/mlp/down": "layers/mlp/down",
        "blocks/norm": "layers/norm",
        "norm": "norm",
    }


def test_the_longest_path_counts():
    wanted = {"embed": A, "layers/mlp/up": B, "layers/mlp/down": A, "layers/norm": B, "norm": B}
    sources, fresh, lines = taken(["layers/mlp/up=", "=layers/mlp/up", "layers=layers"], wanted)
    assert (fresh, lines) == (("layers/mlp/up",), [])
    assert sources.keys() == wanted.keys() - {"layers/mlp/up"}


def test_what_is_new_stays_fresh_and_what_is_old_is_left_out():
    wanted = {"embed": A, "norm": B, "head": A, "adapters/a": A, "adapters/b": B}
    sources, fresh, lines = taken(["head=", "adapters=", "=layers"], wanted)
    assert (sources, fresh, lines) == (
        {"embed": "embed", "norm": "norm"},
        ("head", "adapters/a", "adapters/b"),
        [],
    )


def test_all_differences_are_told_at_once():
    wanted = {"embed": B, "head": A, "layers/mlp/up": A, "layers/norm": ((3,), "float32"), "tied": A, "other": A}
    _, _, lines = taken(["tied=layers/mlp/up", "other=nothing", "ghost=embed", "=void"], wanted)
    assert lines == [
        "embed: checkpoint float32[4,2], this run bfloat16[3]",
        "head: this run float32[4,2], checkpoint absent",
        "layers/norm: checkpoint bfloat16[3], this run float32[3]",
        "tied: comes from layers/mlp/up, and so does layers/mlp/up",
        "other: this run float32[4,2], checkpoint has no nothing",
        "layers/mlp/down: checkpoint float32[4,2], this run has no place for it",
        "norm: checkpoint bfloat16[3], this run has no place for it",
        "ghost: named in --init-map, and this run has no such weights",
        "nothing: named in --init-map, and the checkpoint has no such weights",
        "void: named in --init-map, and the checkpoint has no such weights",
    ]


def test_a_part_of_a_name_is_no_path():
    _, _, lines = taken(["=norm", "=layer"], {path: SAVED[path] for path in SAVED if path != "norm"})
    assert lines == ["layer: named in --init-map, and the checkpoint has no such weights"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["head"], "'head' in --init-map is no entry"),
        (["="], "'=' in --init-map is no entry"),
        (["a=b=c"], "'a=b=c' in --init-map is no entry"),
        (["/head="], "'/head' in --init-map is no path"),
        (["a=b/"], "'b/' in --init-map is no path"),
        (["a=b//c"], "'b//c' in --init-map is no path"),
        (["a=b", "a="], "a as NEW more than once"),
        (["a=b", "c=b"], "b as OLD more than once"),
        (["a=b", "=b"], "b as OLD more than once"),
    ],
)
def test_what_is_no_map(entries, words):
    with pytest.raises(ConfigError) as caught:
        Renames(tuple(entries))
    assert words in str(caught.value)


PATHS = st.sampled_from(["a", "b", "a/x", "a/y", "b/x", "c/x/y", "ab"])
SETS = st.dictionaries(PATHS, st.sampled_from([A, B]))


@given(st.lists(st.tuples(st.one_of(st.just(""), PATHS), st.one_of(st.just(""), PATHS)), max_size=4), SETS, SETS)
def test_nothing_is_passed_over(pairs, wanted, saved):
    """Each array has a source of its own shape, stays fresh, or is told of; each of the checkpoint is used, left out
    by an entry, or told of.
    """
    try:
        renames = Renames(tuple(f"{new}={old}" for new, old in pairs))
    except ConfigError:
        return
    found, lines = renames.taken(wanted, saved)
    told = {line.partition(":")[0] for line in lines}
    for path, array in wanted.items():
        if path in found.sources:
            assert saved[found.sources[path]] == array
        else:
            assert path in found.fresh or path in told
    assert len(set(found.sources.values())) == len(found.sources)
    if not lines:
        for path in saved.keys() - set(found.sources.values()):
            assert any(path == old or path.startswith(old + "/") for old in renames.left_out)
