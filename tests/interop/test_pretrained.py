"""Other people's models: what `transformers` says of them, and the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import (
    CASES,
    FIXTURES,
    OF_STATES,
    config_of,
    copied,
    copied_whole,
    expected,
    tensors_of,
)
from safetensors.numpy import save_file
from slow import slow_but_for

from ulysses_jax import make_mesh
from ulysses_jax.config import Model
from ulysses_jax.families import config_json
from ulysses_jax.families.config_json import model_of, read_config
from ulysses_jax.families.gpt_oss import GPT_OSS
from ulysses_jax.interop import from_pretrained, save_pretrained
from ulysses_jax.models import Attention
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.tensors.expected import open_source
from ulysses_jax.tensors.files import Tensors
from ulysses_jax.tensors.reading import described, read_parameters
from ulysses_jax.tensors.writing import Kept, written

EVERY = CASES + OF_STATES
MESHES = {"one device": {}, "data 2, seq 4": dict(data=2, seq=4)}
OVER_TENSOR = dict(fsdp=2, seq=2, tensor=2)
TOLERANCE = 1e-4


def loss_of(model, tokens):
    logits = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()


def assert_same(model, other, check):
    pairs = (jax.tree.leaves(nnx.state(each)) for each in (model, other))
    for one, same in zip(*pairs, strict=True):
        check(one, same)


def lies_alike(one, other):
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def gradients_of(model, gradients):
    """By the names of the files' tensors."""
    parameters = {
        path: Kept(variable.get_metadata()["letters"], variable.get_value())
        for path, variable in nnx.to_flat_state(gradients)
    }
    wanted = open_source(model.model)[1]
    names = [each.name for each in wanted]
    return dict(zip(names, written(parameters, wanted, "float32"), strict=True))


@pytest.mark.parametrize(
    "case, mesh",
    slow_but_for(
        [
            ("qwen2", "data 2, seq 4"),
            ("gpt2", "one device"),
        ],
        EVERY,
        MESHES,
    )
    + [("qwen3_next", "over tensor")],
)
def test_logits_and_gradients_are_those_of_transformers(case, mesh):
    """With 2 or 3 key heads, also over 4 devices."""
    want = expected(case)
    degrees = MESHES.get(mesh, OVER_TENSOR)
    mesh = make_mesh(**degrees, devices=jax.devices()[: 8 if degrees else 1])
    with jax.set_mesh(mesh):
        model = from_pretrained(FIXTURES / case, compute_dtype="float32")
        tokens = jnp.asarray(want["tokens"])
        logits = model(tokens)
        loss, gradients = nnx.jit(nnx.value_and_grad(loss_of))(model, tokens)
        got = gradients_of(model, gradients)
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(loss, want["loss"], rtol=TOLERANCE)
    names = {name.removeprefix("grad/") for name in want if name.startswith("grad/")}
    assert got.keys() == names
    for name in names:
        wanted = want[f"grad/{name}"]
        # A key's bias without RoPE has no gradient: softmax ignores it.
        largest = max(float(np.abs(wanted).max()), 1e-3)
        np.testing.assert_allclose(
            got[name], wanted, rtol=0, atol=TOLERANCE * largest, err_msg=name
        )


