"""What a device receives for one new token, by formula."""

import jax.numpy as jnp

from ulysses_jax import layout
from ulysses_jax.config import Model
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.parallel.exchange import head_layout
from ulysses_jax.sharding import zero_axes


def token_bytes(model: Model, rows: int, context_blocks: int = 0) -> dict[str, float]:
    """Bytes that a device of the mesh that is set receives a step of `read_token`.

    Args:
      model: completed, without adapters.
      rows: of the device, B / (data fsdp).
      context_blocks: of the cache, where a context memory chooses among them.

    Returns:
      By what is received. With Z the devices over which D is cut, t = tensor, s = seq,
      e the itemsize, R = rows, times fsdp where that cuts D: sums, all-reduces in
      float32, are `8 R (Z-1)/Z (g N H + 2 K H + c F) / t` a layer, of g and c = 1 or,
      gated, 2 products (and, of kind delta, 2 N more), and `16 R D/Z (t-1)/t`; and
      `8 R (Z-1)/Z V/t` for the logits.
      Gathers are `rows (s-1)/s slots H e` a layer after attention, over seq, and `2 R D
      (Z-1)/Z e`. Where fsdp cuts D, rows are gathered before each product. Scores
      of blocks are `8 rows blocks (st-1)/(st)` a layer of kind full.
    """
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    cut = zero_axes(model.width, layout.axes())
    parts, tensor = layout.degree(*cut), layout.degree("tensor")
    seq, shared = layout.degree("seq"), layout.degree("fsdp") if "fsdp" in cut else 1
    item, all_rows = jnp.dtype(model.compute_dtype).itemsize, rows * shared
    heads = head_layout(model.num_heads // tensor, model.num_kv_heads // tensor, seq)

    def others(number: int) -> float:
        return (number - 1) / number

    def into(*features: int) -> tuple[float, float]:
        sums = 8 * others(parts) * all_rows * sum(features) / tensor
        return sums, others(shared) * all_rows * model.width * item

    def out_of(features: int) -> tuple[float, float]:
        sums = 8 * others(tensor) * all_rows * model.width / parts
        gathered = others(shared) * features / tensor + others(parts) * model.width
        return sums, all_rows * gathered * item

    def of_layer(kind: str) -> tuple[float, float]:
        if kind in RECURRENT:
            its = model.state_sizes(kind)
            features, keys = its.num_heads * its.value_size, its.num_key_heads
            keys, more = keys * its.key_size, [features]
            more += [its.num_heads] * 2 * (kind == "delta")
        else:
            features, keys = model.num_heads * size, kv_heads * size
            more = [features] * model.attention_gate
        products = (
            into(features, keys, keys, *more),
            out_of(features),
            into(*(wide,) * (1 + model.is_gated)),
            out_of(wide),
        )
        sums, gathers = map(sum, zip(*products, strict=True))
        return sums, gathers

    size, wide, kv_heads = model.head_size, model.feed_forward_width, model.num_kv_heads
    sums, gathers = map(sum, zip(*map(of_layer, model.kinds()), strict=True))
    attended = others(seq) * rows * heads.num_slots * size * item
    tables = 1 + (model.positions == "learned")
    row = 2 * others(tensor) / parts + others(parts)
    embedded = all_rows * (model.width * row * item + others(shared) * 4)
    logits = sum(into(model.vocab_size))
    attending = model.attending_kinds()
    scores = 8 * others(tensor * seq) * rows * context_blocks
    return {
        "sums": sums,
        "activations": gathers,
        "attended heads": len(attending) * attended,
        "block scores": attending.count("full") * scores,
        "embedding": tables * embedded,
        "logits": logits,
    }
