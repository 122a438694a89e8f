"""Every config here trains: its first steps, all that makes it large made small."""

from pathlib import Path

import pytest
from files import ROOT

from ulysses_jax.config_file import load_stages
from ulysses_jax.training import train_stages
from ulysses_jax.training.metrics import read_rows

SMALL = (
    "--run.simulated-cpu-devices 8 --model.width 32 --model.vocab-size 320 "
    "--model.num-heads 8 --model.num-kv-heads 4 --model.head-size 4 "
    "--model.feed-forward-width 48 --training.num-steps 2 --training.batch-size 8 "
    "--training.sequence-tokens 128 --training.validation-batches 1 "
    "--data.files tests/data/*.py --memory.loss-tile-tokens 64 --memory.no-auto --quiet"
).split()
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}


# Adapters need a folder to begin with: `interop/test_adapters.py` makes one for theirs.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"llama3_8b_lora"}))
def test_first_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *_ = load_stages(CONFIGS[name])
    layers = len(first.model.pattern or ("full",))
    small = [*SMALL, f"--run.folder={tmp_path}", f"--model.num-layers={layers}"]
    if first.model.window:
        small.append("--model.window=24")
    if first.memory.sequence_chunk_tokens:
        small.append("--memory.sequence-chunk-tokens=8")
    stages = load_stages(CONFIGS[name], small)
    train_stages(stages)
    for config in stages:
        rows = read_rows(Path(config.run.folder or "") / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
