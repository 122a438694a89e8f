"""The plan's command line: what it prints and writes, and every refusal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ulysses_jax.config_file import load, load_from_command_line
from ulysses_jax.costs.pairs import Pairs
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.placement import place
from ulysses_jax.plan.__main__ import PROGRAM, main, parse_bytes
from ulysses_jax.plan.compile import mesh_degrees
from ulysses_jax.plan.plan import matching_mesh

ROOT = Path(__file__).parents[2]
H100 = TARGETS["h100"]


@pytest.fixture
def refused(config_file, tmp_path, capfd):
    """Runs the command; asserts that it refuses as it should; returns the message."""

    def run(*args, lines=1):
        target = tmp_path / "plan.json"
        with pytest.raises(SystemExit) as caught:
            main(["--config", str(config_file), "--json", str(target), *args])
        assert caught.value.code == 2
        out, err = capfd.readouterr()
        assert out == "" and not target.exists()
        assert not list(tmp_path.glob("tmp*"))
        message = err.strip()
        if lines:
            assert message.startswith(f"{PROGRAM}: ") and "Traceback" not in message
            assert len(message.splitlines()) == lines, message
        return message

    return run


@pytest.fixture
def not_reached(plant_worker):
    plant_worker("raise SystemExit('compiled all the same')")


def plan(config_file, capsys, *args):
    main(["--config", str(config_file), *args])
    out, err = capsys.readouterr()
    return out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--gpus h1000:1x8", "unknown GPU 'h1000': did you mean 'h100'"),
        ("--gpus mi300:1x8", "valid are a100-40, a100-80, h100, h200, b200"),
        ("--gpus h100:8", "cannot read the GPUs 'h100:8'.* h100:1x8"),
        ("--gpus h100", "cannot read the GPUs 'h100'.* h100:1x8"),
        ("--gpus h100:0x8", "cannot read the GPUs"),
        ("", "say for which GPUs: --gpus h100:1x8.*--check"),
        ("--gpus h100:1x6", "on h100:1x6: mesh .* there are 6.*; this works: --mesh"),
        ("--gpus h100:1x8 --mesh.fsdp 0", "positive.*; this works: --mesh.fsdp 2$"),
        ("--gpus h100:1x8 --host-memory 3XB", "--host-memory '3XB': write it as"),
        ("--gpus h100:1x8 --training.batch-size 3", "batch_size 3 .* use .* 4"),
        (
            "--gpus h100:1x8 --model.strategy ring",
            "strategy ring .* ring=1, seq=4: use ring=4, seq=1 or ring=2, seq=1",
        ),
        ("--gpus h100:1x8 --model.num-kv-heads 3", "num_kv_heads 3 does not divide"),
        (
            "--gpus h100:1x8 --model.pattern full mine",
            "'mine', which is no kind of layer: use 'full', .*'delta'",
        ),
        ("--gpus h100:1x8 --documents-of-data", "data.mask_documents is false: leave"),
        ("--check --model.pattern full mine", "'mine', which is no kind of layer: use"),
        ("--gpus h100:1x8 --config nowhere.yaml", "--config stands twice"),
        ("--gpus h100:1x8 --plot nowhere/x.png", "nowhere/x.png: there is no folder"),
        ("--gpus h100:1x8 --json nowhere/x.json", "nowhere/x.json: there is no folder"),
        ("--check --gpus h100:1x8", "--check .* takes no --gpus"),
        ("--check --host-memory 1TB", "--check .* takes no --host-memory"),
    ],
)
def test_refusals_before_anything_is_compiled(not_reached, refused, args, message):
    found = refused(*args.split())
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "args",
    [
        "--gpus h100:1x8 --model.nonsense 3",
        "--gpus h100:1x8 --nonsense",
        "--gpus h100:1x8 --mesh.seq many",
        "--gpus h100:1x8 --timeout soon",
        "--gpus",
        "--gpu h100:1x8",
    ],
)
def test_arguments_that_do_not_exist(not_reached, refused, args):
    message = refused(*args.split(), lines=None)
    assert args.split()[-1].split(".")[-1] in message


def test_no_config(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--gpus", "h100:1x8"])
    assert caught.value.code == 2
    assert "say which run: --config" in capfd.readouterr().err


def test_a_field_that_the_file_invents(tmp_path, capfd):
    path = tmp_path / "odd.yaml"
    path.write_text("model: {widht: 3}")
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(path), "--gpus", "h100:1x8"])
    assert caught.value.code == 2
    assert "did you mean 'model.width'" in capfd.readouterr().err


def test_a_compile_that_dies(plant_worker, refused):
    plant_worker(
        "import os, sys; sys.stderr.write('F1 size mismatch when packing\\n'); "
        "sys.stderr.flush(); os.abort()"
    )
    message = refused("--gpus", "h100:1x8", lines=2)
    assert "ended by signal 6" in message and "size mismatch" in message


def test_a_compile_that_exceeds_its_time(plant_worker, refused):
    plant_worker("import time; time.sleep(60)")
    message = refused("--gpus", "h100:1x8", "--timeout", "0.3")
    assert "longer than 0.3 s" in message and "allow more time" in message


def test_a_compile_that_dies_on_the_way_to_the_longest(plant_worker, refused):
    plant_worker("raise SystemExit('no more')")
    for option in ("--longest", "--compare"):
        message = refused("--gpus", "h100:1x8", option, lines=2)
        assert "ended with exit code 1" in message and "no more" in message


def test_without_the_plugin(plant_worker, refused):
    plant_worker(
        "import sys\n"
        "from ulysses_jax.plan import compile, worker\n"
        "compile._is_installed = lambda name: False\n"
        "worker.main(sys.argv[1])"
    )
    message = refused("--gpus", "h100:1x8")
    assert "`make plan`" in message and "pip install 'ulysses-jax[gpu]'" in message


def test_the_mesh_that_a_refusal_names_works(refused, planted, config_file):
    message = refused("--gpus", "h100:2x6")
    works = message.split("this works: ")[1].split()
    main(["--config", str(config_file), "--gpus", "h100:2x6", *works])
    (request,) = planted()
    degrees = request["config"]["mesh"]
    assert np.prod(list(degrees.values())) == 12


@pytest.mark.parametrize(
    ("overrides", "num_devices", "works"),
    [
        # The nearest: the batch stays, then tensor, then seq; fsdp takes the rest.
        ("", 4, "--mesh.fsdp 1"),
        ("", 16, "--mesh.fsdp 4"),
        ("", 1, "--mesh.fsdp 1 --mesh.seq 1"),
        ("--training.batch-size 1", 8, "--mesh.fsdp 1 --mesh.seq 8"),
        ("--mesh.data 2 --mesh.fsdp 2 --mesh.seq 2", 16, "--mesh.seq 4"),
        ("--mesh.data -1 --mesh.fsdp 1", 2, "--mesh.data 1 --mesh.seq 2"),
        ("--mesh.tensor 2 --mesh.fsdp 1", 4, "--mesh.seq 2"),
        ("--mesh.tensor 2 --mesh.fsdp 1", 3, None),
        ("--mesh.seq 3 --mesh.fsdp -1", 8, "--mesh.fsdp 2 --mesh.seq 4"),
        # More devices than heads and rows: a ring.
        ("", 64, "--mesh.fsdp 4 --mesh.ring 2 --mesh.seq 8"),
        ("--memory.head-chunks 8", 64, None),
        ("--training.accumulation-steps 3", 64, None),
        ("--training.accumulation-steps None", 1024, None),
    ],
)
def test_a_matching_mesh(config_file, overrides, num_devices, works):
    args = ["--config", str(config_file), *overrides.split()]
    found = matching_mesh(load_from_command_line(args, program="")[0], num_devices)
    if works is not None:
        assert found == works
    (config,) = load_from_command_line([*args, *found.split()], program="")
    degrees = mesh_degrees(config, H100, 1, num_devices)
    config = place(config, degrees)
    heads = config.model.num_heads / (degrees["tensor"] * degrees["seq"])
    assert heads == int(heads) and heads % config.memory.head_chunks == 0


def test_no_mesh_at_all(config_file):
    """A table of learned positions that nothing but 1 divides, for tensor alone."""
    config = load(config_file, ["--memory.head-chunks", "16"])
    assert matching_mesh(config, 8) == ""


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1.9TB", 1_900_000_000_000),
        ("512GiB", 512 * 2**30),
        ("1 TiB", 2**40),
        ("2tb", 2 * 10**12),
        ("80G", 80 * 10**9),
        (" 64 MiB ", 64 * 2**20),
        ("1.5kB", 1500),
        ("123456", 123_456),
        ("123B", 123),
        ("1e3GB", None),
        ("", None),
        ("0", None),
        ("-1GB", None),
        ("lots", None),
        ("1.2.3GB", None),
        (".", None),
        ("5XB", None),
        ("5iB", None),
        ("nan", None),
    ],
)
def test_parse_bytes(text, num_bytes):
    if num_bytes is None:
        with pytest.raises(ValueError, match="1.9TB or 512GiB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == num_bytes


# Rows of 1,024 tokens, by the document of each token; 0 is padding.
LAID_OUT = {
    "stream": [[1] * 100 + [2] * 700 + [3] * 224, [3] * 476 + [4] * 548, [4] * 152],
    "whole": [[2] * 700 + [1] * 100, [3] * 700, [4] * 700],
}


@pytest.mark.parametrize("packing", LAID_OUT)
def test_documents_of_the_data(planted, config_file, capsys, tmp_path, packing):
    """Files of 99 and 699 bytes, each with its end, in rows of 1,024 tokens."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, size in (("a", 99), ("b", 699), ("c", 699), ("d", 699)):
        (texts / name).write_text("x" * size)
    flags = ("--gpus", "h100:1x8", "--data.mask-documents", "--data.document-tokens=7")
    out = plan(
        config_file,
        capsys,
        *flags,
        "--data.files",
        str(texts),
        f"--data.packing={packing}",
        "--documents-of-data",
    )
    mean = int(re.findall(r": as if of ([\d,]+) tokens", out)[0].replace(",", ""))
    laid_out = LAID_OUT[packing]
    rows = np.array([row + [0] * (1024 - len(row)) for row in laid_out])
    seen = (rows[:, :, None] == rows[:, None]) & (rows > 0)[:, None]
    # Of a row: one that is full, or as they are.
    pairs = np.tril(seen).sum() / (2200 / 1024 if packing == "stream" else 3)
    assert Pairs((None,), mean).visible(1024) == pytest.approx(pairs, rel=0.01)


