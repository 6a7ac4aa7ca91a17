"""What a build shows: a bar on a terminal, otherwise a line now and then, and nothing for a short build."""

import io

import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.data import progress
from jaxscale.data.build import build


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def source(tmp_path):
    return str(write_jsonl(tmp_path / "a.jsonl", make_texts(40)))


def test_a_short_build_is_silent(source, tmp_path, byte_tokenizer, capsys):
    build([source], tmp_path / "out", byte_tokenizer)
    assert capsys.readouterr() == ("", "")


def test_lines(source, tmp_path, byte_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    file = build([source], tmp_path / "out", byte_tokenizer, block_bytes=500)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert lines[-1].startswith(f"tokenising out: 100%, {file.header.tokens:,} tokens")


def test_bar(source, tmp_path, byte_tokenizer, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    build([source], tmp_path / "out", byte_tokenizer)
    assert "tokenising out" in terminal.getvalue()
