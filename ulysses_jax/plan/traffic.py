"""What a step sends, by kind of collective and mesh axis, beside what it should."""

import math
from collections.abc import Iterable
from typing import Any

from ulysses_jax.config import Config
from ulysses_jax.plan.collectives import Collective
from ulysses_jax.sharding import zero_axes

BF16_BYTES, F32_BYTES = 2, 4


def traffic(collectives: Iterable[Collective], config: Config) -> list[dict[str, Any]]:
    """One row a kind of collective and mesh axis, largest first.

    Args:
      config: placed on its mesh.

    Returns:
      Rows of `collective`, `axis`, `count` and `bytes` (sent, a GPU a step), `link`
      ("within a host" or "between hosts"), `between_hosts_bytes` (of these, through the
      GPU's network adapter), `formula_bytes` and `ratio` to it (None where no formula
      exists), `phases` (bytes by phase), `largest` (the instructions that send most).
    """
    groups: dict[tuple[str, str], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, each.axes), []).append(each)
    rows = [
        _row(kind, axes, members, formula_bytes(config, kind, axes))
        for (kind, axes), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def unexpected(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each row that sends what no formula asks for.

    Those that send over 1 % more than their formula, and the gathers and exchanges
    without one that are more than 1 % of the step's traffic.
    """
    rows = list(rows)
    total = sum(row["bytes"] for row in rows)
    lines = []
    for row in rows:
        largest = row["largest"][0]
        what = f"{row['collective']} over {row['axis']}"
        source = f"; largest: {largest['makes']}, from {largest['from'] or 'no name'}"
        if row["ratio"] is not None:
            # Fewer gathers than the formula's are XLA's gain; fewer exchanges, a fault.
            low = 0.99 if row["collective"] == "all-to-all" else 0
            if not low <= row["ratio"] <= 1.01:
                times = f"{row['ratio']:.2f} times"
                lines.append(f"{what} sends {times} what the formula says{source}")
        elif row["collective"] != "all-reduce" and row["bytes"] > total / 100:
            sent = f"{row['bytes'] / 1e6:.4g} MB"
            lines.append(f"{what} sends {sent}, which no formula asks for{source}")
    return lines


def formula_bytes(config: Config, kind: str, axes: str) -> float | None:
    """Bytes that a GPU should send a step in these collectives; None: no formula.

    The exchange: `(2 + 2/G)(T N H / P) (P-1)/P e` a layer and pass, in the compute
    dtype, and `(2 T N H / P + 2 T H) (P-1)/P e` where P exceeds the KV heads of a
    device's tensor part, each then repeated P/K times. Parameters at ZeRO stage 3:
    gathered in the compute dtype for each pass over the layers (a recomputation needs
    no down projection: nothing reads what it makes; and nothing of a feed-forward in
    tiles, whose backward pass makes its hidden activations itself), once for the
    embedding and once for the head; below, in float32 once a step. Their gradients in
    float32 once an accumulation step: scattered, then summed over `data`; at stage 1
    summed over all axes of tokens.
    """
    model, training, mesh = config.model, config.training, config.mesh
    assert model.num_kv_heads and model.head_size and training.accumulation_steps
    passes = num_passes(config)
    element = BF16_BYTES if model.compute_dtype == "bfloat16" else F32_BYTES
    if (kind, axes) == ("all-to-all", "seq"):
        rows = training.batch_size // (mesh.data * mesh.fsdp)  # over all its parts
        heads = model.num_heads // mesh.tensor
        # Repeated, never beyond the query heads that read them.
        kv_heads = min(max(model.num_kv_heads // mesh.tensor, mesh.seq), heads)
        local_tokens = rows * config.padded_tokens() / mesh.seq
        elements = local_tokens * (2 * heads + 2 * kv_heads) * model.head_size
        share = (mesh.seq - 1) / mesh.seq
        return model.num_layers * passes * elements * share * element
    degrees = {"fsdp": mesh.fsdp, "ring": mesh.ring, "seq": mesh.seq}
    zero = [axis for axis in zero_axes(model.width, degrees) if degrees[axis] > 1]
    degree = math.prod(degrees[axis] for axis in zero)
    layers, rest = _matrix_elements(config)
    tokens = {"data": mesh.data} | degrees
    spread = [axis for axis in tokens if tokens[axis] > 1]
    stage = training.zero_stage
    if stage == 1 and (kind, axes) == ("all-reduce", "+".join(spread)):
        devices = math.prod(tokens.values())
        sent = 2 * (layers + rest) / mesh.tensor * (devices - 1) / devices * F32_BYTES
    elif stage > 1 and (kind, axes) == ("all-reduce", "data"):
        shard = (layers + rest) / mesh.tensor / degree
        sent = 2 * shard * (mesh.data - 1) / mesh.data * F32_BYTES
    elif axes != "+".join(zero):
        return None
    elif kind == "all-gather" and stage < 3:
        return (layers + rest) / mesh.tensor * (degree - 1) / degree * F32_BYTES
    elif kind == "all-gather":
        assert model.feed_forward_width
        unread = model.num_layers * model.width * model.feed_forward_width
        if feed_forward_is_tiled(config):
            unread *= 3 if model.feed_forward == "swiglu" else 2
        # Of layers that are recomputed together, only the last one's is not read.
        unread *= (passes - 2) / config.memory.remat_layers
        if config.memory.in_pieces:
            unread = layers  # the recomputation shares the backward pass's gathers
        gathered = (layers * passes - unread + rest) / mesh.tensor
        sent = gathered * (degree - 1) / degree * element
    elif kind == "reduce-scatter" and stage > 1:
        sent = (layers + rest) / mesh.tensor * (degree - 1) / degree * F32_BYTES
    else:
        return None
    return training.accumulation_steps * sent


def num_passes(config: Config) -> float:
    """Passes over the layers: forward, backward, and recomputation if there is any.

    A layer in pieces recomputes itself in any case, and once more where it is not the
    last of layers that are recomputed together.
    """
    memory = config.memory
    if memory.in_pieces:
        return 4 - 1 / memory.remat_layers
    return 2 if memory.remat == "none" else 3


def feed_forward_is_tiled(config: Config) -> bool:
    """Whether a device has more tokens than memory.mlp_tile_tokens."""
    training, mesh, tile = config.training, config.mesh, config.memory.mlp_tile_tokens
    assert training.accumulation_steps
    rows = training.batch_size // training.accumulation_steps // mesh.data // mesh.fsdp
    tokens = rows * config.padded_tokens() // (mesh.ring * mesh.seq)
    return tile is not None and tokens > tile


def _matrix_elements(config: Config) -> tuple[int, int]:
    """Elements of the layers' matrices; of the embedding, positions and head."""
    model = config.model
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size
    gated = 3 if model.feed_forward == "swiglu" else 2
    layer = model.width * (attention + gated * model.feed_forward_width)
    positions = (model.max_positions or 0) if model.positions == "learned" else 0
    # XLA gathers a tied table once, and adds its two gradients before it scatters them.
    tables = 1 if model.tied_embeddings else 2
    rest = model.width * (tables * model.vocab_size + positions)
    return model.num_layers * layer, rest


def _row(kind: str, axes: str, members: list[Collective], formula: float | None):
    total = sum(each.count * each.sent_bytes for each in members)
    phases: dict[str, float] = {}
    for each in members:
        phases[each.phase] = phases.get(each.phase, 0) + each.count * each.sent_bytes
    largest = sorted(members, key=lambda each: -each.count * each.sent_bytes)[:3]
    crosses = any(each.crosses_hosts for each in members)
    return {
        "collective": kind,
        "axis": axes,
        "count": sum(each.count for each in members),
        "bytes": total,
        "link": "between hosts" if crosses else "within a host",
        "between_hosts_bytes": sum(
            each.count * each.between_hosts_bytes for each in members
        ),
        "formula_bytes": formula,
        "ratio": total / formula if formula else None,
        "phases": phases,
        "largest": [
            {
                "bytes": each.count * each.sent_bytes,
                "count": each.count,
                "makes": ", ".join(
                    f"{array.dtype}[{','.join(map(str, array.dims))}]"
                    for array in each.results[:4]
                ),
                "from": each.instruction.op_name,
            }
            for each in largest
        ],
    }
