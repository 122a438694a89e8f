"""The folders that `make_fixtures.py` wrote, and copies to spoil."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
CASES = (
    "llama",
    "llama_biases",
    "llama2",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gpt2",
    "phi3",
    "yarn_llama",
)
OF_STATES = ("qwen3_next", "qwen3_5")
"""Those with layers of kind delta, of which `generate` has no cache."""


@functools.cache
def expected(case):
    with np.load(FIXTURES / case / "expected.npz") as file:
        return dict(file)


def tensors_of(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def copied(case, to, **config):
    """A folder like a case's, in one file, with other fields in its config.json."""
    folder = Path(to) / case
    folder.mkdir(parents=True)
    save_file(tensors_of(FIXTURES / case), folder / "model.safetensors")
    values = config_of(FIXTURES / case) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def copied_whole(case, to):
    return Path(shutil.copytree(FIXTURES / case, Path(to) / case))
