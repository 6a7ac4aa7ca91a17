"""Tokenizers, and a cache folder of its own for every test."""

import pytest
from data_samples import make_tokenizer_text  # beside this file

from jaxscale.data.tokenizer import ByteTokenizer, FileTokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture
def bpe_tokenizer():
    return FileTokenizer(make_tokenizer_text())
