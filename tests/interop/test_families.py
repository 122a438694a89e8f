"""The config.json of published models, as their folders have it, in and out."""

import dataclasses

import pytest

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Rope
from ulysses_jax.families.config_json import config_of, model_of

LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=128256,
)
PLAIN = LLAMA | dict(rope_scaling=None, rope_theta=1e6)
MISTRAL = PLAIN | dict(model_type="mistral", sliding_window=None)
QWEN2 = PLAIN | dict(
    model_type="qwen2",
    max_window_layers=28,
    sliding_window=4096,
    use_sliding_window=False,
    max_position_embeddings=32768,
)
QWEN3 = QWEN2 | dict(model_type="qwen3", head_dim=64, sliding_window=None)
GEMMA3 = PLAIN | dict(
    model_type="gemma3_text",
    hidden_activation="gelu_pytorch_tanh",
    head_dim=256,
    query_pre_attn_scalar=168,
    rope_local_base_freq=10000,
    rope_theta=1000000,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    sliding_window=512,
    sliding_window_pattern=6,
    num_hidden_layers=26,
    tie_word_embeddings=True,
)
PHI3 = PLAIN | dict(
    model_type="phi3",
    original_max_position_embeddings=4096,
    pad_token_id=32000,
    partial_rotary_factor=0.75,
    sliding_window=262144,
    rope_scaling=dict(long_factor=[1.5] * 48, short_factor=[1.0] * 48, type="longrope"),
)
GPT2 = dict(
    model_type="gpt2", n_embd=768, n_head=12, n_layer=12, n_positions=1024, vocab_size=9
)
QWEN3_NEXT = PLAIN | dict(
    model_type="qwen3_next",
    full_attention_interval=4,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    num_experts=0,
    num_hidden_layers=48,
    partial_rotary_factor=0.25,
)
QWEN3_5 = PLAIN | dict(
    model_type="qwen3_5_text",
    rope_parameters=dict(
        mrope_interleaved=True,
        mrope_section=[11, 11, 10],
        rope_theta=1e7,
        rope_type="default",
    ),
)
LONG = dict(
    scaling="longrope",
    factor=32.0,
    original_tokens=4096,
    short_factors=(1.0,) * 48,
    long_factors=(1.5,) * 48,
)
PATTERN = ("window",) * 5 + ("full",)
CASES = [
    (LLAMA, dict(num_kv_heads=8, head_size=128, attention_biases="none")),
    (
        LLAMA,
        dict(rope=Rope(scaling="llama3", factor=8.0, original_tokens=8192)),
    ),
    (MISTRAL, dict(window=None, pattern=("full",), rope=Rope(base=1e6))),
    (MISTRAL | dict(sliding_window=4096), dict(window=4096, pattern=("window",))),
    (QWEN2, dict(attention_biases="inputs", window=None, pattern=("full",))),
    (
        QWEN2 | dict(use_sliding_window=True),
        dict(window=4096, pattern=("full",) * 28 + ("window",) * 4),
    ),
    (
        QWEN2 | dict(rope_scaling=dict(type="yarn", factor=4.0)),
        dict(rope=Rope(base=1e6, scaling="yarn", factor=4.0, original_tokens=32768)),
    ),
    (QWEN3, dict(query_key_norm=True, head_size=64, attention_biases="none")),
    (GEMMA3, dict(pattern=PATTERN, window=512, attention_scale=168**-0.5)),
    (
        GEMMA3,
        dict(
            rope=Rope(base=1e6, window_base=1e4, scaling="linear", factor=8.0),
            embedding_scale=64.0,
            tied_embeddings=True,
        ),
    ),
    (PHI3, dict(rope=Rope(base=1e6, fraction=0.75, **LONG))),
    (
        PHI3 | dict(rope_scaling=PHI3["rope_scaling"] | dict(type="su")),
        dict(rope=Rope(base=1e6, fraction=0.75, **LONG)),
    ),
    (
        QWEN3_NEXT,
        dict(
            pattern=("delta", "delta", "delta", "full"),
            rope=Rope(base=1e6, fraction=0.25),
            delta_heads=32,
            delta_key_heads=16,
            delta_key_size=128,
            norm="zero_centered_rms",
        ),
    ),
    (QWEN3_5, dict(rope=Rope(base=1e7, fraction=0.25), head_size=256)),
    (GPT2, dict(max_positions=1024, biases=True, head_size=64, norm="layer")),
]


