"""Every rule of the audit with its error text, and the report."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale import axes
from jaxscale.audit import AuditError, audit
from jaxscale.config import Config, DataConfig, ModelConfig, PhaseConfig, PipelineConfig, PrecisionConfig, TrainConfig
from jaxscale.task import Parameter


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(axes.AXES, 1) | given


def config(pipeline=PipelineConfig(), microbatches=1, noise_scale=False, **data) -> Config:  # noqa: B008 - frozen
    train = TrainConfig(microbatches=microbatches, noise_scale=noise_scale)
    data = DataConfig(**{"sequence": 256, "batch": 8} | data)
    return Config("test", ModelConfig(), data=data, train=train, pipeline=pipeline)


def model(heads: int = 8, width: int = 64, mlp: int = 256, vocab: int = 512) -> dict[str, Parameter]:
    return {
        "embed/table": Parameter((vocab, width), ("vocab", "embed")),
        "layers/attention/q": Parameter((2, width, heads, 16), ("layers", "embed", "heads", "head_dim")),
        "layers/attention/o": Parameter((2, heads, 16, width), ("layers", "heads", "head_dim", "embed")),
        "layers/mlp/up": Parameter((2, width, mlp), ("layers", "embed", "mlp")),
        "norm/scale": Parameter((width,), ("norm",), init="ones"),
    }


def problems(parameters, mesh, run=None) -> list[str]:
    """The findings of the one error that is raised."""
    with pytest.raises(AuditError) as error:
        audit(parameters, mesh, run or config())
    first, *findings = str(error.value).splitlines()
    assert first.startswith(f"{len(findings)} problem")
    assert all(finding.startswith("  - ") for finding in findings)
    return [finding.removeprefix("  - ") for finding in findings]


@pytest.mark.parametrize(
    "mesh",
    [sizes(), sizes(fsdp=8), sizes(data=2, fsdp=2, tensor=2), sizes(tensor=8), sizes(expert=4), sizes(context=4)],
)
def test_a_model_that_fits(mesh):
    report = audit(model(), mesh, config())
    assert report.warnings == ()
    assert report.parameters == 512 * 64 + 2 * (2 * 64 * 8 * 16) + 2 * 64 * 256 + 64


def test_unknown_logical_axis():
    found = problems({"a/b": Parameter((8, 8), ("embde", None))}, sizes(fsdp=8))
    assert len(found) == 1
    assert found[0].startswith(
        "unknown logical axis 'embde' (did you mean 'embed'? axes.RULES has layers, embed, vocab"
    )
    assert found[0].endswith(" of a/b")


def test_as_many_axes_as_dims():
    found = problems({"a/b": Parameter((8, 8), ("embed",))}, sizes())
    assert found == ["1 logical axes ('embed',) for 2 dims (8, 8) of a/b"]


def test_indivisible_dim():
    parameters = {"layers/attention/q": Parameter((2, 64, 9, 16), ("layers", "embed", "heads", "head_dim"))}
    assert problems(parameters, sizes(tensor=4)) == [
        "mesh axis 'tensor' (4) does not divide heads (9) of layers/attention/q; use 1, 3 or 9"
    ]


def test_indivisible_dims_of_the_same_size_share_a_line():
    assert problems(model(heads=6), sizes(fsdp=2, tensor=4)) == [
        "mesh axis 'tensor' (4) does not divide heads (6) of layers/attention/q, layers/attention/o; use 1, 2, 3 or 6"
    ]


def test_suggested_sizes_are_few_and_near():
    found = problems(model(vocab=720720), sizes(tensor=32), config(sequence=256))
    vocab = next(line for line in found if "vocab" in line)
    assert vocab == (
        "mesh axis 'tensor' (32) does not divide vocab (720720) of embed/table; use 24, 26, 28, 30, 33, 35, 36 or 39"
    )


def test_dim_over_several_mesh_axes(monkeypatch):
    monkeypatch.setattr(axes, "RULES", {**axes.RULES, "rows": ("fsdp", "tensor")})
    found = problems({"table": Parameter((12, 2), ("rows", None))}, sizes(fsdp=2, tensor=4))
    assert found == [
        "mesh axes 'fsdp' x 'tensor' (2 x 4 = 8) do not divide rows (12) of table; use 1, 2, 3, 4, 6 or 12"
    ]


def test_mesh_axis_used_twice_in_a_tensor():
    parameters = model() | {"square": Parameter((64, 64), ("embed", "embed"))}
    assert problems(parameters, sizes(fsdp=4)) == [
        "mesh axis 'fsdp' splits 2 dims of square (embed, embed); rename all but one"
    ]


def flat(**changes):
    """The same model without layers, which alone are divided over stages."""
    return {path: parameter for path, parameter in model(**changes).items() if not path.startswith("layers/")}


def test_axis_that_shards_nothing():
    assert problems(flat(), sizes(stage=2, fsdp=4)) == [
        "mesh axis 'stage' (2) shards nothing: no parameter, batch or sequence dim is split over it, so its 2 groups "
        "of devices would repeat the same work; set mesh.stage to 1"
    ]


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "context"])
def test_axes_that_split_the_batch_or_the_sequence_are_no_waste(axis):
    audit(model(), sizes(**{axis: 4}), config())


def test_an_axis_is_no_waste_when_a_parameter_uses_it():
    audit(model(), sizes(stage=2), config(microbatches=2))


@pytest.mark.parametrize(
    ("changes", "stages", "message"),
    [
        (
            {"microbatches": 1},
            2,
            "pipeline: 1 microbatches for 2 stages: 1 of them would always wait; use 2 microbatches",
        ),
        (
            {"pipeline": PipelineConfig("interleaved", 2), "microbatches": 2},
            2,
            "pipeline.chunks (2) does not divide the 1 layers of a stage; use 1",
        ),
        (
            {"noise_scale": True, "microbatches": 4},
            2,
            "train.noise-scale needs the gradient of each microbatch by itself",
        ),
        ({"microbatches": 8}, 4, "mesh axis 'stage' (4) does not divide layers (2); use 1 or 2"),
    ],
)
def test_what_does_not_go_with_stages(changes, stages, message):
    (found,) = problems(model(), sizes(stage=stages), config(**changes))
    assert found.startswith(message)
    if "does not divide" not in message:
        audit(model(), sizes(), config(**changes))


@pytest.mark.parametrize(
    ("sequence", "mesh", "message"),
    [
        (
            250,
            sizes(context=4),
            "mesh axis 'context' (4) does not divide the sequence (250, data.sequence); use 248 or 252",
        ),
        (
            250,
            sizes(tensor=4),
            "mesh axis 'tensor' (4) does not divide the sequence (250, data.sequence); use 248 or 252",
        ),
        (
            36,
            sizes(context=4, tensor=2),
            "mesh axes 'context' x 'tensor' (4 x 2 = 8) do not divide the sequence (36, data.sequence); use 32 or 40",
        ),
        (3, sizes(context=4), "mesh axis 'context' (4) does not divide the sequence (3, data.sequence); use 4"),
    ],
)
def test_indivisible_sequence(sequence, mesh, message):
    assert problems(model(), mesh, config(sequence=sequence)) == [f"{message} tokens"]


def test_sequences_of_all_phases_are_checked():
    run = dataclasses.replace(config(), phases=(PhaseConfig(5, sequence=512), PhaseConfig(9, sequence=514)))
    assert problems(model(), sizes(context=4), run) == [
        "mesh axis 'context' (4) does not divide the sequence (514, phase from step 9); use 512 or 516 tokens"
    ]


def test_replicated_parameters():
    parameters = model() | {"big": Parameter((64, 256), (None, "mlp")), "small": Parameter((64,), (None,))}
    assert problems(parameters, sizes(fsdp=4)) == [
        "14.4% of the parameters are replicated over mesh axis 'fsdp' (4), which divides a dim of theirs (allowed are "
        "2%): big (64, 256), norm/scale (64,), small (64,); name that dim 'embed' in the parameter table"
    ]


def test_few_replicated_parameters_are_fine():
    parameters = model() | {"small": Parameter((64, 16), (None, None))}
    total = sum(64 * 16 if path == "small" else 0 for path in parameters)
    assert total / audit(parameters, sizes(), config()).parameters < 0.02
    audit(parameters, sizes(fsdp=4), config())


@pytest.mark.parametrize(
    ("parameter", "mesh"),
    [
        (Parameter((6, 6), (None, "mlp")), sizes(fsdp=4)),  # 4 divides none of its dims
        (Parameter((64, 3), ("mlp", None)), sizes(fsdp=2, tensor=2)),  # tensor has the dim that could be split
        (Parameter((64, 3), ("layers", None)), sizes(fsdp=2)),  # layers are scanned, not stored apart
        (Parameter((64, 64), (None, None)), sizes(data=8)),  # data copies weights by design
    ],
)
def test_what_cannot_be_sharded_may_be_replicated(parameter, mesh):
    audit({"only": parameter, "one": Parameter((8,), ("embed",))}, mesh, config())


def test_all_findings_come_at_once():
    found = problems(flat(heads=6, width=60, vocab=510), sizes(stage=2, fsdp=8, tensor=4), config(sequence=255))
    assert [line.split("(")[0] for line in found] == [
        "mesh axis 'tensor' ",
        "mesh axis 'fsdp' ",
        "mesh axis 'tensor' ",
        "mesh axis 'stage' ",
    ]


def test_error_names_the_mesh():
    with pytest.raises(AuditError, match=r"^1 problem between the model, the data and the mesh \(stage 2, fsdp 4\):\n"):
        audit(model(), sizes(stage=2, fsdp=4), config())


# The report.


def test_bytes_per_device():
    report = audit(model(), sizes(data=2, fsdp=4, tensor=2), config())
    assert report.bytes_per_device == {
        "embed/table": 512 * 64 * 4 // 8,
        "layers/attention/q": 2 * 64 * 8 * 16 * 4 // 8,
        "layers/attention/o": 2 * 64 * 8 * 16 * 4 // 8,
        "layers/mlp/up": 2 * 64 * 256 * 4 // 8,
        "norm/scale": 64 * 4,
    }
    half = dataclasses.replace(config(), precision=PrecisionConfig(weights="bfloat16"))
    assert audit(model(), sizes(fsdp=4), half).bytes_per_device["norm/scale"] == 64 * 2


def test_padded_rows():
    run = dataclasses.replace(config(batch=12), train=TrainConfig(microbatches=2))
    report = audit(model(), sizes(fsdp=4), run)
    assert (report.rows, report.padded_rows) == (12, 16)
    assert report.warnings == ()  # 4 of 16 is not more than a quarter


def test_much_padding_is_warned_of():
    run = dataclasses.replace(config(batch=4), train=TrainConfig(microbatches=2), phases=(PhaseConfig(3, batch=32),))
    report = audit(model(), sizes(data=2, fsdp=4), run)
    assert report.warnings == (
        "75% of the rows on the devices are padding: 2 microbatches of 2 rows (data.batch) over 8 devices; use "
        "batches of a multiple of 16, or fewer microbatches",
    )
    phases = (PhaseConfig(3, batch=5),)
    report = audit(model(), sizes(fsdp=8), dataclasses.replace(config(), phases=phases))
    assert report.warnings == (
        "38% of the rows on the devices are padding: 5 rows (phase from step 3) over 8 devices; use batches of a "
        "multiple of 8",
    )


@given(
    dims=st.tuples(*[st.sampled_from([4, 6, 8, 12])] * 3),
    mesh=st.builds(sizes, **{axis: st.sampled_from([1, 2, 3, 4]) for axis in ("data", "fsdp", "tensor")}),
)
def test_what_passes_can_be_laid_out(dims, mesh):
    """What the audit lets through, JAX's own shardings accept, with the same bytes on a device."""
    parameters = {"w": Parameter(dims, ("embed", "heads", "head_dim"))}
    sharding = axes.sharding(parameters["w"].axes, axes.abstract_mesh(mesh))
    try:
        report = audit(parameters, mesh, config(sequence=12))
    except AuditError:
        with pytest.raises(ValueError, match="evenly divide the shape"):
            sharding.shard_shape(dims)
        return
    shard = sharding.shard_shape(dims)
    assert report.bytes_per_device["w"] == 4 * shard[0] * shard[1] * shard[2]
