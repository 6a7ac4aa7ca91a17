"""Prefill and step-by-step decoding give the logits of the full forward pass, on every mesh."""

import re

import jax
import numpy as np
import pytest
from generate_samples import MESHES, MODELS, VOCABULARY, config_of, full_logits, make_params, mesh_of

from jaxscale.generate import decode as decode_module
from jaxscale.generate.decode import decode, prefill

ROWS, LENGTH = 8, 24
PROMPTS = np.array([1, 7, 8, 12, 3, 2, 5, 12], np.int32)
"""Lengths of the prompts of one batch."""


def tokens_of_rows():
    return np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)


def check(model, steps=8):
    task = config_of(model).model.task(config_of(model))
    params = make_params(task)
    tokens = tokens_of_rows()
    expected = full_logits(task, params, tokens)
    assert np.abs(expected).max() > 0.5, "logits near zero would be equal whatever happens"
    rows = np.arange(ROWS)
    prompt = np.where(np.arange(12) < PROMPTS[:, None], tokens[:, :12], 9).astype(
        np.int32
    )  # what is behind is not read
    cache, logits = prefill(task, params, prompt, PROMPTS, capacity=LENGTH)
    lengths = PROMPTS.copy()
    for _ in range(steps):
        np.testing.assert_allclose(np.asarray(logits), expected[rows, lengths - 1], atol=1e-5)
        cache, logits = decode(task, params, cache, tokens[rows, lengths])
        lengths += 1
    assert np.asarray(cache.length_B).tolist() == lengths.tolist()
    np.testing.assert_allclose(np.asarray(logits), expected[rows, lengths - 1], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_full_forward_pass(name):
    with jax.set_mesh(mesh_of({})):
        check(MODELS[name], steps=12)


@pytest.mark.parametrize("name", MESHES)
def test_logits_equal_the_full_forward_pass_on_every_mesh(name):
    with jax.set_mesh(mesh_of(MESHES[name])):
        check(MODELS["all"])


def test_logits_of_experts_on_a_mesh():
    with jax.set_mesh(mesh_of({"expert": 4, "tensor": 2})):
        check(MODELS["experts"], steps=3)


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_a_long_prompt_is_read_in_chunks(name, monkeypatch):
    monkeypatch.setattr(decode_module, "CHUNK", 5)
    jax.clear_caches()
    with jax.set_mesh(mesh_of(MESHES[name])):
        check(MODELS["all"], steps=3)
    jax.clear_caches()


COLLECTIVE = re.compile(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
COPY = re.compile(r"= (\S+) (?:copy|transpose|copy-start)\(")
CAPACITY = 37
"""A size that no other dim has."""


@pytest.mark.parametrize("name", MESHES)
def test_the_cache_is_written_in_place_and_never_sent(name):
    with jax.set_mesh(mesh_of(MESHES[name])):
        task = config_of(MODELS["all"]).model.task(config_of(MODELS["all"]))
        params = make_params(task)
        cache, _ = prefill(task, params, np.ones((8, 16), np.int32), np.full(8, 16, np.int32), capacity=CAPACITY)
        pointers = [shard.data.unsafe_buffer_pointer() for shard in cache.keys_LBGTK.addressable_shards]
        token = np.zeros(8, np.int32)
        compiled = decode.lower(task, params, cache, token).compile()
        text = compiled.as_text()
        sent, copied = COLLECTIVE.findall(text), COPY.findall(text)
        assert bool(sent) == (name not in ("one", "data8"))
        assert not [shape for shape in sent + copied if f",{CAPACITY}," in shape]
        longer, _ = decode(task, params, cache, token)
        assert [shard.data.unsafe_buffer_pointer() for shard in longer.keys_LBGTK.addressable_shards] == pointers
