"""Llama, and those that differ from it in a field or two: Mistral, Qwen, Phi-3."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ulysses_jax.config import MOST_LAYERS, Model
from ulysses_jax.families.family import Family, Fields, Part, Stored, pattern_of, stored
from ulysses_jax.families.rope_json import REPLACED, rope_json, rope_of

KINDS = {"full_attention": "full", "sliding_attention": "window"}


def sizes_of(fields: Fields) -> dict[str, Any]:
    """The fields of a `Model` that every family after GPT-2 names alike."""
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    return {
        "vocab_size": fields.need("vocab_size"),
        "width": width,
        "num_layers": fields.need("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_size": fields.get("head_dim", None, int) or width // heads,
        "feed_forward_width": fields.need("intermediate_size"),
        "norm_epsilon": fields.get("rms_norm_eps", 1e-6),
    }


def sizes_json(model: Model, max_tokens: int) -> dict[str, Any]:
    """`sizes_of`, the other way."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.feed_forward_width,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": max_tokens,
    }


def kinds_of(
    fields: Fields, default: Sequence[str], names: dict[str, str] = KINDS
) -> dict[str, Any]:
    """Pattern and window, from layer_types, by these names, or by what the family does
    without."""
    kinds = list(default)
    named = fields.get("layer_types", None, list)
    if named is not None:
        unknown = sorted({str(each) for each in named} - set(names))
        if unknown:
            raise ValueError(
                f"{fields.where}: layer_types has {', '.join(unknown)}, which is none "
                f"of {', '.join(names)}"
            )
        kinds = [names[each] for each in named]
    if len(kinds) != fields.need("num_hidden_layers"):
        raise ValueError(
            f"{fields.where}: layer_types names {len(kinds)} layers, and "
            f"num_hidden_layers is {fields.need('num_hidden_layers')}"
        )
    found: dict[str, Any] = {"pattern": pattern_of(kinds)}
    if "window" in kinds:
        found["window"] = fields.need("sliding_window")
    return found


def layer_types(model: Model, names: dict[str, str] = KINDS) -> list[str]:
    by_kind = {kind: name for name, kind in names.items()}
    return [by_kind.get(kind, kind) for kind in model.kinds()]


def _model_of(
    fields: Fields,
    *,
    tied: bool = False,
    base: float = 10_000.0,
    windows: str = "none",
    biases: str = "by attention_bias",
    query_key_norm: bool = False,
    has_mlp_bias: bool = False,
    window: int | None = None,
    partial_rope: bool = False,
) -> Model:
    """Args: windows: which layers have one: none, all, or by number: layer_types, or
    use_sliding_window and max_window_layers. biases: of attention. window: of a file
    that does not say."""
    fields.only("hidden_act", "silu", "an activation")
    layers = fields.need("num_hidden_layers", most=MOST_LAYERS)
    kinds = ["full"] * layers
    said = {"sliding_window": window, **fields.values}
    fields = Fields(said, fields.where)
    if windows == "all" and fields.get("sliding_window", None, int) is not None:
        kinds = ["window"] * layers
    if windows == "by number" and fields.get("use_sliding_window", False):
        first = fields.get("max_window_layers", 28)
        kinds = ["window" if i >= first else "full" for i in range(layers)]
    if biases == "by attention_bias":
        biases = "all" if fields.get("attention_bias", False) else "none"
    found = kinds_of(fields, kinds)
    if windows != "by number" and found["pattern"] != pattern_of(kinds):
        raise ValueError(
            f"{fields.where}: layer_types are not what layers of its model_type are, "
            f"which has none: {', '.join(found['pattern'])}"
        )
    if not has_mlp_bias:
        fields.only("mlp_bias", False, "biases of the feed-forward")
    return Model(
        **sizes_of(fields),
        **found,
        rope=rope_of(fields, base=base, partial=partial_rope),
        biases=has_mlp_bias and fields.get("mlp_bias", False),
        attention_biases=biases,  # pyright: ignore[reportArgumentType]
        query_key_norm=query_key_norm,
        tied_embeddings=fields.get("tie_word_embeddings", tied),
    )


def _config_of(
    model: Model, max_tokens: int, *, windows: str = "none", has_biases: bool = False
) -> dict[str, Any]:
    rope = model.rope
    if rope.scaling == "dynamic":
        max_tokens = rope.original_tokens or max_tokens  # which its base is for
    if rope.scaling == "longrope" and rope.original_tokens:
        max_tokens = round(rope.factor * rope.original_tokens)  # so is its factor
    values = sizes_json(model, max_tokens) | rope_json(rope) | {"hidden_act": "silu"}
    if has_biases:
        values["attention_bias"] = model.attention_biases == "all"
    if windows == "all":
        values["sliding_window"] = model.window
    elif windows == "by number":
        values |= {
            "layer_types": layer_types(model),
            "sliding_window": model.window,
            "use_sliding_window": model.window is not None,
        }
    return values


def _llama_config(model: Model, max_tokens: int) -> dict[str, Any]:
    values = _config_of(model, max_tokens, has_biases=True)
    return values | {"mlp_bias": model.biases}


