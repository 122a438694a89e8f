"""A small model with adapters, and what its gradients should be: those of the plain
model with merged weights, dense and on one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from ulysses_jax import config as configs
from ulysses_jax import make_mesh, placement
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict
from ulysses_jax.models.adapter import ADAPTER, joined, split
from ulysses_jax.sharding import activation, at_stage
from ulysses_jax.training.loss import cross_entropy
from ulysses_jax.training.model import features_and_head, model_of
from ulysses_jax.training.state import abstract_state, init_state
from ulysses_jax.training.step import frozen_weights, weights_of

B, T, V = 4, 32, 24
RANK, ALPHA = 3, 5.0
MODEL = dict(
    vocab_size=V,
    width=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    feed_forward_width=24,
    attention_gate=True,
    zigzag=False,  # batches here lie in the sequence's own order
)


def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


def make_config(degrees=None, *, targets=("all",), dtype="float32", model=None, **more):
    """Placed; more: of memory, but for stage, of ZeRO."""
    training = dict(zero_stage=more.pop("stage", 3))
    lora = dict(rank=RANK, alpha=ALPHA, targets=list(targets)) if targets else None
    values = dict(
        model=MODEL | dict(compute_dtype=dtype, lora=lora) | (model or {}),
        data=dict(mask_documents=False),
        training=dict(num_steps=3, batch_size=B, sequence_tokens=T) | training,
        memory=dict(loss_tile_tokens=16) | more,
    )
    config = complete(from_dict(configs.Config, values), name="test")
    return placement.place(config, dict(mesh_of(**(degrees or {})).shape))


@functools.cache
def first_parameters(config):
    """Of one device, grown until the layers matter; no A or B is zero."""
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, strategy="auto", compute_dtype="float32"
        ),
        mesh=configs.Mesh(),
        memory=configs.Memory(remat="none"),
        training=dataclasses.replace(config.training, zero_stage=3),
    )
    with jax.set_mesh(mesh_of()):
        state = jax.jit(functools.partial(init_state, plain))()
    rng = np.random.default_rng(0)

    def grown(path, x):
        if any(str(each.key).endswith(ADAPTER) for each in path):
            return rng.normal(0, 0.1, x.shape).astype(np.float32)
        return np.asarray(x) * (4 if x.ndim > 1 else 1)

    return jax.tree_util.tree_map_with_path(grown, state.all_parameters())


def make_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (B, T + 1))
    first = rng.random((B, T)) < 0.1
    first[:, 0] = True
    starts = np.maximum.accumulate(np.where(first, np.arange(T), 0), axis=1)
    batch = dict(
        tokens=ids[:, :-1],
        labels=np.where(rng.random((B, T)) < 0.3, -1, ids[:, 1:]),
        positions=np.arange(T) - starts,
        segment_ids=np.cumsum(first, axis=1),
    )
    return {name: values.astype(np.int32) for name, values in batch.items()}


def merged(parameters, scale):
    """Of a layer, or a tree of them: every W with its adapter in it."""
    found = {}
    for name, part in parameters.items():
        if str(name).endswith(ADAPTER):
            continue
        adapter = parameters.get(f"{name}{ADAPTER}") if isinstance(name, str) else None
        if adapter is not None:
            a, b = adapter["a"], adapter["b"]
            rank = a.shape[-1]
            delta = jnp.matmul(
                a.reshape(a.shape[0], -1, rank),
                b.reshape(b.shape[0], rank, -1),
                precision="highest",
            )
            part = part + scale * delta.reshape(part.shape)
        found[name] = merged(part, scale) if isinstance(part, dict) else part
    return found


@functools.cache
def oracle(config):
    """Loss and gradients of A and B, of the plain model on no mesh.

    Args:
      config: of `make_config({}, ...)`.
    """
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora=None)
    )
    parameters = first_parameters(config)
    adapters, others = split(config.model, parameters)

    def function(adapters, batch):
        model = model_of(plain, merged(joined(adapters, others), ALPHA / RANK))
        x, head = features_and_head(model, batch, configs.Memory(remat="none"))
        return cross_entropy(x, head, batch["labels"], B * T)

    loss, gradients = jax.jit(jax.value_and_grad(function))(adapters, make_batch())
    return float(loss), jax.tree.map(np.asarray, gradients)


def loss_and_gradients(config):
    """Of the adapters, on the config's mesh, as a step makes them."""
    mesh = mesh_of(**dataclasses.asdict(config.mesh))
    one = make_config(
        {}, targets=config.model.lora.targets, model=dict(_own(config.model))
    )
    adapters, others = split(config.model, first_parameters(one))

    def put(value, leaf, spec=None):
        kind = leaf.sharding.memory_kind
        sharding = NamedSharding(mesh, spec or leaf.sharding.spec, memory_kind=kind)
        return jax.device_put(jnp.asarray(value, leaf.dtype), sharding)

    def slot(value, leaf):
        stage = config.training.zero_stage
        return put(value, leaf, at_stage(leaf.sharding.spec, "gradients", stage))

    def function(slots, adapters, others, batch):
        weights = joined(weights_of(adapters, slots), frozen_weights(config, others))
        model = model_of(config, weights)
        x, head = features_and_head(model, batch, config.memory)
        return cross_entropy(x, head, batch["labels"], config.memory.loss_tile_tokens)

    with jax.set_mesh(mesh):
        state = abstract_state(config)
        slots = state.parameters
        if config.training.zero_stage == 2:
            cut = dataclasses.replace(config.training, zero_stage=3)
            slots = abstract_state(dataclasses.replace(config, training=cut)).parameters
        arguments = (
            jax.tree.map(put, adapters, slots),
            jax.tree.map(put, adapters, state.parameters),
            jax.tree.map(put, others, state.frozen),
            {
                name: jax.device_put(
                    x, NamedSharding(mesh, activation("BT", mesh.shape))
                )
                for name, x in make_batch().items()
            },
        )
        loss, gradients = jax.jit(jax.value_and_grad(function))(*arguments)
    return float(loss), jax.tree.map(np.asarray, gradients)


def _own(model):
    names = ("norm", "feed_forward", "positions", "biases", "tied_embeddings")
    return {name: getattr(model, name) for name in names}
