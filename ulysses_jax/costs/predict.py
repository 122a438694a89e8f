"""How long a step should take on the target: a prediction, and how it is reckoned."""

from typing import Any

from ulysses_jax.config import Config, Model, in_pieces
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.costs.kernels import tile_products
from ulysses_jax.costs.matrices import matrix_elements
from ulysses_jax.costs.optimizer import optimizer_seconds
from ulysses_jax.costs.pairs import pairs_of
from ulysses_jax.costs.recurrences import (
    multiplied_again,
    recurrence_flops,
    state_passes_bytes,
)
from ulysses_jax.costs.targets import Target
from ulysses_jax.costs.traffic import feed_forward_is_tiled, num_passes
from ulysses_jax.lora import adapter_elements
from ulysses_jax.parallel.exchange import head_layout
from ulysses_jax.strategies import num_members

# Passes over HBM of elementwise work, forward, in elements of the compute dtype a token
# and layer: two norms and two residual sums touch D ten times; RoPE, casts and the
# exchange's layout touch q, k, v and out three times; the activation reads and writes
# four times F. Backward takes twice as much.
D_PASSES, QKV_PASSES, F_PASSES = 10, 3, 4
# At least, of a kernel that waits for the one before: its launch and its end; an
# estimate.
KERNEL_SECONDS = 3e-6


def predict(config: Config, target: Target, plan: dict[str, Any]) -> dict[str, Any]:
    """The time of a step from formulas and the program's schedule; nothing is measured.

    Args:
      config: placed on its mesh.
      plan: `compile.analyse`'s result, for the collectives and what stands under them,
        and the kernels of loops over chunks.

    Returns:
      `step_seconds` = matmul + attention + recurrence + elementwise + optimizer +
      exposed communication + exposed host, each as `*_seconds`;
      `communication_seconds` and `host_seconds`, exposed or not; `tokens_per_second` of
      the cluster; `mfu`, the FLOPs of a forward and backward pass without recomputation
      over the compute dtype's peak; `hfu`, with it; `model_flops` and `hardware_flops`
      of the whole step; `tflops_per_gpu`, of the model; `recomputed_flops_fraction`, of
      the hardware's. Tokens and FLOPs of the model are those of the sequence, time and
      FLOPs of the hardware those of the sequence as padded to the mesh.

    A collective is exposed by what its time exceeds the compute between its start and
    its done; collectives in flight together share that compute, so exposure is
    understated where many overlap each other, and overstated where compute that stands
    outside would have hidden it.

    Attention takes what the device with the most of it takes: over a ring whose tokens
    lie in the sequence's own order that is the last one.

    A recurrence takes what its FLOPs take, most of them of float32 states, as TF32; or,
    if that is more, `KERNEL_SECONDS` for each kernel of its loops over chunks: these
    are small, and each waits for the one before.

    Moves between host and device take their bytes, both ways, over PCIe's bandwidth in
    one direction: as if the two never overlapped. They are exposed by what exceeds the
    compute of the same place, such as one run of a loop's body: so the moves of the
    optimizer, beside which nothing is computed, all are.
    """
    devices = plan["num_devices"]
    flops = step_flops(config, config.padded_tokens())
    matmul = (flops["matmul"] + flops["matmul_recompute"]) / devices
    query_width = config.model.num_heads * (config.model.head_size or 0)
    flops["attention_recompute"] += (
        2.0
        * tile_products(config, plan["attention"])
        * query_width
        * config.training.batch_size
    )
    attention = flops["attention"] + flops["attention_recompute"]
    attention *= _head_padding(config) * _most_of_members(config) / devices
    recurrence = (flops["recurrence"] + flops["recurrence_recompute"]) / devices
    recurrence_rate = target.peak_flops_per_second("float32") * target.matmul_efficiency
    peak = target.peak_flops_per_second(config.model.compute_dtype)
    matmul_rate = peak * target.matmul_efficiency
    attention_rate = peak * target.attention_efficiency
    exposed = total = 0.0
    for each in plan["overlap"]["collectives"]:
        between = each["between_hosts_bytes"]
        seconds = link_seconds(target, each["bytes"] - between, between)
        hidden = (
            each["matmul_flops_between"] / matmul_rate
            + each["attention_flops_between"] / attention_rate
        )
        total += each["count"] * seconds
        exposed += each["count"] * max(seconds - hidden, 0)
    host_exposed = host_total = 0.0
    pcie = target.pcie_bytes_per_second * target.pcie_efficiency
    for each in plan["host_moves"]["places"]:
        seconds = (each["to_device_bytes"] + each["to_host_bytes"]) / pcie
        hidden = (
            each["matmul_flops"] / matmul_rate
            + each["attention_flops"] / attention_rate
        )
        host_total += each["count"] * seconds
        host_exposed += each["count"] * max(seconds - hidden, 0)
    parts = {
        "matmul_seconds": matmul / matmul_rate,
        "attention_seconds": attention / attention_rate,
        "recurrence_seconds": max(
            recurrence / recurrence_rate, plan["chunk_kernels"] * KERNEL_SECONDS
        ),
        "elementwise_seconds": _elementwise_bytes(config)
        / devices
        / target.memory_bytes_per_second,
        "optimizer_seconds": optimizer_seconds(
            config,
            target,
            plan["memory"]["optimizer_bytes"] + plan["memory"]["host_optimizer_bytes"],
        ),
        "exposed_communication_seconds": exposed,
        "exposed_host_seconds": host_exposed,
    }
    seconds = sum(parts.values())
    training = config.training
    model_flops = model_flops_of(step_flops(config, training.sequence_tokens))
    hardware_flops = sum(flops.values())
    recomputed = hardware_flops - model_flops_of(flops)
    return {
        "step_seconds": seconds,
        **parts,
        "communication_seconds": total,
        "host_seconds": host_total,
        "tokens_per_second": training.batch_size * training.sequence_tokens / seconds,
        "mfu": model_flops / seconds / devices / peak,
        "hfu": hardware_flops / seconds / devices / peak,
        "tflops_per_gpu": model_flops / seconds / devices / 1e12,
        "model_flops": model_flops,
        "hardware_flops": hardware_flops,
        "recomputed_flops_fraction": recomputed / hardware_flops,
    }


