"""What a run says of itself before it starts: its size, its mesh, its padding."""

import itertools
import math
from collections.abc import Sequence

import jax

from ulysses_jax.config import Config, Model
from ulysses_jax.data.open import counted
from ulysses_jax.parallel.exchange import head_layout
from ulysses_jax.sharding import ZERO, zero_axes
from ulysses_jax.strategies import shared_out
from ulysses_jax.training.state import TrainState

# What a traced program calls where these attend: jax.nn's primitive, tokamax's kernel.
_CALLED = {"cudnn": "dot_product_attention_fwd", "mosaic": "flash_attention_sm90"}


def describe(config: Config, state: TrainState, attention: str) -> list[str]:
    """The run in a few lines; `config` is placed, `state` may be abstract.

    Args:
      attention: what a device computes, as `attention_of` says.
    """
    model, mesh = config.model, config.mesh
    assert model.num_kv_heads is not None
    layers = counted(model.num_layers, "layer")
    lines = [f"{_size(state)}, {layers}; {_work(config)}{_strategy(config)}"]
    lines.append(f"attention {attention}{_kinds(model)}; memory {_memory(config)}")
    lines += _padding(config)
    heads = model.num_heads // mesh.tensor
    layout = head_layout(heads, model.num_kv_heads // mesh.tensor, mesh.seq)
    if layout.num_slots > heads and model.strategy != "all_gather":
        lines.append(
            shared_out(model.num_heads, "heads", heads, tensor=mesh.tensor)
            + f", and seq is {mesh.seq}: padded to {layout.num_slots}, attention costs "
            f"{layout.num_slots / heads:.2f} times"
        )
    axes = vars(mesh)
    zero = zero_axes(model.width, axes)
    copies = math.prod(axes[a] for a in ZERO) // math.prod(axes[a] for a in zero)
    if copies > 1:
        lines.append(
            f"model.width {model.width} does not divide over fsdp {mesh.fsdp} x ring "
            f"{mesh.ring} x seq {mesh.seq}: what training.zero_stage cuts lies in "
            f"{copies} copies there"
        )
    return lines


def describe_own(config: Config, state: TrainState, name: str) -> list[str]:
    """The same of a user's own module."""
    return [
        f"{_size(state)} of {name}; {_work(config)}",
        "attention and memory are its own; zero_stage "
        f"{config.training.zero_stage}, where its parameters say how they lie",
        *_padding(config),
    ]


def describe_lengths(configs: Sequence[Config]) -> list[str]:
    """How the steps of each length are run; placed configs, the shortest first."""
    return [
        f"steps of {config.training.sequence_tokens:,} tokens: "
        f"{counted(config.training.batch_size, 'row')}, mesh {_degrees(config)}"
        + _strategy(config)
        for config in configs
    ]


def _strategy(config: Config) -> str:
    """Of a sequence that is spread."""
    model, mesh = config.model, config.mesh
    if mesh.ring * mesh.seq == 1:
        return ""
    order = ", tokens in zigzag order" if config.zigzag_members() > 1 else ""
    chunks = config.memory.head_chunks or 1
    groups = f", heads in {chunks} groups" if chunks > 1 else ""
    return f"; strategy {model.strategy}{order}{groups}"


def _padding(config: Config) -> list[str]:
    mesh, tokens = config.mesh, config.training.sequence_tokens
    padding = config.padded_tokens() - tokens
    if not padding:
        return []
    halves = "half-blocks of " if config.zigzag_members() > 1 else ""
    return [
        f"{counted(tokens, 'token')} do not divide over {halves}ring {mesh.ring} x seq "
        f"{mesh.seq}: each sequence is padded with {counted(padding, 'masked token')}"
    ]


def _size(state: TrainState) -> str:
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(tree))
        for tree in (state.parameters, state.frozen)
    )
    of = f" to train, of adapters; {frozen:,} that stay as they are" if frozen else ""
    return f"{trained:,} parameters{of}"


def _work(config: Config) -> str:
    training = config.training
    return (
        f"{training.batch_size} x {training.sequence_tokens:,} tokens a step of "
        f"{training.optimizer}; mesh {_degrees(config)}"
    )


def _degrees(config: Config) -> str:
    degrees = {axis: n for axis, n in vars(config.mesh).items() if n > 1}
    return " x ".join(f"{a}={n}" for a, n in (degrees or {"devices": 1}).items())


def _kinds(model: Model) -> str:
    """The pattern, where not all layers are full."""
    assert model.pattern
    if set(model.pattern) == {"full"}:
        return ""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(model.pattern)]
    names = [kind if n == 1 else f"{n} {kind}" for kind, n in runs]
    sees = f" (of {model.window:,} tokens)" if model.window is not None else ""
    if model.sparse is not None:
        sees += f" ({model.sparse}, blocks of {model.sparse_block_tokens} tokens)"
    return f", in layers {', '.join(names)}{sees}"


def attention_of(config: Config, platform: str, step: jax.stages.Traced) -> str:
    """The attention that a traced step runs, by its name in `model.attention`."""
    if config.model.attention != "auto":
        return config.model.attention
    # On GPUs the mask and the shapes decide: the program itself says what they did.
    text = str(step.jaxpr) if platform in ("gpu", "cuda") else ""
    names = [name for name, called in _CALLED.items() if called in text]
    return " and ".join(names) or "blockwise"


def _memory(config: Config) -> str:
    """What memory and training.zero_stage save, in the fields' own names."""
    memory = config.memory
    options = [f"remat {memory.remat}"]
    if memory.offload:
        part = memory.offload_fraction
        of = f" ({part:g} of inputs)" if part < 1 and "inputs" in memory.offload else ""
        options.append(f"offload {', '.join(memory.offload)}{of}")
    for name in ("sequence_chunk_tokens", "mlp_tile_tokens", "loss_tile_tokens"):
        if getattr(memory, name) is not None:
            options.append(f"{name} {getattr(memory, name):,}")
    return "; ".join([*options, f"zero_stage {config.training.zero_stage}"])
