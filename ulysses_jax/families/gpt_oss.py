"""gpt-oss: its attention, with sinks and biases, every other layer in a window. Its
experts are not here."""

from typing import Any

from ulysses_jax.config import MOST_LAYERS, Model
from ulysses_jax.families.family import Family, Fields, Stored, stored
from ulysses_jax.families.llama import (
    ATTENTION,
    attention_tensors,
    kinds_of,
    sizes_json,
    sizes_of,
)
from ulysses_jax.families.rope_json import rope_json, rope_of


def _model_of(fields: Fields) -> Model:
    layers = fields.need("num_hidden_layers", most=MOST_LAYERS)
    kinds = ["full" if i % 2 else "window" for i in range(layers)]
    return Model(
        **sizes_of(fields),
        **kinds_of(fields, kinds),
        rope=rope_of(fields, base=150_000.0),
        attention_biases="all" if fields.get("attention_bias", True) else "none",
        sinks=True,
        tied_embeddings=fields.get("tie_word_embeddings", False),
    )


def _config_of(model: Model, max_tokens: int) -> dict[str, Any]:
    return sizes_json(model, max_tokens) | rope_json(model.rope)


def _tensors(model: Model) -> list[Stored]:
    sinks = stored(f"{ATTENTION}.sinks", "attention.sinks", "N")
    return [*attention_tensors(model), sinks]


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _model_of,
    _config_of,
    _tensors,
    missing="its feed-forward are experts (mlp.experts, mlp.router), which this "
    "library's layers have not; its attention is Attention(Model(sinks=True, "
    "attention_biases='all', pattern=('window', 'full'), window=...))",
)
