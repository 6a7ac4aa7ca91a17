"""A run goes on with the data it began with, place by place, whole, and with the tokenizer that its weights know."""

import json

import numpy as np
import pytest
from small_runs import config_of, lines, losses, train

from jaxscale import trainer
from jaxscale.config import ConfigError
from jaxscale.data.errors import DataError
from jaxscale.train.protocols import ExitReason, World

ONE = ("--devices", 1)


@pytest.fixture(scope="module", name="texts")
def _texts(tmp_path_factory):
    """Three corpora, and a copy of the first."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a", "b", "c"):
        documents = [f"{name} {n} green bottles hanging on the wall" * 3 for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "copy-of-a.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    return folder


def mixture(texts, *names):
    return ("--data.mixture", *(f"{texts / name}.jsonl:1" for name in names), *ONE)


def test_a_mixture_in_another_order_is_refused(tmp_path, texts):
    folder = tmp_path / "run"
    assert train(folder, *mixture(texts, "a", "b", "c"), "--steps", 3) is ExitReason.COMPLETED
    message = r"corpora from step 0 on, in order: \S+/a\.jsonl .*/b\.jsonl .*/c\.jsonl .* -> \S+/c\.jsonl .*/a\.jsonl "
    with pytest.raises(DataError, match=message):
        train(folder, *mixture(texts, "c", "a", "b"), "--steps", 6)
    assert len(losses(folder)) == 3
    assert train(folder, *mixture(texts, "copy-of-a", "b", "c"), "--steps", 6) is ExitReason.COMPLETED
    assert train(tmp_path / "whole", *mixture(texts, "a", "b", "c"), "--steps", 6) is ExitReason.COMPLETED
    assert [line["row"] for line in lines(folder)] == [line["row"] for line in lines(tmp_path / "whole")]


def test_corpora_that_change_places_between_phases_are_refused(tmp_path, texts):
    def flags(first, second):
        return ("--data.path", texts / f"{first}.jsonl", "--phases", f"4:mixture={texts / second}.jsonl:1", *ONE)

    assert train(tmp_path / "run", *flags("a", "b"), "--steps", 3) is ExitReason.COMPLETED
    with pytest.raises(DataError, match=r"from step 0 on, in order: \S+/a\.jsonl \(\w{8}\) -> \S+/b\.jsonl \(\w{8}\)"):
        train(tmp_path / "run", *flags("b", "a"), "--steps", 6)
    assert train(tmp_path / "run", *flags("copy-of-a", "b"), "--steps", 6) is ExitReason.COMPLETED


def test_other_microbatches_are_refused(tmp_path):
    assert train(tmp_path / "run", "--steps", 2, *ONE) is ExitReason.COMPLETED
    with pytest.raises(ConfigError, match=r"in another order \(train\.microbatches: 1 -> 2\)"):
        train(tmp_path / "run", "--steps", 4, "--train.microbatches", 2, *ONE)


def test_weights_of_another_tokenizer_are_refused(tmp_path, texts):
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1, "green": 2, "bottles": 3}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", **flags}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    words = ("--data.path", texts / "a.jsonl", "--data.tokenizer", tmp_path / "tokenizer.json", *ONE)
    assert train(tmp_path / "words", *words, "--steps", 1) is ExitReason.COMPLETED
    message = (
        r"words was trained with tokenizer WordLevel-4 \(\w{8}\), this run uses bytes \(1e51a7b9\), so .*"
        r"set data\.tokenizer to \S+words/tokenizer"
    )
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", "--init-from", tmp_path / "words", "--steps", 1, *ONE)
    assert not (tmp_path / "run").exists()
    advised = ("--data.path", texts / "b.jsonl", "--data.tokenizer", tmp_path / "words" / "tokenizer", *ONE)
    start = ("--init-from", tmp_path / "words", "--steps", 1)
    assert train(tmp_path / "run", *start, *advised) is ExitReason.COMPLETED


def test_a_damaged_cache_is_built_again_and_trains_the_same(tmp_path, texts, caplog):
    flags = ("--data.path", texts / "a.jsonl", "--data.cache", tmp_path / "C", "--steps", 2, *ONE)
    assert train(tmp_path / "good", *flags) is ExitReason.COMPLETED
    (tokens,) = (tmp_path / "C").glob("*/tokens.bin")
    ids = np.fromfile(tokens, np.uint16)
    ids[::2] = 30000
    ids.tofile(tokens)
    assert trainer.train(config_of("--run.dir", tmp_path / "again", *flags), World()) is ExitReason.COMPLETED
    assert losses(tmp_path / "again") == losses(tmp_path / "good")
    assert [record.message[:14] for record in caplog.records if "IS DAMAGED" in record.message] == ["THE BUILT DATA"]
