"""Streams and rows: nothing leaks over a document's border, whatever the documents' lengths and cuts."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_corpus  # beside this file
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.data.corpus import held_out_documents
from jaxscale.data.errors import DataError
from jaxscale.data.rows import empty_rows, make_rows

LENGTHS = st.lists(st.integers(1, 30), min_size=2, max_size=40)


def expected_stream(offsets, documents):
    """Token by token: its id, its document, its place in it."""
    stream = [(t, d, t - offsets[d]) for d in documents for t in range(offsets[d], offsets[d + 1])]
    return np.array(stream, np.int64).reshape(-1, 3)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_streams_and_rows_are_exact(lengths, data):
    held = data.draw(st.integers(0, len(lengths) - 1))
    with tempfile.TemporaryDirectory() as folder:
        corpus, offsets = make_corpus(Path(folder) / "c", lengths, held)
        out = set(held_out_documents(len(lengths), held).tolist())
        assert len(out) == held
        for stream, documents in [
            (corpus.train, [d for d in range(len(lengths)) if d not in out]),
            (corpus.held_out, sorted(out)),
        ]:
            if stream is None:
                assert not out
                continue
            truth = expected_stream(offsets, documents)
            assert (stream.length, stream.documents) == (len(truth), len(documents))
            assert stream.bytes == sum(lengths[d] - 1 for d in documents)
            if len(truth) < 3:
                continue
            sequence = data.draw(st.integers(1, min(len(truth) - 1, 40)))
            every = np.arange(stream.windows(sequence)) * sequence
            all_rows = make_rows(*stream.gather(every, sequence + 1), every)
            assert stream.targets(sequence) == all_rows["loss_weight"].sum()
            last = len(truth) - sequence - 1
            starts = np.array(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=6)))
            tokens, document_starts = stream.gather(starts, sequence + 1)
            rows = make_rows(tokens, document_starts, np.arange(len(starts)))
            for b, start in enumerate(starts):
                window = truth[start : start + sequence + 1]
                token, document, _ = window.T
                assert rows["tokens"][b].tolist() == token[:-1].tolist()
                assert rows["targets"][b].tolist() == token[1:].tolist()
                assert rows["loss_weight"][b].tolist() == (document[:-1] == document[1:]).astype(float).tolist()
                # Segments: one per document, numbered from 1 in order of appearance.
                order = {d: i + 1 for i, d in enumerate(dict.fromkeys(document[:-1].tolist()))}
                assert rows["segment_ids"][b].tolist() == [order[d] for d in document[:-1].tolist()]
                # Positions: from the document's start, or from the row's start for one that began before.
                seen: dict[int, int] = {}
                expected = []
                for d in document[:-1].tolist():
                    expected.append(seen.get(d, 0))
                    seen[d] = seen.get(d, 0) + 1
                assert rows["positions"][b].tolist() == expected


def test_dtypes_and_row_ids():
    tokens, starts = np.zeros((2, 5), np.int32), np.zeros((2, 5), bool)
    for rows in (make_rows(tokens, starts, np.array([7, 2**32 + 3])), empty_rows(4, np.array([7, 2**32 + 3]))):
        assert {name: str(value.dtype) for name, value in rows.items()} == {
            **dict.fromkeys(["tokens", "targets", "segment_ids", "positions"], "int32"),
            "loss_weight": "float32",
            "row": "uint32",
        }
        assert rows["row"].tolist() == [7, 3]
        assert {value.shape for value in rows.values()} == {(2, 4), (2,)}


def test_windows_cover_every_token_once_as_target(tmp_path):
    corpus, _ = make_corpus(tmp_path / "c", [5, 9, 17, 3])
    for sequence in (1, 4, 11, 33):
        count = corpus.train.windows(sequence)
        tokens, starts = corpus.train.gather(np.arange(count) * sequence, sequence + 1)
        targets = make_rows(tokens, starts, np.arange(count))["targets"].reshape(-1)
        assert targets.tolist() == list(range(1, count * sequence + 1))
        assert corpus.train.length - 1 - len(targets) < sequence  # what is left is no whole window


def test_held_out_is_fixed():
    """A run may not evaluate on what an earlier version trained on."""
    assert held_out_documents(42, 2).tolist() == [10, 21]
    assert set(held_out_documents(1000, 10)) < set(held_out_documents(1000, 11))
    assert len(set(held_out_documents(1000, 999))) == 999


def test_hashing_in_pieces_changes_nothing(monkeypatch):
    from jaxscale.data import corpus

    whole = held_out_documents(500, 20).tolist()
    monkeypatch.setattr(corpus, "_CHUNK", 7)
    assert held_out_documents(500, 20).tolist() == whole


def test_outside_the_stream_is_an_error(tmp_path):
    corpus, _ = make_corpus(tmp_path / "c", [5, 9])
    corpus.train.gather(np.array([0, 4]), 10)
    with pytest.raises(IndexError, match="in a stream of 14 tokens"):
        corpus.train.gather(np.array([0, 5]), 10)


def test_too_little_data(tmp_path):
    corpus, _ = make_corpus(tmp_path / "c", [5, 9, 4], held_out=1, address="small")
    left = corpus.train.length
    corpus.check_sequence(left - 1)
    with pytest.raises(
        DataError, match=rf"corpus small has {left} tokens to train on \(1 documents .* {left} takes {left + 1}"
    ):
        corpus.check_sequence(left)
    with pytest.raises(DataError, match=r"has 3 documents, data.held-out-documents asks for 3 .* at most 2"):
        make_corpus(tmp_path / "d", [5, 9, 4], held_out=3)
