"""What a step sends, by kind of collective and mesh axis, beside what it should."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ulysses_jax.config import Config, Model, in_pieces, kinds_in_pieces
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.costs.collectives import Collective
from ulysses_jax.costs.matrices import layer_elements, matrix_elements
from ulysses_jax.costs.optimizer import muon_bytes
from ulysses_jax.costs.recurrences import recurrent_bytes
from ulysses_jax.parallel.bytes import received_bytes
from ulysses_jax.parallel.zigzag import seen_steps
from ulysses_jax.sharding import zero_axes
from ulysses_jax.strategies import Strategy

BF16_BYTES, F32_BYTES = 2, 4
ATTENTION = "attention"


def traffic(collectives: Iterable[Collective], config: Config) -> list[dict[str, Any]]:
    """One row a kind of collective and mesh axis, largest first.

    Args:
      config: placed on its mesh.

    Returns:
      Rows of `collective`, `axis`, `count` and `bytes` (sent, a GPU a step), `link`
      ("within a host" or "between hosts"), `between_hosts_bytes` (of these, through the
      GPU's network adapter), `formula_bytes` and `ratio` to it (None where no formula
      exists), `parts` (`what`, and the same four, of each recurrence that sends so, and
      of the attention beside it), `phases` (bytes by phase), `largest` (the
      instructions that send most).
    """
    formulas = bytes_by_part(config)
    groups: dict[tuple[str, str], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, each.axes), []).append(each)
    rows = [
        _row(key, members, formula_bytes(config, *key), _parts(key, members, formulas))
        for key, members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def unexpected(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each row that sends what no formula asks for.

    Those that send over 1 % more than their formula, and the gathers and exchanges
    without one that are more than 1 % of the step's traffic; over tensor, where
    activations are gathered and sums scattered, there is none.
    """
    rows = list(rows)
    total = sum(row["bytes"] for row in rows)
    lines = []
    for row in rows:
        largest = row["largest"][0]
        what = f"{row['collective']} over {row['axis']}"
        source = f"; largest: {largest['makes']}, from {largest['from'] or 'no name'}"
        # Fewer gathers than the formula's are XLA's gain; fewer exchanges, a fault.
        is_exchange = row["collective"] in ("all-to-all", "collective-permute")
        low = 0.99 if is_exchange else 0
        of_parts = [(f" of {part['what']}", part["ratio"]) for part in row["parts"]]
        for of_part, ratio in [("", row["ratio"]), *of_parts]:
            if ratio is not None and not low <= ratio <= 1.01:
                lines.append(
                    f"{what}{of_part} sends {ratio:.2f} times what the formula says"
                    + source
                )
                break
        if (
            row["ratio"] is None
            and row["collective"] != "all-reduce"
            and row["axis"] != "tensor"
            and row["bytes"] > total / 100
        ):
            sent = f"{row['bytes'] / 1e6:.4g} MB"
            lines.append(f"{what} sends {sent}, which no formula asks for{source}")
    return lines


def formula_bytes(config: Config, kind: str, axes: str) -> float | None:
    """Bytes that a GPU should send a step in these collectives; None: no formula.

    Attention: what `parallel.bytes.received_bytes` says of the run's strategy, a layer
    and row; the forward pass's again where it is recomputed; of layers whose tokens
    reach others by a state, what `costs.recurrences.recurrent_bytes` says. Parameters
    at ZeRO stage 3: gathered in the compute dtype for each pass over the layers (a
    recomputation needs no down projection: nothing reads what it makes; and nothing of
    a feed-forward in tiles, whose backward pass makes its hidden activations itself),
    once for the embedding and once for the head; below, in float32 once a step. Their
    gradients in float32 once an accumulation step: scattered, then summed over `data`;
    at stage 1 summed over all axes of tokens, the tables' once a step, and scattered
    where `data` is 1. Matrices that Muon makes orthogonal: what
    `costs.optimizer.muon_bytes` says.
    """
    found = [attention_bytes(config).get((kind, axes)), _rest_bytes(config, kind, axes)]
    if config.training.optimizer == "muon":
        found.append(muon_bytes(config, kind, axes))
    known = [each for each in found if each is not None]
    return sum(known) if known else None


