"""Stages: read from one file, run by one command, each from the one before."""

import os
import re
import signal

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from ulysses_jax import train
from ulysses_jax.config_file import load, load_stages
from ulysses_jax.training import load_run, train_stages
from ulysses_jax.training.metrics import RunLog, read_rows

CONFIG = {
    "run": {"simulated_cpu_devices": 8, "seed": 3},
    "model": {
        "vocab_size": 264,
        "width": 16,
        "num_layers": 1,
        "num_heads": 4,
        "rope": {"base": 1e4},
        "compute_dtype": "float32",
    },
    "training": {
        "num_steps": 2,
        "batch_size": 4,
        "sequence_tokens": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "validation_batches": 0,
    },
    "mesh": {"fsdp": 2, "seq": 4},
    "quiet": True,
    "stages": [
        {"training": {"num_steps": 3}},
        {
            "model": {"rope": {"base": 1e6}},
            "training": {
                "sequence_tokens": 32,
                "learning_rate": 0,
                "final_learning_rate": 0,
                "weight_decay": 0,
            },
            "mesh": {"fsdp": 1, "seq": 8},
        },
    ],
}


def written(folder, **changes):
    (folder / "text.txt").write_text("abc def\n" * 90)
    data = {"files": str(folder / "text.txt"), "validation_fraction": 0.1}
    values = CONFIG | {"data": data} | changes
    values["run"] = {"folder": str(folder / "run")} | values["run"]
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_stage_says_what_is_other(tmp_path):
    path = written(tmp_path)
    first, second = load_stages(path, ["--training.batch-size", "8"])
    assert first.training.num_steps == 3 and second.training.num_steps == 2
    assert [each.training.sequence_tokens for each in (first, second)] == [16, 32]
    assert [each.model.rope.base for each in (first, second)] == [1e4, 1e6]
    assert [each.training.batch_size for each in (first, second)] == [8, 8]
    assert first.model.num_heads == second.model.num_heads == 4
    assert [each.run.seed for each in (first, second)] == [3, 4]
    runs = f"{tmp_path}/run/stage_1", f"{tmp_path}/run/stage_2"
    assert (first.run.folder, second.run.folder) == runs
    assert (first.run.after, second.run.after) == (None, runs[0])


def test_one_command_goes_through_all_stages(tmp_path, monkeypatch, capfd):
    path = written(tmp_path)
    folders = tmp_path / "run/stage_1", tmp_path / "run/stage_2"
    argv = ["--config", str(path)]
    log_step = RunLog.log_step

    def tell(self, step, *args, **numbers):
        if step == 2:  # the last step is under way then
            os.kill(os.getpid(), signal.SIGTERM)
        log_step(self, step, *args, **numbers)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "log_step", tell)
        with pytest.raises(SystemExit) as stopped:
            train.main(argv, interrupted=lambda: None)
    assert stopped.value.code == 130
    assert not folders[1].exists()  # told to stop: no second stage
    with pytest.raises(ValueError, match=f"no run.s folder: .*: give {folders[0]}"):
        load_run(tmp_path / "run")
    first = nnx.to_pure_dict(nnx.state(load_run(folders[0])))
    rows = read_rows(folders[0] / "metrics.jsonl")

    capfd.readouterr()
    train.main(argv)
    said = capfd.readouterr().out
    assert "stage 2 of 2" in said
    assert f"starting after step 3 of {folders[0]}" in said
    assert "model.rope.base was 10000.0, is 1000000.0" in said
    assert (
        said.count("compiled the step") == 1
        and read_rows(folders[0] / "metrics.jsonl") == rows
    )
    second = nnx.to_pure_dict(nnx.state(load_run(folders[1])))
    jax.tree.map(np.testing.assert_array_equal, second, first)  # its rate is 0
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--training.num-steps", "5"])
    assert stopped.value.code == 2
    want = "stage 1 of 2 has training.num_steps 5, and stage 2 has begun from its step"
    assert f"{want} 3: set it to 3 in the file" in capfd.readouterr().err
    assert read_rows(folders[0] / "metrics.jsonl") == rows
    config = load(folders[1] / "config.yaml")
    assert config.run.after == str(folders[0]) and config.mesh.seq == 8


@pytest.mark.slow
def test_memory_auto_is_chosen_for_each_stage(tmp_path, monkeypatch, capfd):
    """As if the second one's longer rows had no room for all that could be kept."""

    def kept(config):
        is_too_much = config.memory.remat == "none" and config.padded_tokens() == 32
        return (2**60 if is_too_much else 0), 0

    monkeypatch.setattr("ulysses_jax.memory.auto.kept_bytes", kept)
    first, second = ({"num_steps": 1, "sequence_tokens": t} for t in (16, 32))
    stages = [{"training": first}, {"training": second}]
    train_stages(load_stages(written(tmp_path, stages=stages, memory="auto")))
    one, two = capfd.readouterr().out.split("stage 2 of 2")
    assert one.count("memory auto:") == 1 and "memory remat none" in one
    assert two.count("memory auto:") == 2 and "memory remat products" in two
    folders = tmp_path / "run/stage_1", tmp_path / "run/stage_2"
    chosen = [load(each / "config.yaml").memory for each in folders]
    assert [each.remat for each in chosen] == ["none", "products"]
    assert not any(each.auto for each in chosen)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": []}, "stages is a list of sections"),
        ({"stages": [{}, 3]}, "stage 2 is a section of sections"),
        (
            {"stages": [{}, {"training": {"steps": 3}}]},
            "stage 2 of 2: .*unknown field 'training.steps'",
        ),
        (
            {"stages": [{}, {"mesh": {"tensor": 8, "fsdp": 1, "seq": 1}}]},
            "stage 2 of 2: model.num_heads 4 does not divide over mesh.tensor 8",
        ),
        (
            {
                "stages": [
                    {},
                    {
                        "training": {"sequence_tokens": 100},
                        "memory": {"sequence_chunk_tokens": 16},
                    },
                ]
            },
            "stage 2 of 2: memory.sequence_chunk_tokens 16 does not divide the 25",
        ),
        (
            {"run": {"after": "BEFORE"}, "stages": None},
            "run.after .*BEFORE has no check.*: give a stage of it, .*BEFORE/stage_2",
        ),
        (
            {"run": {"after": "nowhere"}, "stages": None},
            "run.after nowhere has no checkpoint to start from",
        ),
    ],
)
def test_refused_before_the_first_stage_starts(
    tmp_path, capfd, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        stage = tmp_path / "BEFORE" / f"stage_{number}"
        stage.mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl"):
            (stage / name).write_text("")
    path = written(tmp_path, **changes)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(path)])
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert re.search(message, said), said
    assert not list((tmp_path / "run").rglob("checkpoints"))


def test_a_program_for_one_run_names_the_others(tmp_path):
    with pytest.raises(ValueError, match="has 2 stages, each a run: .*load_stages"):
        load(written(tmp_path))
