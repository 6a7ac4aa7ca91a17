"""Prompts -> text: tokens are drawn one after the other until the document ends, for several prompts side by side.

All processes of a world call it alike and get the same text. Read next: `load.py`, which takes the weights from a run.

Legend: B rows of the batch: the prompts, filled up to a multiple of the batch shards; W longest prompt; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from jaxscale import axes
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.generate.cache import Cache
from jaxscale.generate.decode import Decoder, decode, prefill
from jaxscale.generate.sample import GenerateError, Sampling, sample
from jaxscale.generate.words import Words
from jaxscale.task import Params, Task

LONGEST = 1 << 17
"""Positions of a row, prompt and continuation, that are accepted: beyond, a mistake is likelier than a wish."""

ROUND = 64
"""Prompt lengths and capacities are rounded up to this, so that similar requests share a compiled program."""


def generate_text(
    task: Task,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[str]:
    """The continuation of each prompt on the current mesh, without the prompt. Arguments as of `stream_text`."""
    texts = [""] * len(prompts)
    for pieces in stream_text(
        task,
        params,
        tokenizer,
        prompts,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def stream_text(
    task: Task,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[list[str]]:
    """Yields, after each token, the text that it completed in each row; joined they are the continuations.

    params: sharded by the rules on the current mesh. An empty prompt starts a document. A row ends with its document or
    after `tokens` tokens, the whole when all rows have ended. Drawing: see `Sampling`; a token's key comes from the
    seed (modulo 2^32), the prompt's number and the position, so every mesh and every world draws with the same random
    numbers. Where the model computes in float32 that gives the same text; bfloat16 rounds differently on another mesh,
    which now and then turns a draw, and the text after it.
    Raises GenerateError, before anything is computed, for prompts or settings that cannot work.
    """
    decoder = _decoder(task)
    sampling = Sampling(min(tokenizer.vocabulary, task.vocabulary), temperature, top_k, top_p)
    if tokens < 1:
        raise GenerateError(f"{tokens} tokens are to be generated; ask for 1 or more")
    ids = encode(task, tokenizer, prompts, tokens)
    return _stream(decoder, sampling, params, tokenizer, ids, tokens, seed)


def encode(task: Task, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    """Token ids of each prompt; an empty one is the end of the document before. Raises GenerateError.

    A prompt is text, as documents are in training: names of control tokens in it are only characters.
    """
    if not prompts:
        raise GenerateError("no prompt is given; give one or more, an empty one starts a document")
    ids = []
    for prompt in prompts:
        try:
            (encoded,) = tokenizer.encode_batch([prompt])
        except UnicodeEncodeError as error:
            raise GenerateError(f"the prompt is not valid text ({error}); give it as UTF-8") from error
        ids.append(encoded.tolist() or [tokenizer.end_of_document])
        if max(ids[-1]) >= task.vocabulary:
            raise GenerateError(
                f"tokenizer {tokenizer.name} gives token id {max(ids[-1])} for the prompt, but the model has a "
                f"vocabulary of {task.vocabulary}; use the tokenizer that the model was trained with"
            )
    longest = max(map(len, ids))
    if longest + tokens > LONGEST:
        raise GenerateError(
            f"a prompt of {longest} tokens and {tokens} to generate need {longest + tokens} positions; "
            f"at most {LONGEST} are accepted: shorten the prompt or ask for less"
        )
    return ids


def _decoder(task: Task) -> Decoder:
    # Asked name by name: a task with a recipe's hooks around it passes every attribute on.
    missing = [name for name in ("model", "layer", "scan_layers", "head") if not hasattr(task, name)]
    if missing:
        raise GenerateError(
            f"{type(task).__name__} cannot generate text: it has no {', '.join(missing)}; "
            "only language models made of layers with attention can"
        )
    decoder: Decoder = task  # type: ignore[assignment]  # checked just above, for attributes that mypy cannot see
    return decoder


def _stream(
    task: Decoder,
    sampling: Sampling,
    params: Params,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    tokens: int,
    seed: int,
) -> Iterator[list[str]]:
    rows = _round_up(len(ids), axes.batch_shards(jax.sharding.get_abstract_mesh().shape))
    padded = ids + [[tokenizer.end_of_document]] * (rows - len(ids))
    longest = max(map(len, padded))
    tokens_BW = np.zeros((rows, _round_up(longest, ROUND)), np.int32)
    for row, prompt in enumerate(padded):
        tokens_BW[row, : len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in padded], np.int32)
    row_B, key = np.arange(rows, dtype=np.int32), np.uint32(seed % 2**32)
    capacity = max(_round_up(longest + tokens, ROUND), tokens_BW.shape[1])

    words = [Words(tokenizer, prompt) for prompt in ids]
    running = [True] * len(ids)
    cache, token_B = _first(task, sampling, params, tokens_BW, length_B, row_B, key, capacity=capacity)
    for made in range(1, tokens + 1):
        drawn_B = token_B
        if made < tokens:
            # Started before the last token is fetched, so that the device does not wait for this process.
            cache, token_B = _next(task, sampling, params, cache, drawn_B, row_B, key)
        pieces = [""] * len(ids)
        for row, token in enumerate(np.asarray(drawn_B)[: len(ids)].tolist()):
            if not running[row]:
                continue
            running[row] = made < tokens and token != tokenizer.end_of_document
            pieces[row] = words[row].add(token) + ("" if running[row] else words[row].rest())
        yield pieces
        if not any(running):
            return


@partial(jax.jit, static_argnames=("task", "sampling", "capacity"))
def _first(
    task: Decoder,
    sampling: Sampling,
    params: Params,
    tokens_BW: jax.Array,
    length_B: jax.Array,
    row_B: jax.Array,
    seed: jax.Array,
    *,
    capacity: int,
) -> tuple[Cache, jax.Array]:
    """The cache of the prompts and the first token of each continuation, int32 (B,), on every device."""
    cache, logits_BV = prefill(task, params, tokens_BW, length_B, capacity=capacity)
    return cache, jax.reshard(sample(sampling, logits_BV, seed, row_B, cache.length_B), jax.P())


@partial(jax.jit, static_argnames=("task", "sampling"), donate_argnames="cache")
def _next(
    task: Decoder,
    sampling: Sampling,
    params: Params,
    cache: Cache,
    token_B: jax.Array,
    row_B: jax.Array,
    seed: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Appends the token and draws the one after it."""
    cache, logits_BV = decode(task, params, cache, token_B)
    return cache, jax.reshard(sample(sampling, logits_BV, seed, row_B, cache.length_B), jax.P())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
