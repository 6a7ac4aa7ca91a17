"""Batches on devices: the same rows in every world, exact resume at any step, nothing left behind."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from data_samples import make_corpus, make_texts, write_jsonl  # beside this file
from jax.sharding import NamedSharding

from jaxscale import axes
from jaxscale.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
)
from jaxscale.data.batches import StepRows, needed_rows
from jaxscale.data.corpora import Corpora, open_corpora
from jaxscale.data.errors import DataError
from jaxscale.data.evaluation import evaluation_batches, held_out
from jaxscale.data.loader import Loader, _assemble, to_devices
from jaxscale.data.tokenizer import ByteTokenizer


def make_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[: int(np.prod(shape))])


def make_config(steps=20, microbatches=1, changes=(), batches=0, seed=0, **data):
    data = {"path": "" if "mixture" in data else "a", "sequence": 16, "batch": 8, **data}
    return Config(
        "test",
        ModelConfig(),
        steps=steps,
        seed=seed,
        data=DataConfig(**data),
        phases=tuple(changes),
        train=TrainConfig(microbatches=microbatches),
        evaluate=EvaluateConfig(batches=batches),
    )


@pytest.fixture
def corpora(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    made = {name: make_corpus(tmp_path / name, np.roll(lengths, i), 3, name)[0] for i, name in enumerate("abc")}
    return Corpora(ByteTokenizer(), made, 3)


def read(config, corpora, mesh, start=0):
    with Loader(config, corpora, mesh, start) as loader:
        return [(s.step, s.row, s.rows, {k: np.asarray(v) for k, v in s.batch.items()}) for s in loader]


def same(a, b):
    assert [x[:3] for x in a] == [x[:3] for x in b]
    for x, y in zip(a, b, strict=True):
        for name in x[3]:
            np.testing.assert_array_equal(x[3][name], y[3][name])


PHASES = (
    PhaseConfig(4, batch=16),
    PhaseConfig(9, mixture=(SourceConfig("c", 1.0), SourceConfig("a", 2.0))),
    PhaseConfig(14, sequence=32, batch=4),
)
MIXED = {"mixture": (SourceConfig("a", 3.0), SourceConfig("b", 1.0)), "changes": PHASES}


def test_shapes_and_shardings(corpora):
    mesh = make_mesh(data=2, fsdp=2, context=2)
    with Loader(make_config(batch=6, microbatches=2), corpora, mesh) as loader:
        step = next(loader)
    padded = 8  # two microbatches of 3 rows, each padded to 4 shards
    assert (step.step, step.row, step.rows) == (0, 0, 6)
    for name in ("tokens", "targets", "segment_ids", "positions", "loss_weight"):
        assert step.batch[name].shape == (padded, 16)
        assert step.batch[name].sharding == NamedSharding(mesh, jax.P(("data", "fsdp", "expert"), "context"))
    assert step.batch["row"].sharding == NamedSharding(mesh, jax.P(("data", "fsdp", "expert")))
    assert step.batch["row"].tolist() == list(range(8))
    assert np.asarray(step.batch["loss_weight"])[6:].sum() == np.asarray(step.batch["segment_ids"])[6:].sum() == 0
    assert (np.asarray(step.batch["segment_ids"])[:6] >= 1).all()
    # Row r is in microbatch r mod 2, so each microbatch has as many real rows as the other.
    real = np.asarray(step.batch["segment_ids"])[:, 0] > 0
    assert real[0::2].sum() == real[1::2].sum() == 3


def test_same_batch_on_every_mesh(corpora):
    config = make_config(**MIXED)
    reference = read(config, corpora, make_mesh())
    assert len(reference) == 20
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"expert": 2}):
        same(read(config, corpora, make_mesh(**sizes)), reference)
    # Six devices do not divide 8 rows: the real rows are the same and come first.
    for one, other in zip(read(config, corpora, make_mesh(fsdp=6)), reference, strict=True):
        assert one[:3] == other[:3]
        for name, value in other[3].items():
            np.testing.assert_array_equal(one[3][name][: one[2]], value)
        assert one[3]["loss_weight"][one[2] :].sum() == 0


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 9, 13, 14, 19, 20])
def test_resume_is_exact_at_any_step(start, corpora):
    config = make_config(**MIXED)
    same(read(config, corpora, make_mesh(fsdp=2), start), read(config, corpora, make_mesh(fsdp=2))[start:])


def test_prefetch_changes_nothing_and_seed_does(corpora):
    reference = read(make_config(**MIXED), corpora, make_mesh())
    same(read(make_config(prefetch=1, **MIXED), corpora, make_mesh()), reference)
    other = read(make_config(seed=1, **MIXED), corpora, make_mesh())
    assert any((a[3]["tokens"] != b[3]["tokens"]).any() for a, b in zip(reference, other, strict=True))


def in_order(config, corpora):
    """The first token of each row: with tokens numbered by `make_corpus`, that names the window."""
    return np.concatenate([b["tokens"][:n, 0] for _, _, n, b in read(config, corpora, make_mesh())])


def test_every_window_once_per_pass(corpora):
    windows = corpora.by_address["a"].train.windows(16)
    passes = 3
    steps = -(-passes * windows // 8)
    first = in_order(make_config(steps=steps, batch=8), corpora)[: passes * windows].reshape(passes, windows)
    assert all(len(set(one.tolist())) == windows for one in first)
    assert len({tuple(one) for one in first.tolist()}) == passes
    plain = in_order(make_config(steps=steps, shuffle=False), corpora)[:windows]
    assert (np.diff(plain) > 0).all()


HOSTS = {1: {"fsdp": 2}, 2: {"data": 2, "fsdp": 2}, 3: {"fsdp": 6}, 4: {"fsdp": 4, "tensor": 2}}


def host_devices(mesh, hosts, host):
    devices = mesh.devices.reshape(-1)
    return list(np.array_split(devices, hosts)[host])


@pytest.mark.parametrize("plan", [(1,) * 4, (2,) * 4, (3,) * 4, (4,) * 4, (4, 2, 3, 1), (1, 3, 4, 2)])
def test_every_row_once_per_pass_for_any_hosts(plan, corpora):
    """Hosts come and go between steps; together they read every row of a pass once, in the same order as one host."""
    config = make_config(batch=9, steps=16, changes=(PhaseConfig(5, batch=12),))
    seen, reference = [], in_order(config, corpora)
    for step in range(config.steps):
        hosts = plan[step * len(plan) // config.steps]
        mesh = make_mesh(**HOSTS[hosts])
        at_place = {}
        for host in range(hosts):
            devices = host_devices(mesh, hosts, host)
            source = StepRows(config, corpora.by_address, mesh, devices)
            places = needed_rows(mesh, source.padded(step), devices)
            rows = source[step]
            assert len(rows["tokens"]) == len(places) <= source.padded(step)
            first, count = source.span(step)
            for index, place in enumerate(places.tolist()):
                assert rows["row"][index] == first + place
                real = bool(rows["segment_ids"][index, 0])
                assert real == (place < count)
                if real:
                    # Several hosts may hold the same row (tensor parallel over hosts); it is the same row.
                    assert at_place.setdefault(place, rows["tokens"][index].tolist()) == rows["tokens"][index].tolist()
        assert sorted(at_place) == list(range(count))
        seen.extend(at_place[place][0] for place in sorted(at_place))
    assert seen == reference.tolist()
    windows = corpora.by_address["a"].train.windows(16)
    assert len(set(seen[:windows])) == windows


def test_a_host_reads_only_what_it_needs():
    mesh = make_mesh(fsdp=4, tensor=2)
    assert needed_rows(mesh, 8, host_devices(mesh, 4, 1)).tolist() == [2, 3]
    mesh = make_mesh(data=2, tensor=4)
    assert needed_rows(mesh, 8, host_devices(mesh, 4, 0)).tolist() == [0, 1, 2, 3]
    assert needed_rows(mesh, 8, host_devices(mesh, 4, 1)).tolist() == [0, 1, 2, 3]


def test_arrays_of_several_processes_equal_those_of_one(corpora):
    """The path that a world of several processes takes, with all devices in this one."""
    config = make_config(batch=6)
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    source = StepRows(config, corpora.by_address, mesh, mesh.local_devices)
    rows = source[3]
    reference = to_devices(rows, mesh, 6)
    here = needed_rows(mesh, 6, mesh.local_devices)
    made = _assemble(rows, 6, here, {name: value.sharding for name, value in reference.items()})
    for name, value in reference.items():
        assert made[name].sharding == value.sharding
        np.testing.assert_array_equal(np.asarray(made[name]), np.asarray(value))


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def test_close_leaves_no_thread(corpora):
    loader = Loader(make_config(), corpora, make_mesh())
    next(loader)
    assert threads()
    loader.close()
    loader.close()
    deadline = time.monotonic() + 10
    while threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StopIteration):
        next(loader)


def test_background_errors_reach_the_consumer_and_end_the_loader(corpora, monkeypatch):
    real = StepRows.__getitem__

    def fails(self, step):
        if step == 2:
            raise OSError("the disk went away")
        return real(self, step)

    monkeypatch.setattr(StepRows, "__getitem__", fails)
    loader = Loader(make_config(), corpora, make_mesh())
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(loader)
    with pytest.raises(StopIteration):  # and not step 3, as if step 2 had been trained
        next(loader)


def test_sequence_and_context(corpora):
    with pytest.raises(
        DataError, match=r"'context' \(4\) does not divide a sequence of 18 tokens; use data.sequence 16"
    ):
        Loader(make_config(sequence=18), corpora, make_mesh(context=4))


def test_short_corpus_in_a_later_phase(corpora):
    config = make_config(changes=[PhaseConfig(5, sequence=100_000)])
    with pytest.raises(DataError, match=r"corpus a has .* one sequence of 100000 takes 100001"):
        Loader(config, corpora, make_mesh())


# Evaluation


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 3}])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_covers_every_held_out_token_once(sizes, batch, corpora):
    config, mesh = make_config(batch=batch), make_mesh(**sizes)
    targets, shapes = [], set()
    for number, made in enumerate(evaluation_batches(config, corpora, mesh)):
        made = {name: np.asarray(value) for name, value in made.items()}
        shapes.add(made["tokens"].shape)
        targets.extend(made["targets"][made["loss_weight"] > 0].tolist())
        assert made["row"][0] == number * batch
    assert len(shapes) == 1  # one program evaluates all of it
    expected = []
    for corpus in corpora.by_address.values():
        stream = corpus.held_out
        tokens, starts = stream.gather(np.zeros(1, int), stream.length)
        expected.extend(tokens[0][~starts[0]].tolist())
    assert sorted(targets) == sorted(expected)
    assert held_out(corpora).tokens == len(expected)


def test_evaluation_limits_and_nothing_held_out(corpora, tmp_path):
    assert len(list(evaluation_batches(make_config(batch=1, batches=2), corpora, make_mesh()))) == 2
    corpus, _ = make_corpus(tmp_path / "x", [50, 50])
    nothing = Corpora(ByteTokenizer(), {"a": corpus}, 0)
    assert list(evaluation_batches(make_config(), nothing, make_mesh())) == []
    assert (held_out(nothing).tokens, held_out(nothing).bytes_per_token) == (0, 0.0)


def test_bytes_per_token(tmp_path, bpe_tokenizer):
    texts = make_texts(30)
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    counts = held_out(open_corpora(make_config(path=source, held_out_documents=4)))
    assert (counts.documents, counts.bytes_per_token) == (
        4,
        1.0,
    )  # bytes are tokens, and an end of document for a first byte
    bpe_tokenizer.save(tmp_path / "tokenizer")
    coarse = held_out(
        open_corpora(make_config(path=source, held_out_documents=4, tokenizer=str(tmp_path / "tokenizer")))
    )
    assert coarse.bytes == counts.bytes
    assert coarse.tokens < counts.tokens


# What a resume checks


def test_identity(tmp_path, bpe_tokenizer):
    texts = make_texts(30)
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", texts[i:])) for i, n in enumerate("ab"))
    saved = open_corpora(make_config(path=a)).identity()
    (tmp_path / "moved").mkdir()
    moved = str(write_jsonl(tmp_path / "moved" / "c.jsonl", texts))
    open_corpora(make_config(path=moved)).check_identity(saved)
    more = make_config(path=a, changes=[PhaseConfig(5, mixture=(SourceConfig(a), SourceConfig(b)))])
    open_corpora(more).check_identity(saved)
    with pytest.raises(DataError, match=r"not the data .*corpus .*a\.jsonl: content \w{8} -> not there"):
        open_corpora(make_config(path=b)).check_identity(saved)
    with pytest.raises(DataError, match="held-out documents: 0 -> 2"):
        open_corpora(make_config(path=a, held_out_documents=2)).check_identity(saved)
    bpe_tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"tokenizer: bytes \(1e51a7b9\) -> BPE-\d+"):
        open_corpora(make_config(path=a, tokenizer=str(tmp_path / "tokenizer"))).check_identity(saved)
    write_jsonl(tmp_path / "a.jsonl", texts[2:])
    with pytest.raises(DataError, match=r"a\.jsonl: content (\w{8}) -> (?!\1)\w{8}"):
        open_corpora(make_config(path=a)).check_identity(saved)


def test_identity_is_by_place(tmp_path):
    """A mixture in another order, and two corpora that change places, are other data once their phase has begun."""
    texts = make_texts(40)
    a, b, c = (str(write_jsonl(tmp_path / f"{n}.jsonl", texts[i:])) for i, n in enumerate("abc"))

    def identity(corpora):
        return json.loads(json.dumps(corpora.identity()))  # as a checkpoint keeps it

    def mixed(*paths, later=(), start=4):
        changes = [PhaseConfig(start, mixture=tuple(map(SourceConfig, later)))] if later else []
        return open_corpora(make_config(mixture=tuple(map(SourceConfig, paths)), changes=changes))

    saved = identity(mixed(a, b, c))
    mixed(a, b, c).check_identity(saved, 3)
    with pytest.raises(
        DataError, match=r"from step 0 on, in order: \S+a\.jsonl \(\w{8}\), .*b.*c.* -> \S+c\.jsonl .*a.*b"
    ):
        mixed(c, a, b).check_identity(saved, 3)
    mixed(c, a, b).check_identity(saved, 0)

    saved = identity(mixed(a, later=[b]))
    with pytest.raises(DataError, match=r"corpora from step 0 on, in order: \S+a\.jsonl \(\w{8}\) -> \S+b\.jsonl \("):
        mixed(b, later=[a]).check_identity(saved, 3)

    saved = identity(mixed(a, later=[b, c]))
    mixed(a, later=[c, b]).check_identity(saved, 4)  # step 4 has not been trained yet
    with pytest.raises(DataError, match=r"corpora from step 4 on, in order: \S+b\.jsonl .* -> \S+c\.jsonl "):
        mixed(a, later=[c, b]).check_identity(saved, 5)
    mixed(a, later=[a, b, c], start=6).check_identity(saved, 5)  # the order of the rows refuses it

    (tmp_path / "moved").mkdir()
    moved = str(write_jsonl(tmp_path / "moved" / "b.jsonl", texts[1:]))
    mixed(a, later=[moved, c]).check_identity(saved, 5)

    twice = identity(mixed(a, b, later=[b, a]))  # one corpus at places of several phases
    mixed(a, b, later=[b, a]).check_identity(twice, 9)
    with pytest.raises(DataError, match="corpora from step 4 on"):
        mixed(a, b, later=[a, b]).check_identity(twice, 9)

    old = {name: value for name, value in saved.items() if name != "places"}
    mixed(a, later=[c, b]).check_identity(old, 5)  # of an older version: there is nothing to compare


def test_open_corpora_refuses(tmp_path):
    with pytest.raises(DataError, match=r"the run has no data; set --data\.path"):
        open_corpora(make_config(path=""))
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", make_texts(30))) for n in "ab")
    with pytest.raises(DataError, match="hold the same tokens"):
        open_corpora(make_config(mixture=(SourceConfig(a), SourceConfig(b))))
    with pytest.raises(DataError, match="from step 0 on names a corpus twice"):
        open_corpora(make_config(mixture=(SourceConfig(a), SourceConfig(a))))
    with pytest.raises(DataError, match=r"a\.jsonl has \d+ tokens to train on .* one sequence of 99999"):
        open_corpora(make_config(path=a, sequence=99999))
    with pytest.raises(ConfigError):
        make_config(batch=6, microbatches=4)


def test_vocabulary(corpora):
    corpora.check_vocabulary(257)
    with pytest.raises(DataError, match=r"token ids up to 256, beyond the model's vocabulary of 256"):
        corpora.check_vocabulary(256)
