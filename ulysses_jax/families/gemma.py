"""Gemma 3, text: windows and full layers, each with its rope, and norms everywhere."""

import dataclasses
import math
from typing import Any

from ulysses_jax.config import Model
from ulysses_jax.families.family import Family, Fields, Stored
from ulysses_jax.families.llama import (
    attention_tensors,
    feed_forward_tensors,
    kinds_of,
    layer_types,
    norm_tensors,
    outer_tensors,
    sizes_json,
    sizes_of,
)
from ulysses_jax.families.rope_json import REPLACED, rope_json, rope_of


def _model_of(fields: Fields) -> Model:
    fields.only("hidden_activation", "gelu_pytorch_tanh", "an activation")
    fields.only("attn_logit_softcapping", None, "a soft cap on attention's logits")
    fields.only("final_logit_softcapping", None, "a soft cap on the logits")
    fields.only("use_bidirectional_attention", False, "attention to later tokens")
    sizes = sizes_of(fields)
    sizes["head_size"] = fields.get("head_dim", 256)
    every = max(fields.get("sliding_window_pattern", 6), 1)
    kinds = [
        "full" if (i + 1) % every == 0 else "window" for i in range(sizes["num_layers"])
    ]
    rope = rope_of(fields, base=1_000_000.0, layers="full_attention")
    both = fields.get("rope_parameters", None, dict) or {}
    narrow = Fields(both.get("sliding_attention") or {}, fields.where)
    narrow.only("rope_type", "default", "a rope of the layers with windows")
    window_base = narrow.get("rope_theta", 0.0) or fields.get(
        "rope_local_base_freq", 10_000.0
    )
    attention = "all" if fields.get("attention_bias", False) else "none"
    return Model(
        **sizes,
        **kinds_of(fields, kinds),
        norm="zero_centered_rms",
        post_norms=True,
        query_key_norm=True,
        feed_forward="geglu",
        rope=dataclasses.replace(rope, window_base=window_base),
        attention_biases=attention,
        attention_scale=float(fields.get("query_pre_attn_scalar", 256.0)) ** -0.5,
        tied_embeddings=fields.get("tie_word_embeddings", True),
        embedding_scale=math.sqrt(sizes["width"]),
    )


def _config_of(model: Model, max_tokens: int) -> dict[str, Any]:
    scale = model.attention_scale or 1.0
    return {
        **sizes_json(model, max_tokens),
        **rope_json(dataclasses.replace(model.rope, window_base=None)),
        "rope_local_base_freq": model.rope.window_base,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types(model),
        "sliding_window": model.window,
        "attention_bias": model.attention_biases == "all",
        # A whole number; of another one the model that is read again differs.
        "query_pre_attn_scalar": max(round(scale**-2), 1),
    }


def _tensors(model: Model) -> list[Stored]:
    norms = norm_tensors(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        feed_forward_norm="pre_feedforward_layernorm",
        feed_forward_post_norm="post_feedforward_layernorm",
    )
    attention, feed_forward = attention_tensors(model), feed_forward_tensors(model)
    return [*outer_tensors(model), *norms, *attention, *feed_forward]


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _model_of,
    _config_of,
    _tensors,
    (*REPLACED, "rope_local_base_freq", "layer_types", "sliding_window_pattern"),
)
