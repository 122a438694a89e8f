"""What a run says of itself before it starts: its size, its mesh, its padding."""

import math

import jax

from ulysses_jax.config import Config
from ulysses_jax.parallel.exchange import head_layout
from ulysses_jax.sharding import ZERO, zero_axes
from ulysses_jax.training.state import TrainState


def describe(config: Config, state: TrainState) -> list[str]:
    """The run in a few lines; `config` is placed, `state` may be abstract."""
    model, training, mesh = config.model, config.training, config.mesh
    assert model.num_kv_heads is not None
    degrees = {axis: n for axis, n in vars(mesh).items() if n > 1} or {"devices": 1}
    parameters = sum(x.size for x in jax.tree.leaves(state.parameters))
    lines = [
        f"{parameters:,} parameters, {model.num_layers} layers; "
        f"{training.batch_size} x {training.sequence_tokens:,} tokens a step; mesh "
        + " x ".join(f"{axis}={n}" for axis, n in degrees.items())
    ]
    if mesh.ring * mesh.seq > 1:
        order = ", tokens in zigzag order" if config.zigzag_members() > 1 else ""
        chunks = config.memory.head_chunks or 1
        groups = f", heads in {chunks} groups" if chunks > 1 else ""
        lines[0] += f"; strategy {model.strategy}{order}{groups}"
    padding = config.padded_tokens() - training.sequence_tokens
    if padding:
        halves = "half-blocks of " if config.zigzag_members() > 1 else ""
        lines.append(
            f"{training.sequence_tokens:,} tokens do not divide over {halves}ring "
            f"{mesh.ring} x seq {mesh.seq}: each sequence is padded with {padding} "
            "masked tokens"
        )
    heads = model.num_heads // mesh.tensor
    layout = head_layout(heads, model.num_kv_heads // mesh.tensor, mesh.seq)
    if layout.num_slots > heads and model.strategy != "all_gather":
        lines.append(
            f"{heads} heads do not divide over seq {mesh.seq}: padded to "
            f"{layout.num_slots}, attention costs {layout.num_slots / heads:.2f} times"
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
