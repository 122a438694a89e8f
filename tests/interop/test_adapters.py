"""Runs that train adapters: from a folder, through checkpoints, to folders again."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from files import ROOT
from flax import nnx
from folders import FIXTURES, config_of, tensors_of
from peft_folders import PEFT, adapters_of, with_adapters

from ulysses_jax import export, make_mesh
from ulysses_jax.config import Lora, Model
from ulysses_jax.config_file import load, load_stages
from ulysses_jax.interop import from_pretrained, save_pretrained
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training import load_run, train, train_stages
from ulysses_jax.training.load import refuse_other_adapters
from ulysses_jax.training.proof import read_commit

MODEL = Model(
    vocab_size=264, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("from") / "model"
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    save_pretrained(model, made, dtype="bfloat16", max_tokens=32)
    (made.parent / "text.txt").write_text("abc def\n" * 90)
    return made


def small(folder, *words):
    """configs/llama3_8b_lora.yaml with a small model: four steps, saved after two."""
    given = f"""
      --run.folder {folder.parent}/run --data.files {folder.parent}/text.txt
      --data.document-tokens null --model.from {folder} --model.vocab-size 264
      --model.width 16 --model.num-layers 2 --model.num-heads 4 --model.num-kv-heads 2
      --model.head-size 6 --model.feed-forward-width 64 --model.lora.rank 2
      --model.lora.targets q up down --training.num-steps 4 --training.batch-size 8
      --training.sequence-tokens 16 --training.learning-rate 0.01
      --training.warmup-steps 1 --training.validation-batches 1
      --training.checkpoint-interval-steps 2 --mesh.data 2 --mesh.fsdp 4
      --memory.no-auto --quiet
    """
    return load(ROOT / "configs" / "llama3_8b_lora.yaml", [*given.split(), *words])


@pytest.fixture(scope="module")
def trained(folder):
    """The module that `train` hands over."""
    return train(small(folder))


def values_of(model):
    return nnx.to_pure_dict(nnx.state(model))


STILL = {"learning_rate": 0.0, "final_learning_rate": 0.0, "weight_decay": 0.0}


def staged(folder, place, *stages):
    """`small` as a file with stages, whose first one is what `trained` left."""
    config = small(folder)
    values = config.to_dict() | {"stages": list(stages)}
    values["run"] |= {"folder": str(place / "run")}
    (place / "own.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(folder.parent / "run", place / "run" / "stage_1")
    return load_stages(place / "own.yaml")


def test_adapters_go_on_from_stage_to_stage(trained, folder, tmp_path, capsys):
    """Longer rows, another RoPE base, and no rate: the same adapters, the same base."""
    longer = {"sequence_tokens": 32, "num_steps": 1} | STILL
    model = {"rope": {"base": 1e6}, "lora": {"alpha": 8.0}}
    stages = staged(folder, tmp_path, {}, {"training": longer, "model": model})
    now = train_stages(stages)
    said = capsys.readouterr().out
    assert f"starting after step 4 of {tmp_path}/run/stage_1" in said
    from_ = f"parameters: of {folder}, with the adapters of {tmp_path}/run/stage_1"
    assert from_ in said
    for name, was, later in (("rope.base", 500000.0, 1e6), ("lora.alpha", 32.0, 8.0)):
        assert f"model.{name} was {was}, is {later}" in said
    assert float(abs(values_of(now)["layers"][0]["attention"]["q_adapter"]["b"]).max())
    jax.tree.map(np.testing.assert_array_equal, values_of(now), values_of(trained))
    again = load_run(tmp_path / "run" / "stage_2")  # of model.from and its adapters
    assert again.model.lora.alpha == 8.0 and again.model.rope.base == 1e6
    got, want = values_of(again), values_of(load_run(folder.parent / "run"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "lora, message",
    [
        (None, "adapters of rank 2 on q, up, down, and this run, .* all parameters: "),
        ({"rank": 3}, "adapters of rank 2 on q, up, down, .* rank 3 on q, up, down: "),
        ({"targets": ["q"]}, "adapters of rank 2 on q, up, down, .* rank 2 on q: "),
    ],
)
def test_other_adapters_than_before(trained, folder, tmp_path, lora, message):
    stages = staged(folder, tmp_path, {}, {"model": {"lora": lora}})
    message = f"run.after .*/run.* trained {message}"
    same = "stage 2 of 2: .*give every stage the same model.lora"
    with pytest.raises(ValueError, match=f"{message}give every stage") as stopped:
        train_stages(stages)
    assert re.search(same, str(stopped.value), re.DOTALL)
    with pytest.raises(ValueError, match=f"{message}set model.lora.*--to merged"):
        train(stages[1])
    assert not (tmp_path / "run" / "stage_2" / "checkpoints").exists()
    targets = {"model": {"lora": {"targets": ["up", "down", "[q]"]}}}
    shutil.rmtree(tmp_path / "run")
    (first, second) = staged(folder, tmp_path, {}, targets)
    refuse_other_adapters(first.model.lora, second)  # the same ones, by other names


def test_adapters_after_a_run_that_has_none(trained, folder, tmp_path):
    """Nor on other weights than before."""
    config = small(folder, f"--run.folder={tmp_path}/whole", "--training.num-steps=1")
    plain = dataclasses.replace(config.model, lora=None)
    whole = train(dataclasses.replace(config, model=plain))
    assert whole.model.lora is None
    after = f"--run.after={tmp_path}/whole", f"--run.folder={tmp_path}/after"
    with pytest.raises(ValueError, match="trained all parameters, .* of rank 2 on q, "):
        train(small(folder, *after))
    shutil.copytree(folder, tmp_path / "another")
    path = tmp_path / "another" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x3f")
    other = (
        f"--run.after={folder.parent}/run",
        f"--run.folder={tmp_path}/other",
        f"--model.from={tmp_path}/another",
    )
    with pytest.raises(ValueError, match="adapters are of other weights than those in"):
        train(small(folder, *other))


def test_only_adapters_are_trained_and_saved(trained, folder):
    base, now = values_of(from_pretrained(folder)), values_of(trained)
    layers, was = now["layers"][0], base["layers"][0]
    assert now["embedding"].dtype == jnp.bfloat16 and now["norm"]["scale"].dtype == "f4"
    assert float(abs(layers["attention"]["q_adapter"]["b"]).max()) > 0
    for part, name in (("attention", "q"), ("feed_forward", "up")):
        np.testing.assert_array_equal(
            np.asarray(layers[part][name], np.float32), was[part][name]
        )
    assert "k_adapter" not in layers["attention"]
    saved = folder.parent / "run" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["2", "4"]
    arrays = read_commit(saved / "4")["arrays"]
    parameters = [path for path in arrays if path.startswith(".parameters")]
    assert len(parameters) == 6 and all("_adapter" in path for path in parameters)
    assert not any(path.startswith(".frozen") for path in arrays)


def test_the_model_of_a_run_is_that_which_was_trained(trained, folder):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 264, (8, 16)))
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        want = np.asarray(trained(tokens))
    for read in (load_run, from_pretrained):
        model = read(folder.parent / "run")
        assert model.embedding.get_value().dtype == jnp.float32
        np.testing.assert_allclose(model(tokens), want, 0.02, 0.02)
    base = from_pretrained(folder, compute_dtype="bfloat16")(tokens)
    assert abs(np.asarray(base) - want).max() > 0.1


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(trained, folder, tmp_path):
    """Its base is read again from model.from."""
    again = tmp_path / "again"
    shutil.copytree(folder.parent / "run", again)
    shutil.rmtree(again / "checkpoints" / "4")
    resumed = train(small(folder, f"--run.folder={again}"))
    jax.tree.map(np.testing.assert_array_equal, values_of(resumed), values_of(trained))


@pytest.mark.slow
def test_a_base_that_is_gone_or_changed_is_refused(trained, folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    run = folder.parent / "run" / "config.yaml"
    config = load(run, [f"--model.from={moved}"])
    train(config)  # nothing is left to do, and the same weights elsewhere will do
    path = moved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"other weights.*model.safetensors was .*: gi"
    ):
        train(config)
    shutil.rmtree(moved)
    with pytest.raises(ValueError, match=r"has neither.*put the folder back, or"):
        train(config)


def merged(folder, adapters, scale):
    """The folder's tensors with A and B in them, in float32, by this test's own rules.

    Args:
      adapters: of the names of PEFT's tensors.
    """
    tensors = tensors_of(folder)
    found = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    for name, b in adapters.items():
        if ".lora_B." in name:
            a = adapters[name.replace(".lora_B.", ".lora_A.")]
            own = name.removeprefix("base_model.model.").replace(".lora_B", "")
            found[own] = found[own] + scale * b @ a
    return {name: x.astype(tensors[name].dtype) for name, x in found.items()}


def test_export_merges_and_with_adapters_does_not(trained, folder, tmp_path, capsys):
    words = ["--run", f"{folder.parent}/run", "--to"]
    export.main([*words, f"{tmp_path}/peft", "--adapters"])
    export.main([*words, f"{tmp_path}/whole"])
    adapters = adapters_of(tmp_path / "peft")
    assert len(adapters) == 2 * 3 * 2 and all("lora_" in name for name in adapters)
    want, got = merged(folder, adapters, 16), tensors_of(tmp_path / "whole")
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(
            got[name].astype(np.float32), want[name].astype(np.float32), 1e-2, 1e-6
        )
    changed = {name for name in want if (want[name] != tensors_of(folder)[name]).any()}
    assert len(changed) == 6
    assert config_of(tmp_path / "whole") == config_of(folder)
    with pytest.raises(ValueError, match="tmp.*whole is there already"):
        save_pretrained(load_run(folder.parent / "run"), tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"lie in bfloat16.*in float32.*read them anew"
    ):
        save_pretrained(trained, tmp_path / "lossy", dtype="float32")
    with pytest.raises(SystemExit) as ended:
        export.main(["--run", f"{tmp_path}/peft", "--to", f"{tmp_path}/x"])
    assert ended.value.code == 2 and "no run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_adapters_are_peft_s(case, tmp_path):
    """Logits are those of transformers with PEFT, and files those that it writes."""
    model = with_adapters(case)
    with np.load(PEFT / case / "expected.npz") as want:
        logits = model(want["tokens"])
        np.testing.assert_allclose(logits, want["logits"], 1e-4, 1e-4)
    save_pretrained(model, tmp_path / "peft", adapters=True)
    got, wanted = adapters_of(tmp_path / "peft"), adapters_of(PEFT / case)
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
    names = ("adapter_config.json", "r")
    fields, theirs = (
        json.loads((place / names[0]).read_text())
        for place in (tmp_path / "peft", PEFT / case)
    )
    for name in ("r", "lora_alpha", "peft_type", "task_type", "fan_in_fan_out", "bias"):
        assert fields[name] == theirs[name]
    ends = [each.split(".")[-1] for each in fields["target_modules"]]
    assert sorted(ends) == sorted(x.split(".")[-1] for x in theirs["target_modules"])
    # Merged, it is the same model without adapters.
    save_pretrained(model, tmp_path / "whole", dtype="float32")
    again = from_pretrained(tmp_path / "whole")
    assert again.model.lora is None
    with np.load(PEFT / case / "expected.npz") as want:
        np.testing.assert_allclose(again(want["tokens"]), want["logits"], 1e-4, 1e-4)


def test_what_peft_has_not(tmp_path):
    for case, targets, what in (
        (
            "phi3",
            ("q", "out"),
            r"of q are of parts of .*qkv_proj.weight, which is 3 weights",
        ),
        ("gpt2", ("k",), r"of k are of parts of .*c_attn.weight"),
        ("llama", None, "model.lora is null: write it whole"),
    ):
        lora = Lora(rank=2, targets=targets) if targets else None
        own = dataclasses.replace(from_pretrained(FIXTURES / case).model, lora=lora)
        model = Transformer(own, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=what):
            save_pretrained(model, tmp_path / "x", adapters=True)
        assert not (tmp_path / "x").exists()
        save_pretrained(model, tmp_path / case)  # merged it always can be
    with pytest.raises(ValueError, match="has adapters of PEFT's, .*merge them first"):
        from_pretrained(PEFT / "llama")


def test_refusals(folder, tmp_path):
    config = small(folder)

    def refused(match, make_model=Transformer, **changes):
        model = dataclasses.replace(config.model, **changes)
        out = dataclasses.replace(config.run, folder=str(tmp_path / "none"))
        with pytest.raises(ValueError, match=match):
            train(dataclasses.replace(config, model=model, run=out), make_model)
        assert not (tmp_path / "none").exists()

    refused(r"model.from does not say whose: give .*--model.from", from_=None)
    refused(
        "'w', which matches none.* use some of q, k, v, out, gate, up, down",
        lora=Lora(targets=("q", "w")),
    )
    refused("has no target", lora=Lora(targets=()))
    refused(
        "rank 17 is more than .* k has, 16 to 12 features: use 12 or",
        lora=Lora(rank=17),
    )
    refused(
        "'gate', which matches none", feed_forward="gelu", lora=Lora(targets=("gate",))
    )
    refused("rank must be positive, not 0", lora=Lora(rank=0))
    refused("alpha must be positive, not 0", lora=Lora(alpha=0.0))
    refused("lora must be Lora or null, not 3", lora=3)
    refused(
        "adapts the projections of ulysses_jax.Transformer, and Own is none",
        lambda model, rngs: Own(model, rngs),
    )


class Own(nnx.Module):
    def __init__(self, model, rngs):
        self.table = nnx.Embed(model.vocab_size, model.width, rngs=rngs)

    def features(self, tokens, positions, segment_ids):
        return self.table(tokens)

    @property
    def head(self):
        return self.table.embedding