@pytest.mark.parametrize("layer, kind", [(0, "window"), (1, "full")])
def test_attention_of_gpt_oss(layer, kind):
    """Sinks, biases, a window in one of two layers, YaRN whose bounds are not whole."""
    case = FIXTURES / "gpt_oss"
    want, values = expected("gpt_oss"), read_config(case)
    model = dataclasses.replace(model_of(values), compute_dtype="float32")
    assert model.pattern == ("window", "full") and model.sinks
    attention = Attention(model, rngs=nnx.Rngs(0), kind=kind)
    tensors = tensors_of(case)
    sizes = {"N": model.num_heads, "K": model.num_kv_heads, "H": model.head_size}
    for each in GPT_OSS.tensors(model):
        (part,) = each.parts
        parameter = getattr(attention, part.path[1])
        stored = part.stored.replace(" ", "")
        w = tensors[each.name.format(i=layer)].astype(np.float32)
        w = w.reshape([sizes.get(letter, model.width) for letter in stored])
        letters = parameter.get_metadata()["letters"]
        parameter.set_value(
            jnp.asarray(w.transpose([stored.index(x) for x in letters]))
        )

    def run(attention, x):
        return jnp.vdot(attention(x), want["w"])

    x = jnp.asarray(want["x"])
    out = nnx.jit(lambda attention, x: attention(x))(attention, x)
    np.testing.assert_allclose(out, want[f"attention.{layer}"], rtol=0, atol=TOLERANCE)
    gradients, dx = nnx.jit(nnx.grad(run, argnums=(0, 1)))(attention, x)
    np.testing.assert_allclose(dx, want[f"grad_x.{layer}"], rtol=0, atol=TOLERANCE * 10)
    for name, tensor in (("sinks", "sinks"), ("q_bias", "q_proj.bias")):
        wanted = want[f"grad/model.layers.{layer}.self_attn.{tensor}"]
        got = gradients[name].get_value().reshape(wanted.shape)
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("case", EVERY)
def test_there_and_back_again_is_bit_identical(case, tmp_path):
    """From one device and from a mesh, which lay the parameters otherwise."""
    meshes = ({}, OVER_TENSOR) if case in ("llama", "qwen3_next") else ({},)
    for number, degrees in enumerate(meshes):
        mesh = make_mesh(**degrees, devices=jax.devices()[: 8 if degrees else 1])
        to = tmp_path / f"{number}"
        with jax.set_mesh(mesh):
            save_pretrained(from_pretrained(FIXTURES / case), to, file_bytes=10_000)
        before, after = tensors_of(FIXTURES / case), tensors_of(to)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert tensor.tobytes() == after[name].tobytes(), name
        assert config_of(to) == config_of(FIXTURES / case)
        assert len(list(to.glob("model-*.safetensors"))) > 2
        assert [each.name for each in tmp_path.iterdir() if each.name[0] == "."] == []


@pytest.mark.parametrize("case", EVERY)
def test_a_config_of_a_model_alone_describes_it(case):
    """Without the folder that it came from; in the form that older versions read."""
    model = model_of(read_config(FIXTURES / case))
    made = config_json.config_of(model, None, 64)
    assert dataclasses.replace(model_of(made), rope=model.rope) == model
    rope = dataclasses.replace(
        model_of(made).rope, attention_factor=model.rope.attention_factor
    )
    assert rope == model.rope
    assert "rope_parameters" not in made