def test_what_it_prints(planted, analysis, config_file, capsys):
    out = plan(config_file, capsys, "--gpus", "h100:1x8")
    assert "h100:1x8  fsdp=2 x seq=4  ulysses  4 x 1,024 tokens a step" in out
    # 1. Memory, by what it holds; what XLA does not see is labelled so.
    for part in ("parameters", "gradients", "optimizer", "activations and temporaries"):
        assert re.search(rf"^{part} +\d", out, re.M), part
    assert "from XLA's buffer assignment" in out
    assert re.search(r"CUDA context \(estimated\)  +0.59", out)
    assert re.search(r"It fits, with 7\d\.\d GiB a GPU to spare", out)
    # 2. and 3. Traffic by collective and axis: times, bytes, formula, ratio, overlap,
    # link; bfloat16 is float32 on the CPU, so twice the formula.
    (exchange,) = re.findall(r"^all-to-all over seq .*$", out, re.M)
    rows = {(r["collective"], r["axis"]): r for r in analysis["traffic"]}
    row = rows["all-to-all", "seq"]
    assert exchange.split()[3:] == [
        f"{row['count']}",
        f"{row['bytes'] / 1e9:.3f}",
        f"{row['formula_bytes'] / 1e9:.3f}",
        f"{row['ratio']:.3f}",
        f"{analysis['overlap']['exchange_fraction']:.0%}",
        *"within a host".split(),
    ]
    assert re.search(r"^all-gather over fsdp\+seq ", out, re.M)
    # 4. Copies.
    assert re.search(r"Layout-only copies around the exchanges: \d+ MB a layer", out)
    # 5. Time.
    assert "predicted, not measured" in out
    for part in ("matmul", "attention", "exposed communication", "step"):
        assert re.search(rf"^{part} +\d", out, re.M), part
    assert re.search(r"tokens/s, MFU [\d.]+%, [\d,]+ TFLOP/s a GPU; \d+% of", out)
    # And what is odd.
    assert "warning: all-to-all over seq sends 2.00 times what the formula says" in out