def received_by(
    config: Config, strategy: Strategy, *, ring: int, seq: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """`parallel.bytes.received_bytes` of a run's model, under any strategy and degrees;
    the mean over the layers that attend, where their windows differ."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    windows = _windows(config.model)
    for window, count in windows.items():
        share = count / windows.total()
        received = _received_by(config, strategy, ring=ring, seq=seq, window=window)
        for key, (forward, backward) in received.items():
            sums = found.get(key, (0.0, 0.0))
            found[key] = (sums[0] + share * forward, sums[1] + share * backward)
    return found


def _received_by(
    config: Config, strategy: Strategy, *, ring: int, seq: int, window: int | None
) -> dict[tuple[str, str], tuple[float, float]]:
    """`received_by` of the layers with this window."""
    model, tensor = config.model, config.mesh.tensor
    assert model.num_kv_heads and model.head_size
    is_own = strategy == model.strategy
    return received_bytes(
        strategy,
        tokens=config.padded_tokens(),
        num_heads=model.num_heads // tensor,
        num_kv_heads=model.num_kv_heads // tensor,
        head_size=model.head_size,
        itemsize=BF16_BYTES if model.compute_dtype == "bfloat16" else F32_BYTES,
        ring=ring,
        seq=seq,
        width=model.width,
        window=window,
        zigzag=bool(model.zigzag) if is_own else True,
    )


def attention_bytes(config: Config) -> dict[tuple[str, str], float]:
    """Bytes that a GPU sends a step so that attention reaches all tokens (and, of
    megatron, so that each feed-forward does); by kind and axis."""
    found: dict[tuple[str, str], float] = {}
    for of_part in bytes_by_part(config).values():
        for key, sent in of_part.items():
            found[key] = found.get(key, 0.0) + sent
    return found


def bytes_by_part(config: Config) -> dict[str, dict[tuple[str, str], float]]:
    """`attention_bytes` of attention, and of each function of a recurrence."""
    kinds = config.model.kinds()
    layers = [
        (count, {ATTENTION: _layer_bytes(config, window)})
        for window, count in _windows(config.model).items()
    ]
    layers += [
        (kinds.count(kind), recurrent_bytes(config, kind))
        for kind in RECURRENT
        if kind in kinds
    ]
    found: dict[str, dict[tuple[str, str], float]] = {}
    for count, of_one in layers:
        for what, by_key in of_one.items():
            sums = found.setdefault(what, {})
            for key, sent in by_key.items():
                sums[key] = sums.get(key, 0.0) + count * sent
    return found


def _windows(model: Model) -> Counter[int | None]:
    """How many of the layers that attend have which window."""
    kinds = model.attending_kinds()
    return Counter(model.window if kind == "window" else None for kind in kinds)


def _layer_bytes(config: Config, window: int | None) -> dict[tuple[str, str], float]:
    """`attention_bytes` of one layer with this window."""
    model, training, mesh = config.model, config.training, config.mesh
    strategy, ring, seq = model.strategy, mesh.ring, mesh.seq
    assert strategy != "auto"
    received = _received_by(config, strategy, ring=ring, seq=seq, window=window)
    parts = mesh.seq * mesh.tensor
    if model.strategy == "megatron" and parts > mesh.seq:
        if config.residual_tokens() * parts == config.padded_tokens():
            # Tokens lie over tensor too, and are gathered and scattered over both.
            both = _received_by(config, strategy, ring=1, seq=parts, window=window)
            received = {(kind, "seq+tensor"): n for (kind, _), n in both.items()}
    rows = training.batch_size // (mesh.data * mesh.fsdp)  # over all its parts
    found = {}
    for key, (forward, backward) in received.items():
        forwards = float(num_passes(config) - 1)
        if config.memory.remat == "attention" and key[0] == "collective-permute":
            # A kept out and logsumexp spare the ring its second round, but for the one
            # block that the backward pass starts with. All that is exchanged or
            # gathered the backward pass reads.
            tokens, zigzag = config.padded_tokens(), bool(model.zigzag)
            hops = seen_steps(
                tokens,
                tokens,
                mesh.ring,
                causal=True,
                window=window,
                zigzag=zigzag,
            )
            forwards = 1 + 1 / max(len(hops), 1)
        if model.strategy == "megatron":
            forwards = _forwards_of_megatron(config, key[0])
        sent = rows * (forwards * forward + backward)
        if sent:
            found[key] = sent
    return found


def _forwards_of_megatron(config: Config, kind: str) -> float:
    """Passes in which activations are gathered, or scattered, as in a forward pass."""
    recomputed = num_passes(config) - 2
    if kind == "reduce-scatter":
        # Of a layer's two, one: nothing reads what a recomputed layer returns.
        return 1 + recomputed / 2
    if feed_forward_is_tiled(config):
        # Its backward pass gathers its input anew, recomputed or not.
        return 1 + max(recomputed, 1 / 2)
    return 1 + recomputed


def _rest_bytes(config: Config, kind: str, axes: str) -> float | None:
    """Of parameters and their gradients."""
    model, training, mesh = config.model, config.training, config.mesh
    assert training.accumulation_steps
    passes = num_passes(config)
    element = BF16_BYTES if model.compute_dtype == "bfloat16" else F32_BYTES
    degrees = {"fsdp": mesh.fsdp, "ring": mesh.ring, "seq": mesh.seq}
    layers, rest = matrix_elements(model)
    stage, steps = training.zero_stage, training.accumulation_steps
    if model.lora and (kind, stage) != ("all-gather", 3):
        return None  # of adapters alone: a part of a hundredth, or none
    unread = 0.0
    if kind == "all-gather" and stage == 3:
        assert model.feed_forward_width
        unread_of_layer = model.width * model.feed_forward_width
        if feed_forward_is_tiled(config):
            unread_of_layer *= 3 if model.is_gated else 2
        unread = (passes - 2) * len(model.kinds()) * unread_of_layer
        # Of layers in pieces the recomputation shares the backward pass's gathers.
        unread += sum(
            layer_elements(model, kind) - unread_of_layer
            for kind in kinds_in_pieces(model, config.memory)
        )
    layer_degrees, parts = degrees, mesh.tensor
    if model.strategy == "megatron":  # seq has parts of a layer's matrices, whole in D
        layer_degrees, parts = degrees | {"seq": 1}, mesh.tensor * mesh.seq
    found = []
    for is_table, elements, gathered, share, over in (
        (False, layers, layers * passes - unread, parts, layer_degrees),
        (True, rest, rest, mesh.tensor, degrees),
    ):
        zero = [axis for axis in zero_axes(model.width, over) if over[axis] > 1]
        degree = math.prod(over[axis] for axis in zero)
        tokens = {"data": mesh.data} | over
        spread = [axis for axis in tokens if tokens[axis] > 1]
        whole = elements / share * F32_BYTES
        # Tables are cut for the moments right after their sum: XLA scatters such sums,
        # and puts them off to the end of a step.
        summed = stage == 1 and not (is_table and spread == zero)
        times = 1 if stage == 1 and is_table else steps
        if summed and (kind, axes) == ("all-reduce", "+".join(spread)):
            devices = math.prod(tokens.values())
            found.append(times * 2 * whole * (devices - 1) / devices)
        elif stage > 1 and (kind, axes) == ("all-reduce", "data"):
            found.append(steps * 2 * whole / degree * (mesh.data - 1) / mesh.data)
        elif axes != "+".join(zero):
            continue
        elif kind == "all-gather" and stage < 3:
            found.append(whole * (degree - 1) / degree)
        elif kind == "all-gather":
            found.append(steps * gathered / share * (degree - 1) / degree * element)
        elif kind == "reduce-scatter" and not summed:
            found.append(times * whole * (degree - 1) / degree)
    return sum(found) if found else None


def num_passes(config: Config) -> int:
    """Passes over the layers: forward, backward, and that which recomputes products.

    A layer in pieces recomputes itself in any case.
    """
    is_recomputed = config.memory.recomputes_products
    return 2 + (is_recomputed or in_pieces(config.model, config.memory))


def feed_forward_is_tiled(config: Config) -> bool:
    """Whether a device has more tokens than memory.mlp_tile_tokens."""
    training, mesh, tile = config.training, config.mesh, config.memory.mlp_tile_tokens
    assert training.accumulation_steps
    rows = training.batch_size // training.accumulation_steps // mesh.data // mesh.fsdp
    shards = 1 if config.model.strategy == "megatron" else mesh.ring * mesh.seq
    tokens = rows * config.padded_tokens() // shards
    return tile is not None and tokens > tile


def _parts(
    key: tuple[str, str],
    members: list[Collective],
    formulas: dict[str, dict[tuple[str, str], float]],
) -> list[dict[str, Any]]:
    """What `bytes_by_part` parts, of a row that recurrences have a part of."""
    here = {what: found[key] for what, found in formulas.items() if key in found}
    names = [what for what in here if what != ATTENTION]
    if not names:
        return []
    by_part: dict[str, list[Collective]] = {what: [] for what in here}
    for each in members:
        name = each.instruction.op_name
        what = next((what for what in names if what in name), ATTENTION)
        by_part.setdefault(what, []).append(each)
    return [
        {"what": what, **_sums(part, here.get(what))} for what, part in by_part.items()
    ]


def _sums(members: list[Collective], formula: float | None) -> dict[str, Any]:
    total = sum(each.count * each.sent_bytes for each in members)
    return {
        "count": sum(each.count for each in members),
        "bytes": total,
        "formula_bytes": formula,
        "ratio": total / formula if formula else None,
    }


def _row(
    key: tuple[str, str],
    members: list[Collective],
    formula: float | None,
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    phases: dict[str, float] = {}
    for each in members:
        phases[each.phase] = phases.get(each.phase, 0) + each.count * each.sent_bytes
    largest = sorted(members, key=lambda each: -each.count * each.sent_bytes)[:3]
    crosses = any(each.crosses_hosts for each in members)
    return {
        "collective": key[0],
        "axis": key[1],
        **_sums(members, formula),
        "link": "between hosts" if crosses else "within a host",
        "between_hosts_bytes": sum(
            each.count * each.between_hosts_bytes for each in members
        ),
        "parts": parts,
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