def test_a_model_is_stretched_and_keeps_what_else_its_folder_said(tmp_path):
    folder = copied("llama", tmp_path, bos_token_id=7, eos_token_id=[1, 2])
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not to be copied")
    model = from_pretrained(folder)
    longer = dataclasses.replace(model.model.rope, base=5e6, factor=16.0)
    model.model = dataclasses.replace(model.model, rope=longer)
    save_pretrained(model, tmp_path / "out", dtype="float32", max_tokens=4096)
    values = config_of(tmp_path / "out")
    assert model_of(values).rope == longer
    assert values["max_position_embeddings"] == 4096
    assert (values["bos_token_id"], values["eos_token_id"]) == (7, [1, 2])
    assert "rope_parameters" not in values and values["dtype"] == "float32"
    assert {str(w.dtype) for w in tensors_of(tmp_path / "out").values()} == {"float32"}
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_of_a_model_from_nowhere(tmp_path):
    small = dict(vocab_size=24, width=16, num_layers=2, num_heads=4)
    model = Transformer(Model(**small), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="give max_tokens"):
        save_pretrained(model, tmp_path / "out")
    save_pretrained(model, tmp_path / "out", max_tokens=99)
    assert config_of(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]
    again = from_pretrained(tmp_path / "out", compute_dtype="bfloat16")
    for one, other in zip(
        jax.tree.leaves(nnx.state(model)),
        jax.tree.leaves(nnx.state(again)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    other = Transformer(Model(**small, sinks=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has such a model \(sinks True\)"):
        save_pretrained(other, tmp_path / "other", max_tokens=99)
    with pytest.raises(ValueError, match="is there already"):
        save_pretrained(model, tmp_path / "out", max_tokens=99)
    assert {each.name for each in tmp_path.iterdir()} == {"out"}


def test_older_names_of_gpt2(tmp_path):
    """Without the first word, and with masks that are made of the config."""
    folder = copied("gpt2", tmp_path)
    tensors = {
        name.removeprefix("transformer."): w for name, w in tensors_of(folder).items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    model = from_pretrained(folder)
    np.testing.assert_array_equal(model.embedding.get_value(), tensors["wte.weight"])


@pytest.fixture
def read(monkeypatch):
    """Names and sizes of the pieces that are read."""
    found = []
    whole = Tensors.read

    def counted(self, name, where):
        piece = whole(self, name, where)
        found.append((name, piece.size))
        return piece

    monkeypatch.setattr(Tensors, "read", counted)
    return found


def test_a_device_reads_its_own_pieces_alone(read):
    """Over 8 devices each element of a matrix is read once, in pieces."""
    with jax.set_mesh(make_mesh(fsdp=2, seq=2, tensor=2)):
        model = from_pretrained(FIXTURES / "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    pieces = [size for each, size in read if each == name]
    assert len(pieces) == 8 and sum(pieces) == 40 * 24
    del model


BAD_CONFIGS = [
    (dict(model_type="mamba"), "model_type 'mamba', which is none of llama, mistral"),
    (dict(hidden_act="relu"), "hidden_act is 'relu', an activation"),
    (dict(num_hidden_layers=3), "has no model.layers.2.input_layernorm.weight, .* and"),
    (dict(num_hidden_layers=1), "has model.layers.1.input_layernorm.weight, .* and"),
    (
        dict(tie_word_embeddings=True, vocab_size=50),
        r"\[48, 24\], and in .* \[50, 24\]",
    ),
    (dict(vocab_size=None), "has no vocab_size"),
    (dict(vocab_size="48"), "vocab_size is '48', and must be of type int"),
    (
        dict(rope_parameters=dict(rope_type="mrope", rope_theta=1.0)),
        "rope_type 'mrope' is none of 'default', 'linear'",
    ),
    (
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, mrope_section=[1])),
        "rope_type linear has mrope_section",
    ),
    (dict(rope_parameters=dict(rope_type="yarn")), "yarn has no factor"),
    (
        dict(rope_parameters=dict(rope_type="longrope", factor=2.0)),
        "has no short_factor",
    ),
    (dict(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    (
        dict(layer_types=["full_attention"]),
        "names 1 layers, and num_hidden_layers is 2",
    ),
    (dict(layer_types=["linear_attention"] * 2), "linear_attention, which is none of"),
    (dict(num_attention_heads=5, num_key_value_heads=2), "does not divide"),
]


@pytest.mark.parametrize("config, message", BAD_CONFIGS, ids=str)
def test_a_config_that_cannot_be_read(config, message, tmp_path, monkeypatch):
    """Named before a tensor is read."""
    folder = copied("llama", tmp_path, **config)
    monkeypatch.setattr(Tensors, "read", None)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)

    monkeypatch.setattr(Tensors, "read", None)
    refused(tmp_path, "is no model's folder: cannot read .*config.json")
    refused(FIXTURES / "gpt_oss", r"GptOssForCausalLM: .* experts \(mlp.experts")
    folder = copied("llama", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for spoilt, message in (
        (whole[:-1], "no whole safetensors file"),
        (whole[:100], "no whole safetensors file"),
        (b"\xff" * 8 + whole[8:], "no whole safetensors file"),
        (whole[:8] + b"[" + whole[9:], "no whole safetensors file"),
        (b"", "no whole safetensors file"),
    ):
        (folder / "model.safetensors").write_bytes(spoilt)
        refused(folder, message)
    (folder / "model.safetensors").unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json$")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pickled weights, which run code")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is no JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "is no JSON object, but a list")


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = from_pretrained(FIXTURES / "llama")

    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ulysses_jax.interop.pretrained.write", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    for options, message in (
        (dict(dtype="int8"), "dtype is float32, bfloat16, float16 or None"),
        (dict(max_tokens=-5), "max_tokens -5 is no length"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="not a object"):
        save_pretrained(object(), tmp_path / "out")


def test_a_device_reads_its_own_heads_alone(read):
    """Of a tensor whose parts come in turn, head by head of keys: each element once."""
    with jax.set_mesh(make_mesh(**OVER_TENSOR)):
        from_pretrained(FIXTURES / "qwen3_next")
    for part, rows in (("in_proj_qkvz", 2 * 2 * 4 + 2 * 6 * 6), ("in_proj_ba", 12)):
        name = f"model.layers.1.linear_attn.{part}.weight"
        assert sum(size for each, size in read if each == name) == rows * 24


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_experts=512), r"num_experts is 512, .* 4 of the 4 layers"),
        (dict(num_experts=None), "num_experts is 512"),  # what it is without
        (
            dict(num_experts=8, decoder_sparse_step=2, mlp_only_layers=[1]),
            r"num_experts is 8, .* 1 of the 4 layers are experts \(from layer 3 on",
        ),
        (dict(attention_bias=True), "attention_bias is True, biases beside"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', an activation"),
        (dict(layer_types=["sliding_attention"] * 4), "sliding_attention, which is"),
        (dict(linear_num_key_heads=4), "delta_key_heads 4 does not divide"),
        (dict(linear_key_head_dim=8), r"in_proj_qkvz.weight has shape \[88, 24\]"),
        (dict(linear_conv_kernel_dim=3), r"conv1d.weight has shape \[52, 1, 4\]"),
    ],
    ids=str,
)
def test_what_a_qwen3_next_may_not_have(changes, message, tmp_path, monkeypatch):
    folder = copied("qwen3_next", tmp_path, **changes)
    monkeypatch.setattr(Tensors, "read", None)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_experts_that_no_layer_has(tmp_path):
    """By either field; what is written says it by one."""
    folder = copied("qwen3_next", tmp_path, num_experts=8, mlp_only_layers=[0, 1, 2, 3])
    model = from_pretrained(folder)
    rope = dataclasses.replace(model.model.rope, base=50.0, fraction=1.0)
    model.model = dataclasses.replace(model.model, rope=rope)
    save_pretrained(model, tmp_path / "out")
    values = config_of(tmp_path / "out")
    assert (values["num_experts"], values["partial_rotary_factor"]) == (0, 1.0)
    assert model_of(values).rope == rope


def test_a_head_that_is_not_the_embedding(tmp_path):
    """Of a config that ties them; the same head is passed over."""
    folder = copied("gemma3", tmp_path)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    from_pretrained(folder)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="is not the embedding, which config.json ties"
    ):
        from_pretrained(folder)


