"""The prediction: FLOPs counted by hand, time from a plan made by hand."""

import dataclasses
import math

import pytest

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.costs import predict as prediction
from ulysses_jax.costs.kernels import tile_products
from ulysses_jax.costs.predict import predict
from ulysses_jax.costs.targets import TARGETS

# A GPU of round figures: 1 TFLOP/s, 1 GB/s of HBM, 100 MB/s of NVLink, 10 of network.
GPU = dataclasses.replace(
    TARGETS["h100"],
    bf16_flops_per_second=1e12,
    memory_bytes_per_second=1e9,
    nvlink_bytes_per_second=1e8,
    network_bytes_per_second=1e7,
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    nvlink_efficiency=0.5,
    network_efficiency=0.5,
)


def run(*, mesh=None, memory=None, tokens=1024, batch_size=4, parts=1, **model):
    defaults = dict(
        vocab_size=512,
        width=256,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_size=64,
        feed_forward_width=512,
    )
    config = configs.Config(
        model=configs.Model(**defaults | model),
        training=configs.Training(
            batch_size=batch_size, sequence_tokens=tokens, accumulation_steps=parts
        ),
        mesh=configs.Mesh(**mesh or dict(fsdp=2, seq=4)),
        memory=configs.Memory(**memory or {}),
    )
    config = complete(config, name="run")
    return placement.place(config, dataclasses.asdict(config.mesh))


def step_flops(config):
    return prediction.step_flops(config, config.padded_tokens())


def plan(
    config,
    *collectives,
    optimizer_bytes=0,
    host_optimizer_bytes=0,
    moves=(),
    kernel="cudnn",
    chunk_kernels=0,
):
    blank = dict(
        count=1,
        bytes=0.0,
        between_hosts_bytes=0.0,
        matmul_flops_between=0,
        attention_flops_between=0,
    )
    return {
        "num_devices": 8,
        "chunk_kernels": chunk_kernels,
        "memory": {
            "optimizer_bytes": optimizer_bytes,
            "host_optimizer_bytes": host_optimizer_bytes,
        },
        "host_moves": {"places": list(moves)},
        "attention": [
            {"kind": kind, "layers": config.model.kinds().count(kind), "kernel": kernel}
            for kind in dict.fromkeys(config.model.attending_kinds())
        ],
        "overlap": {"collectives": [blank | each for each in collectives]},
    }


