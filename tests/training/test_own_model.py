"""A user's own module, trained by the trainer as by a plain loop on one device."""

import collections
import dataclasses
import functools
import math
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from files import ROOT
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import Mesh as Devices
from jax.sharding import PartitionSpec as P
from shared_programs import shared_programs as shared_programs
from slow import slow_but_for

from ulysses_jax import Transformer, make_mesh, ulysses_attention
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Memory, Mesh, Model, Run, Training
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.data.loader import batches
from ulysses_jax.data.open import open_data
from ulysses_jax.models import Layer
from ulysses_jax.placement import place
from ulysses_jax.training import load_run, train
from ulysses_jax.training.metrics import read_rows
from ulysses_jax.training.prepare import prepared
from ulysses_jax.training.state import abstract_state, first_state, shard_bytes
from ulysses_jax.training.step import abstract_batch, jit_train_step

V, D, N, B, T, STEPS = 264, 16, 4, 4, 32, 4
DEGREES = dict(fsdp=2, seq=4)
AT_EMBED, AT_QKV = (None, "fsdp"), (("fsdp", "seq"), None)


def said(init, sharding):
    return nnx.with_partitioning(init, sharding)


class Mine(nnx.Module):
    """No part of it is this library's but for the attention."""

    def __init__(self, model, *, rngs):
        normal = nnx.initializers.normal(0.1)
        self.embed = nnx.Embed(
            model.vocab_size, D, embedding_init=said(normal, AT_EMBED), rngs=rngs
        )
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        init = said(normal, AT_QKV)
        # A bias of keys would have no gradient, but for rounding.
        self.qkv = nnx.Linear(D, 3 * D, use_bias=False, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(D, D, rngs=rngs)
        self.unembed = nnx.Linear(D, model.vocab_size, use_bias=False, rngs=rngs)

    @property
    def head(self):
        """An array."""
        return self.unembed.kernel[...].T

    def attend(self, q, k, v, segment_ids):
        return ulysses_attention(q, k, v, segment_ids=segment_ids)

    def features(self, tokens, positions, segment_ids):
        x = self.embed(tokens) + jnp.sin(positions / 7.0)[..., None]
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], N, -1) for y in (q, k, v))
        return x + self.out(self.attend(q, k, v, segment_ids).reshape(x.shape))


def dense(q, k, v, segment_ids=None):
    """Attention on one device, without this library."""
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    logits = jnp.where(seen, logits, -1e30)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits), v)


class Dense(Mine):
    def attend(self, q, k, v, segment_ids):
        return dense(q, k, v, segment_ids)


class Tied(Mine):
    """Its head is a parameter, cut as no weight of this library is."""

    def __init__(self, model, *, rngs):
        super().__init__(model, rngs=rngs)
        del self.unembed
        init = said(nnx.initializers.normal(0.1), ("seq", "tensor"))
        self.embed = nnx.Embed(model.vocab_size, D, embedding_init=init, rngs=rngs)

    @property
    def head(self):
        return self.embed.embedding


class TiedDense(Tied, Dense):
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Documents of a few lengths, so that most rows pack more than one."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for i in range(40):
        line = bytes(rng.choice(list(b"abcde"), rng.integers(8, 30)).tolist()) + b"\n"
        (folder / f"{i}.txt").write_bytes(line)
    return str(folder)


@pytest.fixture(scope="module")
def make_config(files):
    def make(folder="never", *, mesh=None, memory=None, data=None, **training):
        steps = dict(num_steps=STEPS, batch_size=B, sequence_tokens=T)
        rate = dict(learning_rate=0.02, warmup_steps=1, weight_decay=0.3)
        checks = dict(validation_batches=0)
        return Config(
            run=Run(folder=str(folder)),
            model=Model(vocab_size=V, width=D, num_layers=1, num_heads=N),
            data=Data(files=files, **(data or {})),
            training=Training(**steps | rate | checks | training),
            mesh=Mesh(**(mesh or DEGREES)),
            memory=Memory(**{"loss_tile_tokens": 7, **(memory or {})}),
            quiet=True,
        )

    return make


PAGE = (ROOT / "docs" / "own_model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that docs/own_model.md has after its first block, run as it stands."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "docs", folder / "docs")
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        exec(BLOCKS[0], found)
    return SimpleNamespace(**found, folder=folder / "runs" / "mine")


