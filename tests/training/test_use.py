"""What rows say of the devices: model FLOPs over their peak, bytes that they held."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Model, Training
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.mesh import make_mesh
from ulysses_jax.models.kinds import KINDS
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training import use
from ulysses_jax.training.by_length import Split
from ulysses_jax.training.use import Use, peak_bytes_by_device

MODEL = Model(vocab_size=256, width=32, num_layers=2, num_heads=4)
CONFIG = complete(
    Config(model=MODEL, training=Training(batch_size=2, sequence_tokens=128)), name="x"
)


def of_tokens(tokens, model=CONFIG.model):
    training = dataclasses.replace(CONFIG.training, sequence_tokens=tokens)
    config = dataclasses.replace(CONFIG, model=model, training=training)
    return Split(config, make_mesh(seq=8))


@pytest.fixture
def gpus(monkeypatch):
    """Simulated devices that pass for H100s."""
    h100 = TARGETS["h100"]
    monkeypatch.setattr(use, "target_of", lambda device: h100)
    return h100


def test_flops_over_the_peak_of_all_devices(gpus):
    """Six FLOPs a weight and token, causal attention six T^2 N H more, by hand."""
    weights = 2 * (4 * 32 * 32 + 3 * 32 * CONFIG.model.feed_forward_width) + 32 * 256
    used = Use({tokens: of_tokens(tokens) for tokens in (64, 128)}, Transformer)
    for tokens in (64, 128):
        attention = 2 * 2 * 3 * 2 * tokens * tokens * 32
        flops = 6 * weights * 2 * tokens + attention
        expected = flops / 0.25 / 8 / gpus.bf16_flops_per_second
        row = used.row(0.25, tokens)
        assert row == {"mfu": pytest.approx(expected, rel=0.02)}
    assert used.row(0.25, None) == row


def test_nothing_is_said_where_nothing_is_known(gpus, monkeypatch):
    monkeypatch.setitem(KINDS, "mine", KINDS["full"])
    own = dataclasses.replace(CONFIG.model, pattern=("mine",))
    assert Use({128: of_tokens(128, own)}, Transformer).row(1.0, None) == {}
    monkeypatch.undo()
    assert Use({128: of_tokens(128)}, Transformer).row(1.0, None) == {}
    assert peak_bytes_by_device() is None


class Device:
    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self.peak}


def test_bytes_that_devices_held(monkeypatch):
    monkeypatch.setattr(use.jax, "local_devices", lambda: [Device(5), Device(7)])
    used = Use({128: of_tokens(128)}, Transformer)
    assert used.row(1.0, None) == {"device_peak_bytes": 7}
    assert peak_bytes_by_device() == [5, 7]


def test_of_all_processes_in_more_bits_than_an_array_of_jax_has(monkeypatch):
    def gathered(x, tiled):
        here = np.asarray(jnp.asarray(x))  # as JAX sends it
        return np.concatenate([here, here])

    held = [85_899_345_920, 2**31]
    monkeypatch.setattr(use.jax, "local_devices", lambda: [*map(Device, held)])
    monkeypatch.setattr(use.jax, "process_count", lambda: 2)
    monkeypatch.setattr(use.multihost_utils, "process_allgather", gathered)
    assert peak_bytes_by_device() == held * 2
