"""Planned beside measured, on 8 simulated CPU devices."""

import dataclasses
import json

import numpy as np
import pytest

from ulysses_jax.config_file import load
from ulysses_jax.costs.pairs import Pairs
from ulysses_jax.plan import __main__ as command
from ulysses_jax.plan import check as check_module
from ulysses_jax.plan.__main__ import main
from ulysses_jax.plan.check import check, documents


def row(found, what):
    (found,) = [each for each in found["rows"] if each["what"] == what]
    return found


SMALL = "--training.sequence-tokens 64 --model.compute-dtype float32".split()


@pytest.mark.slow
def test_bytes_planned_are_bytes_measured(config_file):
    """Arrays cut over tensor, over seq, over both, and not at all."""
    overrides = "--mesh.fsdp 1 --mesh.seq 4 --mesh.tensor 2 --data.mask-documents "
    overrides += "--model.positions learned --model.norm layer"
    config = load(config_file, [*SMALL, *overrides.split()])
    found = check(config, num_steps=1)
    held = row(found, "state and batch on a device")
    assert held["planned"] == held["measured"] > 0
    assert held["unit"] == "bytes"


def test_the_command(config_file, tmp_path, capsys):
    file = tmp_path / "check.json"
    args = ["--config", str(config_file), "--check", "--json", str(file), *SMALL]
    main(args)  # no SystemExit: exit code 0
    out, err = capsys.readouterr()
    found = json.loads(file.read_text())
    assert found["device"] == "cpu: cpu" and found["num_devices"] == 8
    assert found["plan"]["traffic"] and found["plan"]["memory"]["device_bytes"] > 0
    held = row(found, "state and batch on a device")
    assert held["planned"] == held["measured"]
    # The process holds the programs too: its growth is shown, not equal.
    growth = row(found, "growth of the process, a device")
    assert growth["planned"] == found["plan"]["memory"]["device_bytes"]
    assert growth["measured"] >= 0
    step = row(found, "a step")
    assert step["planned"] is None and 0 < step["measured"] < 60
    assert "Planned and measured on 8 x cpu" in out
    assert "state and batch on a device" in out and "1.000" in out
    assert "all-to-all over seq" in out


def test_bytes_too_far_apart_end_the_command(config_file, monkeypatch, capsys):
    rows = [
        check_module.bytes_row("high-water mark of a device", 1000, measured)
        for measured in (0, 900, 1100, 899, 1101)
    ]
    assert ["why" in row for row in rows] == [False] * 3 + [True] * 2
    assert "why" not in check_module.bytes_row("growth", 1000, 9000, None)
    monkeypatch.setattr(command, "check", lambda config: {"rows": rows})
    monkeypatch.setattr(command, "print_check", lambda found, console: None)
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(config_file), "--check", *SMALL])
    assert str(caught.value).splitlines()[1:] == [
        "python -m ulysses_jax.plan: high-water mark of a device: planned 1,000 bytes, "
        "measured 1,101, more than 10% apart"
    ]


@pytest.mark.slow
def test_a_wrong_plan_is_seen(config_file, monkeypatch, capsys):
    """XLA's bytes off by one float32 of each of the model's columns."""
    compile_on = check_module.compile_on

    def wrong(config, mesh):
        program = compile_on(config, mesh)
        size = program.stats["argument_size"] + 4 * config.model.width
        return dataclasses.replace(
            program, stats=program.stats | {"argument_size": size}
        )

    monkeypatch.setattr(check_module, "compile_on", wrong)
    held = row(
        check(load(config_file, SMALL), num_steps=1), "state and batch on a device"
    )
    assert held["planned"] - held["measured"] == 4 * 128


def test_the_high_water_mark_of_a_gpu(monkeypatch):
    """Devices that tell it are asked; those that cannot say 0, not nothing."""

    class Gpu:
        platform = "gpu"

        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    class Devices:
        def __init__(self, device):
            self.flat = [device]

    class Mesh:
        def __init__(self, stats):
            self.devices = Devices(Gpu(stats))

    mark = check_module._high_water
    assert mark(Mesh({"peak_bytes_in_use": 7, "bytes_in_use": 3})) == 7  # pyright: ignore
    assert mark(Mesh(None)) == 0  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--mesh.fsdp", "3"), "there are 8"),
        (("--training.batch-size", "3"), "use a batch_size of 4"),
    ],
)
def test_refusals(config_file, tmp_path, capsys, overrides, message):
    file = tmp_path / "check.json"
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(config_file), "--check", "--json", str(file), *overrides])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and not file.exists()


@pytest.mark.parametrize("tokens, mean", [(32_768, 4096), (131_072, 1024), (64, 4096)])
def test_documents_are_as_many_pairs_as_the_plan_counts(tokens, mean):
    segments, positions = documents(tokens, mean)
    starts = np.flatnonzero(positions == 0)
    assert starts[0] == 0 and len(starts) == max(round(tokens / mean), 1)
    assert (np.flatnonzero(np.diff(segments)) + 1 == starts[1:]).all()
    planned = Pairs((None,), mean).visible(tokens)
    assert positions.sum(dtype=float) == pytest.approx(planned, rel=0.1)


def test_a_row_is_one_document_where_none_are_said():
    segments, positions = documents(64, None)
    assert not segments.any() and (positions == np.arange(64)).all()
