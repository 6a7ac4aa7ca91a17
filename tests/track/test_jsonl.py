"""metrics.jsonl: floats bit for bit, torn lines, epochs, lines that a kill lost, and a fuzz of the reader."""

import json
import math
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.track import lines
from jaxscale.track.jsonl import BLOCK, JsonlMetrics, backwards, read_metrics


def write(path, *metric_lines):
    sink = JsonlMetrics(path)
    for line in metric_lines:
        sink.write(line)
    sink.close()


def line(step, epoch=1, loss=0.5):
    return {"step": step, "epoch": epoch, "loss": loss}


def bits(value):
    return struct.pack("<d", value)


@given(st.floats(width=64))
def test_every_float_comes_back_bit_for_bit(value):
    text = lines.encode({"step": 1, "loss": value, "layers": {"a/b": [value, {"c": value}]}})
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    back = lines.decode(text)
    for found in (back["loss"], back["layers"]["a/b"][0], back["layers"]["a/b"][1]["c"]):
        assert math.isnan(found) if math.isnan(value) else bits(found) == bits(value)
    assert back.keys() == {"step", "loss", "layers"}


def test_what_stands_for_nan_is_documented_in_the_line():
    assert json.loads(lines.encode({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "ok": 1.0})) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "ok": 1.0,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }
    with pytest.raises(ValueError, match="a metric is called 'nonfinite'"):
        lines.encode({"nonfinite": 1.0})


def test_scalars_of_numpy_and_jax_are_numbers():
    import jax.numpy as jnp

    found = lines.decode(
        lines.encode({"a": np.float32(0.1), "b": jnp.float32(0.1), "c": np.int64(3), "d": True, "e": None})
    )
    assert found == {"a": float(np.float32(0.1)), "b": float(np.float32(0.1)), "c": 3, "d": True, "e": None}
    assert lines.decode(lines.encode({"a": np.float32("nan")}))["a"] != 0
    with pytest.raises(TypeError):
        lines.encode({"a": object()})


@pytest.mark.parametrize("torn", ['{"step": 3, "epoch": 1, "lo', '{"step": 3', "{", "\x00\x00"])
def test_a_torn_last_line_is_ended_and_passed_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, line(1), line(2))
    with open(path, "a") as file:
        file.write(torn)
    assert read_metrics(path) == [line(1), line(2)]
    write(path, line(3, epoch=2))
    assert read_metrics(path) == [line(1), line(2), line(3, epoch=2)]
    assert path.read_text().splitlines()[2] == torn


def test_a_whole_last_line_without_its_end_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines.encode(line(1)).rstrip())
    write(path, line(2))
    assert read_metrics(path) == [line(1), line(2)]


def test_the_highest_epoch_counts_for_each_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, line(1), line(2), line(3), line(2, epoch=2, loss=0.25), line(1, epoch=3), line(1, epoch=2))
    assert read_metrics(path) == [line(1, epoch=3), line(2, epoch=2, loss=0.25), line(3)]
    assert read_metrics(tmp_path / "absent") == []


def test_a_restored_state_gets_its_line_back_and_no_line_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(line(step) for step in range(1, 6)), line(4, epoch=2), line(5, epoch=2))
    sink = JsonlMetrics(path)
    assert not sink.ensure_line(line(3))
    assert not sink.ensure_line(line(5, epoch=2))
    assert not sink.ensure_line({}), "a state of step 0 has no line"
    assert sink.ensure_line(line(6, epoch=2, loss=math.inf))
    assert not sink.ensure_line(line(6, epoch=2, loss=math.inf))
    sink.close()
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_lost_by_a_kill_is_found_missing_behind_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, line(1))
    with open(path, "a") as file:
        file.write('{"step": 2, "epo')
    sink = JsonlMetrics(path)
    assert sink.ensure_line(line(2))
    sink.close()
    assert read_metrics(path) == [line(1), line(2)]


def test_backwards_is_the_file_backwards(tmp_path):
    path = tmp_path / "metrics.jsonl"
    many = [line(step, loss="x" * (step * 7919 % (BLOCK // 4))) for step in range(60)]
    write(path, *many)
    assert path.stat().st_size > 3 * BLOCK
    assert list(backwards(path)) == many[::-1]
    some = list(backwards(path, limit=BLOCK))
    assert 0 < len(some) < len(many)
    assert some == many[::-1][: len(some)]
    assert list(backwards(tmp_path / "absent")) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 400), junk=st.binary(max_size=40))
def test_fuzz_of_the_reader(tmp_path_factory, seed, cut, junk):
    """Whatever is torn off or thrown in, the reader returns exactly the whole lines that were written."""
    chance = random.Random(seed)
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    junk = bytes(byte for byte in junk if byte not in b"\n}")
    data, kept = b"", {}
    for _ in range(8):
        written = line(chance.randrange(6), epoch=chance.randrange(3), loss=chance.choice([0.1, math.inf, 1e-300, 7.0]))
        text = lines.encode(written)
        if chance.random() < 0.3:
            text = text[: chance.randrange(len(text) - 1)] + junk + b"\n"
        else:
            best = kept.get(written["step"])
            if best is None or written["epoch"] >= best["epoch"]:
                kept[written["step"]] = written
        data += text
    path.write_bytes(data + lines.encode(line(99))[: cut % 30])
    assert read_metrics(path) == [kept[step] for step in sorted(kept)]


@given(st.binary(max_size=300))
def test_fuzz_with_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "metrics.jsonl"
    path.write_bytes(data)
    read_metrics(path)
    list(backwards(path))
    write(path, line(1))
    assert read_metrics(path)[-1]["step"] >= 1
