"""The trainer's step, compiled for GPUs that are not there; needs the CUDA plugin."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from ulysses_jax import config as configs
from ulysses_jax.attention.cudnn import cudnn_gradients
from ulysses_jax.attention.mask import Mask
from ulysses_jax.complete import complete
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.predict import step_flops
from ulysses_jax.costs.targets import TARGETS, Target, parse_gpus
from ulysses_jax.plan.compile import (
    PlanError,
    analyse,
    cluster_devices,
    compile_step,
)
from ulysses_jax.plan.worker import plan_step

pytestmark = pytest.mark.plan

H100 = TARGETS["h100"]


def tiny(
    *,
    num_kv_heads=4,
    tokens=1024,
    batch_size=4,
    memory=None,
    strategy="auto",
    **degrees,
):
    config = configs.Config(
        model=configs.Model(
            vocab_size=512,
            width=256,
            num_layers=2,
            num_heads=8,
            num_kv_heads=num_kv_heads,
            head_size=64,
            feed_forward_width=512,
            strategy=strategy,
        ),
        data=configs.Data(mask_documents=False),
        training=configs.Training(batch_size=batch_size, sequence_tokens=tokens),
        mesh=configs.Mesh(**degrees),
        memory=configs.Memory(**(memory or {})),
    )
    return complete(config, name="tiny")


def plan(config: configs.Config, gpus: str = "h100:1x8"):
    target, hosts, gpus_per_host = parse_gpus(gpus)
    program = compile_step(config, target, hosts, gpus_per_host)
    return analyse(program, target, gpus_per_host)


def exchange(result):
    rows = result["traffic"]
    return next(
        r for r in rows if (r["collective"], r["axis"]) == ("all-to-all", "seq")
    )


@pytest.mark.parametrize(
    "degrees",
    [
        dict(data=2, seq=4),
        dict(fsdp=4, seq=2),
        dict(data=2, seq=2, tensor=2),
        dict(seq=8),
    ],
    ids=str,
)
def test_a_step_sends_what_the_formulas_say(degrees):
    result = plan(tiny(strategy="ulysses", **degrees))
    assert exchange(result)["ratio"] == pytest.approx(1, abs=0.01)
    for row in result["traffic"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
    assert result["warnings"] == []
    # cuDNN attends: XLA sees its call, and its backward's workspace is estimated.
    assert result["attention_flops"] > 0
    memory = result["memory"]
    assert "cuDNN workspace" in {each["name"] for each in memory["estimated"]}
    assert 0 < memory["device_bytes"] < memory["limit_bytes"] and memory["fits"]
    assert memory["host_bytes_per_device"] == 0


def test_muon_exchanges_matrices_as_the_formula_says():
    """And keeps one moment of a matrix in the place of two."""
    config = tiny(strategy="ulysses", seq=8)
    training = replace(config.training, optimizer="muon")
    adamw, muon = plan(config), plan(replace(config, training=training))
    for row in muon["traffic"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
    elements = 2 * 256 * (2 * 512 + 2 * 256 + 3 * 512)  # of matrices in two layers
    more = exchange(muon)["bytes"] - exchange(adamw)["bytes"]
    # A layer's matrices on each device, padded from 2 layers to 8: 7/8 sent, and back.
    assert more == 2 * 4 * elements / 2 * 7 / 8
    less = adamw["memory"]["optimizer_bytes"] - muon["memory"]["optimizer_bytes"]
    assert less == pytest.approx(4 * elements / 8, abs=16)


@pytest.mark.parametrize(
    "remat, degrees, attention",
    [
        (
            "full",
            dict(ring=2, seq=4),
            {"all-to-all": "seq", "collective-permute": "ring"},
        ),
        ("attention", dict(ring=4, fsdp=2), {"collective-permute": "ring"}),
        ("none", dict(ring=8), {"collective-permute": "ring"}),
        (
            "full",
            dict(fsdp=4, seq=2, strategy="all_gather"),
            {"all-gather": "seq", "reduce-scatter": "seq"},
        ),
        (
            "full",
            dict(fsdp=2, seq=4, strategy="megatron"),
            {"all-gather": "seq", "reduce-scatter": "seq"},
        ),
        (
            "none",
            dict(data=2, seq=2, tensor=2, strategy="megatron"),
            {"all-gather": "seq+tensor", "reduce-scatter": "seq+tensor"},
        ),
    ],
    ids=str,
)
def test_every_strategy_sends_its_formula_and_attends_half(remat, degrees, attention):
    """cuDNN in every block, and what a causal mask hides is not computed."""
    config = tiny(memory=dict(remat=remat), **degrees)
    # Tables large beside the positions, which megatron gathers too.
    config = replace(config, model=replace(config.model, vocab_size=4096))
    result = plan(config)
    keys = {(row["collective"], row["axis"]) for row in result["traffic"]}
    assert keys >= set(attention.items())
    for row in result["traffic"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
    assert result["warnings"] == []
    products = 2 + 5 + 2 * (remat == "full")
    rows, layers, width = 4, 2, 8 * 64
    half = products * rows * layers * 1024**2 * width / 8
    assert result["attention_flops"] == half


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "degrees, steps, changes",
    [
        (dict(fsdp=2, seq=4), 1, {}),
        (dict(data=2, seq=2, tensor=2), 1, dict(tied_embeddings=True)),
        (dict(data=2, fsdp=2, seq=2), 2, {}),
        (dict(fsdp=2, seq=4), 2, dict(tied_embeddings=True)),
    ],
    ids=str,
)
def test_each_stage_of_zero_sends_what_the_formulas_say(degrees, steps, changes, stage):
    config = tiny(batch_size=8, **degrees)
    result = plan(
        replace(
            config,
            model=replace(config.model, **changes),
            training=replace(
                config.training, accumulation_steps=steps, zero_stage=stage
            ),
        )
    )
    assert result["warnings"] == []
    spread = "+".join(axis for axis in ("data", "fsdp", "seq") if axis in degrees)
    zero = spread.removeprefix("data+")
    has_data = "data" in degrees
    rows = {(row["collective"], row["axis"]): row for row in result["traffic"]}
    expected = {
        1: [("all-reduce", spread), ("all-gather", zero)],
        2: [("reduce-scatter", zero), ("all-gather", zero)],
        3: [("reduce-scatter", zero), ("all-gather", zero)],
    }[stage] + [("all-reduce", "data")] * (stage > 1 and has_data)
    for key in expected:
        if key[0] == "all-reduce" and (steps > 1 or changes) and stage > 1:
            # XLA moves the sums of tables behind the accumulation, and with jax 0.12
            # adds a tied table's two gradients before it sums them.
            assert 0.8 < rows[key]["ratio"] < 1.01
        else:
            assert rows[key]["ratio"] == pytest.approx(1, abs=0.01), key
    if stage == 1:  # of sums, XLA scatters those that it then cuts
        scatters = {axis for kind, axis in rows if kind == "reduce-scatter"}
        assert scatters - {"tensor"} == (set() if has_data else {zero})
    once = rows["all-gather", zero]["phases"]
    assert (set(once) == {"update"}) == (stage < 3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "degrees",
    [
        dict(fsdp=2, ring=2, seq=2),
        dict(data=2, ring=2, tensor=2),
        dict(ring=2, seq=2, tensor=2),
        dict(fsdp=2, seq=4, strategy="megatron"),
        dict(data=2, seq=2, tensor=2, strategy="megatron"),
        dict(fsdp=4, seq=2, strategy="all_gather"),
    ],
    ids=str,
)
def test_each_stage_with_every_strategy(degrees, stage):
    """Sent and kept; a part of megatron's layers is one over seq too."""
    config = tiny(**degrees)
    # Tables large beside the positions, which megatron gathers too.
    config = replace(config, model=replace(config.model, vocab_size=4096))
    result = plan(replace(config, training=replace(config.training, zero_stage=stage)))
    assert result["warnings"] == []
    gathers = 0
    for row in result["traffic"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
            gathers += row["collective"] == "all-gather" and "update" in row["phases"]
    assert (gathers > 0) == (stage < 3)
    tensor, seq = degrees.get("tensor", 1), degrees.get("seq", 1)
    is_megatron = degrees.get("strategy") == "megatron"
    layers = 2 * (256 * 64 * 2 * (8 + 4) + 3 * 256 * 512) // tensor
    tables, vectors = 2 * 4096 * 256 // tensor, (2 * 2 + 1) * 256
    shards = math.prod(degrees.get(axis, 1) for axis in ("fsdp", "ring", "seq"))
    cut = 4 * ((layers + tables) // shards + vectors)
    whole = 4 * (layers // (seq if is_megatron else 1) + tables + vectors)
    memory = result["memory"]
    assert memory["parameters_bytes"] == (cut if stage == 3 else whole)
    assert memory["gradients_bytes"] == (whole if stage == 1 else cut)
    assert memory["optimizer_bytes"] == pytest.approx(2 * cut, abs=16)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_are_gathered_once_a_pass_and_not_once_a_tile(remat):
    result = plan(tiny(fsdp=4, seq=2, memory=dict(remat=remat, mlp_tile_tokens=100)))
    for row in result["traffic"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
    assert result["warnings"] == []


@pytest.mark.parametrize(
    "options, forwards",
    [
        (dict(remat="none"), 1),
        (dict(remat="full"), 2),
        (dict(remat="attention"), 1),
    ],
    ids=str,
)
def test_kept_attention_calls_its_forward_once(options, forwards):
    """Calls in the program: of one layer."""
    config = tiny(data=2, seq=4, memory=options)
    program = compile_step(config, H100, 1, 8)
    assert program.text.count('custom_call_target="__cudnn$fmhaSoftmax"') == forwards
    name = 'custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    assert program.text.count(name) == 1
    result = analyse(program, H100, 8)
    assert result["warnings"] == []
    assert exchange(result)["ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_groups_of_heads_keep_attention_too(remat):
    """One call a group, of all tokens; XLA may write the last layer out by itself."""
    config = tiny(data=2, seq=4, memory=dict(remat=remat, head_chunks=2))
    program = compile_step(config, H100, 1, 8)
    calls = [
        "transpose(jvp())/" in each.op_name
        for _, each in parse(program.text).top_level()
        if each.custom_call_target == "__cudnn$fmhaSoftmax"
    ]
    assert calls.count(False) == 2
    assert calls.count(True) in ({0} if remat == "attention" else {2, 4})
    result = analyse(program, H100, 8)
    assert result["warnings"] == []
    assert exchange(result)["ratio"] == pytest.approx(1, abs=0.01)


LARGE = dict(
    width=4096, num_heads=32, num_kv_heads=8, head_size=128, feed_forward_width=14336
)


@cache
def large(hosts, head_chunks):
    """Two layers of Llama-3-8B at 131,072 tokens, one sequence a host of 8 GPUs."""
    config = tiny(
        tokens=2**17,
        batch_size=hosts,
        seq=8,
        fsdp=hosts,
        memory=dict(head_chunks=head_chunks),
    )
    return replace(config, model=replace(config.model, **LARGE))


@pytest.mark.parametrize("head_chunks", [1, 4])
def test_copies_around_exchanges(head_chunks):
    """Forward, of [T/8, 4096] activations: attention's output and a quarter, values."""
    copies = plan(large(1, head_chunks))["copies"]["phases"]["forward"]
    assert copies == pytest.approx(1.25 * 2**17 / 8 * 4096 * 2)


@pytest.mark.parametrize("hosts", [1, 8])
def test_exchanges_and_gathers_run_under_compute(hosts):
    """With 4 groups of heads. A KV head a GPU, so that keys and values, a fifth, and of
    the rest a quarter, can have no attention beside them: it hides 3 of 5 at most."""
    overlap = plan(large(hosts, 4), f"h100:{hosts}x8")["overlap"]
    assert all(each >= 0.75 for each in overlap["exchange_phases"].values())
    assert 0.35 < overlap["exchange_attention_fraction"] < 0.6
    parameters = "seq" if hosts == 1 else "fsdp+seq"
    assert overlap["fractions"][f"all-gather over {parameters}"] > 0.7


def over_tensor(tokens, *, strategy="ulysses", num_layers=2):
    config = tiny(
        tokens=tokens,
        seq=4,
        tensor=2,
        strategy=strategy,
        num_kv_heads=8,
        batch_size=1,
    )
    return plan(replace(config, model=replace(config.model, num_layers=num_layers)))


@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_sums_over_tensor_are_scattered(strategy):
    rows = over_tensor(8192, strategy=strategy)["traffic"]
    sent = {(row["collective"], row["axis"]): row["bytes"] for row in rows}
    summed = sum(n for (kind, _), n in sent.items() if kind == "all-reduce")
    assert summed < 8192 // 4 * 256 * 2 / 4  # a quarter of one activation
    assert any(kind == "reduce-scatter" and "tensor" in axis for kind, axis in sent)


def test_inputs_of_layers_are_kept_over_tensor_too():
    """Half of what they take where tokens do not divide over tensor."""

    def growth(tokens):
        few, many = (
            over_tensor(tokens, num_layers=n)["memory"]["activations_bytes"]
            for n in (8, 24)
        )
        return (many - few) / 16

    inputs = 32768 // 4 * 256 * 2
    assert growth(32772) - growth(32768) == pytest.approx(inputs / 2, rel=0.1)


def test_two_collectives_in_flight_hide_the_sums_of_gradients(monkeypatch):
    """On 64 GPUs; with one in flight, which XLA_FLAGS may ask for, none is hidden."""
    name = "reduce-scatter over fsdp+seq"
    assert plan(large(8, 1), "h100:8x8")["overlap"]["fractions"][name] > 0.75
    flag = "--xla_gpu_experimental_parallel_collective_overlap_limit=1"
    monkeypatch.setenv("XLA_FLAGS", flag)
    one = plan_step(large(8, 1), H100, 8, 8, use_cache=False)
    assert one["overlap"]["fractions"][name] < 0.1


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_a_layer_in_chunks(remat):
    """Kept attention: two calls forward (of a block's own keys, of those before) and no
    more; keys and values, 16 KV slots of [4096, 64] in 8 chunks, on the host."""
    config = tiny(
        seq=8,
        num_kv_heads=8,
        tokens=32768,
        batch_size=1,
        memory=dict(remat=remat, sequence_chunk_tokens=512),
    )
    program = compile_step(config, H100, 1, 8)
    calls = program.text.count('custom_call_target="__cudnn$fmhaSoftmax"')
    assert calls == 2 if remat == "attention" else calls > 2
    result = analyse(program, H100, 8)
    assert result["warnings"] == []
    assert exchange(result)["ratio"] == pytest.approx(1, abs=0.01)
    assert result["memory"]["host_bytes_per_device"] == 0

    offload = ("inputs", "keys") + ("attention",) * (remat == "attention")
    offloaded = plan(replace(config, memory=replace(config.memory, offload=offload)))
    keys = 2 * 32768 * 64 * 2
    inputs = 2 * 4096 * 256 * 2
    kept = 2 * 4096 * 8 * (64 * 2 + 4) if remat == "attention" else 0
    host = offloaded["memory"]["host_bytes_per_device"]
    assert host == pytest.approx(keys + inputs + kept, rel=0.01)


@pytest.mark.parametrize("name", TARGETS)
def test_xla_accepts_every_target(name):
    result = plan(tiny(fsdp=2, seq=4), f"{name}:1x8")
    assert result["memory"]["limit_bytes"] == TARGETS[name].memory_bytes
    assert result["attention_flops"] > 0


@cache
def over_fsdp(hosts, batch_size):
    """The exchange of seq 8, in a host, under an fsdp that takes what is left."""
    config = tiny(seq=8, fsdp=-1, num_kv_heads=8, batch_size=batch_size)
    return exchange(plan(config, f"h100:{hosts}x8"))


@cache
def over_seq(seq, tokens):
    """The exchange of one sequence over all GPUs: 64 heads, so that each has some."""
    config = tiny(seq=seq, tokens=tokens, batch_size=1)
    heads = dict(num_heads=64, num_kv_heads=64, head_size=8)
    config = replace(config, model=replace(config.model, **heads))
    return exchange(plan(config, f"h100:{seq // 8}x8"))


def test_weak_scaling_from_8_to_1024_gpus():
    """GPUs and rows grow together: each GPU sends the same, inside its host."""
    few = over_fsdp(1, batch_size=1)
    for hosts in (8, 128):
        many = over_fsdp(hosts, batch_size=hosts)
        assert many["bytes"] == pytest.approx(few["bytes"], rel=0.01)
        assert many["ratio"] == pytest.approx(1, abs=0.01)
        assert many["link"] == few["link"] == "within a host"


def test_weak_scaling_of_one_sequence():
    """GPUs and tokens grow together: only the share sent away, (P-1)/P, grows."""
    eight = over_seq(8, 4096)
    assert eight["link"] == "within a host"
    many = over_seq(64, 32_768)
    assert many["ratio"] == pytest.approx(1, abs=0.01)
    a_share = many["bytes"] / (63 / 64)
    assert a_share == pytest.approx(eight["bytes"] / (7 / 8), rel=0.01)
    assert many["link"] == "between hosts"


def test_strong_scaling_falls_as_the_number_of_gpus():
    many, few = over_fsdp(128, batch_size=128), over_fsdp(1, batch_size=128)
    assert many["bytes"] * 128 == pytest.approx(few["bytes"], rel=0.01)
    many, few = over_seq(64, 32_768), over_seq(8, 32_768)
    a_share = many["bytes"] / (63 / 64)
    assert a_share * 8 == pytest.approx(few["bytes"] / (7 / 8), rel=0.01)
    assert few["ratio"] == pytest.approx(1, abs=0.01)


FLOPS = {
    "rematerialised, more GPUs than KV heads": (dict(seq=8, num_kv_heads=2), {}),
    "a window": (dict(data=2, seq=4), dict(window=256, pattern=("window",))),
    "a GPT over tensor, nothing recomputed, in parts": (
        dict(data=2, seq=2, tensor=2, strategy="ulysses"),
        dict(
            steps=2,
            remat="none",
            feed_forward="gelu",
            norm="layer",
            positions="learned",
            tied=True,
        ),
    ),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_by_formula_are_those_of_the_program(name):
    """Equal to the last: no tile is padded, and the mask is causal."""
    arguments, changes = FLOPS[name]
    changes = dict(changes)
    config = tiny(**arguments)
    steps, remat = changes.pop("steps", 1), changes.pop("remat", "full")
    if "tied" in changes:
        changes["tied_embeddings"] = changes.pop("tied")
        changes["max_positions"] = config.training.sequence_tokens
    config = replace(
        config,
        model=replace(config.model, **changes),
        training=replace(config.training, accumulation_steps=steps),
        memory=configs.Memory(remat=remat),
    )
    result = plan(config)
    flops = step_flops(config, config.training.sequence_tokens)
    for what in ("matmul", "attention"):
        formula = flops[what] + flops[f"{what}_recompute"]
        assert result[f"{what}_flops"] * result["num_devices"] == formula, what
    if remat == "full":
        assert flops["matmul_recompute"] > 0


def test_an_exchange_across_hosts_says_so():
    row = exchange(plan(tiny(seq=8, batch_size=1), "h100:2x4"))
    assert row["link"] == "between hosts"
    assert row["between_hosts_bytes"] == pytest.approx(row["bytes"] * 4 / 7)


def test_a_needless_all_gather_is_reported(plant_needless_gather):
    plant_needless_gather()
    (warning,) = plan(tiny(fsdp=2, seq=4))["warnings"]
    assert "all-gather over fsdp+seq sends 1." in warning


def test_a_target_that_xla_refuses():
    target = replace(H100, description='one quote: "')
    with pytest.raises(PlanError, match="XLA refuses the target h100"):
        compile_step(tiny(seq=8), target, 1, 8)


def test_from_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = plan_step(tiny(fsdp=-1, seq=4), H100, 1, 8)
    assert result["mesh"]["fsdp"] == 2 and not result["is_cached"]
    assert plan_step(tiny(fsdp=-1, seq=4), H100, 1, 8)["is_cached"]
    old: Target = replace(H100, compute_capability=(3, 5))
    with pytest.raises(PlanError, match="XLA cannot compile"):
        plan_step(tiny(seq=8), old, 1, 8)
    with pytest.raises(ValueError, match="batch_size"):
        plan_step(tiny(fsdp=-1, seq=4, batch_size=1), H100, 1, 8)


def test_cudnn_pulls_back_a_part_without_its_forward():
    """The backward kernel reads the out and logsumexp that it is given."""
    device = cluster_devices(H100, 1, 1)[0]
    one = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    q, k = array(2, 512, 8, 128), array(2, 512, 2, 128)
    logsumexp = array(2, 8, 512, dtype=jnp.float32)

    def gradients(q, k, v, given_out, given_logsumexp, dout):
        return cudnn_gradients(
            q, k, v, given_out, given_logsumexp, dout, mask=Mask(causal=True)
        )

    text = (
        jax.jit(gradients)
        .trace(q, k, k, q, logsumexp, q)
        .lower(lowering_platforms=("cuda",))
        .compile()
        .as_text()
    )
    assert text is not None
    calls = [line for line in text.splitlines() if "custom_call_target" in line]
    assert len(calls) == 1 and "__cudnn$fmhaSoftmaxBackward" in calls[0]
    assert "%given_out" in calls[0] and "%given_logsumexp" in calls[0]
