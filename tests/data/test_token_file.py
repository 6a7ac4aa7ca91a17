"""Reading token folders: whatever is wrong with one is said, nothing odd is ever opened."""

import json
import shutil

import numpy as np
import pytest
from data_samples import make_texts, write_jsonl  # beside this file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxscale.data.build import build
from jaxscale.data.errors import DataError
from jaxscale.data.token_file import load_header, open_token_file
from jaxscale.data.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    return build([str(source)], tmp_path / "tokens", ByteTokenizer()).folder


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "document_bytes.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "too long"])
def test_damaged_files(folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": data[:-1], "too long": data + b"\0"}[damage])
    message = "is not there" if damage == "missing" else f"is {damage}: .* build the folder again"
    with pytest.raises(DataError, match=rf"{name} {message}"):
        open_token_file(folder)


def test_foreign_folders(folder, tmp_path):
    with pytest.raises(DataError, match=r"is no token folder .*jaxscale data build"):
        open_token_file(tmp_path / "nowhere")
    for text, message in [
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('{"format": "other"}', "belongs to another program"),
        ('{"format": "jaxscale-tokens", "version": 99}', "format version 99"),
        ('{"format": "jaxscale-tokens", "version": 1}', "is damaged"),
    ]:
        (folder / "header.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_token_file(folder)


def test_verify_finds_what_opening_does_not(folder):
    def changed(name, dtype, index, value):
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        data = np.fromfile(copy / name, dtype)
        data[index] = value
        data.tofile(copy / name)
        return open_token_file(copy)

    open_token_file(folder).verify()
    with pytest.raises(DataError, match="token id 300 beyond the vocabulary of 257"):
        changed("tokens.bin", np.uint16, 5, 300).verify()
    with pytest.raises(DataError, match="content hash"):
        changed("tokens.bin", np.uint16, 5, 1).verify()
    with pytest.raises(DataError, match="offsets that do not grow"):
        changed("documents.bin", np.int64, 3, 0).verify()
    offsets = np.fromfile(folder / "documents.bin", np.int64)
    with pytest.raises(DataError, match="does not end with token 256"):
        changed(
            "documents.bin", np.int64, 3, offsets[3] - 1 if offsets[3] - 1 > offsets[2] else offsets[3] + 1
        ).verify()
    with pytest.raises(DataError, match="runs from 1 to"):
        changed("documents.bin", np.int64, 0, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_headers(data, folder):
    """Any header is either refused with a DataError or describes the files that are there."""
    raw = json.loads(getattr(test_fuzzed_headers, "original", None) or (folder / "header.json").read_text())
    test_fuzzed_headers.original = json.dumps(raw)
    for name in data.draw(st.lists(st.sampled_from(sorted(raw)), max_size=3)):
        if data.draw(st.booleans()):
            raw.pop(name, None)
        else:
            raw[name] = data.draw(JSON)
    text = json.dumps(raw).encode()
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))] + data.draw(st.binary(max_size=4))
    (folder / "header.json").write_bytes(text)
    try:
        header = load_header(folder)
        file = open_token_file(folder)
    except DataError:
        return
    assert len(file.tokens) == header.tokens
    assert len(file.document_bytes) == header.documents
    assert header.largest_token < header.vocabulary
