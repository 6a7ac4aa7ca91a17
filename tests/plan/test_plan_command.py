"""`jaxscale plan`: what fits, which schedule, and every refusal with its reason."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxscale.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA = str(RECIPES / "lm_8b.py")
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def plan(capsys, *arguments):
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_state_and_room_of_a_slice(capsys):
    code, said, _ = plan(capsys, LLAMA, "--on", "v6e-16")
    assert code == 0
    assert "8.03 B parameters" in said
    assert "fsdp 16 on v6e-16" in said
    # 8.03e9 weights and two moments in float32 over 16 devices.
    assert "parameters 1.87 GiB, optimizer 3.74 GiB" in said
    assert "fits: " in said


def test_what_does_not_fit_says_by_how_much(capsys):
    code, said, _ = plan(capsys, LLAMA, "--on", "v6e-16", "--mesh.data", "16")
    assert code == 1
    assert "does not fit: " in said
    assert "more than the 32 GiB of a device" in said


def test_json_has_the_same(capsys):
    code, said, _ = plan(capsys, LLAMA, "--on", "v6e-16", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["hbm_bytes"]["params"] == pytest.approx(8.03e9 * 4 / 16, rel=0.001)
    assert found["fits"] is True
    assert found["hbm_bytes"]["limit"] == 32 * 2**30


def test_schedules_are_compared_where_there_are_stages(capsys):
    flags = ("--on", "v5p-512", "--mesh.stage", "4", "--train.microbatches", "8")
    _, said, _ = plan(capsys, LLAMA, *flags, "--pipeline.schedule", "interleaved", "--pipeline.chunks", "2")
    (line,) = (line for line in said.splitlines() if "this config" in line)
    assert line.split()[:2] == ["interleaved", "2"]
    # (S - 1) / (v M + S - 1) = 15.8 %, and more since the last chunk has the head, as much work as 2.4 layers.
    assert 15.8 < float(line.split()[4].rstrip("%")) < 30
    _, said, _ = plan(capsys, LLAMA, "--on", "v5p-512")
    assert "schedules" not in said


def test_unequal_stages_are_planned_with_their_padding(capsys):
    """Places for 9 layers on each of 4 stages; the last has 5, so that 4/9 of what it keeps of layers is padding."""
    flags = ("--on", "v5p-512", "--mesh.stage", "4", "--train.microbatches", "8", "--json")
    _, said, _ = plan(capsys, LLAMA, *flags)
    even = json.loads(said)
    _, said, _ = plan(capsys, LLAMA, *flags, "--pipeline.layers", "9", "9", "9", "5")
    uneven = json.loads(said)
    assert even["padding"] == ""
    assert uneven["padding"].startswith("stages have 9 9 9 5 layers and places for 9 each: up to ")
    assert uneven["parameters"] == even["parameters"]
    # Of each device's parameters only embedding and head are not layers.
    assert 1.05 < uneven["hbm_bytes"]["params"] / even["hbm_bytes"]["params"] < 9 / 8
    cost = {
        name: next(one["lockstep"] for one in found["schedules"] if one["name"] == "1f1b")
        for name, found in (("even", even), ("uneven", uneven))
    }
    assert cost["uneven"] < 0.95 * cost["even"], "without the head's work the last stage has as much as the others"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on", "cpu-8", "--compile"], "names no topology"),
        (["--compile", "--on", ""], "name its mesh file, for example --on v5e-256"),
        (["--on", "v7-1"], "unknown mesh 'v7-1'"),
        (["--on", "v6e-16", "--mesh.stage", "5"], "does not match 16 devices"),
        (["--on", "h100-64", "--compile"], "names no topology"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, flags, message):
    code, _, error = plan(capsys, LLAMA, *flags)
    assert code == 2
    assert message in error


def test_a_recipe_comes_first(capsys):
    code, _, error = plan(capsys, "--on", "v6e-16")
    assert code == 2
    assert "plan needs a recipe first" in error
    assert plan(capsys, "--help")[1].startswith("usage: jaxscale plan")


@pytest.mark.skipif(HAS_COMPILER, reason="the TPU's compiler is installed")
def test_compiling_without_the_compiler_says_what_to_install(capsys):
    code, _, error = plan(capsys, LLAMA, "--on", "v6e-16", "--compile")
    assert code == 2
    assert "pip install 'jaxscale[tpu]'" in error


@pytest.mark.skipif(not HAS_COMPILER, reason="needs the TPU's compiler: pip install 'jaxscale[tpu]'")
class TestCompiler:
    def test_a_step_is_compiled_once_and_found_again(self, tmp_path, monkeypatch):
        """In processes of their own: what was traced before names the functions in the text that is hashed."""
        monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))

        def run():
            command = [sys.executable, "-m", "jaxscale", "plan", *flags]
            return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

        file = tmp_path / "v5e-8.toml"
        file.write_text('chip = "v5e"\ntopology = "v5e:2x4"\nslices = 1\nhosts_per_slice = 2\ndevices_per_host = 4\n')
        flags = (str(RECIPES / "lm_tiny.py"), "--on", str(file), "--compile", "--json")
        first = run()
        held, compiled = first["hbm_bytes"], first["compiled"]
        assert compiled["argument_bytes"] > held["params"] + held["optimizer"]
        assert compiled["alias_bytes"] >= held["params"] + held["optimizer"], "the state is donated"
        assert compiled["argument_bytes"] < compiled["peak_bytes"] <= held["total"]
        tokens = 8 * 256
        weights = 4 * (4 * 256 * 256 + 3 * 256 * 1024) + 512 * 256  # of layers and head
        again = weights - 512 * 256 - 4 * 256 * 1024  # recomputed: neither the head nor what ends a layer
        assert compiled["flops"] * 8 == pytest.approx(2 * tokens * (3 * weights + again), rel=0.01)
        assert not first["compiled"]["cached"]
        assert 0 < first["hidden_in_loops"] < 1
        second = run()
        assert second["compiled"]["cached"]
        assert second["collectives"] == first["collectives"]

    def test_a_topology_that_does_not_exist_is_refused(self, capsys, tmp_path):
        file = tmp_path / "odd.toml"
        file.write_text('chip = "v5e"\ntopology = "v5e:3x5"\nslices = 1\nhosts_per_slice = 1\ndevices_per_host = 15\n')
        code, _, error = plan(capsys, str(RECIPES / "lm_tiny.py"), "--on", str(file), "--compile", "--mesh.fsdp", "1")
        assert code == 2
        assert "knows no topology 'v5e:3x5'" in error or "does not match" in error