def at(page, folder):
    """The page's config, from anywhere."""
    return dataclasses.replace(
        page.config,
        run=Run(folder=str(folder)),
        data=Data(files=str(page.folder.parents[1] / "docs" / "*.md")),
        quiet=True,
    )


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


def plain_loop(config, make_model=Dense):
    """Flax and optax alone: the losses, and the module after the last step."""
    config = place(complete(config, name="plain"), vars(Mesh()))
    training, data = config.training, open_data(config)
    with nnx.use_eager_sharding(False):  # or Flax asks for a mesh
        model = make_model(config.model, rngs=nnx.Rngs(config.run.seed))
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        training.learning_rate,
        training.warmup_steps,
        training.num_steps,
        training.final_learning_rate,
    )
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    chain = optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            rate,
            training.beta1,
            training.beta2,
            weight_decay=training.weight_decay,
            mask=matrices,
        ),
    )
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def objective(model):
            ids = batch["tokens"], batch["positions"], batch.get("segment_ids")
            logits = model.features(*ids) @ model.head[...].T
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.maximum(batch["labels"], 0)
            )
            valid = batch["labels"] >= 0
            return jnp.where(valid, each, 0).sum() / valid.sum()

        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    here = SingleDeviceSharding(jax.devices()[0])
    shape = 1, training.batch_size, training.sequence_tokens
    stream = batches(data.train, shape, here, seed=config.run.seed)
    found = []
    for _ in range(training.num_steps):
        batch = {name: values[0] for name, values in next(stream).items()}
        found.append(float(step(model, optimizer, batch)))
    return found, model


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module))


def assert_same(got, want):
    """By arrays: AdamW makes the rounding of a gradient near 0 a part of a step."""

    def near(got, want):
        got, want = np.asarray(got), np.asarray(want)
        assert np.linalg.norm(got - want) < 2e-5 * np.linalg.norm(want)

    jax.tree.map(near, parameters(got), parameters(want))


def test_it_learns_as_a_plain_loop_does(page):
    """Losses and parameters: of packed documents, over fsdp=2 x seq=4."""
    names = {}
    exec(BLOCKS[0].split("config = ")[0], names)
    names["ulysses_attention"] = dense
    want, module = plain_loop(at(page, "never"), names["Mine"])
    assert want[-1] < want[0] - 1
    np.testing.assert_allclose(losses(page.folder), want, rtol=1e-5)
    assert_same(page.model, module)
    last = read_rows(page.folder / "metrics.jsonl")[-1]
    assert last["step"] == 10 and last["validation_loss"] < want[0] - 1


def test_the_page_s_module_lies_as_it_says(page):
    """What `train` returns: parameters over fsdp and seq, a norm whole."""
    model = page.model
    for variable, spec in (
        (model.qkv.kernel, P(("fsdp", "seq"), None)),
        (model.head, P(None, ("fsdp", "seq"))),
        (model.norm.scale, P()),
    ):
        array = variable[...]
        want = NamedSharding(array.sharding.mesh, spec)
        assert array.sharding.is_equivalent_to(want, array.ndim)


def test_it_resumes(page, tmp_path, capsys):
    """After step 5, as if it had never stopped; then there is nothing left to do."""
    shutil.copytree(page.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    config = at(page, tmp_path / "run")
    resumed = train(config, make_model=page.Mine)
    assert "resuming after step 5 of 10" in capsys.readouterr().out
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(page.folder), rtol=1e-6)
    assert_same(resumed, page.model)
    assert_same(train(config, make_model=page.Mine), page.model)
    assert "nothing left to do" in capsys.readouterr().out