def link_seconds(target: Target, inside: float, between: float) -> float:
    """Of what a GPU sends inside its host and, at the same time, between hosts."""
    return max(
        inside / (target.nvlink_bytes_per_second * target.nvlink_efficiency),
        between / (target.network_bytes_per_second * target.network_efficiency),
    )


def step_flops(config: Config, span: int) -> dict[str, float]:
    """FLOPs of a step of the whole cluster, by formula, on sequences of `span` tokens.

    `matmul`: 2 a weight and token forward, 4 backward, 2 of a frozen one (embeddings
    are looked up, not multiplied). `attention`: with a causal mask 2 T^2 N H a sequence
    and layer forward and 4 backward; a layer's window narrows it, and documents packed
    into a sequence do (`pairs.Pairs`); heads that pad N to a multiple of seq are not
    counted. `recurrence`: `costs.recurrences.recurrence_flops`. `*_recompute`: what
    rematerialisation, and flash attention's backward (T^2 N H more), do again.
    """
    model, training = config.model, config.training
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    tokens = training.batch_size * span
    query_width = model.num_heads * model.head_size
    gated = 3 if model.is_gated else 2
    down = model.width * model.feed_forward_width
    layers, _ = matrix_elements(model)
    head = model.width * model.vocab_size
    # One product of all visible pairs, over batch and layers that attend.
    product = 2 * pairs_of(config).visible(span) * query_width * training.batch_size
    again = num_passes(config) > 2
    # Nothing reads what the feed-forward of a recomputed layer makes; its backward pass
    # reads the hidden activations, and in tiles makes them again, whether the layer is
    # recomputed or not.
    hidden = model.num_layers * (gated - 1) * down
    recomputed = again * (layers - model.num_layers * gated * down)
    recomputed += (again or feed_forward_is_tiled(config)) * hidden
    recomputed += multiplied_again(config)
    attention_again = again and config.memory.remat != "attention"
    frozen = layers + head if model.lora else 0
    adapters = model.num_layers * adapter_elements(model)
    return {
        "matmul": tokens * (6.0 * (layers + head + adapters) - 2.0 * frozen),
        "matmul_recompute": 2.0 * tokens * recomputed,
        "attention": 6.0 * product,
        # Kept out and logsumexp: the backward pass calls no forward.
        "attention_recompute": (1.0 + 2.0 * attention_again) * product,
    } | {name: tokens * each for name, each in recurrence_flops(config).items()}


def model_flops_of(flops: dict[str, float]) -> float:
    """Of `step_flops`, those of a forward and backward pass without recomputation."""
    return flops["matmul"] + flops["attention"] + flops["recurrence"]


def check_kinds(model: Model) -> None:
    """Refuses kinds of layers whose work no formula here counts.

    Raises:
      ValueError: names them.
    """
    known = ("full", "window", "sparse", *RECURRENT)
    if others := sorted(set(model.kinds()) - set(known)):
        raise ValueError(
            f"the plan knows layers of kind {', '.join(known)}, not "
            f"{', '.join(others)}: "
            "plan the run with one of these in their place (--model.pattern)"
        )


def _head_padding(config: Config) -> float:
    """Query slots a head: above 1 where heads do not divide over seq."""
    model, mesh = config.model, config.mesh
    assert model.num_kv_heads
    if model.strategy == "all_gather":
        return 1.0
    heads, kv_heads = (n // mesh.tensor for n in (model.num_heads, model.num_kv_heads))
    return head_layout(heads, kv_heads, mesh.seq).num_slots / heads


def _most_of_members(config: Config) -> float:
    """What the last member attends to over the mean, in the sequence's own order."""
    model, mesh, tokens = config.model, config.mesh, config.padded_tokens()
    assert model.strategy != "auto"
    members = num_members(model.strategy, mesh.ring, mesh.seq)
    if members == 1 or model.zigzag:
        return 1.0
    return pairs_of(config).most(tokens, members)


def _qkv(model: Model, kind: str) -> int:
    """Features of q, k, v and out of a layer."""
    assert model.num_kv_heads and model.head_size
    keys = model.num_kv_heads * model.head_size
    if kind in RECURRENT:
        sizes = model.state_sizes(kind)
        keys = sizes.num_key_heads * sizes.key_size
    return 2 * (model.attended_features(kind) + keys)


def _elementwise_bytes(config: Config) -> float:
    """HBM traffic of a step outside of matrix products and attention, whole cluster."""
    model, training = config.model, config.training
    assert model.feed_forward_width
    every = D_PASSES * model.width + F_PASSES * model.feed_forward_width
    elements = sum(every + QKV_PASSES * _qkv(model, kind) for kind in model.kinds())
    passes = 3 + (config.memory.remat != "none" or in_pieces(model, config.memory))
    size = 2 if model.compute_dtype == "bfloat16" else 4
    tokens = training.batch_size * config.padded_tokens()
    layers = elements * passes * size * tokens
    for kind in model.kinds():
        if kind in RECURRENT:
            layers += passes * tokens * state_passes_bytes(config, kind)
    # Logits are float32: written, read for the softmax, written and read as gradient.
    logits = 4 * 4 * model.vocab_size * tokens
    return layers + logits
