"""Adapters of the fixtures' models, each with what PEFT says of it.

The tests read the folders in `peft` and need neither torch nor PEFT. This script wrote
them, with peft 0.21.2 beside what `make_fixtures.py` names:

    python tests/interop/make_peft_fixtures.py

A folder has the adapter_config.json and the adapter_model.safetensors of PEFT's own
`save_pretrained`, random A and B; its expected.npz has tokens int32 [2, T] and float32
logits [2, T, V] of the model with them, computed in float32.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

HERE = Path(__file__).parent
T = 24
CASES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    + ["down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


def main() -> None:
    for case, modules in CASES.items():
        rng = np.random.default_rng(0)
        base = AutoModelForCausalLM.from_pretrained(
            HERE / "fixtures" / case, dtype=torch.float32, attn_implementation="eager"
        )
        config = LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=modules,
            task_type="CAUSAL_LM",
            fan_in_fan_out=case == "gpt2",
        )
        model = get_peft_model(base.eval(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    noise = rng.standard_normal(parameter.shape, np.float32)
                    parameter.copy_(torch.from_numpy(0.2 * noise))
        folder = HERE / "peft" / case
        model.peft_config["default"].base_model_name_or_path = case
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        tokens = rng.integers(0, base.config.vocab_size, (2, T))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens)).logits
        np.savez(folder / "expected.npz", tokens=tokens.astype(np.int32), logits=logits)


if __name__ == "__main__":
    main()
