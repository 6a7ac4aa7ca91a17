"""DiLoCo against NumPy: a model of a few weights, whole steps of `make_step`, slices that move apart and come together.

The task is least squares, so that the reference needs no autodiff: gradients of mean (x . w - y)^2 are written out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.config import Config, ConfigError, ModelConfig, OptimConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.fragments import fragments, is_due
from jaxscale.parallel.gradient_exchange import check_slices
from jaxscale.parallel.local_config import LocalConfig
from jaxscale.task import Parameter
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

WIDTH, OUT, ROWS = 8, 4, 8
TABLE = {
    "w": Parameter((WIDTH, OUT), ("embed", "mlp"), scale=0.3),
    "b": Parameter((OUT,), ("norm",), init="zeros"),
}


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """x . w + b; the numbers of a row are its tokens, scaled."""

    parameters = TABLE
    stored_layout = None
    tables = None

    def __hash__(self):
        return 1

    def init(self, key):
        w = jax.random.normal(key, (WIDTH, OUT), out_sharding=axes.spec("embed", "mlp")) * 0.3
        return {"w": w, "b": jnp.zeros(OUT, out_sharding=axes.spec("norm"))}

    def loss(self, params, batch, key):
        del key
        rows = axes.spec("act_batch")[0]
        x = batch["tokens"].astype(jnp.float32) / 10
        w = jax.reshard(params["w"], jax.P(None, None))
        y = jnp.einsum("BD,DO->BO", x, w, out_sharding=jax.P(rows, None)) + params["b"]
        total = jnp.sum(batch["loss_weight"][:, :OUT] * (y - batch["targets"][:, :OUT].astype(jnp.float32) / 10) ** 2)
        return total, {"loss": total}


def config_of(local, optim=None):
    optim = optim or OptimConfig("sgd", learning_rate=0.05, schedule="constant", momentum=0.0, weight_decay=0.0, clip=0)
    return Config("local", ModelConfig(), steps=100, optim=optim, local=local)


def batch_of(step):
    generator = np.random.default_rng(step)
    weight = np.zeros((ROWS, WIDTH), np.float32)
    weight[:, :OUT] = 1
    return {
        "tokens": generator.integers(-20, 20, (ROWS, WIDTH)).astype(np.int32),
        "targets": generator.integers(-20, 20, (ROWS, WIDTH)).astype(np.int32),
        "loss_weight": weight,
    }


def train(config, steps, **sizes):
    """(state as NumPy arrays after these steps, by path; losses)."""
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    mesh = jax.make_mesh(shape, axes.AXES, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        task = LeastSquares()
        optimizer = make_optimizer(config.optim, TABLE, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        step, losses, states = make_step(config, task, optimizer), [], []
        for number in range(steps):
            batch = {k: jax.device_put(v, axes.sharding(("act_batch", None))) for k, v in batch_of(number).items()}
            state, metrics = step(state, batch, np.int32(number))
            losses.append(float(metrics["loss"]))
            for leaf in jax.tree.leaves(state["params"]):
                copies = [
                    np.asarray(s.data) for s in leaf.addressable_shards if s.index == leaf.addressable_shards[0].index
                ]
                assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)
            states.append({path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()})
    return states, losses


def start():
    with jax.set_mesh(jax.make_mesh((1,) * 6, axes.AXES, devices=jax.devices()[:1])):
        params = LeastSquares().init(jax.random.fold_in(jax.random.key(0), 0))
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}


def gradient(params, batch, rows):
    """Of the mean over the given rows, in float64."""
    x, y = batch["tokens"][rows] / 10, batch["targets"][rows][:, :OUT] / 10
    error = 2 * (x @ params["w"] + params["b"] - y) / (len(x) * OUT)
    return {"w": x.T @ error, "b": error.sum(0)}


def reference(steps, slices, local, rate=0.05):
    """DiLoCo with plain SGD inside, as the paper's algorithm 1 says it, with fragments and a delay as its successor."""
    common = start()
    mine = [dict(common) for _ in range(slices)]
    momentum = {path: np.zeros_like(w) for path, w in common.items()}
    pending = {}
    parts = np.split(np.arange(ROWS), slices)
    groups = [["b", "w"]] if local.fragments == 1 else [["w"], ["b"]]
    for done in range(1, steps + 1):
        batch = batch_of(done - 1)
        for s in range(slices):
            g = gradient(mine[s], batch, parts[s])
            mine[s] = {path: w - rate * g[path] for path, w in mine[s].items()}
        for number, group in enumerate(groups):
            first = local.every * (number + 1) // local.fragments
            ends = done - local.delay
            movement = {path: np.mean([common[path] - mine[s][path] for s in range(slices)], axis=0) for path in group}
            if local.delay == 0:
                pending |= movement
            if ends >= first and (ends - first) % local.every == 0:
                for path in group:
                    momentum[path] = local.momentum * momentum[path] + pending[path]
                    common[path] = common[path] - local.learning_rate * (
                        pending[path] + local.momentum * momentum[path]
                    )
                    for s in range(slices):
                        mine[s][path] = local.mixing * mine[s][path] + (1 - local.mixing) * common[path]
            if local.delay and done >= first and (done - first) % local.every == 0:
                pending |= movement
    return common, mine, momentum


