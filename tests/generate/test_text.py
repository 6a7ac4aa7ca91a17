"""Prompts to text: the same on every mesh and in every world, ends with the document, refuses what cannot work."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from generate_samples import MESHES, MODELS, SMALL, VOCABULARY, config_of, full_logits, make_params, mesh_of

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.generate import text as text_module
from jaxscale.generate.sample import GenerateError
from jaxscale.generate.text import generate_text, stream_text
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import Hooks
from jaxscale.testing.processes import run_world
from jaxscale.train.hooks import with_step_metrics

PROMPTS = ["To be, or not to be", "", "x"]
DRAWN = {"tokens": 12, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "seed": 5}
GREEDY = {"tokens": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
SCRIPT = Path(__file__).parent / "world_that_generates.py"


class PrintableTokenizer(ByteTokenizer):
    """Every id shows, so that no two continuations look alike."""

    def decode(self, ids):
        return "".join(chr(0x4E00 + int(i)) for i in ids)


@functools.cache
def prepared(mesh, model=MODELS["all"]):
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        task = config_of(model).model.task(config_of(model))
        return task, make_params(task, spread=5.0)


def texts(mesh="one", prompts=PROMPTS, model=MODELS["all"], tokenizer=None, **settings):
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        task, params = prepared(mesh, model)
        return generate_text(task, params, tokenizer or PrintableTokenizer(), prompts, **(DRAWN | settings))


def test_greedy_text_is_the_argmax_of_the_full_forward_pass():
    (found,) = texts(prompts=["abc"], **GREEDY)
    with jax.set_mesh(mesh_of({})):
        task, params = prepared("one")
        ids = list(b"abc")
        for _ in range(GREEDY["tokens"]):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(full_logits(task, params, padded)[0, len(ids) - 1, :257].argmax()))
    assert found == PrintableTokenizer().decode(ids[3:])


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_any_mesh_draws_the_same(mesh):
    assert texts(mesh) == texts()


def test_a_world_of_processes_draws_the_same():
    outcomes = run_world([str(SCRIPT), "{distributed}"], 2, 2, timeout=240)
    for outcome in outcomes:
        assert json.loads(outcome.stdout.splitlines()[-1]) == texts()


def test_rows_do_not_depend_on_their_neighbours():
    alone = texts(prompts=PROMPTS[:1])
    assert texts()[:1] == alone
    assert texts(prompts=[PROMPTS[0], "another"])[:1] == alone
    twice = texts(prompts=["x", "x"])
    assert twice[0] != twice[1], "the same prompt twice gives two samples"
    assert texts(seed=6) != texts()
    assert texts(seed=5 + 2**32) == texts()


def test_the_last_token_is_reached_and_no_more():
    assert [len(text) for text in texts()] == [12, 12, 12]
    assert [len(text) for text in texts(tokens=1)] == [1, 1, 1]


class EndsWith(PrintableTokenizer):
    """A tokenizer whose documents end with an id that the test has seen generated."""

    def __init__(self, end):
        self.end_of_document = end

    def decode(self, ids):
        return super().decode([i for i in ids if i != self.end_of_document])


def test_a_row_ends_with_its_document_and_the_others_go_on():
    prompts = PROMPTS[::2]  # an empty one would start with the other end
    whole = texts(prompts=prompts)
    end = ord(whole[0][4]) - 0x4E00
    cut = [text.split(chr(0x4E00 + end))[0] for text in whole]
    assert len(cut[0]) <= 4
    assert texts(prompts=prompts, tokenizer=EndsWith(end)) == cut


def test_generation_stops_when_every_row_has_ended():
    end = ord(texts(prompts=["x"])[0][2]) - 0x4E00
    with jax.set_mesh(mesh_of({})):
        task, params = prepared("one")
        steps = list(stream_text(task, params, EndsWith(end), ["x"], **DRAWN))
    assert len(steps) <= 3


def test_only_ids_of_the_tokenizer_are_drawn():
    class Few(PrintableTokenizer):
        vocabulary = 7

    drawn = texts(tokenizer=Few(), prompts=["\1\2"], tokens=40, temperature=100.0, top_k=0, top_p=1.0)
    assert {ord(c) - 0x4E00 for c in drawn[0]} <= set(range(7))


def test_a_second_call_and_further_tokens_compile_nothing(monkeypatch):
    traced = []
    plain = text_module.sample
    monkeypatch.setattr(text_module, "sample", lambda *a: traced.append(1) or plain(*a))
    settings = {"temperature": 0.71828}  # nobody else's, so that nothing is compiled yet
    texts(**settings)
    assert len(traced) == 2, "the prompts and the first token; any other token"
    texts(prompts=["another", "three", "prompts"], seed=8, **settings)
    assert len(traced) == 2


def test_a_task_with_hooks_generates():
    with jax.set_mesh(mesh_of({})):
        task, params = prepared("one")
        hooked = with_step_metrics(task, Hooks(step_metrics=lambda *_: {}))
        assert generate_text(hooked, params, PrintableTokenizer(), PROMPTS, **DRAWN) == texts()


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([], {}, "no prompt is given"),
        (["x"], {"tokens": 0}, "0 tokens are to be generated"),
        (["\ud800"], {}, "not valid text"),
        (["x" * 200_000], {}, "need 200012 positions; at most 131072"),
        (["x"], {"top_p": 2.0}, "top-p is 2.0"),
    ],
)
def test_requests_that_cannot_work(prompts, settings, said):
    with pytest.raises(GenerateError, match=said):
        texts(prompts=prompts, **settings)


def test_ids_beyond_the_vocabulary_are_refused_before_anything_is_computed():
    small = TransformerConfig(**{**SMALL, "vocabulary": 104})
    with pytest.raises(GenerateError, match=r"token id 121 for the prompt, but the model has a\s+vocabulary of 104"):
        texts(prompts=["y"], model=small)
    assert VOCABULARY > 121


def test_a_task_without_layers_cannot_generate():
    class Other:
        vocabulary = 300

    with pytest.raises(GenerateError, match="Other cannot generate text: it has no model, layer, scan_layers, head"):
        generate_text(Other(), {}, ByteTokenizer(), ["x"], **DRAWN)