def test_a_tensor_in_two_files(tmp_path):
    folder = copied_whole("llama", tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = tensors_of(folder)
    save_file(tensors, first)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, second)
    with pytest.raises(
        ValueError, match="model.norm.weight is in .*: a tensor is in one"
    ):
        from_pretrained(folder)


def test_an_index_that_cannot_be_followed(tmp_path):
    folder = copied_whole("llama", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, files = "model.norm.weight", index["weight_map"]
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / files[name]).read_bytes())
    other = next(file for file in files.values() if file != files[name])
    for placed, message in (
        ("../outside.safetensors", "which leaves the folder"),
        (str(outside), "which leaves the folder"),
        (other, f"says that {name} is in {other}, and it is in model-0000"),
        ("missing.safetensors", "missing.safetensors is no whole safetensors file"),
        (3, "is no index"),
    ):
        path.write_text(json.dumps({"weight_map": files | {name: placed}}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no index"):
        from_pretrained(folder)


def test_a_dtype_that_is_not_read(tmp_path):
    folder = copied("llama", tmp_path)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is stored as I8, and read"):
        from_pretrained(folder)


def test_parameters_are_made_where_they_lie():
    with jax.set_mesh(make_mesh(fsdp=2, seq=2, tensor=2)):
        model = from_pretrained(FIXTURES / "llama")
        plain = nnx.jit(lambda: Transformer(model.model, rngs=nnx.Rngs(0)))()
        assert_same(model, plain, lies_alike)
        abstract = described(plain)
        assert set(abstract) == {
            "embedding",
            "layers",
            "norm",
            "rest",
            "unembedding",
        } - (set() if model.rest else {"rest"})
        again = read_parameters(*open_source(model.model), abstract)
        np.testing.assert_array_equal(again["norm"]["scale"], model.norm.scale[...])
