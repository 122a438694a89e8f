"""What layers cost whose tokens reach others by a state: FLOPs, kernels, bytes."""

import jax.numpy as jnp

from ulysses_jax.attention import convolution, delta, linear
from ulysses_jax.attention.chunks import SCOPE
from ulysses_jax.config import Config
from ulysses_jax.config.model import RECURRENT, StateSizes
from ulysses_jax.costs.hlo import Module
from ulysses_jax.parallel.bytes import convolution_bytes, state_bytes

# Of a program's instructions, those that are no kernel of a GPU.
_NO_KERNEL = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
)
CHUNK_TOKENS = {"linear": linear.CHUNK_TOKENS, "delta": delta.CHUNK_TOKENS}


def recurrence_flops(config: Config) -> dict[str, float]:
    """FLOPs a token, over layers and heads.

    Returns:
      `recurrence`: 3 times those of a device that has all tokens, for forward and
      backward. `recurrence_recompute`: what is done again, chunks in the backward pass
      and layers that are recomputed; and what shards of a sequence do more, to know
      what they make of a state that comes, and to read it.
    """
    model, mesh = config.model, config.mesh
    is_spread = mesh.ring * mesh.seq > 1
    # What `remat` products keeps is the output: the states are made again.
    passes = 3 + (config.memory.remat != "none")
    own = done = 0.0
    for kind in model.kinds():
        if kind in RECURRENT:
            sizes = model.state_sizes(kind)
            heads = sizes.num_heads
            own += heads * 3 * _chunk_flops(sizes, kind, is_spread=False)
            again = (passes + 1) * _chunk_flops(sizes, kind, is_spread=is_spread)
            done += heads * (again + passes * is_spread * 2.0 * sizes.state_size)
    return {"recurrence": own, "recurrence_recompute": done - own}


def _chunk_flops(sizes: StateSizes, kind: str, *, is_spread: bool) -> float:
    """Forward, a token and head: as `ulysses_jax.linear` says."""
    size, columns, chunk = sizes.key_size, sizes.value_size, CHUNK_TOKENS[kind]
    if kind == "linear":
        return 2.0 * chunk * (size + columns) + 4 * size * columns
    columns += size * is_spread  # of states: what it makes of one too
    return 4.0 * chunk * (size + columns) + 2 / 3 * chunk**2 + 6 * size * columns


def chunk_kernels(module: Module) -> int:
    """Kernels that a GPU runs a step, one after the other, in loops over chunks."""
    bodies = {
        name
        for _, each in module.top_level()
        if each.opcode == "while" and SCOPE in each.op_name
        for name in each.called
    }
    return sum(
        module.runs[computation.name]
        for computation, each in module.top_level()
        if computation.name in bodies
        and each.opcode not in _NO_KERNEL
        and not each.opcode.endswith("-done")
    )


def state_passes_bytes(config: Config, kind: str) -> float:
    """HBM traffic of a layer's states a token and pass, float32: a chunk reads the one
    before, and writes its own twice: as carry, and to be kept."""
    sizes = config.model.state_sizes(kind)
    makes_one = kind == "delta" and config.mesh.ring * config.mesh.seq > 1
    columns = sizes.value_size + sizes.key_size * makes_one
    states = sizes.num_heads * sizes.key_size * columns
    return 3.0 * 4 * states / CHUNK_TOKENS[kind]


def recurrent_bytes(
    config: Config, kind: str
) -> dict[str, dict[tuple[str, str], float]]:
    """Bytes that a GPU sends a step for one layer of a recurrent kind, by the function
    that sends them, as a program names it, and by kind of collective and axis: states,
    and the last tokens that a convolution reads, for each pass; next to nothing where
    documents begin."""
    model, mesh, training = config.model, config.mesh, config.training
    sizes = model.state_sizes(kind)
    rows = training.batch_size // (mesh.data * mesh.fsdp)  # over all its parts
    passes = 2 + (config.memory.remat != "none")
    heads, key_heads = (n // mesh.tensor for n in sizes[:2])
    states = state_bytes(
        shards=mesh.ring * mesh.seq,
        num_heads=heads,
        state_size=sizes.state_size,
        change_size=1 if kind == "linear" else sizes.key_size**2,
    )
    sent = {linear.NAME if kind == "linear" else delta.NAME: states}
    if kind == "delta" and 1 in states:
        halo = convolution_bytes(
            convolution_tokens=model.convolution_tokens,
            features=heads * sizes.value_size + 2 * key_heads * sizes.key_size,
            itemsize=jnp.dtype(model.compute_dtype).itemsize,
        )
        sent[convolution.NAME] = {1: halo}
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, by_reach in sent.items():
        found[name] = {}
        for reach, each in by_reach.items():
            key = "collective-permute", _axes(reach, mesh.ring, mesh.seq)
            found[name][key] = found[name].get(key, 0.0) + rows * passes * each
    return found


def _axes(reach: int, ring: int, seq: int) -> str:
    """Over which shards so far from each other differ."""
    axes = ["ring"] * (ring > 1) + ["seq"] * (seq > 1 and reach % seq > 0)
    return "+".join(axes)
