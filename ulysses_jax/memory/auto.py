"""`memory: auto`: the cheapest options with which a step fits its device and host."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_jax.config import Config, Memory, attended_features

GIB = 2**30
TILE_TOKENS, CHUNK_TOKENS, LEAST_CHUNK_TOKENS = 8192, 16384, 1024

# From the cheapest on: what each changes in the one before, and what that costs.
RUNGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("keep everything", {"remat": "none"}),
    ("recompute norms and activations", {"remat": "products"}),
    ("recompute all but attention", {"remat": "attention"}),
    ("tile the feed-forward", {"mlp_tile_tokens": TILE_TOKENS}),
    (
        "inputs and attention wait on the host",
        {"offload": ("inputs", "attention")},
    ),
    (
        "layers in chunks of tokens",
        {
            "sequence_chunk_tokens": CHUNK_TOKENS,
            "offload": ("inputs", "attention", "keys"),
        },
    ),
    (
        "recompute attention too",
        {"remat": "full", "offload": ("inputs", "keys")},
    ),
    ("the optimizer waits on the host", {"offload": ("inputs", "keys", "optimizer")}),
    (
        "parameters and gradients too",
        {"offload": ("inputs", "keys", "optimizer", "parameters")},
    ),
    (
        "an eighth of the inputs stays on the device",
        {"offload": ("inputs",), "offload_fraction": 0.875},
    ),
    (
        "and all state waits on the host",
        {"offload": ("inputs", "optimizer", "parameters")},
    ),
)


@dataclass(frozen=True)
class Fit:
    """What a step needs of a device and of its share of the host, and what there is."""

    device_bytes: int
    device_limit_bytes: int
    host_bytes: int
    host_limit_bytes: int

    @property
    def fits(self) -> bool:
        return (
            self.device_bytes <= self.device_limit_bytes
            and self.host_bytes <= self.host_limit_bytes
        )


def choose(
    config: Config, compiled: Callable[[Config], Fit], limits: Fit
) -> tuple[Config, list[dict[str, Any]]]:
    """The first rung that fits, from the cheapest on.

    Args:
      config: placed on its mesh, with `memory.auto`.
      compiled: compiles a step and says what it needs.
      limits: of the device and its share of the host; what is needed is ignored. Rungs
        whose kept values alone exceed them are not compiled.

    Returns:
      The config with that rung's options in place of `auto`; and what was tried:
      `rung`, `fits`, `is_compiled`, and the fields of `Fit`.

    Raises:
      ValueError: no rung fits; the message has the numbers of the last.
    """
    trials = []
    for name, memory in rungs(config):
        candidate = dataclasses.replace(config, memory=memory)
        device, host = kept_bytes(candidate)
        fit = dataclasses.replace(limits, device_bytes=device, host_bytes=host)
        is_compiled = fit.fits
        if is_compiled:
            fit = compiled(candidate)
        trials.append(
            {"rung": name, "fits": fit.fits, "is_compiled": is_compiled}
            | dataclasses.asdict(fit)
        )
        if fit.fits:
            return candidate, trials
    raise ValueError(
        "memory auto: nothing fits. "
        + "; ".join(map(describe, trials[-2:]))
        + f". Shorten the sequence ({config.training.sequence_tokens:,} tokens), or "
        "spread it over more devices"
    )


def rungs(config: Config) -> list[tuple[str, Memory]]:
    """The options of every rung, for the tokens that a device of this run has.

    Layers that attend are cut into chunks under the strategy ulysses alone, and all
    where some number of tokens, a multiple of 128, divides a device's; only parameters
    that are cut, at ZeRO's stage 3, go to the host. Without, those rungs are what else
    they say.
    """
    chunk = _chunk_tokens(config)
    may_wait = {"inputs", "attention", "optimizer"}
    may_wait |= {"keys"} if chunk and config.model.attending_kinds() else set()
    may_wait |= {"parameters"} if config.training.zero_stage == 3 else set()
    given = config.memory
    memory = Memory(loss_tile_tokens=given.loss_tile_tokens)
    found: list[tuple[str, Memory]] = []
    for name, changes in RUNGS:
        memory = dataclasses.replace(memory, **changes)
        offload = tuple(word for word in memory.offload if word in may_wait)
        # Else groups of heads hide nothing; the reference has no parts.
        has_groups = (
            memory.recomputes_products and config.model.attention != "reference"
        )
        head_chunks = given.head_chunks if has_groups else 1
        rung = dataclasses.replace(memory, offload=offload, head_chunks=head_chunks)
        if memory.sequence_chunk_tokens:
            rung = dataclasses.replace(rung, sequence_chunk_tokens=chunk)
        if rung not in [each for _, each in found]:
            found.append((name, rung))
    return found


def _chunk_tokens(config: Config) -> int | None:
    """The most tokens that a chunk may have; None: no chunks."""
    if config.model.attending_kinds() and (
        config.model.strategy not in ("auto", "ulysses")
        or config.model.attention == "reference"
    ):
        return None
    tokens = config.padded_tokens() // (config.mesh.ring * config.mesh.seq)
    if tokens <= LEAST_CHUNK_TOKENS:
        return tokens
    sizes = range(CHUNK_TOKENS, LEAST_CHUNK_TOKENS - 1, -128)
    return next((n for n in sizes if tokens % n == 0), None)


def kept_bytes(config: Config) -> tuple[int, int]:
    """What all layers keep for the backward pass, at least: of a device, of the host.

    The input of every layer; attention's output and the feed-forward's hidden
    activations where they are kept.
    """
    model, memory, mesh, training = (
        config.model,
        config.memory,
        config.mesh,
        config.training,
    )
    assert model.feed_forward_width and training.accumulation_steps
    rows = training.batch_size // training.accumulation_steps // mesh.data // mesh.fsdp
    tokens = rows * config.padded_tokens() // (mesh.ring * mesh.seq)
    item = 2 if model.compute_dtype == "bfloat16" else 4
    size = model.num_layers * item
    inputs = rows * config.residual_tokens() * size * model.width
    heads = tokens * item * attended_features(model, memory) // mesh.tensor
    attention = 0 if memory.remat == "full" else heads
    hidden = tokens * size * model.feed_forward_width // mesh.tensor
    hidden = 0 if memory.recomputes_products else hidden
    kept = memory.kept_features(model.width) / model.width
    moved = round(inputs * (1 - kept)) * ("inputs" in memory.offload)
    moved_attention = attention * ("attention" in memory.offload)
    host = moved + moved_attention
    return inputs + attention + hidden - host, host


def describe(trial: dict[str, Any]) -> str:
    """A line on what was tried."""
    least = "" if trial["is_compiled"] else "at least "
    device, host = (
        f"{least}{trial[f'{where}_bytes'] / GIB:,.1f} of "
        f"{trial[f'{where}_limit_bytes'] / GIB:,.1f} GiB {of}"
        for where, of in (("device", "of a device"), ("host", "of its host"))
    )
    return f"{trial['rung']}: {device}, {host}"
