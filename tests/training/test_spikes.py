"""A spike of the loss: back to a checkpoint, on past the batch, and never for ever."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from shared_programs import shared_programs as shared_programs

from ulysses_jax.config import Config, Data, Lora, Memory, Mesh, Model, Run, Training
from ulysses_jax.interop import save_pretrained
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training import loop, run, spikes, train
from ulysses_jax.training.metrics import read_rows
from ulysses_jax.training.proof import COMMIT_FILE, read_commit, write_commit
from ulysses_jax.training.spikes import Spikes
from ulysses_jax.training.state import first_state

pytestmark = pytest.mark.usefixtures("shared_programs")

CONFIG = Config(
    model=Model(vocab_size=264, width=32, num_layers=1, num_heads=4),
    training=Training(
        num_steps=40,
        batch_size=4,
        sequence_tokens=64,
        learning_rate=2e-2,
        warmup_steps=2,
        validation_batches=0,
        checkpoint_interval_steps=8,
        keep_checkpoints=99,
        spike_nats=1.5,
    ),
    mesh=Mesh(fsdp=2, seq=4),
    quiet=True,
)


def test_a_spike_is_above_the_median_of_those_before(monkeypatch):
    monkeypatch.setattr(spikes, "_LOSSES", 4)
    seen = Spikes(0.5, {})
    for step, loss in enumerate([9.0, 2.0, 3.0, 2.0, 3.0, 2.0], 1):
        seen.see(step, loss)  # the first four are held to nothing
        assert seen.take() is None
    seen.see(7, None)
    assert seen.meta() == {"recent_losses": [3.0, 2.0, 3.0, 2.0]}
    seen.see(8, 3.0)  # not above 2.5 + 0.5
    assert seen.take() is None
    seen.see(9, 3.0)  # of 2, 3, 2, 3
    assert seen.take() is None
    seen.see(10, 3.51)  # of 3, 2, 3, 3
    assert seen.take() == (
        10,
        "the loss of step 10 is 3.5100, and the median of the 4 before it 3.0000",
    )
    assert seen.take() is None
    again = Spikes(0.5, seen.meta())
    again.see(11, 3.51)
    assert again.take() is not None
    assert Spikes(None, {}).meta() == {}


def test_not_for_ever():
    seen = Spikes(0.5, {})
    for _ in range(3):
        seen.went_back(8, {})
    seen.went_back(16, {"recent_losses": [2.0, 3.0]})
    assert seen.meta() == {"recent_losses": [2.0, 3.0]}
    for _ in range(2):
        seen.went_back(16, {})
    with pytest.raises(ValueError, match="4 spikes after the checkpoint of step 16"):
        seen.went_back(16, {})


def test_saved_right_after_the_way_back_it_counts_on():
    """The same state under another number: as at a spike in a step that is saved."""
    seen = Spikes(0.5, {})
    for step in (8, 16, 24):
        seen.went_back(step, {})
        seen.saved(step + 8)
    with pytest.raises(ValueError, match="4 spikes after the checkpoint of step 32"):
        seen.went_back(32, {})
    seen = Spikes(0.5, {})
    for step in (8, 16, 24, 32, 40):
        seen.went_back(step, {})
        seen.see(step + 4, 2.0)  # a step was taken: what is saved is another state
        seen.saved(step + 8)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Text that is soon known by heart, and 64 letters of noise."""
    folder = tmp_path_factory.mktemp("text")
    noise = np.random.default_rng(0).integers(ord("i"), 127, 64, dtype=np.uint8)
    known = b"abcdefgh" * 700
    (folder / "text.txt").write_bytes(known[:3200] + bytes(noise) + known[3200:])
    return dataclasses.replace(
        CONFIG, data=Data(files=str(folder / "text.txt"), validation_fraction=0.0)
    )


def in_folder(config, folder, **training):
    return dataclasses.replace(
        config,
        run=Run(folder=str(folder)),
        training=dataclasses.replace(config.training, **training),
    )


def losses(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl")}


def events(folder, *names):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] in names]


def as_if(folder, back, other, spike):
    """The state of a checkpoint as if it were the spike's, and no spike after it."""
    step = other / "checkpoints" / str(spike)
    shutil.copytree(folder / "checkpoints" / str(back), step)
    body = read_commit(step) | {"step": spike}
    (step / COMMIT_FILE).unlink()
    write_commit(step, body)


