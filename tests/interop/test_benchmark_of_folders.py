"""benchmarks/interop.py at a tenth: a model needs room for itself and little more."""

import pytest
from files import module_of


@pytest.mark.slow
def test_memory(monkeypatch, capsys):
    benchmark = module_of("benchmarks/interop.py")
    monkeypatch.setattr(benchmark, "WIDTH", 512)
    monkeypatch.setattr(benchmark, "VOCABULARY", 4000)
    rows = benchmark.rows(0.1)
    for row in rows:
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert 0.09e9 < row["file_bytes"] < 0.11e9
        if row["what"] == "interop":
            parameters = row["file_bytes"] * 4 / size
            # Besides the parameters: a stack of them, and what JAX compiles.
            more = row["peak_bytes"] - row["start_bytes"] - parameters
            assert more < 0.35 * parameters + 60e6, row
    benchmark.print_table(rows)
    assert "safetensors" in capsys.readouterr().out
