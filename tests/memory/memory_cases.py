"""A small model's loss and gradients, under any memory options and mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from ulysses_jax import config as configs
from ulysses_jax import make_mesh, placement
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict
from ulysses_jax.plan.compile import compile_on
from ulysses_jax.sharding import activation
from ulysses_jax.training.loss import cross_entropy
from ulysses_jax.training.model import features_and_head, model_of
from ulysses_jax.training.state import abstract_state, init_state

B, V = 4, 28
TOLERANCE = 1e-5
MESHES = {
    "one device": {},
    "seq 8": dict(seq=8),
    "data 2, seq 4": dict(data=2, seq=4),
    "fsdp 2, seq 2, tensor 2": dict(fsdp=2, seq=2, tensor=2),
}
FAMILIES = {
    "llama": dict(num_kv_heads=4),
    "gpt": dict(
        norm="layer",
        feed_forward="gelu",
        positions="learned",
        biases=True,
        tied_embeddings=True,
    ),
}


def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


def make_config(family="llama", degrees=None, *, tokens=56, model=None, **memory):
    """Placed; 56 tokens are 7 on each of 8 devices."""
    values = dict(
        model=dict(
            vocab_size=V,
            width=16,
            num_layers=2,
            num_heads=8,
            head_size=4,
            feed_forward_width=20,
            compute_dtype="float32",
            zigzag=False,  # batches here lie in the sequence's own order
        )
        | FAMILIES[family]
        | (model or {}),
        data=dict(mask_documents=False),
        training=dict(num_steps=5, batch_size=B, sequence_tokens=tokens),
        memory=dict(loss_tile_tokens=64) | memory,
    )
    config = complete(from_dict(configs.Config, values), name="test")
    return placement.place(config, dict(mesh_of(**(degrees or {})).shape))


def make_batch(tokens, *, packed):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (B, tokens + 1))
    first = rng.random((B, tokens)) < (0.1 if packed else 0)
    first[:, 0] = True
    starts = np.maximum.accumulate(np.where(first, np.arange(tokens), 0), axis=1)
    batch = dict(
        tokens=ids[:, :-1],
        labels=np.where(rng.random((B, tokens)) < 0.3, -1, ids[:, 1:]),
        positions=np.arange(tokens) - starts,
    )
    if packed:
        batch["segment_ids"] = np.cumsum(first, axis=1)
    return {name: values.astype(np.int32) for name, values in batch.items()}


@functools.cache
def first_parameters(config):
    """Made on one device; grown, so that every layer matters, and sinks unlike."""
    config = dataclasses.replace(
        config, mesh=configs.Mesh(), memory=configs.Memory(remat="none")
    )
    with jax.set_mesh(mesh_of()):
        state = jax.jit(functools.partial(init_state, config))()

    def grown(path, x):
        if path[-1].key == "sinks":
            return np.linspace(-1, 2, x.size, dtype=np.float32).reshape(x.shape)
        return np.asarray(x) * (4 if x.ndim > 1 else 1)

    return jax.tree_util.tree_map_with_path(grown, state.parameters)


def loss_and_gradients(config, *, packed=True):
    """Of the whole model on the config's mesh, as NumPy arrays."""
    degrees = dataclasses.asdict(config.mesh)
    mesh = mesh_of(**degrees)

    def function(parameters, batch):
        model = model_of(config, parameters)
        x, head = features_and_head(model, batch, config.memory)
        return cross_entropy(x, head, batch["labels"], config.memory.loss_tile_tokens)

    def put(values, spec, kind=None):
        return jax.device_put(values, NamedSharding(mesh, spec, memory_kind=kind))

    with jax.set_mesh(mesh):
        parameters = jax.tree.map(
            lambda value, leaf: put(
                value, leaf.sharding.spec, leaf.sharding.memory_kind
            ),
            first_parameters(dataclasses.replace(config, mesh=configs.Mesh())),
            abstract_state(config).parameters,
        )
        batch = make_batch(config.padded_tokens(), packed=packed)
        batch = {k: put(v, activation("BT", mesh.shape)) for k, v in batch.items()}
        loss, gradients = jax.jit(jax.value_and_grad(function))(parameters, batch)
        jax.tree.map(_assert_lies_alike, gradients, parameters)
    return float(loss), jax.tree.map(np.asarray, gradients)


def _assert_lies_alike(gradient, parameter):
    assert gradient.sharding.is_equivalent_to(parameter.sharding, parameter.ndim)


@functools.cache
def plain(family, mesh_name, *, packed=True):
    """Without any of the memory options."""
    config = make_config(family, MESHES[mesh_name], remat="none")
    return loss_and_gradients(config, packed=packed)


def assert_same(got, want):
    """Relative to the largest element of each gradient."""
    np.testing.assert_allclose(got[0], want[0], rtol=TOLERANCE)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got[1]),
        jax.tree.leaves(want[1]),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if "k_bias" in name:
            continue  # without RoPE it has no gradient: softmax ignores it
        scale = float(np.abs(b).max())
        assert scale > 1e-3, name
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=name)


def compiled(config):
    """The train step's program on CPU devices."""
    return compile_on(config, mesh_of(**dataclasses.asdict(config.mesh)))
