"""GPT-2: learned positions, LayerNorm, biases; matrices stored the other way round."""

from typing import Any

from ulysses_jax.config import Model
from ulysses_jax.families.family import Family, Fields, Part, Stored, stored

_GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def _model_of(fields: Fields) -> Model:
    fields.one_of("activation_function", _GELU, "gelu_new")
    fields.only("scale_attn_weights", True, "attention without a scale")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.only(name, False, "an option of attention")
    return Model(
        vocab_size=fields.need("vocab_size"),
        width=fields.need("n_embd"),
        num_layers=fields.need("n_layer"),
        num_heads=fields.need("n_head"),
        feed_forward_width=fields.get("n_inner", None, int),
        norm="layer",
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        feed_forward="gelu",
        positions="learned",
        max_positions=fields.need("n_positions"),
        biases=True,
        tied_embeddings=fields.get("tie_word_embeddings", True),
    )


def _config_of(model: Model, max_tokens: int) -> dict[str, Any]:
    del max_tokens  # it has a table
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.width,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.feed_forward_width,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": model.tied_embeddings,
    }


def _tensors(model: Model) -> list[Stored]:
    found = [
        stored("transformer.wte.weight", "embedding", "V D"),
        stored("transformer.wpe.weight", "position_table", "V D"),
        *_norm("transformer.ln_f", "norm"),
    ]
    if not model.tied_embeddings:
        found.append(stored("lm_head.weight", "unembedding", "V D"))
    layer = "transformer.h.{i}"
    found += [*_norm(f"{layer}.ln_1", "attention_norm")]
    found += [*_norm(f"{layer}.ln_2", "feed_forward_norm")]
    for ending, first in (("", "D "), ("_bias", "")):
        parts = tuple(
            Part(("attention", f"{name}{ending}"), f"{first}NH".replace("N", letter))
            for name, letter in (("q", "N"), ("k", "K"), ("v", "K"))
        )
        kind = "bias" if ending else "weight"
        found += [
            Stored(f"{layer}.attn.c_attn.{kind}", parts, dim=0 if ending else 1),
            stored(
                f"{layer}.attn.c_proj.{kind}",
                f"attention.out{ending}",
                "D" if ending else "NH D",
            ),
            stored(f"{layer}.mlp.c_fc.{kind}", f"feed_forward.up{ending}", f"{first}F"),
            stored(
                f"{layer}.mlp.c_proj.{kind}",
                f"feed_forward.down{ending}",
                "D" if ending else "F D",
            ),
        ]
    return found


def _norm(name: str, path: str) -> list[Stored]:
    return [
        stored(f"{name}.weight", f"{path}.scale", "D"),
        stored(f"{name}.bias", f"{path}.bias", "D"),
    ]


GPT2 = Family("gpt2", "GPT2LMHeadModel", _model_of, _config_of, _tensors)