def test_it_says_what_is_missing(planted, config_file, capsys, analysis, tmp_path):
    memory = analysis["memory"]
    answer = json.loads((tmp_path / "answer.json").read_text())
    answer["result"]["memory"] = memory | {
        "fits": False,
        "free_bytes": -3 * 2**30,
        "activations_bytes": 82 * 2**30,
        "host_bytes_per_device": 2**37,
        "host_bytes_per_node": 2**40,
        "host_limit_bytes_per_node": 2**39,
    }
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    out = " ".join(plan(config_file, capsys, "--gpus", "h100:1x8").split())
    assert (
        "It does not fit: 3.0 GiB a GPU and 512.0 GiB of memory a host missing" in out
    )
    assert "missing. GPUs and hosts are both too small: shorten the sequence" in out
    assert "host memory a GPU 128.00 1024.0 of 512 GiB a host" in out


def test_it_says_what_to_do(planted, config_file, capsys, analysis, tmp_path):
    answer = json.loads((tmp_path / "answer.json").read_text())
    answer["result"]["memory"] = analysis["memory"] | {
        "fits": False,
        "free_bytes": -3 * 2**30,
        "activations_bytes": 82 * 2**30,
    }
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    out = " ".join(plan(config_file, capsys, "--gpus", "h100:1x8").split())
    assert "chunks of tokens that fits: --memory.auto" in out


