"""A run that starts from a folder, and the folder that it becomes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from folders import FIXTURES, config_of, tensors_of
from jax.sharding import AxisType
from word_tokenizer import write_tokenizer

from ulysses_jax import export, make_mesh, placement
from ulysses_jax.config import Config, Data, Mesh, Model, Rope, Run, Training
from ulysses_jax.config_file import load
from ulysses_jax.families.config_json import model_of
from ulysses_jax.interop import from_pretrained, save_pretrained
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.tensors.expected import open_source
from ulysses_jax.training import train
from ulysses_jax.training.state import first_state

# Five layers of a pattern of two: one is left over.
MODEL = Model(
    vocab_size=264,
    width=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    attention_biases="inputs",
    pattern=("full", "window"),
    window=5,
    rope=Rope(base=1e4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("from") / "model"
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    save_pretrained(model, made, dtype="bfloat16", max_tokens=32)
    write_tokenizer(made)
    (made.parent / "text.txt").write_text("a long text ?\n" * 90)
    return made


@pytest.fixture
def file(folder, tmp_path):
    """A config of a run from the folder, at a rate of nothing."""
    path = tmp_path / "own.yaml"
    path.write_text(
        f"""
run: {{folder: {tmp_path}/run}}
model: {{from: {folder}, compute_dtype: float32}}
data: {{files: {folder.parent}/text.txt}}
training:
  num_steps: 1
  batch_size: 4
  sequence_tokens: 16
  learning_rate: 0
  final_learning_rate: 0
  weight_decay: 0
  warmup_steps: 0
  validation_batches: 0
