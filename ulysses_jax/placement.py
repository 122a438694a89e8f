"""A config filled in and checked, by itself and on its mesh."""

import dataclasses
import math
import os
import sys
from typing import Any

from ulysses_jax.config import Config, Memory, Mesh, Model, Training, in_pieces
from ulysses_jax.spreading import (
    Strategy,
    check_head_chunks,
    check_split,
    check_strategy,
    num_members,
    received_bytes,
    strategy_of,
    total_bytes,
)


def complete(config: Config, *, name: str) -> Config:
    """Fills in the fields that follow from others, and checks each on its own."""
    _check_ranges(config)
    model, training = config.model, config.training
    if model.head_size is None and model.width % model.num_heads:
        raise ValueError(
            f"model.width {model.width} does not divide by model.num_heads "
            f"{model.num_heads}: change one, or set model.head_size"
        )
    filled = dict(
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_size=model.head_size or model.width // model.num_heads,
        feed_forward_width=model.feed_forward_width or 4 * model.width,
        max_positions=(model.max_positions or training.sequence_tokens)
        if model.positions == "learned"
        else None,
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, **filled),
        run=dataclasses.replace(config.run, folder=_folder(config.run.folder, name)),
    )
    _check_model(config.model, training)
    _check_memory(config.memory, config.model, training)
    return config


def _folder(folder: str | None, name: str) -> str:
    """The run's: ~ is the home folder, as in a shell, which does not see it after =."""
    if folder is None:
        return f"runs/{name}"
    found = os.path.expanduser(folder)
    if not found.strip():
        why = "it is empty"
    elif found[0] == "~":
        why = f"there is no home folder {found.split('/')[0]}"
    else:
        return found
    raise ValueError(
        f"run.folder {folder!r} names no folder ({why}): leave it out for runs/{name}, "
        "or write ./ before the name"
    )


def place(config: Config, degrees: dict[str, int]) -> Config:
    """The config on a mesh of these degrees; checks that everything divides.

    Raises:
      ValueError: with the numbers and what would fit, before anything is compiled.
    """
    model, training = config.model, config.training
    tensor = degrees["tensor"]
    heads = ("num_heads", "num_kv_heads")
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
        fair = next(n for n in range(chunk, 0, -1) if local_tokens % n == 0)
        fits = [
            n * chunk * shards
            for n in (local_tokens // chunk, local_tokens // chunk + 1)
        ]
        raise ValueError(
            f"memory.sequence_chunk_tokens {chunk} does not divide the {local_tokens} "
            f"tokens of a device (training.sequence_tokens {training.sequence_tokens} "
            f"over mesh.ring x mesh.seq {shards}): use sequence_tokens {fits[0]} or "
            f"{fits[1]}, or a chunk of {fair}"
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
    return dataclasses.replace(
        config,
        model=_with_strategy(model, memory, degrees),
        memory=memory,
        mesh=Mesh(**degrees),
        training=dataclasses.replace(training, accumulation_steps=steps),
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
        # reference, a window where an attention knows no positions.
        can_gather = (
            memory.head_chunks == 1
            and not (memory.sequence_chunk_tokens or memory.auto)
            and model.attention != "reference"
            and model.window is None
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
    if memory.sequence_chunk_tokens and strategy != "ulysses":
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
    zigzag = by_blocks if model.zigzag is None else model.zigzag
    return dataclasses.replace(model, strategy=strategy, zigzag=zigzag)


_MAY_BE_ZERO = {
    "seed",
    "validation_fraction",
    "warmup_steps",
    "weight_decay",
    "learning_rate",
    "final_learning_rate",
    "validation_interval_steps",
    "validation_batches",
    "process_id",
    "beta1",
    "beta2",
    "label_smoothing",
    "z_loss",
}
_BELOW_ONE = {"validation_fraction", "beta1", "beta2", "label_smoothing"}


def _check_ranges(config: Config) -> None:
    """Numbers are positive, or not negative; counts are int32; fractions below 1."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or section.name == "mesh":
            continue
        for each in dataclasses.fields(values):
            value = getattr(values, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low = 0 if each.name in _MAY_BE_ZERO else sys.float_info.min
            name = f"{section.name}.{each.name}"
            if not math.isfinite(value) or value < low:
                bound = "not negative" if low == 0 else "positive"
                raise ValueError(f"{name} must be {bound}, not {value}")
            if each.name == "seed" and value >= 2**32:
                raise ValueError(f"{name} must be below 2^32, not {value}")
            if each.name != "seed" and isinstance(value, int) and value >= 2**31:
                raise ValueError(f"{name} must be below 2^31, not {value}")
            if each.name == "offload_fraction" and value > 1:
                raise ValueError(f"{name} must be at most 1, not {value}")
            if each.name in _BELOW_ONE and value >= 1:
                raise ValueError(f"{name} must be below 1, not {value}")


def _check_model(model: Model, training: Training) -> None:
    assert model.num_kv_heads and model.head_size
    if model.num_heads % model.num_kv_heads:
        fits = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ValueError(
            f"model.num_kv_heads {model.num_kv_heads} does not divide model.num_heads "
            f"{model.num_heads}: use one of {fits}"
        )
    if model.positions == "rope" and model.head_size % 2:
        raise ValueError(
            f"model.head_size {model.head_size} is odd: RoPE turns pairs; use "
            f"{model.head_size + 1}"
        )
    if model.max_positions and model.max_positions < training.sequence_tokens:
        raise ValueError(
            f"model.max_positions {model.max_positions} is less than "
            f"training.sequence_tokens {training.sequence_tokens}: raise it"
        )


def _check_memory(memory: Memory, model: Model, training: Training) -> None:
    if memory.auto:
        return  # they are replaced
    if memory.remat == "none" and "inputs" in memory.offload:
        raise ValueError(
            "memory.offload inputs moves what remat keeps, but memory.remat none keeps "
            "everything: use memory.remat full or attention, or do not offload inputs"
        )
    if memory.remat == "none" and "parameters" in memory.offload:
        raise ValueError(
            "memory.offload parameters fetches a layer's parameters once more for its "
            "backward pass, but memory.remat none keeps what the first fetch brought: "
            "use memory.remat full or attention, or do not offload parameters"
        )
    if training.zero_stage < 3 and "parameters" in memory.offload:
        raise ValueError(
            "memory.offload parameters fetches a device's own part of each layer, but "
            f"training.zero_stage {training.zero_stage} keeps all parameters on every "
            "device: use training.zero_stage 3, or do not offload parameters"
        )
    moved = model.width - memory.kept_features(model.width)
    if memory.offload_fraction < 1 and ("inputs" not in memory.offload or not moved):
        raise ValueError(
            f"memory.offload_fraction {memory.offload_fraction} moves nothing: it is of"
            f" the {model.width} features that memory.offload inputs moves; offload "
            "inputs, with a larger fraction, or leave it at 1"
        )
    if memory.remat != "attention" and "attention" in memory.offload:
        raise ValueError(
            "memory.offload attention moves attention's outputs, which memory.remat "
            f"{memory.remat} does not keep apart: use memory.remat attention, or do "
            "not offload attention"
        )
    if memory.sequence_chunk_tokens is None and "keys" in memory.offload:
        raise ValueError(
            "memory.offload keys moves the keys and values of a layer in chunks: set "
            "memory.sequence_chunk_tokens, or do not offload keys"
        )
    if in_pieces(model, memory) and model.attention == "reference":
        raise ValueError(
            "model.attention reference cannot attend to some keys at a time, as "
            "memory.sequence_chunk_tokens and memory.head_chunks ask: use "
            "model.attention auto or blockwise"
        )
