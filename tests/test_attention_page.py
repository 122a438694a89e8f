"""docs/attention.md: its own blocks, one after another, and what they make."""

import re

import jax
import numpy as np
import pytest
from files import ROOT

from ulysses_jax import make_mesh, ulysses_attention
from ulysses_jax.models.kinds import KINDS
from ulysses_jax.training.metrics import read_rows

ONE = make_mesh(devices=jax.devices()[:1])


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    """An attention of one's own and two kinds, trained under seq=8."""
    monkeypatch.setattr("ulysses_jax.models.kinds.KINDS", dict(KINDS))
    page = (ROOT / "docs" / "attention.md").read_text()
    own, kinds, trained = re.findall(r"```python\n(.*?)```", page, re.S)
    # As the headings say, without what is imported and called.
    assert len(own[own.index("def ") : own.index("\n\n\nq =")].splitlines()) <= 20
    assert len(kinds[kinds.index("def ") :].strip().splitlines()) <= 40
    here = 'jax.config.update("jax_num_cpu_devices", 8)'
    own, names = own.replace(here, ""), {}
    exec(own + kinds, names)
    q, capped = names["q"], names["capped"]
    alone = ulysses_attention(q, q, q, attention=capped, mesh=ONE)
    np.testing.assert_allclose(names["out"], alone, atol=1e-6)
    soft = ulysses_attention(q * 9, q * 9, q, mesh=ONE)
    held = ulysses_attention(q * 9, q * 9, q, attention=capped, mesh=ONE)
    assert np.abs(np.asarray(soft) - held).max() > 0.1
    folder = tmp_path / "run"
    exec(trained.replace("runs/own_kinds", str(folder)), names)
    rows = read_rows(folder / "metrics.jsonl")
    assert len(rows) == 20 and rows[-1]["loss"] < rows[0]["loss"] - 1
    decay = np.asarray(names["model"].layers[0].attention.decay[...])
    assert decay.shape == (2, 4) and (decay[0] != decay[1]).any()  # it learns
