import json

import numpy as np
import pytest
import xxhash
from data_samples import make_tokenizer_text  # beside this file

from jaxscale.data.errors import DataError
from jaxscale.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer, token_dtype

TEXTS = ["", "plain", "naïve – ‘quotes’ 漢字 🙂", "tab\tand\r\nlines\n"]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_round_trip(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == token_dtype(tokenizer.vocabulary)
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids.tolist(), tokenizer.end_of_document]) == text


def test_bytes_decodes_anything():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0x68, 0xFF, 0x69]) == "h\ufffdi"
    assert tokenizer.decode(np.array([0x68, 300, 511])) == "h\ufffd\ufffd"  # ids that only a larger model has


def test_dtype_by_vocabulary():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_save_and_load(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.hash, again.vocabulary, again.end_of_document) == (
        tokenizer.hash,
        tokenizer.vocabulary,
        tokenizer.end_of_document,
    )


def test_hash_follows_meaning(bpe_tokenizer):
    text = make_tokenizer_text()
    assert FileTokenizer(json.dumps(json.loads(text), indent=3)).hash == bpe_tokenizer.hash
    assert FileTokenizer(make_tokenizer_text(vocabulary=280)).hash != bpe_tokenizer.hash
    assert FileTokenizer(text, "the").hash != bpe_tokenizer.hash
    assert ByteTokenizer().hash == "1e51a7b98f6af073c5a6c3217e23f7db"  # stored in every byte-level corpus there is


def test_truncation_and_padding_of_the_file_are_off():
    content = json.loads(make_tokenizer_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    tokenizer = FileTokenizer(json.dumps(content))
    assert (
        tokenizer.decode(tokenizer.encode_batch(["a longer text than three tokens"])[0])
        == "a longer text than three tokens"
    )
    assert len(tokenizer.encode_batch(["a"])[0]) == 1
    assert tokenizer.hash == FileTokenizer(make_tokenizer_text()).hash


def test_names_of_special_tokens_in_a_text_are_text(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "_without_control", None)  # the library does it: no text is cut
    text = "a <|endoftext|> in the <|endoftext|>text"
    (ids,) = bpe_tokenizer.encode_batch([text])
    assert bpe_tokenizer.end_of_document not in ids
    assert bpe_tokenizer.decode(ids) == text


def test_the_hash_tells_such_ids_from_those_of_before(bpe_tokenizer):
    """Until then `<|endoftext|>` in a text ended the document: folders built that way are of another tokenizer."""
    content = json.loads(make_tokenizer_text())
    meaning = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    before = xxhash.xxh3_128_hexdigest(json.dumps([meaning, bpe_tokenizer.end_of_document], sort_keys=True).encode())
    assert bpe_tokenizer.hash != before


def unigram():
    """A model that has its control token's name in the vocabulary, as T5 does, and an unknown token."""
    pieces = {"</s>": 0.0, "<unk>": 0.0, "▁": -2.0, "a": -3.0, "<": -5.0, "/": -5.0, "s": -5.0, ">": -5.0}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(["</s>", "<unk>"])],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        "model": {"type": "Unigram", "unk_id": 1, "byte_fallback": False, "vocab": [list(p) for p in pieces.items()]},
    }
    return FileTokenizer(json.dumps(content))


def test_a_model_that_knows_the_names_of_control_tokens():
    tokenizer = unigram()
    found = tokenizer.encode_batch(["a</s>a", "a＜/s＞a", "</s>" * 3, "</s>" * 5000, "z"])
    assert [ids.tolist() for ids in found] == [
        [3, 4, 5, 6, 7, 3],
        [3, 4, 5, 6, 7, 3],  # what becomes the name by normalising
        [4, 5, 6, 7] * 3,
        [4, 5, 6, 7] * 5000,
        [1],  # the unknown token is not control: it stands for text
    ]
    assert tokenizer.decode(found[0]) == "a</s>a"


def test_a_character_that_the_model_makes_a_control_token_of():
    tokenizer = FileTokenizer(json.dumps({**json.loads(unigram()._text), "normalizer": ARROW}))
    with pytest.raises(DataError, match=r"turns '→' in a text into its control token '</s>'; leave that out"):
        tokenizer.encode_batch(["a→a"])


ARROW = {"type": "Replace", "pattern": {"String": "→"}, "content": "</s>"}


def test_end_of_document_by_name():
    text = make_tokenizer_text(end="<stop>")
    with pytest.raises(DataError, match=r"none of the usual end-of-document tokens.*end-of-document"):
        FileTokenizer(text)
    assert FileTokenizer(text, "<stop>").end_of_document == 0
    with pytest.raises(DataError, match="has no token '<halt>'"):
        FileTokenizer(text, "<halt>")


def test_bad_specs(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json is not there"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="tokenizer '' is not there"):
        load_tokenizer("")
    (tmp_path / "tokenizer_settings.json").write_text('{"end_of_document": 3}')
    with pytest.raises(DataError, match=r"tokenizer_settings\.json is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"bad\.json is nothing that the tokenizers library can read"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 7\)"):
        load_tokenizer(tmp_path / "latin.json")
    with pytest.raises(DataError, match=r"leave data\.end-of-document empty"):
        load_tokenizer("bytes", "</s>")
