"""Texts, files and a small trained tokenizer for the tests of this folder."""

import json

import numpy as np

from jaxscale.data.corpus import open_corpus
from jaxscale.data.token_file import Header, header_text, open_token_file


def make_tokenizer_text(vocabulary: int = 300, end: str = "<|endoftext|>") -> str:
    """A byte-level BPE tokenizer.json trained on a few lines, with one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat", "a dog and a log in the fog"], trainer)
    return tokenizer.to_str()


def make_texts(count: int, seed: int = 0, longest: int = 200) -> list[str]:
    """Documents of random length, some empty, some not ASCII."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh éü\n"))
    return ["".join(letters[rng.integers(0, len(letters), rng.integers(0, longest))]) for _ in range(count)]


def write_jsonl(path, texts, field: str = "text"):
    path.write_text(
        "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8"
    )
    return path


def make_corpus(folder, lengths, held_out=0, address="corpus"):
    """A corpus whose token i is i, documents of these lengths (in tokens), and where each document starts.

    Written straight to disk: ids this large come from no tokenizer, but they make every mix-up visible.
    """
    lengths = np.asarray(lengths, np.int64)
    total = int(lengths.sum())
    folder.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    tokens = np.arange(total, dtype="<u4")
    tokens.tofile(folder / "tokens.bin")
    offsets.tofile(folder / "documents.bin")
    (lengths - 1).astype("<i8").tofile(folder / "document_bytes.bin")
    header = Header(
        dtype="uint32",
        tokens=total,
        documents=len(lengths),
        bytes=int((lengths - 1).sum()),
        vocabulary=2**20,
        largest_token=total - 1,
        end_of_document=2**20 - 1,
        tokenizer_name="numbers",
        tokenizer_hash="0" * 32,
        content=f"{address} {lengths.tolist()}"[:64],
        plan="",
        sources=(),
    )
    (folder / "header.json").write_text(header_text(header))
    return open_corpus(address, open_token_file(folder), held_out), offsets