def test_back_to_a_checkpoint_and_on_past_the_batch(config, tmp_path, monkeypatch):
    """What follows is to the bit what a run from that state does with later batches."""
    monkeypatch.setattr(spikes, "_LOSSES", 8)
    folder = tmp_path / "run"
    train(in_folder(config, folder))
    went = events(folder, "rolled_back")
    assert went and [e["step"] for e in events(folder, "spike")] == [
        e["step"] for e in went
    ]
    rows = losses(folder)
    assert list(rows) == list(range(1, 41))
    spike, back = went[0]["step"], went[0]["to_step"]
    assert rows[spike] > np.median([rows[s] for s in range(spike - 8, spike)]) + 1.5
    assert back == (spike - 1) // 8 * 8
    told = [e["rows"] for e in events(folder, "rows") if e["step"] == spike]
    assert [len(rows) for rows in told] == [went[0]["num_rows"]] == [4 * (spike - back)]
    other = tmp_path / "other"
    as_if(folder, back, other, spike)
    train(in_folder(config, other))
    assert {s: x for s, x in rows.items() if s > spike} == losses(other)
    # Resumed before the spike, a run knows what was usual, and does the same.
    again = tmp_path / "again"
    shutil.copytree(
        folder / "checkpoints" / str(back), again / "checkpoints" / str(back)
    )
    train(in_folder(config, again))
    assert {s: x for s, x in rows.items() if s > back} == losses(again)
    assert [e["step"] for e in events(again, "rolled_back")] == [
        e["step"] for e in went
    ]


def test_spikes_at_steps_that_are_saved_end_the_run_too(config, tmp_path, monkeypatch):
    """Each saves the state that the run went back to, under its own number."""
    see = Spikes.see

    def spiking(self, step, loss):
        see(self, step, loss)
        if step > 8 and step % 8 == 0:
            self._found = step, "a spike"

    monkeypatch.setattr(Spikes, "see", spiking)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="4 spikes after the checkpoint of step 32"):
        train(in_folder(config, folder))
    went = [(e["step"], e["to_step"]) for e in events(folder, "rolled_back")]
    assert went == [(16, 8), (24, 16), (32, 24)]


def test_the_rows_passed_over_hold_the_batch(config, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "_LOSSES", 8)
    taken = {}
    batches = loop.training_batches

    def seen(*args, start_step):
        stream = batches(*args, start_step=start_step)
        for number, batch in enumerate(stream, start_step + 1):
            taken[number] = (np.asarray(batch["tokens"]) >= ord("i")).any()
            yield batch
        stream.close()

    monkeypatch.setattr(loop, "training_batches", seen)
    folder = tmp_path / "run"
    train(in_folder(config, folder))
    noisy = [step for step, has in taken.items() if has]
    assert {e["step"] for e in events(folder, "rolled_back")} <= set(noisy)


def test_without_a_checkpoint_it_goes_on(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spikes, "_LOSSES", 8)
    folder = tmp_path / "run"
    train(in_folder(config, folder, checkpoint_interval_steps=1000))
    assert events(folder, "spike") and not events(folder, "rolled_back")
    assert "there is no checkpoint to go back to" in capsys.readouterr().out
    assert list(losses(folder)) == list(range(1, 41))


ELSEWHERE = {
    "in the host": dict(memory=Memory(offload=("optimizer", "parameters"))),
    "frozen": dict(lora=Lora(rank=2, targets=("q", "up"))),
    "by length": dict(lengths=(16, 32, 64), curriculum="uniform"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_lies_elsewhere_comes_back_too(tmp_path, monkeypatch, name):
    """As above: parameters in the host, those that no checkpoint has, and a state that
    the steps before have left as another length's split has it."""
    changed, model = dict(ELSEWHERE[name]), CONFIG.model
    memory, lora = changed.pop("memory", Memory()), changed.pop("lora", None)
    monkeypatch.setattr(run, "first_state", first_state)  # which reads the base
    if lora:
        base = tmp_path / "base"
        save_pretrained(Transformer(model, rngs=nnx.Rngs(0)), base, max_tokens=64)
        model = dataclasses.replace(model, from_=str(base), lora=lora)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("one two three " * (4 + number))
    data = Data(
        files=str(text),
        validation_fraction=0.0,
        **changed,
    )
    config = dataclasses.replace(CONFIG, model=model, data=data, memory=memory)
    training = dict(num_steps=12, checkpoint_interval_steps=3, spike_nats=None)

    def see(self, step, loss):
        if step == 5:
            self._found = step, "a spike"

    monkeypatch.setattr(Spikes, "see", see)
    folder, other = tmp_path / "run", tmp_path / "other"
    train(in_folder(config, folder, **training))
    (went,) = events(folder, "rolled_back")
    assert (went["step"], went["to_step"]) == (5, 3)
    as_if(folder, 3, other, 5)
    train(in_folder(config, other, **training))
    rows = losses(folder)
    assert list(rows) == list(range(1, 13))
    assert {s: x for s, x in rows.items() if s > 5} == losses(other)
