"""The recipes: their resolved configs, how cheap importing one is, their size, and files that are no recipes.

After a change that is meant, write the golden dumps anew and read the difference before committing it:

    JAXSCALE_GOLDEN=write scripts/test tests/test_recipes.py
"""

import difflib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxscale.cli import main
from jaxscale.config import Config, ConfigError, ModelConfig, to_text
from jaxscale.recipe import Hooks, load_recipe

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


def test_there_are_recipes():
    assert {"lm_tiny", "lm_nano", "lm_parity", "lm_shakespeare", "lm_8b", "lm_70b"} <= set(RECIPES)
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_golden_config(name):
    # A recipe may name data that lies beside it; where the repository lies is not part of the recipe.
    text = to_text(load_recipe(recipe_file(name)).config).replace(str(ROOT), "REPOSITORY")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("JAXSCALE_GOLDEN") == "write":
        golden.write_text(text)
    difference = "\n".join(difflib.unified_diff(golden.read_text().splitlines(), text.splitlines(), lineterm="", n=0))
    assert not difference, f"{name} is not as in {golden.name}; if that is meant: JAXSCALE_GOLDEN=write\n{difference}"


@pytest.mark.parametrize("name", RECIPES)
def test_name_and_docstring(name):
    recipe = load_recipe(recipe_file(name))
    assert recipe.config.name == name
    assert f"python recipes/{name}.py" in recipe.description
    assert recipe.hooks(recipe.config) == Hooks()


@pytest.mark.parametrize(
    "command", [*(("train", recipe_file(name)) for name in RECIPES), ("generate",), ("data", "build")]
)
def test_every_flag_has_a_help_text(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # one column
    assert main([*map(str, command), "--help"]) == 0
    shown = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out.partition("examples:")[0])
    flags = re.split(r"^ {1,4}(?:-h, )?(--[a-z][\w.-]+)", shown, flags=re.MULTILINE)[1:]
    bare = []
    for flag, text in zip(flags[::2], flags[1::2], strict=True):
        entry = re.split(r"\n *\n|\n {1,4}\S+ options ", text)[0]
        words = re.sub(r"\((default:|required)[^)]*\)|, --\S+|\{[^}]*\}|\[[^\]]*\]|\b[A-Z]+\b", " ", entry)
        if not re.search(r"[a-z]{2}", words):
            bare.append(flag)
    assert len(flags) > 10
    assert not bare, f"no help text for {', '.join(bare)}: write one below the field"


def test_what_has_to_be_given_says_so(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "build", "--help"]) == 0
    required = [line for line in capsys.readouterr().out.splitlines() if "(required)" in line]
    assert [re.search(r"PATH|--\w+", line).group() for line in required] == ["PATH", "--out"]


@pytest.mark.parametrize("name", RECIPES)
def test_importing_makes_no_backend_no_thread_and_no_array(name):
    code = f"""
import sys, threading, types
from jaxscale.recipe import load_recipe
config = load_recipe({str(recipe_file(name))!r}).config
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend"
assert threading.active_count() == 1, threading.enumerate()
heavy = {{"flax", "optax", "orbax", "grain", "pyarrow", "tokenizers", "tyro", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("lm_tiny", 4.4e6, 4.5e6),
        ("lm_nano", 0.4e6, 0.5e6),
        ("lm_shakespeare", 4.0e6, 4.4e6),
        ("lm_8b", 8_030_261_248, 8_030_261_248),  # as Llama 3.1 has them
        ("lm_70b", 70_553_706_496, 70_553_706_496),
        ("lm_128k", 8_030_261_248, 8_030_261_248),
    ],
)
def test_parameters(name, low, high):
    config = load_recipe(recipe_file(name)).config
    table = config.model.task(config).parameters
    assert low <= sum(math.prod(parameter.shape) for parameter in table.values()) <= high


def test_shakespeare_lies_beside_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe(recipe_file("lm_shakespeare")).config
    assert Path(config.data.path).is_file()
    assert config.data.held_out_documents == 2


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text("from jaxscale.config import Config, ModelConfig\nfrom jaxscale.recipe import Hooks\n" + text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no function config()"),
        ("def config(): return {}", "returned dict; return a jaxscale.config.Config"),
    ],
)
def test_what_is_no_recipe(text, said, tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.py") as error:
        load_recipe(write(tmp_path, text))
    assert said in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"did you mean .*mine\.py"):
        load_recipe(tmp_path / "mime.py")
    with pytest.raises(ConfigError, match=r"has mine\.py"):
        load_recipe(tmp_path)
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(ConfigError, match=r"pipe\.py' is no plain file"):
        load_recipe(tmp_path / "pipe.py")
    with pytest.raises(ConfigError, match="not a Python file"):
        load_recipe(GOLDEN / "lm_tiny.txt")


def test_hooks_see_the_config_as_overridden(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            """
def config(): return Config("mine", ModelConfig())
def hooks(config): return Hooks(evaluations={"seed": lambda context: {"value": config.seed}}) if config.seed else None
""",
        )
    )
    hooks = recipe.hooks(Config("mine", ModelConfig(), seed=5))
    assert hooks.evaluations["seed"](None) == {"value": 5}
    with pytest.raises(ConfigError, match=r"hooks\(config\) of .*mine.py returned NoneType"):
        recipe.hooks(recipe.config)


def test_a_recipe_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SEED = 7\n")
    path = write(
        tmp_path,
        "import neighbour_of_mine\ndef config(): return Config('m', ModelConfig(), seed=neighbour_of_mine.SEED)\n",
    )
    assert load_recipe(path).config.seed == 7