def test_flops_by_hand():
    # A token of a layer meets q 256x512, k and v 256x256, out 512x256, and gate, up
    # and down of 256x512: 393,216 + 393,216 = 786,432 weights, of the down 131,072.
    # The head is 256x512 = 131,072. 4 sequences of 1,024 are 4,096 tokens.
    flops = step_flops(run())
    assert flops["matmul"] == 6 * 4096 * (2 * 786_432 + 131_072)
    assert flops["matmul_recompute"] == 2 * 4096 * 2 * (786_432 - 131_072)
    # q k^T of 4 sequences, 2 layers, 8 heads of 64, half of 1,024^2 pairs, 2 a product.
    product = 4 * 2 * 2 * 8 * 64 * (1024 * 1024 // 2)
    assert flops["attention"] == 6 * product  # 2 forward, 4 backward
    assert flops["attention_recompute"] == 3 * product  # 1 by flash, 2 by remat


@pytest.mark.parametrize(
    "memory, weights, products",
    [
        (dict(remat="none"), 0, 1),
        (dict(remat="attention"), 786_432 - 131_072, 1),
        # Tiles make gate and up again by themselves; a layer in pieces all.
        (dict(remat="none", mlp_tile_tokens=128), 2 * 131_072, 1),
        (dict(remat="none", mlp_tile_tokens=512), 0, 1),  # all of a device's
        (dict(remat="full", mlp_tile_tokens=128), 786_432 - 131_072, 3),
        (dict(remat="none", sequence_chunk_tokens=64), 786_432 - 131_072, 3),
        (dict(remat="attention", sequence_chunk_tokens=64), 786_432 - 131_072, 1),
    ],
    ids=str,
)
def test_flops_of_what_is_recomputed(memory, weights, products):
    """By the weights of a layer as above, and products of attention."""
    full, found = step_flops(run()), step_flops(run(memory=memory))
    assert found["matmul_recompute"] == 2 * 4096 * 2 * weights
    assert found["attention_recompute"] == products * full["attention"] / 6
    assert (found["matmul"], found["attention"]) == (full["matmul"], full["attention"])


def test_flops_of_other_models():
    base = step_flops(run())
    # Fewer KV heads: smaller k and v, the same attention.
    grouped = step_flops(run(num_kv_heads=1))
    assert grouped["attention"] == base["attention"]
    less = 2 * 2 * 256 * 3 * 64  # k and v, 2 layers, 3 heads of 64 fewer
    assert base["matmul"] - grouped["matmul"] == 6 * 4096 * less
    # GELU has no gate; a tied head multiplies all the same.
    plain = step_flops(run(feed_forward="gelu", tied_embeddings=True))
    assert base["matmul"] - plain["matmul"] == 6 * 4096 * 2 * 256 * 512
    # Of a window of 100, the first 100 tokens see half, the others all.
    narrow = step_flops(run(window=100))
    pairs = 100 * 1024 - 100 * 100 / 2
    assert narrow["attention"] / base["attention"] == pairs / (1024 * 1024 / 2)
    assert step_flops(run(window=5000)) == base
    # Of three layers whose pattern is full and window, the last is full too.
    mixed = step_flops(run(num_layers=3, pattern=("full", "window"), window=100))
    by_hand = 2 * base["attention"] / 2 + narrow["attention"] / 2
    assert mixed["attention"] == by_hand
    assert mixed["attention_recompute"] == by_hand / 2
    # The step is the same work in parts, and on any mesh.
    assert step_flops(run(parts=2)) == step_flops(run(mesh=dict(seq=8))) == base
    # Tokens are those of the padded sequence.
    assert step_flops(run(tokens=1021)) == base


def test_tiles_of_a_backward_pass_take_time():
    """Of a kernel that computes whole tiles; 8 heads of 64, 4 sequences, 8 GPUs."""
    config = run()
    plain, tiled = (
        predict(config, GPU, plan(config, kernel=name)) for name in ("cudnn", "mosaic")
    )
    rows = plan(config, kernel="mosaic")["attention"]
    more = 2 * tile_products(config, rows) * 8 * 64 * 4 / 8
    assert more > 0
    gained = tiled["attention_seconds"] - plain["attention_seconds"]
    assert gained == pytest.approx(more / 0.25e12)
    assert tiled["model_flops"] == plain["model_flops"]


def test_documents_shorten_a_step():
    config = run()
    data = dataclasses.replace(config.data, document_tokens=64)
    packed = dataclasses.replace(config, data=data)
    base, found = step_flops(config), step_flops(packed)
    pairs = 64 * 1024 - 64 * 64 * (1 - math.exp(-16))
    assert found["attention"] / base["attention"] == pytest.approx(
        pairs / (1024**2 / 2)
    )
    assert found["matmul"] == base["matmul"]
    long, short = (predict(each, GPU, plan(each)) for each in (config, packed))
    assert short["step_seconds"] < long["step_seconds"]


def test_time_by_hand():
    config = run()
    flops = step_flops(config)
    found = predict(config, GPU, plan(config, optimizer_bytes=8000))
    matmul = (flops["matmul"] + flops["matmul_recompute"]) / 8
    attention = (flops["attention"] + flops["attention_recompute"]) / 8
    assert found["matmul_seconds"] == pytest.approx(matmul / 0.5e12)
    assert found["attention_seconds"] == pytest.approx(attention / 0.25e12)
    # 1,000 parameters: 7 float32 each, over 1 GB/s.
    assert found["optimizer_seconds"] == pytest.approx(28_000 / 1e9)
    # A token and layer: 10 of D, 3 of q, k, v and out, 4 of F; four passes, 2 bytes;
    # and four float32 of V a token.
    elements = 10 * 256 + 3 * (8 + 4 + 4 + 8) * 64 + 4 * 512
    moved = 4096 / 8 * (2 * elements * 4 * 2 + 4 * 4 * 512)
    assert found["elementwise_seconds"] == pytest.approx(moved / 1e9)
    assert found["exposed_communication_seconds"] == 0
    parts = ("matmul", "attention", "elementwise", "optimizer", "exposed_communication")
    seconds = sum(found[f"{part}_seconds"] for part in parts)
    assert found["step_seconds"] == pytest.approx(seconds)
    assert found["tokens_per_second"] == pytest.approx(4096 / seconds)
    model = flops["matmul"] + flops["attention"]
    assert found["mfu"] == pytest.approx(model / seconds / 8e12)
    assert found["tflops_per_gpu"] == pytest.approx(model / seconds / 8 / 1e12)
    assert found["hfu"] > found["mfu"]
    assert found["hardware_flops"] == sum(flops.values())


@pytest.mark.parametrize(
    ("collective", "exposed", "total"),
    [
        # 50 MB at half of 100 MB/s: a second.
        (dict(bytes=50e6), 1, 1),
        (dict(bytes=50e6, count=3), 3, 3),
        # Half a second of matrix products stands between, or of attention.
        (dict(bytes=50e6, matmul_flops_between=0.25e12), 0.5, 1),
        (dict(bytes=50e6, attention_flops_between=0.125e12), 0.5, 1),
        (
            dict(
                bytes=50e6,
                matmul_flops_between=0.125e12,
                attention_flops_between=0.0625e12,
            ),
            0.5,
            1,
        ),
        (dict(bytes=50e6, matmul_flops_between=9e12, count=2), 0, 2),
        # Between hosts at half of 10 MB/s, at the same time as within one.
        (dict(bytes=5e6, between_hosts_bytes=5e6), 1, 1),
        (dict(bytes=55e6, between_hosts_bytes=5e6), 1, 1),
        (dict(bytes=105e6, between_hosts_bytes=5e6), 2, 2),
    ],
)
def test_communication_by_hand(collective, exposed, total):
    config = run()
    quiet = predict(config, GPU, plan(config))
    found = predict(config, GPU, plan(config, collective))
    assert found["exposed_communication_seconds"] == pytest.approx(exposed)
    assert found["communication_seconds"] == pytest.approx(total)
    grown = found["step_seconds"] - quiet["step_seconds"]
    assert grown == pytest.approx(exposed)


def test_moves_to_and_from_the_host_by_hand():
    """8 and 24 MB over PCIe of 80 MB/s: 0.4 s, of which a layer's compute hides 0.3."""
    config = run()
    gpu = dataclasses.replace(GPU, pcie_bytes_per_second=1e8, pcie_efficiency=0.8)
    layer = dict(
        name="layers",
        count=3,
        to_device_bytes=8e6,
        to_host_bytes=24e6,
        matmul_flops=0.1 * 0.5e12,
        attention_flops=0.2 * 0.25e12,
    )
    update = layer | dict(name="update", count=2, matmul_flops=0, attention_flops=0)
    hidden = layer | dict(name="hidden", matmul_flops=1e12)
    still = predict(config, gpu, plan(config))
    found = predict(config, gpu, plan(config, moves=(layer, update, hidden)))
    assert found["host_seconds"] == pytest.approx((3 + 2 + 3) * 0.4)
    assert found["exposed_host_seconds"] == pytest.approx(3 * 0.1 + 2 * 0.4)
    longer = found["step_seconds"] - still["step_seconds"]
    assert longer == pytest.approx(found["exposed_host_seconds"])
    # The optimizer reads and writes the same in either memory.
    device = predict(config, gpu, plan(config, optimizer_bytes=8000))
    host = predict(config, gpu, plan(config, host_optimizer_bytes=8000))
    assert host["optimizer_seconds"] == device["optimizer_seconds"] > 0


def test_compute_hides_only_what_it_stands_under():
    """One collective's spare compute does not hide another's."""
    config = run()
    found = predict(
        config,
        GPU,
        plan(config, dict(bytes=50e6, matmul_flops_between=9e12), dict(bytes=50e6)),
    )
    assert found["exposed_communication_seconds"] == pytest.approx(1)
    assert found["communication_seconds"] == pytest.approx(2)


def test_more_tokens_take_longer_and_use_the_gpu_better():
    rows = []
    for tokens in (1000, 1001, 1024, 2048, 65_536, 2**20):
        config = run(tokens=tokens)
        rows.append(predict(config, GPU, plan(config, dict(bytes=5e6))))
    seconds = [row["step_seconds"] for row in rows]
    # 1,001 is padded to 1,004 over seq 4.
    assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
    assert rows[-1]["attention_seconds"] == pytest.approx(
        256 * rows[-2]["attention_seconds"]
    )
    assert rows[-1]["matmul_seconds"] == pytest.approx(16 * rows[-2]["matmul_seconds"])
    assert all(0 < row["mfu"] < 0.5 for row in rows)


def test_padding_takes_time_and_is_no_work_of_the_model():
    """1,021 tokens are computed as 1,024 over seq 4, and count as 1,021."""
    padded, even = run(tokens=1021), run(tokens=1024)
    found, full = (predict(each, GPU, plan(each)) for each in (padded, even))
    assert found["step_seconds"] == full["step_seconds"]
    assert found["hardware_flops"] == full["hardware_flops"]
    assert found["hfu"] == full["hfu"]
    part, flops = 1021 / 1024, step_flops(even)
    model = flops["matmul"] * part + flops["attention"] * part**2
    assert found["model_flops"] == pytest.approx(model)
    assert found["mfu"] == pytest.approx(model / full["step_seconds"] / 8e12)
    assert found["tokens_per_second"] == pytest.approx(full["tokens_per_second"] * part)


def test_float32_runs_at_the_peak_of_tf32():
    config = run(compute_dtype="float32")
    found, narrow = predict(config, GPU, plan(config)), predict(run(), GPU, plan(run()))
    for part in ("matmul_seconds", "attention_seconds"):
        assert found[part] == pytest.approx(2 * narrow[part])
    ratio = found["mfu"] / narrow["mfu"]
    assert ratio == pytest.approx(2 * narrow["step_seconds"] / found["step_seconds"])


def test_heads_that_do_not_divide_take_longer_and_are_no_model_flops():
    even = run(num_heads=16, num_kv_heads=16)
    heads = dict(num_heads=16, num_kv_heads=16, strategy="ulysses")
    uneven = run(**heads, mesh=dict(seq=3), batch_size=1)
    two = run(**heads, mesh=dict(seq=2), batch_size=1)
    assert step_flops(uneven)["attention"] == pytest.approx(
        step_flops(two)["attention"], rel=0.01
    )
    times = [
        predict(each, GPU, plan(each) | {"num_devices": each.mesh.seq})
        for each in (uneven, two)
    ]
    # 16 heads over 3 devices are 18 slots.
    ratio = times[0]["attention_seconds"] / times[1]["attention_seconds"]
    assert ratio == pytest.approx(18 / 16 * 2 / 3, rel=0.01)
    parts = step_flops(even)
    seconds = predict(even, GPU, plan(even))["attention_seconds"]
    both = parts["attention"] + parts["attention_recompute"]
    assert seconds == pytest.approx(both / 8 / 0.25e12)


def test_the_last_of_a_ring_attends_the_most_in_the_sequences_own_order():
    ring = dict(mesh=dict(ring=2, seq=2, fsdp=2), strategy="hybrid")
    own, zigzag = (
        predict(config, GPU, plan(config))
        for config in (run(**ring, zigzag=False), run(**ring, zigzag=True))
    )
    ratio = own["attention_seconds"] / zigzag["attention_seconds"]
    assert ratio == pytest.approx(2 - 1 / 2)


def test_a_kind_of_your_own_is_not_counted():
    with pytest.raises(ValueError, match="plan knows .* linear, delta, not mine: .*in"):
        prediction.check_kinds(run(pattern=("full", "mine")).model)
    prediction.check_kinds(run(pattern=("full",)).model)