mesh: {{fsdp: 2, seq: 2, tensor: 2}}
quiet: true
"""
    )
    return path


def test_the_folder_says_what_a_file_does_not(file, folder):
    config = load(file)
    assert config.model.from_ == str(folder)
    own = dict(compute_dtype="float32", from_=str(folder), feed_forward_width=64)
    assert dataclasses.replace(MODEL, **own) == config.model
    longer = load(file, ["--model.rope.base", "5e6", "--model.window=7"])
    assert longer.model.rope == Rope(base=5e6) and longer.model.window == 7
    assert longer.model.attention_biases == "inputs"
    # From the command line alone, and the folder that the command line says wins.
    file.write_text("training: {sequence_tokens: 16}")
    for words in (["--model.from", str(folder)], [f"--model.from={folder}"]):
        assert load(file, words).model.num_kv_heads == 2
    gpt2 = ["--model.from", str(FIXTURES / "gpt2")]
    file.write_text(f"model: {{from: {folder}}}\ntraining: {{sequence_tokens: 16}}")
    assert load(file, gpt2).model.positions == "learned"


@pytest.mark.parametrize(
    "stage, offload", [(3, ()), (1, ()), (3, ("parameters", "optimizer"))]
)
def test_a_run_starts_with_the_folder_s_weights(file, folder, stage, offload):
    words = [f"--training.zero-stage={stage}", "--memory.offload", *offload]
    config = load(file, words)
    degrees = dataclasses.asdict(config.mesh)
    mesh = make_mesh(**degrees, axis_type=AxisType.Explicit)
    config = placement.place(config, dict(mesh.shape))
    with jax.set_mesh(mesh):
        state = first_state(config, source=open_source(config.model))
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.parameters)}
    assert kinds == {"pinned_host" if offload else "device"}
    want = nnx.to_pure_dict(nnx.state(from_pretrained(folder)))
    assert jax.tree.structure(state.parameters) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, state.parameters, want)
    assert int(state.step) == 0


@pytest.mark.slow
def test_a_run_from_a_folder_to_a_folder(file, folder, tmp_path, capsys):
    """At a rate of nothing it is the same one, bit for bit; the first is needed no more
    where there is a checkpoint."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    beside = {
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": '{"bos_token": "<s>"}',
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"eos_token_id": 1, "temperature": 0.6}',
        "LICENSE.txt": "as you like",
    }
    for name, text in beside.items():
        (moved / name).write_text(text)
    config = load(file, ["--model.from", str(moved)])
    train(config)
    said = capsys.readouterr().out
    assert f"parameters: of {moved}" in said
    assert f"tokens: of {moved}/tokenizer.json" in said
    export.main(["--run", f"{tmp_path}/run", "--to", f"{tmp_path}/out"])
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert config_of(tmp_path / "out") == config_of(folder)
    names = {each.name for each in moved.iterdir()}
    assert {each.name for each in (tmp_path / "out").iterdir()} == names
    for name in {"tokenizer.json", *beside}:
        own = (moved / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == own
        if name != "LICENSE.txt":  # so has the run's folder, from which another starts
            assert (tmp_path / "run" / name).read_bytes() == own
    shutil.rmtree(moved)
    run = tmp_path / "run" / "config.yaml"
    train(load(run))
    said = capsys.readouterr().out
    assert "nothing left to do" in said
    assert f"tokens: of {tmp_path}/run/tokenizer.json" in said
    from_pretrained(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        export.main(["--run", f"{tmp_path}/run", "--to", f"{tmp_path}/gone"])
    assert ended.value.code == 2 and not (tmp_path / "gone").exists()
    assert f"came from {moved}, which is not there" in capsys.readouterr().err


def test_what_a_run_cannot_start_from(file, folder, tmp_path):
    with pytest.raises(
        ValueError, match="unknown field 'model.from_'; did you .*from'"
    ):
        file.with_name("b.yaml").write_text("model: {from_: x}")
        load(file.with_name("b.yaml"))
    with pytest.raises(ValueError, match="missing is no model's folder"):
        load(file, ["--model.from", str(tmp_path / "missing")])
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.yaml").write_text("{}")
    (tmp_path / "before" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="say --run.after .*before in .*--to NEW_FOL"):
        load(file, ["--model.from", str(tmp_path / "before")])
    with pytest.raises(ValueError, match="experts"):
        load(file, ["--model.from", str(FIXTURES / "gpt_oss")])
    config = load(file, ["--model.num-layers=4"])
    with pytest.raises(ValueError, match="has model.layers.4.input_layernorm.weight"):
        train(config)
    assert not (tmp_path / "run").exists()
    small = Config(
        run=Run(folder=str(tmp_path / "run")),
        model=Model(vocab_size=264, width=8, num_heads=2, from_=str(folder)),
        data=Data(files=str(folder.parent / "text.txt")),
        training=Training(batch_size=8, sequence_tokens=16),
        mesh=Mesh(fsdp=-1),
    )
    with pytest.raises(ValueError, match="model.from .* is none: leave it out"):
        train(small, lambda model, rngs: Own(model, rngs))


class Own(nnx.Module):
    def __init__(self, model, rngs):
        self.table = nnx.Embed(model.vocab_size, model.width, rngs=rngs)
        self.model = model

    def features(self, tokens, positions, segment_ids):
        return self.table(tokens)

    @property
    def head(self):
        return self.table.embedding


@pytest.mark.parametrize(
    "words, message",
    [
        (["--run", "missing", "--to", "out"], "missing is not there"),
        (["--to", "out"], "required: --run"),
    ],
)
def test_exports_that_cannot_be(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        export.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_layers_of_a_state(file, folder, tmp_path):
    """Their heads lie over tensor, documents are packed: the same folder comes out."""
    model = dataclasses.replace(
        model_of(config_of(FIXTURES / "qwen3_next")), vocab_size=264
    )
    made = tmp_path / "of_states"
    save_pretrained(Transformer(model, rngs=nnx.Rngs(0)), made, max_tokens=32)
    write_tokenizer(made)
    train(load(file, ["--model.from", str(made)]))
    export.main(["--run", f"{tmp_path}/run", "--to", f"{tmp_path}/out"])
    before, after = tensors_of(made), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert config_of(tmp_path / "out") == config_of(made)
