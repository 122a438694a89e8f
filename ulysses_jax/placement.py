"""A config on its mesh: choices that are left to it, and what must divide over it."""

import dataclasses
import math
from typing import Any

from ulysses_jax.config import Config, Memory, Mesh, Model
from ulysses_jax.lengths import divisor_near
from ulysses_jax.parallel.bytes import received_bytes, total_bytes
from ulysses_jax.strategies import (
    Strategy,
    check_head_chunks,
    check_split,
    check_strategy,
    num_members,
    strategy_of,
)


def place(config: Config, degrees: dict[str, int]) -> Config:
    """The config on a mesh of these degrees; checks that everything divides.

    Raises:
      ValueError: with the numbers and what would fit, before anything is compiled.
    """
    model, training = config.model, config.training
    tensor = degrees["tensor"]
    heads = ("num_heads", "num_kv_heads")
    if "delta" in model.kinds():
        heads += ("delta_heads", "delta_key_heads")
    split = (*heads, "feed_forward_width", "vocab_size", "max_positions")
    sizes = {name: getattr(model, name) or 0 for name in split}
    for name, size in sizes.items():
        if size % tensor:
            fits = [
                f"mesh.tensor {n}, mesh.fsdp {degrees['fsdp'] * tensor // n}"
                for n in range(tensor - 1, 0, -1)
                if tensor % n == 0 and not any(each % n for each in sizes.values())
            ][:2]
            if name not in heads:  # whose numbers depend on each other
                fits.append(f"a {name} of {math.ceil(size / tensor) * tensor}")
            if name == "vocab_size":
                fits[-1] += ", where no token has the last ids"
            raise ValueError(
                f"model.{name} {size} does not divide over mesh.tensor {tensor}: use "
                + "; or ".join(fits)
                + "; training.batch_size must divide over mesh.data x mesh.fsdp"
            )
    chunk, shards = (
        config.memory.sequence_chunk_tokens,
        degrees["ring"] * degrees["seq"],
    )
    local_tokens = math.ceil(training.sequence_tokens / shards)
    if chunk and local_tokens > chunk and local_tokens % chunk:
        convolves = "delta" in config.model.kinds()
        least = convolves * (config.model.convolution_tokens - 1)
        fair = divisor_near(local_tokens, chunk, least)
        fits = [
            n * chunk * shards
            for n in (local_tokens // chunk, local_tokens // chunk + 1)
        ]
        raise ValueError(
            f"memory.sequence_chunk_tokens {chunk} does not divide the {local_tokens} "
            f"tokens of a device (training.sequence_tokens {training.sequence_tokens} "
            f"over mesh.ring x mesh.seq {shards}): use sequence_tokens {fits[0]} or "
            f"{fits[1]}" + (f", or a chunk of {fair}" if fair else "")
        )
    rows = degrees["data"] * degrees["fsdp"]
    steps = training.accumulation_steps or max(training.batch_size // rows, 1)
    if training.batch_size % (rows * steps):
        fits = math.ceil(training.batch_size / (rows * steps)) * rows * steps
        raise ValueError(
            f"training.batch_size {training.batch_size} does not divide over mesh.data "
            f"{degrees['data']} x mesh.fsdp {degrees['fsdp']} x "
            f"training.accumulation_steps {steps}: use a batch_size of {fits}"
        )
    memory = config.memory
    memory = dataclasses.replace(memory, head_chunks=memory.head_chunks or 1)
    placed = dataclasses.replace(
        config,
        model=_with_strategy(model, memory, degrees),
        memory=memory,
        mesh=Mesh(**degrees),
        training=dataclasses.replace(training, accumulation_steps=steps),
    )
    if model.sparse is not None:
        _check_sparse(placed)
    if "delta" in model.kinds():
        _check_convolution(placed)
    return placed


def _check_convolution(config: Config) -> None:
    """Refuses one that reaches over more than the shard before, or the piece."""
    mesh, before = config.mesh, config.model.convolution_tokens - 1
    chunk = config.memory.sequence_chunk_tokens
    tokens, shards = config.padded_tokens(), mesh.ring * mesh.seq
    if chunk and chunk < before:
        fair = divisor_near(tokens // shards, chunk, before)
        raise ValueError(
            f"model.convolution_tokens {before + 1} reach {before} tokens back, and "
            f"memory.sequence_chunk_tokens {chunk} are fewer: use "
            + (f"{fair}" if fair else f"sequences of {before * shards} tokens or more")
        )
    if shards > 1 and tokens // shards < before:
        raise ValueError(
            f"model.convolution_tokens {before + 1} reach {before} tokens back, but a "
            f"device has {tokens // shards} of the {tokens} of a sequence (mesh.ring "
            f"{mesh.ring} x mesh.seq {mesh.seq}): use sequences of {before * shards} "
            f"tokens or more, or model.convolution_tokens {tokens // shards + 1}"
        )


def _check_sparse(config: Config) -> None:
    """Refuses blocks of a layout that are cut by parts of a sequence."""
    model, mesh, chunk = config.model, config.mesh, config.memory.sequence_chunk_tokens
    assert model.strategy != "auto"
    members = num_members(model.strategy, mesh.ring, mesh.seq)
    tokens, size = config.padded_tokens(), model.sparse_block_tokens
    parts = members * 2 if model.zigzag else members
    least = size * parts
    if tokens % least:
        raise ValueError(
            f"model.sparse_block_tokens {size} does not divide the {tokens} tokens of "
            f"a sequence{f' in {parts} parts' * (parts > 1)}: use a sequence of "
            f"{math.ceil(tokens / least) * least} tokens, or blocks of "
            f"{next(n for n in range(size, 0, -1) if tokens % (n * parts) == 0)}"
        )
    shards = mesh.ring * mesh.seq
    if chunk and chunk < tokens // shards and chunk % size:
        raise ValueError(
            f"model.sparse_block_tokens {size} does not divide "
            f"memory.sequence_chunk_tokens {chunk}: use blocks of "
            f"{next(n for n in range(size, 0, -1) if chunk % n == 0)}, or no chunks"
        )


def _with_strategy(model: Model, memory: Memory, degrees: dict[str, int]) -> Model:
    """Chooses where the config leaves it to the mesh, and checks what it says."""
    ring, seq, tensor = (degrees[axis] for axis in ("ring", "seq", "tensor"))
    assert model.num_kv_heads and model.head_size and memory.head_chunks
    kv_heads = model.num_kv_heads // tensor
    strategy = model.strategy
    if strategy == "auto":
        strategy = strategy_of(ring, seq)
        # What all_gather lacks: groups of heads, layers in pieces, parts of the
        # reference, windows and layouts where an attention knows no positions.
        can_gather = (
            memory.head_chunks == 1
            and not (memory.sequence_chunk_tokens or memory.auto)
            and model.attention != "reference"
            and not any(model.windows())
            and model.sparse is None
            and not model.is_recurrent  # without zigzag order work is not shared out
        )
        if strategy == "ulysses" and seq > 1 and can_gather:
            sizes: dict[str, Any] = dict(
                tokens=1,
                num_heads=model.num_heads // tensor,
                num_kv_heads=kv_heads,
                head_size=model.head_size,
                itemsize=2 if model.compute_dtype == "bfloat16" else 4,
            )
            candidates: tuple[Strategy, ...] = ("ulysses", "all_gather")
            strategy = min(
                candidates,
                key=lambda each: total_bytes(
                    received_bytes(each, **sizes, ring=ring, seq=seq)
                ),
            )
    check_strategy(strategy, ring, seq)
    cuts_attention = memory.sequence_chunk_tokens and model.attending_kinds()
    if cuts_attention and strategy != "ulysses":
        raise ValueError(
            "memory.sequence_chunk_tokens cuts up the strategy ulysses, not "
            f"{strategy}: use mesh.ring 1, mesh.seq {ring * seq} and model.strategy "
            "ulysses, or no chunks"
        )
    check_head_chunks(
        strategy, memory.head_chunks, model.num_kv_heads, tensor=tensor, seq=seq
    )
    if strategy == "megatron":
        names = ("num_heads", "num_kv_heads", "feed_forward_width")
        sizes = {f"model.{name}": getattr(model, name) for name in names}
        check_split(sizes, degrees)
    by_blocks = num_members(strategy, ring, seq) > 1
    if by_blocks and model.attention == "reference":
        raise ValueError(
            f"model.attention reference attends to whole rows, but strategy {strategy} "
            "attends block by block: use model.attention auto or blockwise, or "
            f"mesh.ring 1, mesh.seq {ring * seq} and model.strategy ulysses"
        )
    if model.zigzag and not by_blocks:
        shards = max(ring * seq, 2)
        raise ValueError(
            "model.zigzag true is an order over members that attend by blocks, but "
            f"strategy {strategy} on mesh.ring {ring}, mesh.seq {seq} has none: leave "
            f"model.zigzag out, or use model.strategy auto with mesh.ring {shards}, "
            f"mesh.seq 1, or with mesh.ring 2, mesh.seq {max(shards // 2, 2)}; "
            "mesh.data and mesh.fsdp share the devices that are left"
        )
    zigzag = by_blocks and not model.is_recurrent
    zigzag = zigzag if model.zigzag is None else model.zigzag
    return dataclasses.replace(model, strategy=strategy, zigzag=zigzag)
