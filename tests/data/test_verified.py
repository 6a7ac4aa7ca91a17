"""A token folder is compared with its content hash when it is opened, once per version of its files."""

import json
import os
import shutil

import numpy as np
import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.cache import cache_folder
from jaxscale.data import progress, verified
from jaxscale.data.build import build
from jaxscale.data.corpus import open_corpus
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.token_file import TokenFile, open_token_file
from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.data.verified import VERIFIED, open_verified


@pytest.fixture(name="source")
def _source(tmp_path):
    return str(write_jsonl(tmp_path / "a.jsonl", make_texts(40)))


@pytest.fixture(name="checks")
def _checks(monkeypatch):
    """The folders that were read whole, in order."""
    seen, real = [], TokenFile.verify

    def verify(self, *arguments):
        seen.append(self.folder)
        return real(self, *arguments)

    monkeypatch.setattr(TokenFile, "verify", verify)
    return seen


def overwrite(folder, value=30000):
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    tokens[::2] = value
    tokens.tofile(folder / "tokens.bin")


def cut(name):
    return lambda folder: os.truncate(folder / name, 8)


DAMAGE = {
    "beyond the vocabulary": overwrite,
    "within the vocabulary": lambda folder: overwrite(folder, 7),
    "tokens cut": cut("tokens.bin"),
    "offsets cut": cut("documents.bin"),
    "header cut": cut("header.json"),
    "header gone": lambda folder: (folder / "header.json").unlink(),
    "tokens gone": lambda folder: (folder / "tokens.bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_of_the_cache_is_built_again(source, caplog, damage):
    good = ensure_built(source, ByteTokenizer())
    tokens, content = np.array(good.tokens), good.header.content
    assert not caplog.records
    DAMAGE[damage](good.folder)
    again = ensure_built(source, ByteTokenizer())
    assert (again.folder, again.header.content) == (good.folder, content)
    assert (again.tokens == tokens).all()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"THE BUILT DATA IN {good.folder} IS DAMAGED and is built again: {good.folder}")
    ensure_built(source, ByteTokenizer())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("header cut", "header gone")])
def test_a_damaged_folder_of_the_user_is_refused(source, tmp_path, byte_tokenizer, damage):
    folder = tmp_path / "my tokens"
    build([source], folder, byte_tokenizer)
    DAMAGE[damage](folder)
    before = sorted(path.name for path in folder.iterdir())
    fix = rf"Delete the folder {folder}, then make it again with `jaxscale data build a\.jsonl --out '{folder}'`$"
    for open_it in (lambda: ensure_built(str(folder), byte_tokenizer), lambda: build([source], folder, byte_tokenizer)):
        with pytest.raises(DataError, match=fix):
            open_it()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_damaged_header_of_the_user(source, tmp_path, bpe_tokenizer):
    folder = build([source], tmp_path / "tokens", bpe_tokenizer).folder
    overwrite(folder, 5)
    fix = r"jaxscale data build a\.jsonl --tokenizer TOKENIZER\.json --out "
    with pytest.raises(DataError, match=fix):
        ensure_built(str(folder), bpe_tokenizer)
    (folder / "header.json").write_text("{")
    with pytest.raises(
        DataError, match=r"not readable JSON .*Delete the folder .*jaxscale data build PATH\.\.\. --out "
    ):
        ensure_built(str(folder), bpe_tokenizer)


def test_a_folder_without_header_is_not_taken_for_text(source, tmp_path, byte_tokenizer):
    folder = build([source], tmp_path / "tokens", byte_tokenizer).folder
    (folder / "header.json").unlink()
    with pytest.raises(DataError, match=r"tokens is no token folder \(header\.json is not there\); make one with"):
        ensure_built(str(folder), byte_tokenizer)


def test_each_version_is_read_once(source, tmp_path, byte_tokenizer, checks):
    folder = ensure_built(source, byte_tokenizer).folder
    ensure_built(source, byte_tokenizer)
    assert checks == [], "a build knows what it wrote"
    copy = shutil.copytree(folder, tmp_path / "copy")
    for _ in range(3):
        ensure_built(str(copy), byte_tokenizer)
    assert checks == [copy], "other inodes are another version"
    for name in ("header.json", "tokens.bin", "documents.bin", "document_bytes.bin"):
        os.utime(copy / name, (1, 1))
        for _ in range(2):
            ensure_built(str(copy), byte_tokenizer)
    assert checks == [copy] * 5
    (copy / VERIFIED).write_text("{")
    ensure_built(str(copy), byte_tokenizer)
    assert checks == [copy] * 6


