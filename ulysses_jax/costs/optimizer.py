"""What a step of the optimizer costs: memory traffic, and Muon's products and bytes."""

import math
from collections import Counter

from ulysses_jax.config import Config
from ulysses_jax.costs.matrices import (
    layer_elements,
    layer_matrices,
    matrix_elements,
)
from ulysses_jax.costs.targets import Target
from ulysses_jax.lora import adapter_elements
from ulysses_jax.sharding import zero_axes

NEWTON_SCHULZ_STEPS = 5
FLOAT32_BYTES = 4

# Float32 numbers of a parameter that the optimizer keeps; of others it depends.
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1}


def optimizer_seconds(config: Config, target: Target, state_bytes: float) -> float:
    """Reads parameter, gradient and moments and writes but the gradient; and Muon's
    products, as TF32.

    Args:
      config: placed on its mesh.
      state_bytes: of the optimizer, of one GPU, in either memory.
    """
    name = config.training.optimizer
    if name in MOMENTS:
        parameters = state_bytes / MOMENTS[name]
    else:
        elements = sum(matrix_elements(config.model))
        if config.model.lora:
            elements = config.model.num_layers * adapter_elements(config.model)
        parameters = FLOAT32_BYTES * elements / math.prod(_cut(config))
    moved = 3 * parameters + 2 * state_bytes
    rate = target.peak_flops_per_second("float32") * target.matmul_efficiency
    flops = muon_flops(config) if name == "muon" else 0.0
    return moved / target.memory_bytes_per_second + flops / rate


def muon_flops(config: Config) -> float:
    """Of one GPU: of each layer whose matrices it makes orthogonal. Of m rows and n
    columns, m the fewer, a step takes `4 m^2 n + 2 m^3`. Of adapters, next to none."""
    if config.model.lora:
        return 0.0
    found = 0.0
    stacked, single = _layers(config)
    for kind, count in (stacked + single).items():
        for sides in layer_matrices(config.model, kind):
            m, n = min(sides), max(sides)
            found += count * NEWTON_SCHULZ_STEPS * (4.0 * m * m * n + 2.0 * m**3)
    return found


def muon_bytes(config: Config, kind: str, axes: str) -> float | None:
    """Bytes that a GPU sends a step so that Muon has whole matrices; of adapters there
    is no formula."""
    if config.model.lora:
        return None
    (zero, zero_degree), (parts, parts_degree) = _axes(config)
    stacked, single = (
        FLOAT32_BYTES
        * sum(n * layer_elements(config.model, kind) for kind, n in layers.items())
        for layers in _layers(config)
    )
    found = 0.0
    # A single matrix is gathered over one side first, a part of it.
    for names, degree, share in (
        (zero, zero_degree, parts_degree),
        (parts, parts_degree, 1),
    ):
        if axes != "+".join(names) or degree == 1:
            continue
        away = (degree - 1) / degree
        if kind == "all-to-all":
            found += 2 * stacked * away
        elif kind == "all-gather":
            found += single * away / share
    return found or None


def _layers(config: Config) -> tuple[Counter[str], Counter[str]]:
    """Of which a GPU has whole matrices, by kind: its share of the stacks, padded; and
    those that all GPUs gather one by one."""
    model, memory = config.model, config.memory
    assert model.pattern
    if {"optimizer", "parameters"} & {*memory.offload}:
        return Counter(), Counter(model.kinds())
    repeats, rest = divmod(model.num_layers, len(model.pattern))
    share = math.ceil(repeats / math.prod(_cut(config)))
    return Counter(model.pattern * share), Counter(model.pattern[:rest])


def _cut(config: Config) -> tuple[int, int]:
    """Over how many GPUs D is cut, and the matrices' other side."""
    (_, zero), (_, parts) = _axes(config)
    return zero, parts


def _axes(config: Config) -> tuple[tuple[list[str], int], tuple[list[str], int]]:
    """The axes of more than one GPU that D lies over, and the other side's."""
    mesh = vars(config.mesh)
    other = ["seq", "tensor"] if config.model.strategy == "megatron" else ["tensor"]
    left = {axis: n for axis, n in mesh.items() if axis not in other}
    sides = zero_axes(config.model.width, left), other
    zero, parts = ([axis for axis in side if mesh[axis] > 1] for side in sides)
    return (zero, math.prod(mesh[a] for a in zero)), (
        parts,
        math.prod(mesh[a] for a in parts),
    )
