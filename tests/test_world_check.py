"""What the processes of a world compare before they begin; real worlds that differ are in `runs/test_run_worlds.py`."""

import dataclasses

import pytest

from jaxscale.config import Config, ModelConfig
from jaxscale.train.protocols import World
from jaxscale.world_check import check_alike, difference, facts

CONFIG = Config("test", ModelConfig())
DATA = {"tokenizer": {"name": "bytes", "hash": "aa"}, "held_out_documents": 0, "corpora": {"c1": "a.txt"}}


def changed(part, **fields):
    return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **fields)})


@pytest.mark.parametrize(
    ("world", "config", "data", "said"),
    [
        (World(3, 1), CONFIG, DATA, "number of processes is 3, on process 0 2"),
        (World(2, 1), dataclasses.replace(CONFIG, steps=3), DATA, "steps is 3, on process 0 100"),
        (World(2, 1), CONFIG, {**DATA, "corpora": {"c2": "a.txt"}}, 'content of a.txt is "c2", on process 0 "c1"'),
        (
            World(2, 1),
            CONFIG,
            {**DATA, "tokenizer": {"name": "bytes", "hash": "bb"}},
            'tokenizer is "bytes (bb)", on process 0 "bytes (aa)"',
        ),
        (World(2, 1), changed("data", cache="x"), DATA, ""),
        (World(2, 1), changed("run", compilation_cache="x"), DATA, ""),
    ],
)
def test_differences_name_fields_and_both_values(world, config, data, said):
    assert difference(facts(World(2, 0), CONFIG, DATA), facts(world, config, data)) == said


def test_a_relative_run_directory_is_that_of_the_current_folder(tmp_path, monkeypatch):
    config = changed("run", dir="mine")
    here = facts(World(2, 0), config, DATA)
    monkeypatch.chdir(tmp_path)
    assert difference(here, facts(World(2, 1), config, DATA)).startswith(
        f'run.dir is "{tmp_path}/mine", on process 0 "'
    )


def test_many_differences_are_counted():
    first, mine = ({f"f{i}": f"{side} " * 90 for i in range(9)} for side in "ab")
    said = difference(first, mine)
    assert said.endswith(", and 3 more")
    assert len(said) < 1300


def test_a_world_of_one_agrees_with_itself():
    check_alike(World(), CONFIG, DATA)
