"""Two processes meet numbers that go wrong: both skip, and go back, at one step."""

import json

import numpy as np
import pytest
import yaml
from pod_cases import CONFIG, Pod

from ulysses_jax.training.metrics import read_rows

pytestmark = pytest.mark.slow

EVENTS = {"skipped", "spike", "rolled_back", "rows"}

# A letter whose embedding is infinite, as the run begins; and a short memory.
BROKEN = """
import dataclasses, numpy as np
from ulysses_jax.training import run, spikes
spikes._LOSSES = 8
first = run.first_state
def first_state(*args):
    state = first(*args)
    table = state.parameters["embedding"]
    def part(index):
        values = np.full(table.shape, 0.0, np.float32)
        values[90] = np.inf
        return values[index]
    broken = jax.make_array_from_callback(table.shape, table.sharding, part)
    added = jax.jit(lambda a, b: a + b)(table, broken)
    parameters = state.parameters | dict(embedding=added)
    return dataclasses.replace(state, parameters=parameters)
run.first_state = first_state
time.sleep = lambda seconds, sleep=time.sleep: sleep(seconds * (seconds != 0.25))
"""


def test_skipped_and_gone_back_from(tmp_path):
    """Alike on both, and as one process of four devices does it."""
    noise = np.random.default_rng(0).integers(ord("i"), ord("z"), 64, dtype=np.uint8)
    known = b"abcdefgh" * 700
    text = known[:900] + b"Z" + known[:3200] + bytes(noise) + known[3200:]
    (tmp_path / "text.txt").write_bytes(text)
    config = CONFIG | {
        "data": {"files": str(tmp_path / "text.txt"), "validation_fraction": 0.0},
        "training": CONFIG["training"]
        | {
            "num_steps": 60,
            "checkpoint_interval_steps": 8,
            "learning_rate": 2e-2,
            "warmup_steps": 2,
            "skipped_steps": 1,
            "spike_nats": 1.0,
        },
    }
    found = {}
    for num, devices in ((2, 2), (1, 4)):
        path = tmp_path / f"{num}.yaml"
        config["run"] = {"simulated_cpu_devices": devices}
        path.write_text(yaml.safe_dump(config))
        folder = tmp_path / f"of_{num}"
        with Pod(path, folder, num, prelude=BROKEN) as pod:
            assert pod.ended(*range(num), seconds=300)[0] == [0] * num, pod.said(0)
        lines = (folder / "events.jsonl").read_text().splitlines()
        found[num] = [
            [event.get(name) for name in ("event", "step", "to_step", "rows")]
            for event in map(json.loads, lines)
            if event["event"] in EVENTS
        ]
        saves = {
            kind: [e["step"] for e in map(json.loads, lines) if e["event"] == kind]
            for kind in ("saved", "committed")
        }
        assert saves["saved"] == saves["committed"] == sorted({*saves["saved"]})
        assert saves["saved"][-1] == 60
        rows = read_rows(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 61))
    assert {event[0] for event in found[2]} == EVENTS
    assert found[2] == found[1]
