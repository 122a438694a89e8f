"""Tiny random checkpoints, each with what `transformers` says of it.

The tests read the folders in `fixtures` and need neither torch nor transformers. This
script wrote them, with torch 2.13.0, transformers 5.24.0, safetensors 0.8.0 and numpy
2.4.6 on a CPU. To write them anew, in an environment with these:

    python tests/interop/make_fixtures.py            # all
    python tests/interop/make_fixtures.py phi3 gpt2  # some

A folder has the config.json and the model.safetensors of `save_pretrained`, the weights
in the case's dtype. What is in its expected.npz was computed in float32, from a model
loaded from these very files, with eager attention:

    tokens       int32 [2, T]
    logits       float32 [2, T, V]
    loss         the mean cross entropy of the next token, over 2 (T - 1) predictions
    grad/NAME    of that loss, by the tensor NAME of the file
    generated    int32 [2, 8], the greedy continuation of tokens[:, :12], with a cache

Where a rope depends on the sequence's length, `generated` is what `generate` makes of
it, at lengths 12 (the prompt) to 19:

    mistral      Dynamic NTK's frequencies are those of the length, or of
                 max_position_embeddings (16) up to there. Keys in the cache stay as
                 they were turned: a step at length 17, 18 or 19 turns its query and
                 its own key alone by the frequencies of that length.
    phi3         At length 17, past original_max_position_embeddings, `generate` drops
                 the cache and computes all keys anew. So it is as if there were no
                 cache: at lengths up to 16 the short factors turn every position, and
                 from there on the long ones do.

Of gpt_oss there is the attention alone, of layer 0 (a window) and 1 (none): `x`, and
`attention.0` and `.1` of it at positions 0 to T - 1, weights `w` [2, T, D], and of the
losses sum(attention.i * w) the gradients `grad_x.0` and `.1` and `grad/NAME`.
"""

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import (  # noqa: E402
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
T = 24
PROMPT, NEW = 12, 8
# The chosen token's logit above the next one's, at each step of `generated`: far more
# than what another order of summation changes.
MARGIN = 0.05


@dataclass(frozen=True)
class Case:
    """A model's config, how it is saved, and its embedding's standard deviation."""

    seed: int
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    max_shard_size: int | str = "1GB"
    embedding: float = 0.3


def config(model_type: str, heads: int, kv_heads: int, **fields: Any) -> dict[str, Any]:
    """Small sizes; no token is special, so that none is masked or ends a text."""
    return {
        "model_type": model_type,
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **fields,
    }


QWEN3_NEXT: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    # What the first tokens read of a state may be next to nothing: with a small epsilon
    # it is as large as the rest, and its rounding too.
    "rms_norm_eps": 1e-3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
    },
}
# Bases are small, so that 24 positions turn also the slowest pairs a good way.
CASES = {
    # Wavelengths 6.3, 19.9, 62.8 and 199: one under 16 / 2 stays as it is, one is
    # between, two over 16 / 0.4 are scaled.
    "llama": Case(
        seed=105,
        config=config(
            "llama",
            heads=6,
            kv_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 0.4,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 16,
            },
        ),
        max_shard_size=18_000,
    ),
    "llama_biases": Case(
        seed=224,
        config=config(
            "llama",
            heads=6,
            kv_heads=3,
            max_position_embeddings=64,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "linear",
                "rope_theta": 100.0,
                "factor": 4.0,
            },
        ),
    ),
    "llama2": Case(
        seed=324,
        config=config(
            "llama",
            heads=4,
            kv_heads=4,
            hidden_size=32,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "mistral": Case(
        seed=403,
        config=config(
            "mistral",
            heads=6,
            kv_heads=2,
            head_dim=8,
            max_position_embeddings=16,
            sliding_window=8,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 100.0,
                "factor": 2.0,
            },
        ),
        dtype=torch.float16,
    ),
    "qwen2": Case(
        seed=506,
        config=config(
            "qwen2",
            heads=4,
            kv_heads=2,
            hidden_size=32,
            num_hidden_layers=3,
            max_position_embeddings=64,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "attention_factor": 1.25,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "qwen3": Case(
        seed=622,
        config=config(
            "qwen3",
            heads=6,
            kv_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
    ),
    "gemma3": Case(
        seed=705,
        config=config(
            "gemma3_text",
            heads=4,
            kv_heads=2,
            head_dim=8,
            num_hidden_layers=3,
            max_position_embeddings=128,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            sliding_window=8,
            query_pre_attn_scalar=12,
            tie_word_embeddings=True,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 200.0,
                    "factor": 4.0,
                },
            },
        ),
        # Tied and scaled by sqrt(D): larger, every token would be followed by itself.
        embedding=0.15,
    ),
    "gpt2": Case(
        seed=809,
        config={
            "model_type": "gpt2",
            "vocab_size": 48,
            "n_positions": 32,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 6,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": True,
        },
        dtype=torch.float32,
    ),
    "phi3": Case(
        seed=900,
        config=config(
            "phi3",
            heads=4,
            kv_heads=2,
            hidden_size=32,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            tie_word_embeddings=False,
            partial_rotary_factor=0.5,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.25, 3.0],
            },
        ),
    ),
    # The ramp goes from pair 1 to pair 4 of 8.
    "yarn_llama": Case(
        seed=1000,
        config=config(
            "llama",
            heads=4,
            kv_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 1.0,
                "beta_slow": 0.1,
                "mscale": 1.5,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    # One key head serves three heads of values; half of a head of queries is turned.
    "qwen3_next": Case(
        seed=1105,
        config=config(
            "qwen3_next",
            **QWEN3_NEXT,
            num_hidden_layers=4,
            num_experts=0,
            linear_num_value_heads=6,
            linear_num_key_heads=2,
        ),
    ),
    "qwen3_5": Case(
        seed=1201,
        config=config(
            "qwen3_5_text",
            **QWEN3_NEXT,
            num_hidden_layers=3,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    # The ramp goes from 0.14 to 2.15; truncated, from 0 to 3.
    "gpt_oss": Case(
        seed=11,
        config=config(
            "gpt_oss",
            heads=6,
            kv_heads=2,
            head_dim=8,
            intermediate_size=8,
            num_local_experts=2,
            num_experts_per_tok=2,
            max_position_embeddings=8192,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 256,
            },
        ),
    ),
}


def write(name: str, case: Case) -> None:
    """The folder of a case, in place of an older one."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(case.seed)
    save(folder, case, rng)
    expected = attention if name == "gpt_oss" else whole_model
    arrays = expected(folder, rng)
    gradients = {key for key in arrays if key.startswith("grad/")}
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert all(arrays[key].any() for key in gradients), "a gradient of zeros"
    names = saved_names(folder)
    if name == "gpt_oss":
        names = {key for key in names if ".self_attn." in key}
    assert gradients == {f"grad/{key}" for key in names}
    np.savez_compressed(folder / "expected.npz", **arrays)


def save(folder: Path, case: Case, rng: np.random.Generator) -> None:
    """A model that is random everywhere: norms, biases and sinks too."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(parameter.shape, np.float32))
            if name.endswith("A_log"):
                # Drawn, up to log 16: sums of such decays round to 1e-5 of a state.
                parameter.copy_(0.5 * noise - 1.5)
            elif parameter.ndim == 1:
                # Around 0 or 1, as it was made (sinks: a little off 0).
                parameter.copy_(parameter.round() + 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(case.embedding * noise)
            else:
                parameter.copy_(0.3 * noise)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["dtype"] == str(case.dtype).removeprefix("torch.")


def saved_names(folder: Path) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            names |= set(tensors.keys())
    return names


def load(folder: Path) -> PreTrainedModel:
    """A model of its own, since a rope's frequencies may hang on earlier calls."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def whole_model(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logits, loss, gradients and a greedy continuation."""
    model = load(folder)
    size = model.config.vocab_size
    tokens = rng.integers(0, size, (2, T))
    ids = torch.from_numpy(tokens)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    loss = cross_entropy(logits[:, :-1].reshape(-1, size), ids[:, 1:].reshape(-1))
    loss.backward()
    return {
        "tokens": tokens.astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **gradients_of(model, ""),
        "generated": generate(folder, ids[:, :PROMPT]),
    }


def gradients_of(model: PreTrainedModel, part: str) -> dict[str, np.ndarray]:
    """Of the parameters with `part` in their names, by these names."""
    return {
        f"grad/{name}": parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if part in name
    }


def generate(folder: Path, prompt: torch.Tensor) -> np.ndarray:
    """The likeliest tokens, each clearly so."""
    out = load(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        use_cache=True,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for logits in out.logits:
        first, second = logits.topk(2).values.T
        assert (first - second).min() > MARGIN, "too close: take another seed"
    return out.sequences[:, PROMPT:].numpy().astype(np.int32)


def attention(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Outputs and gradients of each layer's attention alone."""
    model = load(folder)
    width = model.config.hidden_size
    x, w = (rng.standard_normal((2, T, width), np.float32) for _ in range(2))
    inputs = torch.from_numpy(x)
    angles = model.model.rotary_emb(inputs, torch.arange(T)[None])
    make_mask = {
        "sliding_attention": create_sliding_window_causal_mask,
        "full_attention": create_causal_mask,
    }
    arrays = {"x": x, "w": w}
    for i, layer in enumerate(model.model.layers):
        mask = make_mask[model.config.layer_types[i]](
            config=model.config, inputs_embeds=inputs, attention_mask=None, cache=None
        )
        own = inputs.clone().requires_grad_()
        out, _ = layer.self_attn(own, position_embeddings=angles, attention_mask=mask)
        (out * torch.from_numpy(w)).sum().backward()
        arrays[f"attention.{i}"] = out.detach().numpy()
        arrays[f"grad_x.{i}"] = own.grad.numpy()
    return arrays | gradients_of(model, ".self_attn.")


def print_sizes(names: list[str]) -> None:
    total = 0
    print(f"{'case':14}{'safetensors':>12}{'expected':>10}{'all':>10}  loss, generated")
    for name in names:
        files = {path: path.stat().st_size for path in (FIXTURES / name).iterdir()}
        weights = sum(n for path, n in files.items() if path.suffix == ".safetensors")
        path = FIXTURES / name / "expected.npz"
        arrays = np.load(path)
        says = ""
        if "loss" in arrays:
            says = f"{arrays['loss']:.4f}, {arrays['generated'].tolist()}"
        print(f"{name:14}{weights:12}{files[path]:10}{sum(files.values()):10}  {says}")
        total += sum(files.values())
    print(f"{'together':36}{total:10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help="all, if none")
    names = parser.parse_args().cases or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no case {sorted(unknown)}, only {', '.join(CASES)}")
    torch.set_num_threads(2)
    disable_progress_bar()
    torch.manual_seed(0)
    for name in names:
        write(name, CASES[name])
    print_sizes(names)


if __name__ == "__main__":
    main()
