"""`jaxscale data build` with its flags, on the formats that people have, and a run on what it built."""

import gzip
import json

import pytest
from small_runs import lines, train

from jaxscale.checkpoint.layout import read_record
from jaxscale.cli import main
from jaxscale.data import workers
from jaxscale.data.token_file import open_token_file
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.train.protocols import ExitReason

VOCABULARY = {"<|endoftext|>": 0, "<unk>": 1, "once": 2, "more": 3, "unto": 4, "the": 5, "breach": 6}
SENTENCES = ("once more unto the breach", "the more the more", "dear friends once more")


@pytest.fixture(name="files")
def _files(tmp_path):
    """A jsonl.gz and a Parquet file with the text in a column `body`, and a tokenizer of words."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"id": number, "body": SENTENCES[number % 3]} for number in range(60)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:31])
    pq.write_table(pa.Table.from_pylist(rows[31:]), tmp_path / "b.parquet", row_group_size=7)
    return tmp_path


def test_the_command_builds_from_two_formats_and_a_run_trains_on_it(files, monkeypatch, capsys):
    started = []
    original = workers._Worker.__init__
    monkeypatch.setattr(workers._Worker, "__init__", lambda self, *of: started.append(self) or original(self, *of))
    out, tokenizer = files / "tokens", files / "tokenizer.json"
    inputs = [str(files / "a.jsonl.gz"), str(files / "b.parquet")]
    flags = ["--out", str(out), "--tokenizer", str(tokenizer), "--workers", "2"]
    assert main(["data", "build", inputs[0], *flags]) == 2
    assert "no field 'text'; the line has body, id: set data.text-field (--text-field)" in capsys.readouterr().err
    assert not out.exists()
    started.clear()
    assert main(["data", "build", *inputs, *flags, "--text-field", "body"]) == 0
    assert len(started) == 2
    assert all(worker._process.poll() is not None for worker in started), "a worker that outlives the command"
    words = [word for number in range(60) for word in (*SENTENCES[number % 3].split(), "<|endoftext|>")]
    built = open_token_file(out)
    assert built.tokens.tolist() == [VOCABULARY.get(word, 1) for word in words]
    assert built.header.tokenizer_hash == load_tokenizer(str(tokenizer)).hash
    count = len(built.tokens)
    size = sum(len(SENTENCES[number % 3]) for number in range(60))
    assert capsys.readouterr().out == f"{out}: 60 documents, {count:,} tokens from {size:,} bytes of text\n"

    run = files / "run"
    data = ("--data.path", out, "--data.tokenizer", tokenizer, "--data.sequence", 8, "--data.batch", 4)
    assert train(run, *data, "--steps", 2, "--devices", 1) is ExitReason.COMPLETED
    assert [(line["step"], line["rows"]) for line in lines(run)] == [(1, 4), (2, 4)]
    assert all(0 < line["loss"] < 10 for line in lines(run))
    identity = read_record(run / "checkpoints" / "2").data
    assert list(identity["corpora"]) == [built.header.content]
    assert identity["tokenizer"]["hash"] == built.header.tokenizer_hash