@pytest.mark.parametrize(
    "local",
    [
        LocalConfig(every=3),
        LocalConfig(every=4, fragments=2),
        LocalConfig(every=4, fragments=2, delay=1, mixing=0.5, learning_rate=0.5),
    ],
    ids=["whole", "fragments", "delay"],
)
def test_against_numpy(local):
    states, losses = train(config_of(local), 10, data=2, fsdp=2)
    common, mine, momentum = reference(10, 2, local)
    for path in TABLE:
        np.testing.assert_allclose(states[-1][f"params/{path}"], common[path], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states[-1][f"opt/outer/{path}"], momentum[path], rtol=1e-4, atol=1e-6)
        for s in range(2):
            np.testing.assert_allclose(states[-1][f"local/params/{path}"][s], mine[s][path], rtol=1e-5, atol=1e-6)
    apart = states[0]["local/params/w"]
    assert np.abs(apart[0] - apart[1]).max() > 1e-3
    np.testing.assert_allclose(states[0]["params/w"], start()["w"], rtol=1e-6)
    assert all(np.isfinite(losses))


def test_one_step_of_averaging_is_data_parallel():
    """H = 1, outer rate 1, no momentum, plain SGD inside."""
    local = LocalConfig(every=1, learning_rate=1.0, momentum=0.0)
    states, losses = train(config_of(local), 5, data=2, fsdp=2)
    plain, wanted = train(config_of(LocalConfig()), 5, data=2, fsdp=2)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    for path in TABLE:
        np.testing.assert_allclose(states[-1][f"params/{path}"], plain[-1][f"params/{path}"], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(states[-1][f"local/params/{path}"][0], states[-1][f"params/{path}"])


@pytest.mark.parametrize(("exchange", "error"), [("bfloat16", 4e-3), ("int8", 8e-3), ("int4", 0.1)])
def test_what_is_sent_may_be_rounded(exchange, error):
    local = LocalConfig(every=2, learning_rate=1.0, momentum=0.0, exchange=exchange, block=8)
    exact, _ = train(config_of(dataclasses.replace(local, exchange="float32")), 2, data=2)
    found, _ = train(config_of(local), 2, data=2)
    begin = start()
    moved = np.abs(exact[-1]["params/w"] - begin["w"]).max()
    off = np.abs(found[-1]["params/w"] - exact[-1]["params/w"]).max()
    assert 0 < off <= error * moved


def test_adamw_inside_has_moments_of_its_own():
    optim = OptimConfig("adamw", learning_rate=0.01, schedule="constant")
    states, losses = train(config_of(LocalConfig(every=4), optim), 12, data=2)
    for slot in ("mu", "nu"):
        moments = states[-1][f"local/opt/{slot}/w"]
        assert moments.shape == (2, WIDTH, OUT)
        assert not np.allclose(moments[0], moments[1])
    assert np.isfinite(losses).all()


def test_one_slice_that_is_left_goes_on():
    """A world that shrinks to one slice still takes outer steps, from its own movement."""
    local = LocalConfig(every=2, exchange="int8", block=8)
    states, _ = train(config_of(local), 4, data=1, expert=2)
    common, _, momentum = reference(4, 1, local)
    for path in TABLE:
        np.testing.assert_allclose(states[-1][f"params/{path}"], common[path], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states[-1][f"opt/outer/{path}"], momentum[path], rtol=1e-4, atol=1e-6)


def test_fragments_are_of_about_the_same_size():
    table = {f"w{i}": Parameter((2**i,), ("norm",)) for i in range(8)}
    groups = fragments(table, 3)
    assert sorted(path for group in groups for path in group) == sorted(table)
    assert [sum(2 ** int(path[1:]) for path in group) for group in groups] == [128, 64, 63]
    with pytest.raises(ValueError, match="8 weights"):
        fragments(table, 9)


def test_when_fragments_are_due():
    due = {g: [n for n in range(1, 13) if is_due(n, 4, g, 2)] for g in range(2)}
    assert due == {0: [2, 6, 10], 1: [4, 8, 12]}
    assert [n for n in range(1, 13) if is_due(n, 4, 1, 2, delay=3)] == [7, 11]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every": -1}, "local.every is -1"),
        ({"every": 4, "fragments": 5}, "only 4 steps"),
        ({"every": 4, "delay": 4}, "use at most 3"),
        ({"every": 4, "fragments": 0}, "local.fragments is 0"),
        ({"every": 4, "mixing": 1.0}, "local.mixing"),
        ({"every": 4, "momentum": 1.0}, "local.momentum"),
        ({"every": 4, "learning_rate": 0.0}, "local.learning-rate"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        LocalConfig(**changes)


def test_what_does_not_go_together_is_refused():
    config = config_of(LocalConfig(every=4))
    check_slices(config, 2, 2, fresh=True)
    check_slices(config, 1, 2, fresh=False)
    with pytest.raises(ConfigError, match=r"mesh\.data is 1"):
        check_slices(config, 1, 2, fresh=True)
    with pytest.raises(ConfigError, match="the model has 2 weights"):
        check_slices(config_of(LocalConfig(every=4, fragments=3)), 2, 2, fresh=True)
    with pytest.raises(ConfigError, match=r"optim.name is muon.*set optim.name to adamw"):
        check_slices(config_of(LocalConfig(every=4), OptimConfig("muon")), 2, 2, fresh=True)