def test_it_is_loaded_on_other_meshes(page):
    """On none, and on one without the axes that its parameters name; and both it and
    what `train` returned are called under the mesh on which they lie."""
    assert_same(load_run(page.folder, make_model=page.Mine), page.model)
    loaded_before = load_run(page.folder, make_model=page.Mine)
    alone = Devices(np.array(jax.devices()[:4]), ("seq",))
    ids = np.arange(B * T).reshape(B, T) % V, np.arange(T)[None], None
    call = nnx.jit(lambda model: model.features(*ids))
    with jax.set_mesh(make_mesh(**DEGREES)):
        want = np.asarray(call(page.model))
    with jax.set_mesh(alone):
        model = load_run(page.folder, make_model=page.Mine)
        assert not model.qkv.kernel[...].sharding.is_fully_replicated
        np.testing.assert_allclose(call(model), want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(call(loaded_before), want, rtol=0, atol=1e-5)


def test_what_is_no_run_s_folder(page):
    """But lies in one, or is no make_model."""
    for inside in ("config.yaml", "checkpoints", "checkpoints/10"):
        with pytest.raises(ValueError, match=f"no run.s folder: .* {page.folder}$"):
            load_run(page.folder / inside, make_model=page.Mine)
    for make_model in (page.model, "Mine"):
        with pytest.raises(ValueError, match="give a class or a function, not a .* th"):
            load_run(page.folder, make_model=make_model)


def test_another_class_is_refused(page):
    class Other(page.Mine):
        pass

    message = "checkpoint is of a Mine, and make_model makes a {}: give the make_model"
    with pytest.raises(ValueError, match=message.format("Other")):
        train(at(page, page.folder), make_model=Other)
    with pytest.raises(ValueError, match=message.format("Transformer")):
        load_run(page.folder)


@pytest.mark.slow
def test_the_page_s_own_loop(page):
    found = vars(page)
    before = jax.sharding.get_mesh()
    try:
        exec(BLOCKS[1], found)
    finally:
        jax.set_mesh(before)
    assert found["losses"][-1] < found["losses"][0] - 0.3


def placed(config, make_model, mesh):
    config = prepared(complete(config, name="test"), make_model)
    return place(config, dict(mesh.shape))


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_and_moments_lie_as_they_say(make_config, stage):
    """At stage 1 parameters are whole, and their moments cut all the same."""
    mesh = make_mesh(**DEGREES, axis_type=AxisType.Explicit)
    config = placed(make_config(zero_stage=stage), Mine, mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(config, Mine)
    moments = state.optimizer[1][0]

    def shards(tree):
        arrays = (
            tree["embed"]["embedding"],
            tree["qkv"]["kernel"],
            tree["out"]["kernel"],
        )
        return [x.sharding.shard_shape(x.shape) for x in arrays]

    cut, whole = [(V, D // 2), (D // 8, 3 * D), (D, D)], [(V, D), (D, 3 * D), (D, D)]
    assert shards(moments.mu) == shards(moments.nu) == cut
    assert shards(state.parameters) == (whole if stage == 1 else cut)


ON_TENSOR = dict(mesh=dict(data=2, seq=2, tensor=2))


@pytest.mark.parametrize(
    "changed",
    slow_but_for(
        [ON_TENSOR | dict(accumulation_steps=2)],
        [
            ON_TENSOR | dict(accumulation_steps=2),
            ON_TENSOR,
            dict(accumulation_steps=2),
            dict(zero_stage=1),
        ],
    ),
)
def test_the_same_losses_on_other_meshes(make_config, tmp_path, changed):
    """And with gradients in parts, and with a head that is an array."""
    config = make_config(tmp_path, **changed)
    model = train(config, make_model=Mine)
    want, module = plain_loop(config)
    np.testing.assert_allclose(losses(tmp_path), want, rtol=1e-5)
    assert_same(model, module)


@pytest.mark.slow
def test_a_head_that_is_a_parameter(make_config, tmp_path):
    """V over seq, D over tensor, and without document masks, so without segment_ids."""
    config = make_config(tmp_path, data=dict(mask_documents=False))
    model = train(config, make_model=Tied)
    want, dense = plain_loop(config, TiedDense)
    np.testing.assert_allclose(losses(tmp_path), want, rtol=1e-5)
    assert_same(model, dense)


def compiled_step(config, make_model):
    mesh = make_mesh(**DEGREES, axis_type=AxisType.Explicit)
    config = placed(config, make_model, mesh)
    with jax.set_mesh(mesh):
        step = jit_train_step(config, "cpu", make_model)
        step = step.trace(abstract_state(config, make_model), abstract_batch(config))
        return step.lower().compile()


def row(*values):
    return "| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in values)


def test_the_page_s_bytes_of_a_state(page):
    for degrees in ({}, dict(fsdp=2), dict(seq=4), DEGREES):
        num = math.prod(degrees.values())
        devices = jax.devices()[:num]
        mesh = make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)
        found = []
        for stage in (3, 1):
            training = dataclasses.replace(page.config.training, zero_stage=stage)
            config = dataclasses.replace(page.config, training=training)
            config = placed(config, page.Mine, mesh)
            with jax.set_mesh(mesh):
                state = abstract_state(config, page.Mine)
            moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
            found.append((shard_bytes(state.parameters), shard_bytes(moments)))
        name = " x ".join(f"{axis}={n}" for axis, n in degrees.items())
        assert row(name or "one device", *found[0]) in PAGE
        assert found[1] == (360_960, found[0][1])  # at stage 1 parameters are whole


@pytest.mark.parametrize("tokens", slow_but_for([512], [512, 1024]))
def test_the_page_s_collectives(page, tokens):
    """An exchange is an all-to-all, and of all else that is sent no array is larger
    than a parameter: no device gathers a sequence's activations."""
    training = dataclasses.replace(page.config.training, sequence_tokens=tokens)
    config = dataclasses.replace(page.config, training=training)
    step = compiled_step(config, page.Mine)
    degrees = vars(Mesh(**DEGREES))
    kinds = collections.defaultdict(list)
    for each in find_collectives(parse(step.as_text()), degrees, gpus_per_host=8):
        is_sum = each.kind in ("all-reduce", "reduce-scatter")
        kinds["sums" if is_sum else f"{each.kind} over {each.axes}"].append(each)
    column = 2 if tokens == 512 else 3
    rows = {
        "all-to-all over seq": "all-to-all over seq",
        "all-gather over fsdp+seq": "all-gather over fsdp+seq",
        "all-gather over seq": "all-gather over seq",
        "sums": "reduce-scatter and all-reduce",
    }
    for name, said in rows.items():
        found = [each for each in kinds.pop(name) if each.sent_bytes]
        (line,) = re.findall(rf"^\| {re.escape(said)}:.*", PAGE, re.MULTILINE)
        count = sum(each.count for each in found)
        sent = round(sum(each.count * each.sent_bytes for each in found))
        cells = line.strip("| ").split(" | ")
        assert (cells[1], cells[column]) == (f"{count:,}", f"{sent:,}"), name
        largest = max(array.num_bytes for each in found for array in each.results)
        assert name == "all-to-all over seq" or largest <= 320 * 64 * 4
    assert not kinds
    local = 4 // 2 * tokens // 4 * 64 * 4  # bytes of q, or of x, on a device
    assert 4 * local > 320 * 64 * 4 and f"{8 * local * 3 // 4:,}" in PAGE


class Bare(nnx.Module):
    def __init__(self, model, *, rngs):
        self.embed = nnx.Embed(model.vocab_size, D, rngs=rngs)


class Headless(Bare):
    def features(self, tokens, positions, segment_ids):
        return self.embed(tokens)


class Headed(Headless):
    @property
    def head(self):
        return self.embed.embedding


class Transposed(Headless):
    @property
    def head(self):
        return self.embed.embedding[...].T


def with_part(**parts):
    """`Headed`, and one module or variable more."""

    class Whole(Headed):
        def __init__(self, model, *, rngs):
            super().__init__(model, rngs=rngs)
            for name, make in parts.items():
                setattr(self, name, make(rngs))

    return Whole


class Summed(Headed):
    def features(self, tokens, positions, segment_ids):
        return self.embed(tokens).sum(axis=1)


class Short(Headed):
    def features(self, tokens, positions):
        return self.embed(tokens)


class Narrow(Headed):
    def features(self, tokens, positions, segment_ids):
        return self.embed(tokens)[..., :8]


@pytest.mark.parametrize(
    "make_model, message",
    [
        (Bare, r"Bare has no features: a model to train has features\(tokens, pos"),
        (Headless, r"Headless has no head: .* float32 \[vocab_size, D\]"),
        (Transposed, r"head has shape \(16, 264\), and model.vocab_size is 264: .*tr"),
        (
            with_part(
                up=lambda rngs: nnx.Linear(D, D, param_dtype=jnp.bfloat16, rngs=rngs)
            ),
            "Whole.up.bias is bfloat16: parameters are float32",
        ),
        (
            with_part(norm=lambda rngs: nnx.BatchNorm(D, rngs=rngs)),
            "Whole.norm.mean is a BatchStat, and the trainer keeps parameters alone",
        ),
        (
            with_part(drop=lambda rngs: nnx.Dropout(0.1, rngs=rngs)),
            r"Whole.drop.rngs.* is a Rng\w+, and the trainer keeps parameters alone",
        ),
        (
            with_part(scale=lambda rngs: jnp.ones(D)),
            "Whole.scale is an array by itself, .*: make it an nnx.Param",
        ),
        (
            with_part(
                up=lambda rngs: nnx.Param(
                    jnp.ones((D, D)), out_sharding=(None, "model")
                )
            ),
            "Whole.up lies over an axis 'model', and the mesh of a run has data, fsdp",
        ),
        (
            with_part(
                up=lambda rngs: nnx.Param(jnp.ones((D, 3)), out_sharding=(None, "seq"))
            ),
            r"dim 1 of an array of shape \(16, 3\), 3, does not divide over seq=4",
        ),
        (
            Summed,
            r"features returned \(4, 16\) for tokens of \(4, 32\) and a head of \(264, "
            r"16\): it must return \(4, 32, 16\)",
        ),
        (Short, r"Short.features cannot be called with tokens, positions, segment_ids"),
        (Narrow, r"features returned \(4, 32, 8\) .* must return \(4, 32, 16\)"),
    ],
)
def test_modules_that_are_refused(make_config, tmp_path, make_model, message):
    """Before anything is compiled or written."""
    with pytest.raises(ValueError, match=message):
        train(make_config(tmp_path / "run"), make_model=make_model)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "memory",
    [
        dict(auto=True),
        dict(remat="attention"),
        dict(offload=("optimizer",)),
        dict(mlp_tile_tokens=4),
        dict(head_chunks=2),
        dict(sequence_chunk_tokens=4),
    ],
    ids=lambda memory: next(iter(memory)),
)
def test_memory_options_are_refused(make_config, memory):
    ((name, value),) = memory.items()
    with pytest.raises(ValueError) as met:
        train(make_config(memory=memory), make_model=Headed)
    assert str(met.value).startswith(f"memory.{name} {value} acts on the layers of")
    assert "Headed is none: leave it out, and use nnx.remat" in str(met.value)


def test_muon_is_refused(make_config):
    with pytest.raises(ValueError, match="muon steps .* Headed is none.* use adamw"):
        train(make_config(optimizer="muon"), make_model=Headed)


def test_zero_stage_2_is_refused(make_config):
    with pytest.raises(ValueError, match="zero_stage 2 cuts .* Headed is none: use 3"):
        train(make_config(zero_stage=2), make_model=Headed)


def test_the_mesh_of_the_caller_is_none_of_a_run_s(make_config):
    """Whose sizes need not divide over it."""
    with jax.set_mesh(make_mesh(tensor=8)):
        config = dataclasses.replace(
            make_config(), model=Model(num_heads=3, width=24, vocab_size=V)
        )
        assert prepared(config, Transformer) is config
        prepared(make_config(), Mine)


class Squared(nnx.Module):
    """A feed-forward of another library's layers."""

    def __init__(self, rngs):
        self.up = nnx.Linear(D, 24, rngs=rngs)
        self.down = nnx.Linear(24, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.square(self.up(x)))


class MyLayer(Layer):
    def __init__(self, model, *, rngs, kind=None):
        super().__init__(model, rngs=rngs, kind=kind)
        self.feed_forward = Squared(rngs)


@pytest.mark.slow
def test_a_transformer_of_ones_own_layers(make_config):
    """With this library's memory options, on a mesh: the loss of the module by itself
    on one device, then a lower one."""
    make_model = functools.partial(Transformer, make_layer=MyLayer)
    mesh = make_mesh(**DEGREES, axis_type=AxisType.Explicit)
    config = make_config(
        memory=dict(remat="full", mlp_tile_tokens=3), data=dict(mask_documents=False)
    )
    model = dataclasses.replace(
        config.model, compute_dtype="float32", attention="reference"
    )
    config = placed(dataclasses.replace(config, model=model), make_model, mesh)
    tokens = np.random.default_rng(0).integers(0, V, (1, B, T), np.int32)
    labels = np.roll(tokens, -1, axis=-1)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)

    @jax.jit
    def alone():
        logits = make_model(config.model, rngs=nnx.Rngs(config.run.seed))(tokens[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[0]).mean()

    want = float(alone())
    with jax.set_mesh(mesh):
        state, step = first_state(config, make_model), compiled_step(config, make_model)
        names = {"tokens": tokens, "labels": labels, "positions": positions}
        batch = {
            name: jax.device_put(names[name], of.sharding)
            for name, of in abstract_batch(config).items()
        }
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found[0], want, rtol=1e-5)
    assert found[2] < found[0] - 0.1
