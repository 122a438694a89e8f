"""Qwen3-Next and Qwen3.5, text: the gated delta rule, and gated attention in between.

Qwen3-Next's experts are not here: a config whose feed-forwards are all dense is read.
"""

import dataclasses
from functools import partial
from typing import Any

from ulysses_jax.config import MOST_LAYERS, Model
from ulysses_jax.families.family import Family, Fields, Part, Stored, stored
from ulysses_jax.families.llama import (
    NORMS,
    attention_tensors,
    feed_forward_tensors,
    kinds_of,
    layer_types,
    outer_tensors,
    sizes_json,
    sizes_of,
)
from ulysses_jax.families.rope_json import REPLACED, rope_json, rope_of

_KINDS = {"full_attention": "full", "linear_attention": "delta"}
_SIZES = {
    "linear_num_value_heads": ("delta_heads", 32),
    "linear_num_key_heads": ("delta_key_heads", 16),
    "linear_key_head_dim": ("delta_key_size", 128),
    "linear_value_head_dim": ("delta_value_size", 128),
    "linear_conv_kernel_dim": ("convolution_tokens", 4),
}
_FRACTION = 0.25  # of a head that is turned, where a file does not say
# Of positions in pictures: text has one for all three, and is turned as without them.
_OF_PICTURES = ("mrope_section", "mrope_interleaved")


def _model_of(fields: Fields, *, may_have_experts: bool = False) -> Model:
    fields.only("hidden_act", "silu", "an activation")
    fields.only("attention_bias", False, "biases beside attention's gate")
    sizes = sizes_of(fields)
    sizes["head_size"] = fields.get("head_dim", 256)
    for name, (own, default) in _SIZES.items():
        sizes[own] = fields.get(name, default)
    layers = fields.need("num_hidden_layers", most=MOST_LAYERS)
    if may_have_experts:
        _refuse_experts(fields, layers)
    every = max(fields.get("full_attention_interval", 4), 1)
    kinds = ["delta" if (i + 1) % every else "full" for i in range(layers)]
    found = kinds_of(fields, kinds, _KINDS)
    attends = "full" in found["pattern"]
    return Model(
        **sizes,
        **found,
        norm="zero_centered_rms",
        query_key_norm=attends,
        attention_gate=attends,
        rope=rope_of(_with_fraction(fields), base=10_000.0, partial=True),
        tied_embeddings=fields.get("tie_word_embeddings", False),
    )


def _refuse_experts(fields: Fields, layers: int) -> None:
    """Raises ValueError: some layer's feed-forward are experts."""
    experts, step = fields.get("num_experts", 512), fields.get("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    have = [i for i in range(layers) if i not in dense and not (i + 1) % step]
    if experts and have:
        raise ValueError(
            f"{fields.where}: num_experts is {experts}, and the feed-forwards of "
            f"{len(have)} of the {layers} layers are experts (from layer {have[0]} on; "
            "mlp_only_layers, decoder_sparse_step), which this library's layers have "
            "not"
        )


def _with_fraction(fields: Fields) -> Fields:
    """Its rope without what is of pictures, and with the family's fraction."""
    values = {**fields.values}
    values["partial_rotary_factor"] = fields.get("partial_rotary_factor", _FRACTION)
    for name in ("rope_parameters", "rope_scaling"):
        said = fields.get(name, {})
        values[name] = {n: x for n, x in said.items() if n not in _OF_PICTURES}
    return Fields(values, fields.where)


def _config_of(
    model: Model, max_tokens: int, *, may_have_experts: bool = False
) -> dict[str, Any]:
    values = sizes_json(model, max_tokens) | rope_json(model.rope)
    values |= {name: getattr(model, own) for name, (own, _) in _SIZES.items()}
    if may_have_experts:
        values["num_experts"] = 0
    return values | {
        "hidden_act": "silu",
        "layer_types": layer_types(model, _KINDS),
        "partial_rotary_factor": model.rope.fraction,
    }


_DELTA = "model.layers.{i}.linear_attn"
_INTO = (("q", "KH"), ("k", "KH"), ("v", "NU"), ("gate", "NU"))
_OF_HEADS = (("beta", "N"), ("decay", "N"))


def _parts(names: tuple[tuple[str, str], ...], more: str = " D") -> tuple[Part, ...]:
    return tuple(Part(("attention", name), dims + more) for name, dims in names)


def _by_key_head() -> list[Stored]:
    """For each head of keys its own, and those of the values that it serves."""
    return [
        Stored(f"{_DELTA}.in_proj_qkvz.weight", _parts(_INTO), groups="K"),
        Stored(f"{_DELTA}.in_proj_ba.weight", _parts(_OF_HEADS), groups="K"),
    ]


def _one_by_one() -> list[Stored]:
    """As Qwen3.5 has them."""
    qkv, named = _INTO[:3], (("z", _INTO[3]), *zip("ba", _OF_HEADS, strict=True))
    return [
        Stored(f"{_DELTA}.in_proj_qkv.weight", _parts(qkv)),
        *(Stored(f"{_DELTA}.in_proj_{n}.weight", _parts((each,))) for n, each in named),
    ]


def _tensors(model: Model, *, into: Any) -> list[Stored]:
    taps = tuple((f"{name}_taps", letters) for name, letters in _INTO[:3])
    delta = [
        *into(),
        Stored(f"{_DELTA}.conv1d.weight", _parts(taps, " 1 W")),
        stored(f"{_DELTA}.A_log", "attention.log_rate", "N"),
        stored(f"{_DELTA}.dt_bias", "attention.decay_bias", "N"),
        stored(f"{_DELTA}.norm.weight", "attention.norm", "U"),
        stored(f"{_DELTA}.out_proj.weight", "attention.out", "D NU"),
    ]
    by_kind = {"delta": delta, "full": attention_tensors(model)}
    return [
        *outer_tensors(model),
        *NORMS,
        *feed_forward_tensors(model),
        *(
            dataclasses.replace(each, kind=kind)
            for kind, tensors in by_kind.items()
            for each in tensors
        ),
    ]


_REPLACED = (*REPLACED, "layer_types", "full_attention_interval")
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    partial(_model_of, may_have_experts=True),
    partial(_config_of, may_have_experts=True),
    partial(_tensors, into=_by_key_head),
    _REPLACED,
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _model_of,
    _config_of,
    partial(_tensors, into=_one_by_one),
    _REPLACED,
)
