"""Which kernel attends in the layers of each kind: chosen, and in a program; and how
many pairs it computes."""

from typing import Any

import jax
import jax.numpy as jnp

from ulysses_jax.attention.blockwise import SCOPE
from ulysses_jax.attention.layouts import layout_of
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.mosaic import BLOCK_TOKENS
from ulysses_jax.attention.select import choose
from ulysses_jax.config import Config
from ulysses_jax.costs.flops import BY_LAYOUT, BY_TILES, FORWARD
from ulysses_jax.costs.hlo import Instruction, Module
from ulysses_jax.costs.pairs import pairs_of
from ulysses_jax.mesh import Device
from ulysses_jax.strategies import num_members


def attention_of_kinds(config: Config, device: Device) -> list[dict[str, Any]]:
    """What `attention.select.choose` says, as `attend` asks it.

    Args:
      config: placed on its mesh.

    Returns:
      For every kind of layer that attends `kind`, `layers` (how many there are),
      `kernel`, `why` (no faster one; "" where there is none) and `pairs_fraction`, of T
      x T, that its mask leaves in the mean.

    Raises:
      ValueError: as `choose`.
    """
    model = config.model
    kinds = model.attending_kinds()
    rows = []
    for kind in dict.fromkeys(kinds):
        choice = choose(model.attention, device, *_asked(config, kind))
        rows.append(
            {
                "kind": kind,
                "layers": kinds.count(kind),
                "kernel": choice.name,
                "why": choice.why,
                "pairs_fraction": pairs_of(config, (kind,)).fraction(
                    config.padded_tokens()
                ),
            }
        )
    return rows


def kernels_in(module: Module) -> dict[str, list[str]]:
    """The kernels that a program holds, and for which passes, "forward", "backward"."""
    found: dict[str, set[str]] = {}
    for computation in module.computations.values():
        for each in computation.instructions:
            name, way = _attends(each)
            if name:
                found.setdefault(name, set()).add(way)
    return {name: sorted(ways, reverse=True) for name, ways in found.items()}


def others_than_chosen(
    kernels: list[dict[str, Any]], held: dict[str, list[str]]
) -> list[str]:
    """Warnings where a program attends otherwise than `attention_of_kinds` says.

    Args:
      held: `kernels_in` it.
    """
    chosen = {row["kernel"] for row in kernels} - {"reference"}  # of plain products
    ways = "forward", "backward"
    wanted = {f"{name} {way}" for name in chosen for way in ways}
    found = {f"{name} {way}" for name in held for way in held[name]}
    words = [f"has not {each}, which was chosen" for each in sorted(wanted - found)]
    words += [f"has {each}, which was not chosen" for each in sorted(found - wanted)]
    return [
        f"attention: the program {each}: its predicted seconds are of another kernel"
        for each in words
    ]


def _attends(each: Instruction) -> tuple[str, str]:
    """The kernel that an instruction is, or is part of, and its pass; "" for none."""
    target, name = each.custom_call_target, each.op_name
    if "fmha" in target:
        return "cudnn", "backward" if "Backward" in target else "forward"
    if "mosaic_gpu" in target and FORWARD in name:
        return "mosaic", "forward"
    if "mosaic_gpu" in target and (BY_TILES in name or BY_LAYOUT in name):
        return "mosaic", "backward"
    for way in ("forward", "backward"):
        if f"{SCOPE}/{way}" in name:
            return "blockwise", way
    return "", ""


def tile_products(config: Config, kernels: list[dict[str, Any]]) -> float:
    """Products of one pair each that Mosaic's passes compute beyond those of every
    visible pair, two forward and five backward: seven backward, of all pairs of their
    tiles, and by a layout two forward of these; a row, over layers."""
    span = config.padded_tokens()
    more = 0.0
    for row in kernels:
        if row["kernel"] == "mosaic":
            pairs = pairs_of(config, (row["kind"],))
            visible = pairs.visible(span)
            if row["kind"] == "sparse":  # forward too
                tiles = pairs.layout_tiles(rows_at_once(config))
                beyond = 9 * tiles * config.model.sparse_block_tokens**2 - 7 * visible
            else:
                tiles = pairs.tiles(-(-span // BLOCK_TOKENS), BLOCK_TOKENS)
                beyond = 7 * tiles * BLOCK_TOKENS**2 - 5 * visible
            more += row["layers"] * beyond
    return more


def rows_at_once(config: Config) -> int:
    """Rows of a batch that a device attends to together."""
    training, mesh = config.training, config.mesh
    assert training.accumulation_steps
    shares = training.accumulation_steps * mesh.data * mesh.fsdp
    return training.batch_size // shares


def _asked(config: Config, kind: str) -> tuple[Any, Any, Mask]:
    """q, k and mask as a device attends: shapes alone."""
    model, mesh, tokens = config.model, config.mesh, config.padded_tokens()
    window = model.window if kind == "window" else None
    layout = layout_of(model, tokens) if kind == "sparse" else None
    assert model.num_kv_heads and model.head_size and model.strategy != "auto"
    members = num_members(model.strategy, mesh.ring, mesh.seq)
    chunk = config.memory.sequence_chunk_tokens
    by_parts = members > 1
    if by_parts:
        tokens //= members * (2 if model.zigzag else 1)
    elif chunk is not None and chunk < tokens // mesh.seq:
        by_parts, tokens = True, chunk
    q, k = (
        jax.ShapeDtypeStruct(
            (1, tokens, heads, model.head_size), jnp.dtype(model.compute_dtype)
        )
        for heads in (model.num_heads, model.num_kv_heads)
    )
    ids: Any = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    segments = ids if config.data.mask_documents else None
    positions = ids if by_parts and window is not None else None
    mask = Mask(
        causal=True,
        window=window,
        q_segment_ids=segments,
        kv_segment_ids=segments,
        q_positions=positions,
        kv_positions=positions,
        layout=layout,
    )
    return q, k, mask
