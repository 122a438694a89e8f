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
    model, is_spread = config.model, _is_spread(config)
    # What `remat` products keeps is the output: the states are made again.
    passes = 3 + (config.memory.remat != "none")
    own = done = 0.0
    for kind in model.kinds():
        if kind in RECURRENT:
            sizes = model.state_sizes(kind)
            heads = sizes.num_heads
            alone = _chunk_flops(sizes, kind, is_spread=False)
            own += heads * 3 * alone
            if config.memory.sequence_chunk_tokens:
                ends = _chunk_flops(sizes, kind, is_spread=is_spread, is_read=False)
                done += heads * (5 * alone + (6 if is_spread else 1) * ends)
            else:
                again = (passes + 1) * _chunk_flops(sizes, kind, is_spread=is_spread)
                done += heads * (again + passes * is_spread * 2.0 * sizes.state_size)
    return {"recurrence": own, "recurrence_recompute": done - own}


def multiplied_again(config: Config) -> float:
    """Elements of matrices by which a token is multiplied more often in pieces, over
    layers of a state: for keys, values and their gates.

    Over shards, so that pieces know the state before: forward, backward, and there once
    more to pull back, which are two products more; else once backward.
    """
    model, found = config.model, 0
    if not config.memory.sequence_chunk_tokens:
        return 0
    for kind in model.kinds():
        if kind in RECURRENT:
            sizes = model.state_sizes(kind)
            features = sizes.num_key_heads * sizes.key_size
            features += sizes.num_heads * (sizes.value_size + 2 * (kind == "delta"))
            found += model.width * features
    return found * (5 if _is_spread(config) else 1)


def _is_spread(config: Config) -> bool:
    return config.mesh.ring * config.mesh.seq > 1


def _chunk_flops(
    sizes: StateSizes, kind: str, *, is_spread: bool, is_read: bool = True
) -> float:
    """Forward, a token and head: as `ulysses_jax.linear` says; or of what is left in
    states alone."""
    size, columns, chunk = sizes.key_size, sizes.value_size, CHUNK_TOKENS[kind]
    if kind == "linear":
        left = 2.0 * size * columns
        return left + is_read * (2.0 * chunk * (size + columns) + left)
    columns += size * is_spread  # of states: what it makes of one too
    pairs, states = 2.0 * chunk * (size + columns), 2.0 * size * columns
    return (1 + is_read) * pairs + 2 / 3 * chunk**2 + (2 + is_read) * states


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
    before, and writes its own twice: as carry, and to be kept. Over shards, pieces do
    so for what is handed on and for what is read."""
    sizes, is_spread = config.model.state_sizes(kind), _is_spread(config)
    columns = sizes.value_size + sizes.key_size * (kind == "delta" and is_spread)
    if config.memory.sequence_chunk_tokens and is_spread:
        columns += sizes.value_size
    states = sizes.num_heads * sizes.key_size * columns
    return 3.0 * 4 * states / CHUNK_TOKENS[kind]


def recurrent_bytes(
    config: Config, kind: str
) -> dict[str, dict[tuple[str, str], float]]:
    """Bytes that a GPU sends a step for one layer of a recurrent kind, by the function
    that sends them, as a program names it, and by kind of collective and axis: states,
    and the last tokens that a convolution reads, in pieces those of the layer, for each
    pass; next to nothing where documents begin."""
    model, mesh, training = config.model, config.mesh, config.training
    sizes = model.state_sizes(kind)
    rows = training.batch_size // (mesh.data * mesh.fsdp)  # over all its parts
    in_pieces = config.memory.sequence_chunk_tokens is not None
    passes = 2 + (config.memory.remat != "none" or in_pieces)
    heads, key_heads = (n // mesh.tensor for n in sizes[:2])
    convolved = heads * sizes.value_size + 2 * key_heads * sizes.key_size
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
            features=model.width if in_pieces else convolved,
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
