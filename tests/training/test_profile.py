"""A profile of steps N to M: what is in it, and what it refuses."""

import dataclasses
import gzip
import json

import pytest
from shared_programs import shared_programs as shared_programs

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.training import train

CONFIG = Config(
    model=Model(vocab_size=264, width=16, num_layers=1, num_heads=4),
    training=Training(
        num_steps=5, batch_size=2, sequence_tokens=64, validation_batches=0
    ),
    mesh=Mesh(fsdp=2, seq=4),
    quiet=True,
)


def test_the_trace_has_these_steps(tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 200)
    config = dataclasses.replace(
        CONFIG,
        run=Run(folder=str(tmp_path / "run")),
        data=Data(files=str(tmp_path / "text.txt"), validation_fraction=0.0),
        profile=(3, 4),
    )
    train(config)
    folder = tmp_path / "run" / "profile"
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    assert {int(step) for step in steps} == {3, 4}
    # What the devices did: an exchange before attention and one after it, at least.
    exchanges = [e for e in events if "all-to-all" in e.get("name", "")]
    assert len(exchanges) >= 2 * 2 * 2
    (xprof,) = folder.rglob("*.xplane.pb")
    assert xprof.stat().st_size > 10_000
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (said,) = [e for e in map(json.loads, lines) if e["event"] == "profiled"]
    assert said["step"] == 4 and said["folder"] == str(folder)


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (2, 6), (1, 2, 3)])
def test_what_is_no_range_of_steps(steps):
    with pytest.raises(ValueError, match="profile .* of 1 to training.num_steps 5"):
        complete(dataclasses.replace(CONFIG, profile=steps), name="x")
