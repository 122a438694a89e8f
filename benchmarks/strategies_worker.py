"""The programs of strategies.py, on all the devices of this process."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from side_by_side import Program, serve

from ulysses_jax import make_mesh
from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.complete import complete
from ulysses_jax.config import Config
from ulysses_jax.config_file import from_dict
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.placement import place
from ulysses_jax.sharding import activation
from ulysses_jax.strategies import Strategy, num_members
from ulysses_jax.training.state import init_state
from ulysses_jax.training.step import batch_shape, batch_spec, make_train_step


def mesh_of(strategy: str) -> Mesh:
    """All devices as the mesh that a strategy runs on."""
    devices = len(jax.devices())
    ring = {"ring": devices, "hybrid": 2}.get(strategy, 1)
    return make_mesh(ring=ring, seq=devices // ring, axis_type=AxisType.Explicit)


def make_step(strategy: Strategy, tokens: int, heads: int, head_size: int) -> Program:
    """The trainer's step, on random tokens; returns the loss."""
    mesh = mesh_of(strategy)
    values = {
        "model": {
            "vocab_size": 256,
            "width": heads * head_size,
            "num_layers": 2,
            "num_heads": heads,
            "strategy": strategy,
            "compute_dtype": "float32",  # a CPU has no other: XLA would widen it
        },
        "data": {"mask_documents": False},
        "training": {"batch_size": 1, "sequence_tokens": tokens},
        "memory": {"remat": "none"},
    }
    config = complete(from_dict(Config, values), name="strategies")
    config = place(config, dict(mesh.shape))
    order = zigzag_order(tokens, config.zigzag_members())
    stream = np.random.default_rng(0).integers(0, 256, tokens + 1, np.int32)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, batch_spec(mesh))
        arrays = {
            "tokens": stream[:-1],
            "labels": stream[1:],
            "positions": np.arange(tokens, dtype=np.int32),
        }
        batch = {
            name: jax.device_put(x[order].reshape(batch_shape(config)), where)
            for name, x in arrays.items()
        }
        state = jax.jit(partial(init_state, config))()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        step = step.lower(state, batch).compile()

    def run() -> list[Any]:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        return [metrics["loss"]]

    return run


def make_attention(
    strategy: Strategy, tokens: int, heads: int, head_size: int
) -> Program:
    """Causal attention, forward and backward; returns out, dq, dk, dv."""
    mesh = mesh_of(strategy)
    degrees = dict(mesh.shape)
    members = num_members(strategy, degrees["ring"], degrees["seq"])
    order = zigzag_order(tokens, members)
    where = NamedSharding(mesh, activation("BTNH", degrees))
    arrays = np.random.default_rng(0).standard_normal(
        (4, 1, tokens, heads, head_size), np.float32
    )
    arrays = [jax.device_put(x[:, order], where) for x in arrays]

    def attention(q, k, v):
        return attend(
            q,
            k,
            v,
            mesh=mesh,
            mask=Mask(causal=True),
            strategy=strategy,
            zigzag=members > 1,
        )

    def both_passes(q, k, v, dout):
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    with jax.set_mesh(mesh):
        program = jax.jit(both_passes).lower(*arrays).compile()

    return lambda: jax.block_until_ready(program(*arrays))


KINDS = {"step": make_step, "attention": make_attention}


def make(description: dict[str, Any]) -> Program:
    """The program of `{"kind": ..., "strategy": ..., "tokens": ..., ...}`."""
    description = dict(description)
    return KINDS[description.pop("kind")](**description)


if __name__ == "__main__":
    serve(make)
