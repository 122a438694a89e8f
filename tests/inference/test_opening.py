"""The shape of a batch on a mesh, and files that are whole or not there."""

import dataclasses

import pytest

from ulysses_jax import Model, make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Rope
from ulysses_jax.inference import opening
from ulysses_jax.inference.opening import batch_shape, write_whole

MODEL = complete_model(Model(num_heads=8, width=32))


def test_a_batch_is_rounded_up_to_the_mesh():
    mesh = make_mesh(data=2, ring=2, seq=2)
    assert batch_shape(MODEL, 37, 3, mesh) == (4, 40)
    assert batch_shape(MODEL, 40, 4, mesh) == (4, 40)
    learned = dataclasses.replace(MODEL, positions="learned", max_positions=37)
    assert batch_shape(learned, 37, 1, mesh) == (2, 40)
    with pytest.raises(ValueError, match="rows of 38 .* table of 37 .*: use 37 or"):
        batch_shape(learned, 38, 1, mesh)
    rope = Rope(scaling="dynamic", factor=2.0, original_tokens=16)
    by_length = dataclasses.replace(MODEL, rope=rope)
    assert batch_shape(by_length, 40, 1, mesh) == (2, 40)
    with pytest.raises(ValueError, match="become 40 .* use rows of 40"):
        batch_shape(by_length, 37, 1, mesh)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"1")

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(opening.os, "replace", fails)
    with pytest.raises(OSError):
        write_whole(path, b"2")
    assert path.read_bytes() == b"1" and list(tmp_path.iterdir()) == [path]
