"""How many groups of heads a run exchanges, where the config leaves it open."""

import dataclasses
import statistics

from ulysses_jax.config import Config
from ulysses_jax.costs.pairs import pairs_of
from ulysses_jax.costs.predict import link_seconds, step_flops
from ulysses_jax.costs.reckoning import share_outside
from ulysses_jax.costs.targets import Target
from ulysses_jax.costs.traffic import received_by
from ulysses_jax.parallel.exchange import head_layout
from ulysses_jax.parallel.ulysses import head_chunk_counts
from ulysses_jax.placement import place

MOST_CHUNKS = 8
# A group's own four exchanges and dozen kernels; an estimate.
GROUP_SECONDS = 1e-4
# Of a layer's forward pass: groups that save less are not worth their memory.
LEAST_SAVING = 0.01


def place_on(
    config: Config, degrees: dict[str, int], target: Target | None, gpus_per_host: int
) -> Config:
    """`placement.place`, with `memory.head_chunks` as the time model says where it is
    left open: 1 where the target is unknown.

    Raises:
      ValueError: as `place`.
    """
    placed = place(config, degrees)
    if config.memory.head_chunks is not None or target is None:
        return placed
    chunks = cheapest_head_chunks(placed, target, gpus_per_host)
    return dataclasses.replace(
        placed, memory=dataclasses.replace(placed.memory, head_chunks=chunks)
    )


def cheapest_head_chunks(config: Config, target: Target, gpus_per_host: int) -> int:
    """The groups with which a layer's exchanges take the least beside its attention;
    of layers that attend.

    Of the seconds E of an exchange forward and A of attention, c groups leave
    `E/c + max(E - A, 0) (c-1)/c` that no attention hides (the mean over layers, where
    their windows differ), and cost `GROUP_SECONDS` each. One group, unless more save
    `LEAST_SAVING` of the layer. So within a host, where E is small, one group mostly;
    between hosts, several.

    Args:
      config: placed.
    """
    model, memory, mesh = config.model, config.memory, config.mesh
    assert model.num_kv_heads
    if (
        model.strategy != "ulysses"
        or mesh.seq == 1
        or not memory.recomputes_products  # all groups are projected before the first
        or model.attention == "reference"
        or not model.attending_kinds()
    ):
        return 1
    training = config.training
    assert training.accumulation_steps
    rows = training.batch_size // (training.accumulation_steps * mesh.data * mesh.fsdp)
    (sent,) = received_by(config, "ulysses", ring=1, seq=mesh.seq).values()
    share = share_outside("all-to-all", mesh.seq, mesh.tensor, gpus_per_host)
    exchange = rows * link_seconds(target, sent[0] * (1 - share), sent[0] * share)
    # Forward is a third of a step; a layer's part of it on one GPU, of its rows.
    flops = step_flops(config, config.padded_tokens())
    part = 3 * training.batch_size / rows * mesh.seq * mesh.tensor
    peak = target.peak_flops_per_second(model.compute_dtype)
    kinds = model.attending_kinds()
    attention = flops["attention"] / part / len(kinds)
    attention /= peak * target.attention_efficiency
    matmul = flops["matmul"] / part / model.num_layers
    layer = attention + matmul / (peak * target.matmul_efficiency)

    span = config.padded_tokens()
    pairs = [pairs_of(config, (kind,)).visible(span) for kind in kinds]
    spared = [attention * each / statistics.fmean(pairs) for each in pairs]

    def seconds(chunks: int) -> float:
        over = statistics.fmean(max(exchange - each, 0) for each in spared)
        exposed = exchange + over * (chunks - 1)
        return exposed / chunks + chunks * GROUP_SECONDS

    layout = head_layout(
        model.num_heads // mesh.tensor, model.num_kv_heads // mesh.tensor, mesh.seq
    )
    counts = head_chunk_counts(layout.num_kv_slots // mesh.seq, layout.group)
    best = min((n for n in counts if n <= MOST_CHUNKS), key=seconds)
    return best if seconds(1) - seconds(best) >= LEAST_SAVING * layer else 1