def test_a_damaged_folder_is_never_remembered(source, tmp_path, byte_tokenizer, checks):
    folder = build([source], tmp_path / "tokens", byte_tokenizer).folder
    overwrite(folder)
    for _ in range(2):
        with pytest.raises(DamagedData, match="token id 30000 beyond the vocabulary of 257"):
            open_verified(folder)
    assert len(checks) == 2


def test_a_folder_that_changes_while_it_is_read_is_not_remembered(
    source, tmp_path, byte_tokenizer, checks, monkeypatch
):
    folder = shutil.copytree(build([source], tmp_path / "tokens", byte_tokenizer).folder, tmp_path / "copy")
    real = TokenFile.verify

    def touched(self, *arguments):
        os.utime(folder / "tokens.bin", (len(checks), 1))
        return real(self, *arguments)

    monkeypatch.setattr(TokenFile, "verify", touched)
    open_verified(folder)
    monkeypatch.setattr(TokenFile, "verify", real)
    open_verified(folder)
    open_verified(folder)
    assert len(checks) == 2


def test_what_was_found_is_kept_elsewhere_for_a_folder_that_cannot_be_written(source, tmp_path, byte_tokenizer, checks):
    folder = shutil.copytree(build([source], tmp_path / "tokens", byte_tokenizer).folder, tmp_path / "copy")
    (folder / VERIFIED).unlink()
    (folder / VERIFIED).mkdir()  # nothing can be written there
    for _ in range(2):
        open_verified(folder)
    assert checks == [folder]
    assert len(list(cache_folder("verified").iterdir())) == 1
    assert not list(folder.glob(f"{VERIFIED}.*")), "something was left behind"


def test_an_interrupted_build_is_read_by_its_first_reader(source, tmp_path, byte_tokenizer, checks, monkeypatch):
    """What it found on the disk may have been damaged since: the hash is of the damaged bytes then, but not the ids."""
    from jaxscale.data import build as module

    def stops(*arguments, real=module.read_blocks):
        for number, block in enumerate(real(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield block

    real = module.read_blocks
    monkeypatch.setattr(module, "read_blocks", stops)
    with pytest.raises(KeyboardInterrupt):
        build([source], tmp_path / "tokens", byte_tokenizer, block_bytes=500, commit_seconds=0)
    monkeypatch.setattr(module, "read_blocks", real)
    overwrite(tmp_path / "tokens.building")
    build([source], tmp_path / "tokens", byte_tokenizer, block_bytes=500)
    assert checks == []
    with pytest.raises(DataError, match="token id 30000 beyond the vocabulary of 257"):
        ensure_built(str(tmp_path / "tokens"), byte_tokenizer)


def test_lengths_in_bytes_are_checked_too(source, tmp_path, byte_tokenizer):
    folder = build([source], tmp_path / "tokens", byte_tokenizer).folder
    lengths = np.fromfile(folder / "document_bytes.bin", np.int64)
    lengths[0] += 1
    lengths.tofile(folder / "document_bytes.bin")
    with pytest.raises(DamagedData, match=r"document_bytes\.bin adds up to \d+ bytes of text, the header says"):
        open_verified(folder)


def test_a_long_check_is_shown(source, tmp_path, byte_tokenizer, monkeypatch, capsys):
    folder = shutil.copytree(build([source], tmp_path / "tokens", byte_tokenizer).folder, tmp_path / "copy")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    open_verified(folder)
    assert capsys.readouterr().err == ""
    os.utime(folder / "tokens.bin", (1, 1))
    monkeypatch.setattr(verified, "SHOWN_FROM", 0)
    tokens = open_verified(folder).header.tokens
    assert capsys.readouterr().err.startswith(f"checking copy: 100%, {tokens:,} tokens")


def test_a_file_that_is_written_to_while_it_is_read(source, tmp_path, byte_tokenizer):
    """Every batch is looked at, also for ids so large that they are negative as int32."""
    file = build([source], tmp_path / "tokens", byte_tokenizer)
    corpus = open_corpus("a", file, 0)
    corpus.train.gather(np.arange(3), 17)
    with open(file.folder / "tokens.bin", "r+b") as writer:
        writer.seek(2 * 10)
        writer.write(np.uint16(257).tobytes())
    with pytest.raises(DamagedData, match=r"token id 257 beyond its vocabulary of 257.*something writes to it"):
        corpus.train.gather(np.arange(3), 17)
    corpus.train.gather(np.arange(20, 30), 17)


def test_an_outdated_tokenizer_is_said_to_be_one(source, tmp_path, bpe_tokenizer):
    folder = build([source], tmp_path / "tokens", bpe_tokenizer).folder
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "tokenizer_hash": "0" * 32}))
    with pytest.raises(DataError, match=r"built by an older jaxscale, .* delete the folder and build the data again"):
        open_token_file(folder, bpe_tokenizer.hash)