def test_json(planted, config_file, capsys, tmp_path, analysis):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    args = ["--gpus", "h100:1x8", "--json", str(file), "--plot", str(picture)]
    plan(config_file, capsys, *args, "--host-memory", "1.9TB")
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    check_json(found)
    assert file.stat().st_mode & 0o777 == 0o644
    assert found["fits"] is True and found["gpus"] == "h100:1x8"
    assert found["num_devices"] == 8 and found["tokens"] == 1024
    assert found["traffic"] == json.loads(json.dumps(analysis["traffic"]))
    (request,) = planted()
    assert request["host_memory_bytes"] == 1_900_000_000_000
    assert request["hosts"] == 1 and request["gpus_per_host"] == 8
    # The picture: large enough to read, with bars and words in it.
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] >= 500 and pixels.shape[1] >= 1000
    colors = {tuple(c) for c in (pixels[::7, ::7].reshape(-1, 3) * 255).astype(int)}
    assert (0x2F, 0x6F, 0xB0) in colors and (0xD9, 0x62, 0x2B) in colors
    assert 0.02 < (pixels.min(axis=-1) < 0.5).mean() < 0.5


def check_json(plan, *, exchanges=True):
    """All that the command promises of its JSON, by name and type."""
    assert isinstance(plan["fits"], bool)
    assert isinstance(plan["num_devices"], int) and isinstance(plan["tokens"], int)
    for name in ("device", "estimated", "limit"):
        assert plan["memory"][f"{name}_bytes"] > 0
    assert plan["memory"]["host_bytes_per_device"] >= 0
    assert plan["traffic"]
    for row in plan["traffic"]:
        assert isinstance(row["collective"], str) and isinstance(row["axis"], str)
        assert row["count"] > 0 and row["bytes"] >= 0
        assert row["formula_bytes"] is None or row["formula_bytes"] > 0
    fraction = plan["overlap"]["exchange_fraction"]
    assert 0 <= fraction <= 1 if exchanges else fraction is None
    assert plan["copies"]["bytes_per_layer"] >= 0
    assert plan["predicted"]["step_seconds"] > 0
    assert 0 < plan["predicted"]["mfu"] < 1
    assert plan["compile_seconds"] > 0


