"""A run on real text at 32,768 tokens: every part of the memory stack switched on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
    --quiet --run.simulated-cpu-devices 8 --model.num-layers 2 --model.width 64
    --model.num-heads 16 --model.num-kv-heads 8 --training.num-steps 3
    --training.batch-size 1 --training.sequence-tokens 32768
    --training.validation-batches 0 --mesh.data 1 --mesh.seq 8
""".split()
EVERY_PART = """
    --memory.remat attention --memory.offload inputs attention keys optimizer parameters
    --memory.offload-fraction 0.5 --memory.loss-tile-tokens 512
    --memory.mlp-tile-tokens 256 --memory.sequence-chunk-tokens 512
    --memory.head-chunks 2
""".split()
# The process prints its own peak: children of a test runner share one figure.
MAIN = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("PEAK_KB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def train(folder, *options):
    """Losses of the steps, and the process's peak resident memory in bytes."""
    command = [sys.executable, "-c", MAIN, "train.py", "--config", "configs/tiny.yaml"]
    arguments = [*RUN, "--run.folder", str(folder), *options]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    return losses, int(done.stdout.split("PEAK_KB")[1]) * 1024


@pytest.mark.slow
def test_every_part_at_32768_tokens(tmp_path):
    losses, peak_bytes = train(tmp_path / "parts", *EVERY_PART)
    plain, _ = train(tmp_path / "plain", "--memory.remat", "none")
    assert len(losses) == 3
    assert losses == pytest.approx(plain, rel=1e-5)
    assert peak_bytes < 6e9