ATTENTION = "model.layers.{i}.self_attn"


def attention_tensors(model: Model) -> list[Stored]:
    """Of queries, keys, values and what leads back, each by itself; but a gate, head
    by head, beside the queries."""
    found = []
    for name, letters in (("q", "NH"), ("k", "KH"), ("v", "KH")):
        tensor = f"{ATTENTION}.{name}_proj"
        weight = stored(f"{tensor}.weight", f"attention.{name}", f"{letters} D")
        if name == "q" and model.attention_gate:
            gate = Part(("attention", "out_gate"), f"{letters} D")
            weight = Stored(weight.name, (*weight.parts, gate), groups="N")
        found.append(weight)
        if model.attention_biases != "none":
            found.append(stored(f"{tensor}.bias", f"attention.{name}_bias", letters))
    found.append(stored(f"{ATTENTION}.o_proj.weight", "attention.out", "D NH"))
    if model.attention_biases == "all":
        found.append(stored(f"{ATTENTION}.o_proj.bias", "attention.out_bias", "D"))
    if model.query_key_norm:
        found += [
            stored(f"{ATTENTION}.{name}_norm.weight", f"attention.{name}_norm", "H")
            for name in "qk"
        ]
    return found


def feed_forward_tensors(model: Model) -> list[Stored]:
    found = []
    for name in ("gate", "up", "down"):
        tensor, letters = f"model.layers.{{i}}.mlp.{name}_proj", "F D"
        if name == "down":
            letters = "D F"
        path = f"feed_forward.{name}"
        found.append(stored(f"{tensor}.weight", path, letters))
        if model.biases:
            found.append(stored(f"{tensor}.bias", f"{path}_bias", letters[0]))
    return found


def norm_tensors(**names: str) -> list[Stored]:
    """Of a layer: the tensor of each norm's scale."""
    return [
        stored(f"model.layers.{{i}}.{name}.weight", f"{norm}.scale", "D")
        for norm, name in names.items()
    ]


def outer_tensors(model: Model) -> list[Stored]:
    """What is no layer's."""
    found = [
        stored("model.embed_tokens.weight", "embedding", "V D"),
        stored("model.norm.weight", "norm.scale", "D"),
    ]
    if not model.tied_embeddings:
        found.append(stored("lm_head.weight", "unembedding", "V D"))
    return found


NORMS = norm_tensors(
    attention_norm="input_layernorm", feed_forward_norm="post_attention_layernorm"
)


def _tensors(model: Model) -> list[Stored]:
    attention, feed_forward = attention_tensors(model), feed_forward_tensors(model)
    return [*outer_tensors(model), *NORMS, *attention, *feed_forward]


def _phi3_model(fields: Fields) -> Model:
    model = _model_of(fields, windows="all", biases="none", partial_rope=True)
    if model.rope.scaling not in ("none", "longrope"):
        raise ValueError(
            f"{fields.where}: rope_type {model.rope.scaling} is none of phi3's, but "
            "longrope is"
        )
    return model


def _phi3_config(model: Model, max_tokens: int) -> dict[str, Any]:
    """Its rope_scaling has three fields and no other, and of no factor: that is the
    longest sequence over the one before."""
    values = _config_of(model, max_tokens, windows="all")
    rope = values.get("rope_scaling")
    if model.rope.scaling == "longrope" and rope is not None:
        names = ("short_factor", "long_factor")
        values["rope_scaling"] = {"type": "longrope"} | {n: rope[n] for n in names}
    return values


def _phi3_tensors(model: Model) -> list[Stored]:
    """Queries, keys and values in one tensor; so gate and up."""
    inputs = tuple(
        Part(("attention", name), f"{letters} D")
        for name, letters in (("q", "NH"), ("k", "KH"), ("v", "KH"))
    )
    gated = tuple(Part(("feed_forward", name), "F D") for name in ("gate", "up"))
    return [
        *outer_tensors(model),
        *NORMS,
        Stored(f"{ATTENTION}.qkv_proj.weight", inputs),
        stored(f"{ATTENTION}.o_proj.weight", "attention.out", "D NH"),
        Stored("model.layers.{i}.mlp.gate_up_proj.weight", gated),
        stored("model.layers.{i}.mlp.down_proj.weight", "feed_forward.down", "D F"),
    ]


_WINDOWS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    partial(_model_of, has_mlp_bias=True),
    _llama_config,
    _tensors,
    (*REPLACED, *_WINDOWS),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    partial(_model_of, windows="all", biases="none", window=4096),
    partial(_config_of, windows="all"),
    _tensors,
    (*REPLACED, "sliding_window", "layer_types", "mlp_bias"),
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    partial(_model_of, windows="by number", biases="inputs"),
    partial(_config_of, windows="by number"),
    _tensors,
    (*REPLACED, *_WINDOWS),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    partial(_model_of, windows="by number", query_key_norm=True),
    partial(_config_of, windows="by number", has_biases=True),
    _tensors,
    (*REPLACED, *_WINDOWS),
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _phi3_model,
    _phi3_config,
    _phi3_tensors,
    (*REPLACED, *_WINDOWS, "original_max_position_embeddings"),
)