def test_overrides_stand_anywhere(planted, config_file, capsys):
    args = "--mesh.fsdp -1 --gpus h100:2x8 --training.batch-size 16 --mesh.seq 4"
    plan(config_file, capsys, *args.split())
    (request,) = planted()
    assert request["config"]["mesh"]["seq"] == 4
    assert request["config"]["mesh"]["fsdp"] == 4  # what is left
    assert request["config"]["training"]["batch_size"] == 16


def test_results_are_kept_unless_told_otherwise(planted, config_file, capsys):
    for _ in range(2):
        plan(config_file, capsys, "--gpus", "h100:1x8")
    assert len(planted()) == 1
    for _ in range(2):
        plan(config_file, capsys, "--gpus", "h100:1x8", "--no-cache")
    assert len(planted()) == 3


def test_longest(planted, config_file, capsys, tmp_path):
    """What the worker answers always fits: up to the last position."""
    file = tmp_path / "plan.json"
    args = ["--gpus", "h100:1x8", "--longest", "--json", str(file)]
    main(["--config", str(config_file), *args])
    out, err = capsys.readouterr()
    found = json.loads(file.read_text())
    check_json(found)
    tokens = found["longest_tokens"]
    assert tokens == found["tokens"] == 2**31 - 512
    assert f"The longest sequence that fits: {tokens:,} tokens" in out
    assert f"{tokens:,} tokens fit" in err  # as it goes
    assert len(planted()) == len(found["trials"])


def test_compare(planted, config_file, capsys, tmp_path):
    file = tmp_path / "plan.json"
    args = ["--gpus", "h100:1x8", "--compare", "--json", str(file)]
    out = plan(config_file, capsys, *args)
    assert re.search(r"Strategies at \d x 1,024 tokens a step .*predicted", out)
    assert re.search(r"^unsharded +fsdp=", out, re.M)
    assert re.search(r"^ulysses +fsdp=", out, re.M)
    names = [row["strategy"] for row in json.loads(file.read_text())["strategies"]]
    compared = "unsharded ulysses ring hybrid all_gather megatron"
    assert names == compared.split()


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    options = "gpus longest compare check json plot host-memory timeout no-cache"
    for option in options.split():
        assert f"--{option}" in out


def command(*args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ulysses_jax.plan", *args],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.plan
def test_the_command_for_gpus(config_file, tmp_path, own_cache):
    """The whole of it, in a process of its own: the longest sequence, JSON, picture."""
    file = tmp_path / "plan.json"
    args = ["--config", str(config_file), "--gpus", "h100:1x8"]
    done = command(
        *args,
        *("--longest", "--json", str(file), "--plot", str(tmp_path / "plan.png")),
        *("--training.sequence-tokens", "30000000"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    check_json(found)
    assert found["fits"] and found["longest_tokens"] == found["tokens"]
    trials = found["trials"]
    assert len(trials) <= 8
    above = min(trial["tokens"] for trial in trials if not trial["fits"])
    assert found["tokens"] < above <= 1.01 * found["tokens"]
    assert f"{found['tokens']:,} tokens" in done.stdout
    assert imread(tmp_path / "plan.png").shape[0] >= 500


@pytest.mark.plan
def test_without_exchanges(config_file, tmp_path):
    """seq=1: the share of exchanges under compute is null, not 0 or 1."""
    file = tmp_path / "plan.json"
    done = command(
        *("--config", str(config_file), "--gpus", "h100:1x8", "--json", str(file)),
        *("--mesh.fsdp", "8", "--mesh.seq", "1", "--training.batch-size", "8"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    check_json(found, exchanges=False)
    assert found["copies"]["bytes_per_layer"] == 0
    assert "all-to-all" not in done.stdout and "Layout-only" not in done.stdout


@pytest.mark.plan
def test_the_mesh_that_a_refusal_names_compiles(config_file, tmp_path):
    args = ["--config", str(config_file), "--gpus", "h100:1x6"]
    refused = command(*args)
    assert refused.returncode == 2 and refused.stdout == ""
    works = refused.stderr.strip().split("this works: ")[1].split()
    done = command(*args, *works)
    assert done.returncode == 0, done.stderr