@pytest.mark.parametrize("values, fields", CASES, ids=str)
def test_published_configs(values, fields):
    model = model_of(values)
    assert {name: getattr(model, name) for name in fields} == fields


@pytest.mark.parametrize(
    "values, message",
    [
        (GPT2 | dict(scale_attn_weights=False), "scale_attn_weights is False"),
        (LLAMA | dict(partial_rotary_factor=0.5), "turn whole heads"),
        (
            LLAMA | dict(layer_types=["sliding_attention"] * 32, sliding_window=9),
            "none",
        ),
        (MISTRAL | dict(mlp_bias=True), "mlp_bias is True"),
        (PHI3 | dict(rope_scaling=dict(type="linear", factor=2.0)), "longrope is"),
        (GEMMA3 | dict(final_logit_softcapping=30.0), "a soft cap on the logits"),
        (LLAMA | dict(num_hidden_layers=0), "num_hidden_layers is 0, and must be"),
        (LLAMA | dict(rope_theta=0.0), "model.rope.base must be positive"),
        (GEMMA3 | dict(query_pre_attn_scalar=0), "negative power"),
    ],
    ids=str,
)
def test_what_transformers_would_compute_otherwise_is_refused(values, message):
    with pytest.raises(ValueError, match=f"^config.json.*{message}"):
        model_of(values)


@pytest.mark.parametrize(
    "values",
    [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, PHI3, QWEN3_NEXT, QWEN3_5],
    ids=lambda v: v["model_type"],
)
def test_a_stretched_model_s_config_keeps_what_it_said(values):
    """A null too: left out, transformers would take its own default."""
    model = model_of(values)
    rope = dataclasses.replace(model.rope, base=8e6)
    made = config_of(dataclasses.replace(model, rope=rope), values, None)
    assert model_of(made).rope == rope
    assert "torch_dtype" in made and made["rope_theta"] == 8e6
    assert made["max_position_embeddings"] == values["max_position_embeddings"]
    if values is MISTRAL:
        assert made["sliding_window"] is None and "sliding_window" in made
    if values is PHI3:  # three fields, which it checks, and its own padding
        assert set(made["rope_scaling"]) == {"type", "short_factor", "long_factor"}
        assert made["pad_token_id"] == 32000
        assert config_of(model, None, 9)["pad_token_id"] is None


def test_the_length_that_a_rope_s_factor_is_made_of():
    """Longrope's is the longest over the one before; dynamic's base is for it."""
    long = dataclasses.replace(model_of(PHI3), attention_scale=None)
    assert config_of(long, None, 96)["max_position_embeddings"] == 131072
    dynamic = LLAMA | dict(rope_scaling=dict(type="dynamic", factor=2.0))
    made = config_of(model_of(dynamic), None, 10**6)
    assert made["max_position_embeddings"] == 131072


def test_a_family_that_has_such_a_model_is_found():
    """Not one whose layers would compute something else."""
    plain = dataclasses.replace(model_of(LLAMA), rope=Rope(fraction=0.5))
    assert config_of(plain, None, 99)["model_type"] == "phi3"
    windows = dataclasses.replace(
        model_of(QWEN3), query_key_norm=False, pattern=("full", "window"), window=9
    )
    with pytest.raises(ValueError, match="none of llama, .* has such a model"):
        config_of(windows, None, 99)
    biased = dataclasses.replace(
        model_of(LLAMA), biases=True, pattern=("window",), window=9
    )
    with pytest.raises(ValueError, match="has such a model"):
        config_of(biased, None, 99)
    odd = dataclasses.replace(model_of(GEMMA3), attention_scale=0.3)
    with pytest.raises(ValueError, match="has such a model"):
        config_of(odd, None, 99)


def test_a_qwen3_next_whose_layers_all_have_a_state():
    """Which have no gate of attention, and no norms of queries."""
    model = complete_model(model_of(QWEN3_NEXT | {"num_hidden_layers": 2}))
    assert model.kinds() == ("delta", "delta") and not model.attention_gate
    assert complete_model(model_of(config_of(model, None, 64))) == model
