"""A tiny run of three steps, on any mesh of 8 devices and at any stage of ZeRO."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import config as configs
from ulysses_jax import make_mesh, placement
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.training.loss import IGNORED
from ulysses_jax.training.state import abstract_state, init_state
from ulysses_jax.training.step import abstract_batch, batch_spec, make_train_step

B, T, V = 8, 32, 24
NUM_STEPS = 3
FAMILIES = {
    "llama": dict(num_heads=8),
    "grouped": dict(num_heads=8, num_kv_heads=4),
    # Over seq they are padded and repeated, or keys are gathered; over tensor refused.
    "uneven": dict(num_heads=6, num_kv_heads=2),
    "gpt": dict(
        num_heads=8,
        norm="layer",
        feed_forward="gelu",
        positions="learned",
        biases=True,
        tied_embeddings=True,
    ),
}


@functools.cache
def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


def make_config(
    degrees, *, family="llama", dtype="float32", model=None, memory=None, **training
):
    """Placed on the mesh; vocabulary, batch and tokens divide by 8."""
    values = dict(
        model=dict(
            vocab_size=V, width=16, num_layers=2, head_size=4, compute_dtype=dtype
        )
        | FAMILIES[family]
        | (model or {}),
        training=dict(
            num_steps=NUM_STEPS,
            warmup_steps=1,
            learning_rate=0.01,
            batch_size=B,
            sequence_tokens=T,
        )
        | training,
        memory=dict(loss_tile_tokens=6) | (memory or {}),
    )
    config = complete(from_dict(configs.Config, values), name="test")
    return placement.place(config, dict(mesh_of(**degrees).shape))


def make_batch():
    """Rows packed differently, their labels as unequal as can be.

    Row 0 (a shard of data=8) and the last T/8 tokens (a shard of seq=8) have no label;
    of the other rows, from most to a few of the tokens have one.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1))
    first = rng.random((B, T)) < np.linspace(0, 0.3, B)[:, None]
    first[:, 0] = True
    starts = np.maximum.accumulate(np.where(first, np.arange(T), 0), axis=1)
    ignored = rng.random((B, T)) < np.linspace(0.1, 0.8, B)[:, None]
    ignored[0], ignored[:, -T // 8 :] = True, True
    ignored[:, :-1] |= first[:, 1:]  # a document's last token predicts nothing
    batch = dict(
        tokens=tokens[:, :-1],
        labels=np.where(ignored, IGNORED, tokens[:, 1:]),
        positions=np.arange(T) - starts,
        segment_ids=np.cumsum(first, axis=1),
    )
    return {name: values.astype(np.int32) for name, values in batch.items()}


BATCH = make_batch()
NUM_VALID = int((BATCH["labels"] != IGNORED).sum())


def put_batch(mesh, config):
    """As the loader would: tokens in the order that the strategy wants."""
    sharding = NamedSharding(mesh, batch_spec(mesh))
    order = zigzag_order(T, config.zigzag_members())
    steps = config.training.accumulation_steps
    return {
        name: jax.device_put(values.reshape(steps, -1, T)[..., order], sharding)
        for name, values in BATCH.items()
    }


@functools.cache
def first_state(family) -> Any:
    """Made on one device; parameters grown until the layers matter."""
    with jax.set_mesh(mesh_of()):
        init = functools.partial(init_state, make_config({}, family=family))
        state = jax.jit(init)()
    grown = jax.tree.map(
        lambda x: np.asarray(x) * (4 if x.ndim > 1 else 1), state.parameters
    )
    return jax.tree.map(np.asarray, dataclasses.replace(state, parameters=grown))


def put_state(values, config, mesh):
    def put(value, leaf):
        if leaf.sharding is None:
            return jax.device_put(value, NamedSharding(mesh, P()))
        kind, spec = leaf.sharding.memory_kind, leaf.sharding.spec
        return jax.device_put(value, NamedSharding(mesh, spec, memory_kind=kind))

    return jax.tree.map(put, values, abstract_state(config))


# Not all of them: a process may map only so many pieces of memory, programs have many.
@functools.lru_cache(maxsize=48)
def compiled(config):
    """The step, compiled from shapes alone."""
    with jax.set_mesh(mesh_of(**dataclasses.asdict(config.mesh))):
        traced = jax.jit(make_train_step(config), donate_argnums=0).trace(
            abstract_state(config), abstract_batch(config)
        )
        return traced.lower().compile()


@dataclasses.dataclass
class Trained:
    losses: list[float]
    gradient_norms: list[float]
    state: Any


def train(degrees, *, family="llama", state=None, **options) -> Trained:
    """Three steps, from `state` or the first one."""
    config = make_config(degrees, family=family, **options)
    mesh = mesh_of(**degrees)
    step = compiled(config)
    with jax.set_mesh(mesh):
        if state is None:
            state = put_state(first_state(family), config, mesh)
        batch = put_batch(mesh, config)
        rows = []
        for _ in range(NUM_STEPS):
            state, metrics = step(state, batch)
            rows.append({name: float(value) for name, value in metrics.items()})
    return Trained(
        [row["loss"] for row in rows], [row["gradient_norm"] for row in rows], state
    )


@functools.cache
def on_one_device(family="llama", dtype="float32") -> Trained:
    return train({}, family=family, dtype=dtype)


def assert_same(got: Trained, want: Trained, tolerance: float) -> None:
    """Relative; gradients of step 2, whose parameters differ by rounding, less so."""
    np.testing.assert_allclose(got.losses, want.losses, tolerance)
    norms, want_norms = got.gradient_norms, want.gradient_norms
    np.testing.assert_allclose(norms[:2], want_norms[:2], tolerance)
    np.testing.assert_allclose(norms[2], want_norms[2], 10 * tolerance)
    # A fault would show: the curve falls, and gradients are not clipped to nothing.
    assert want.losses[2] < want.losses[1] and want.gradient_norms[0] > 1.2
