"""The folders that `make_peft_fixtures.py` wrote, and our models with them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from folders import FIXTURES
from safetensors.numpy import load_file

from ulysses_jax.config import Lora
from ulysses_jax.interop import from_pretrained
from ulysses_jax.models.transformer import Transformer

PEFT = Path(__file__).parent / "peft"
# Where our projections are in a layer of theirs.
NAMES = {
    "llama": {
        "attention": {x: f"self_attn.{x}_proj" for x in "qkv"}
        | {"out": "self_attn.o_proj"},
        "feed_forward": {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
    "gpt2": {
        "attention": {"out": "attn.c_proj"},
        "feed_forward": {"up": "mlp.c_fc", "down": "mlp.c_proj"},
    },
}
LAYER = {
    "llama": "base_model.model.model.layers",
    "gpt2": "base_model.model.transformer.h",
}


def adapters_of(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def with_adapters(case):
    """Float32; A and B as PEFT's file has them."""
    base = from_pretrained(FIXTURES / case, compute_dtype="float32")
    names, tensors = NAMES[case], adapters_of(PEFT / case)
    targets = tuple(name for part in names.values() for name in part)
    lora = Lora(rank=2, alpha=6.0, targets=targets)
    model = Transformer(dataclasses.replace(base.model, lora=lora), rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(base))
    (stack,) = model.layers
    for part, projections in names.items():
        for name, theirs in projections.items():
            adapter = getattr(getattr(stack, part), f"{name}_adapter")
            for side, variable in (("A", adapter.a), ("B", adapter.b)):
                values = [
                    tensors[f"{LAYER[case]}.{i}.{theirs}.lora_{side}.weight"].T
                    for i in range(base.model.num_layers)
                ]
                values = np.stack(values).reshape(variable.shape)
                variable.set_value(jnp.asarray(values))
    return model
