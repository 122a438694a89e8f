"""What layers cost whose tokens reach others by a state: FLOPs, kernels, bytes."""

import jax.numpy as jnp

from ulysses_jax.attention import delta, linear
from ulysses_jax.attention.chunks import SCOPE
from ulysses_jax.config import Config, Model
from ulysses_jax.config.model import RECURRENT
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
            own += 3 * _chunk_flops(model, kind, is_spread=False)
            done += (passes + 1) * _chunk_flops(model, kind, is_spread=is_spread)
            done += passes * is_spread * 2.0 * _state_size(model)
    heads = model.num_heads
    return {"recurrence": heads * own, "recurrence_recompute": heads * (done - own)}


def _chunk_flops(model: Model, kind: str, *, is_spread: bool) -> float:
    """Forward, a token and head: as `ulysses_jax.linear` says."""
    assert model.head_size
    size, chunk = model.head_size, CHUNK_TOKENS[kind]
    if kind == "linear":
        return 2.0 * chunk * 2 * size + 4 * size * size
    columns = 2 * size if is_spread else size  # of states: what it makes of one too
    return 4.0 * chunk * (size + columns) + 2 / 3 * chunk**2 + 6 * size * columns


def _state_size(model: Model) -> int:
    assert model.head_size
    return model.head_size**2


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
    before, writes its own, and keeps it."""
    columns = 1 + (kind == "delta" and config.mesh.ring * config.mesh.seq > 1)
    states = config.model.num_heads * _state_size(config.model) * columns
    return 3.0 * 4 * states / CHUNK_TOKENS[kind]


def recurrent_bytes(config: Config, kind: str) -> dict[tuple[str, str], float]:
    """Bytes that a GPU sends a step for one layer of a recurrent kind, by kind of
    collective and axis: its states, and the last tokens that a convolution reads, for
    each pass; next to nothing where documents begin."""
    model, mesh, training = config.model, config.mesh, config.training
    assert model.num_kv_heads and model.head_size
    rows = training.batch_size // (mesh.data * mesh.fsdp)  # over all its parts
    passes = 2 + (config.memory.remat != "none")
    heads, kv_heads = (n // mesh.tensor for n in (model.num_heads, model.num_kv_heads))
    sent = state_bytes(
        shards=mesh.ring * mesh.seq,
        num_heads=heads,
        state_size=_state_size(model),
        change_size=1 if kind == "linear" else _state_size(model),
    )
    if kind == "delta" and 1 in sent:
        sent[1] += convolution_bytes(
            convolution_tokens=model.convolution_tokens,
            num_heads=heads + 2 * kv_heads,
            head_size=model.head_size,
            itemsize=jnp.dtype(model.compute_dtype).itemsize,
        )
    found: dict[tuple[str, str], float] = {}
    for reach, each in sent.items():
        key = "collective-permute", _axes(reach, mesh.ring, mesh.seq)
        found[key] = found.get(key, 0.0) + rows * passes * each
    return found


def _axes(reach: int, ring: int, seq: int) -> str:
    """Over which shards so far from each other differ."""
    axes = ["ring"] * (ring > 1) + ["seq"] * (seq > 1 and reach % seq > 0)
    return "+".join(axes)
