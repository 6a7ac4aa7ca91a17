"""`jaxscale data list`, `verify` and `diff`, and the manifest that they read."""

import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.cli import main
from jaxscale.data import shards
from jaxscale.data.build import build
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.filters import parse_filters
from jaxscale.data.inspect_corpus import find_damage
from jaxscale.data.manifest import load_manifest
from jaxscale.data.selection import Selection
from jaxscale.data.shards import ShardDigests
from jaxscale.data.sources import find_inputs

EVERY = ("tokens.bin", "documents.bin", "document_bytes.bin", "header.json", "quarantine.jsonl", "manifest.json")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)


@pytest.fixture(name="folder")
def _folder(tmp_path, byte_tokenizer):
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_texts(40, seed))) for seed, name in enumerate("ab")]
    return build(paths, tmp_path / "tokens", byte_tokenizer).folder


def test_the_manifest(folder, tmp_path, byte_tokenizer):
    manifest = load_manifest(folder)
    file = ensure_built(str(folder), byte_tokenizer)
    for name, parent in zip("ab", manifest["parents"], strict=True):
        data = (tmp_path / f"{name}.jsonl").read_bytes()
        assert (parent["name"], parent["size"]) == (f"{name}.jsonl", len(data))
        assert parent["digest"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"
        assert parent["documents"] == 40
    lengths = np.diff(file.offsets)
    for first, parent in zip((0, 40), manifest["parents"], strict=True):
        part = slice(first, first + 40)
        assert parent["tokens"] == lengths[part].sum()
        assert parent["longest"] == lengths[part].max()
        assert parent["bytes"] == file.document_bytes[part].sum()
    assert manifest["content"] == file.header.content
    assert manifest["code"]["packages"]["numpy"] == np.__version__
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        wanted = [xxhash.xxh3_128_hexdigest(data[at : at + 1000]) for at in range(0, len(data), 1000)]
        assert facts == {"size": len(data), "shards": wanted}
    assert set(manifest["files"]) == {*EVERY[:-1], "tokenizer/tokenizer_settings.json"}


def test_digests_do_not_depend_on_how_bytes_come():
    data, rng = random.Random(0).randbytes(5500), random.Random(1)
    for _ in range(20):
        digests, at = ShardDigests(), 0
        while at < len(data):
            step = rng.choice((0, 1, 999, 1000, 1001, 2500))
            digests.update(data[at : at + step])
            at += step
        whole = ShardDigests()
        whole.update(np.frombuffer(data, np.uint8))
        assert digests.facts() == whole.facts()
        assert len(digests.digests()) == 6


def test_every_flipped_bit_is_found_in_its_shard(folder):
    assert find_damage(folder) == []
    rng = random.Random(0)
    for name in EVERY:
        data = (folder / name).read_bytes()
        for _ in range(40 if data else 0):
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            (folder / name).write_bytes(damaged)
            found = find_damage(folder)
            assert found, (name, at, bit)
            if name not in ("header.json", "manifest.json"):
                assert len(found) == 1
                assert f"{name}, shard {at // 1000} (bytes {at // 1000 * 1000}-" in found[0]
        (folder / name).write_bytes(data)
    assert find_damage(folder) == []


def test_documents_and_inputs_of_a_damaged_shard(folder):
    offsets = np.fromfile(folder / "documents.bin", np.int64)
    tokens = (folder / "tokens.bin").read_bytes()
    for shard in range(-(-len(tokens) // 1000)):
        damaged = bytearray(tokens)
        damaged[shard * 1000] ^= 1
        (folder / "tokens.bin").write_bytes(damaged)
        inside = [
            number
            for number in range(80)
            if offsets[number] * 2 < min((shard + 1) * 1000, len(tokens)) and offsets[number + 1] * 2 > shard * 1000
        ]
        (line,) = find_damage(folder)
        names = ", ".join(
            name for name, part in (("a.jsonl", range(40)), ("b.jsonl", range(40, 80))) if set(inside) & set(part)
        )
        assert line.endswith(f"; it has documents {inside[0]}-{inside[-1]}, of {names}")


def test_shards_that_begin_with_a_document(tmp_path, byte_tokenizer):
    """5 documents of 200 bytes in each shard."""
    texts = [f"{number:099}" for number in range(20)]
    folder = build([str(write_jsonl(tmp_path / "a.jsonl", texts))], tmp_path / "tokens", byte_tokenizer).folder
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[1000] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    (line,) = find_damage(folder)
    assert line.endswith("it has documents 5-9, of a.jsonl")


DAMAGE = {
    "emptied": (lambda path: os.truncate(path, 0), r"shard 0 .*the file ends at 0 bytes"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), r"shard \d+ "),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"more"), r"shard \d+|4 bytes after the end"),
    "gone": (lambda path: path.unlink(), "it is not there"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is not there"),
}


@pytest.mark.parametrize("name", EVERY[:4])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing(folder, name, damage, capsys):
    hurt, message = DAMAGE[damage]
    hurt(folder / name)
    assert main(["data", "verify", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {folder} is damaged" in captured.err
    if name != "header.json":
        assert re.search(f"{name}.*({message})", captured.err)
    else:
        assert "header.json" in captured.err


def test_several_damaged_shards_are_all_named(folder):
    data = bytearray((folder / "tokens.bin").read_bytes())
    for at in (10, 3_500, 3_600, 7_000):
        data[at] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    (folder / "tokenizer" / "tokenizer_settings.json").write_text("{}")
    found = find_damage(folder)
    assert [line.split(", shard ")[1].split()[0] for line in found[:3]] == ["0", "3", "7"]
    assert len(found) == 4
    assert "tokenizer/tokenizer_settings.json" in found[3]


def test_a_folder_of_an_older_version_is_verified_as_far_as_it_goes(folder):
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == []
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[100] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    (line,) = find_damage(folder)
    assert "has content hash" in line


def test_a_manifest_of_another_build(folder, tmp_path, byte_tokenizer):
    other = build([str(tmp_path / "a.jsonl")], tmp_path / "other", byte_tokenizer).folder
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    (line,) = find_damage(folder)
    assert "are of different builds" in line
    raw = json.loads((other / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(DataError, match="has version 99, this jaxscale reads version 1"):
        load_manifest(folder)
    for text in ("{", "[]", '{"format": 3}', json.dumps({**raw, "content": "0"})):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DamagedData, match="build the folder again"):
            load_manifest(folder)


def test_training_names_the_damaged_shard_and_the_command(folder, byte_tokenizer):
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[2500] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    with pytest.raises(
        DataError, match=r"tokens\.bin, shard 2 \(bytes 2000-3000\).*it has documents \d+-\d+, of .*build a\.jsonl"
    ):
        ensure_built(str(folder), byte_tokenizer)


def run(*arguments):
    """In a process of its own, as a person does."""
    command = [sys.executable, "-m", "jaxscale", "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in [*make_texts(30, longest=300), "short", "short"]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:10], "{", *lines[10:]]) + "\n")
    flags = ("--filters", "min-characters=3", "max-longest-line=290", "--deduplicate", "exact", "--max-bad", "1")
    one = run("build", "a.jsonl", "--out", "one", *flags)
    assert one.returncode == 0, one.stderr
    assert "exact-duplicate                       1   a.jsonl:33\n" in one.stdout
    assert "  set aside 1 of 33 records as unusable: see quarantine.jsonl\n" in one.stdout
    assert "a.jsonl:11: not valid JSON" in one.stderr
    bad = run("build", "a.jsonl", "--out", "two")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert main(["data", "build", "a.jsonl", "--out", "two", "--max-bad", "1"]) == 0
    capsys.readouterr()
    assert main(["data", "list", "."]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == ["one", "two"]
    assert "32 documents" in listed
    assert main(["data", "diff", "one", "one"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["data", "diff", "one", "two"]) == 1
    other = capsys.readouterr().out
    assert "selection.deduplicate: exact -> none\n" in other
    assert "total.dropped.exact-duplicate: 1 -> nothing\n" in other
    assert main(["data", "verify", "one", "two"]) == 0
    os.truncate("two/tokens.bin", 10)
    broken = run("verify", "one", "two")
    assert broken.returncode == 1
    assert broken.stdout.startswith("one: sound")
    assert "two: tokens.bin, shard 0" in broken.stderr
    assert main(["data", "list", "one", "two"]) == 1
    capsys.readouterr()
    assert main(["data", "build", "a.jsonl", "--out", "two", "--max-bad", "1"]) == 2
    assert "make it again with `jaxscale data build a.jsonl --max-bad 1 --out two`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify",), "data verify needs folders"),
        (("diff", "a"), "data diff compares 2 folders, 1 are given"),
        (("diff", "a", "b"), "a is no token folder"),
        (("list", "nowhere"), "nowhere is no folder"),
        (("verfy", "a"), "did you mean `jaxscale data verify`?"),
        (("destroy", "a"), "there are build, list, verify, diff"),
        (("list", "--all"), "--all"),
        (("build", "a", "--out", "b", "--max-bad", "-1"), "--max-bad is -1"),
        (("build", "a", "--out", "b", "--filters", "nice"), "'nice' is no filter"),
        (("build", "a", "--out", "b", "--deduplicate", "all"), "invalid choice 'all'"),
        (("build", "a", "--out", "b", "--deduplicate", "near", "--similarity", "2"), "--similarity is 2"),
    ],
)
def test_bad_command_lines(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_nothing_there(capsys, tmp_path):
    assert main(["data", "list", str(tmp_path)]) == 0
    assert "no token folder in" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "no token folder in" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "is no token folder" in capsys.readouterr().err


def test_an_unfinished_build_is_listed(tmp_path, capsys):
    (tmp_path / "x.building").mkdir()
    assert main(["data", "list", str(tmp_path)]) == 0
    assert "x.building  unfinished" in capsys.readouterr().out


def test_names_of_inputs_are_told_apart(tmp_path, byte_tokenizer):
    for language in ("en", "de"):
        (tmp_path / language).mkdir()
        write_jsonl(tmp_path / language / "a.jsonl", make_texts(5, len(language)))
    selection = Selection(filters=parse_filters(["min-characters=1"]))
    file = build([str(tmp_path / "en"), str(tmp_path / "de")], tmp_path / "out", byte_tokenizer, selection=selection)
    assert [parent["name"] for parent in load_manifest(file.folder)["parents"]] == ["en/a.jsonl", "de/a.jsonl"]
    assert len(find_inputs([str(tmp_path / "en")])) == 1
