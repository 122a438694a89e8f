"""FLOPs of a compiled program's instructions: matrix products, and attention."""

import math
import re
from collections.abc import Callable

from ulysses_jax.costs.hlo import Computation, Instruction, Module, search, trip_count

# How attention through Mosaic kernels is named: the loop over the backward pass's tiles
# (`attention.by_tiles`), and tokamax's forward kernel.
BY_TILES, FORWARD = "attention_by_tiles", "flash_attention"
BY_LAYOUT = "attention_by_layout"  # the loop over a layout's tiles
# Among documents its trips are not known: how many it had without them, and of how
# many rows. Where it is differentiated the name stands in parentheses.
STEPS = re.compile(rf"{BY_LAYOUT}/(\d+)_steps_of_(\d+)_rows\)*/while$")


def matmul_flops(module: Module, computation: Computation, each: Instruction) -> int:
    """FLOPs of a matrix product: a dot, a fusion or a loop that holds one, cuBLAS."""
    if each.opcode == "dot":
        left = computation.by_name.get(each.operands[0])
        dims = search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        return _dot_flops(each, left, dims)
    if "__cublas" in each.custom_call_target:
        left = computation.by_name.get(each.operands[0])
        dims = search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', each.attributes)
        return _dot_flops(each, left, dims.replace('"', ""))
    return _flops_inside(module, each, matmul_flops)


def attention_flops(module: Module, computation: Computation, each: Instruction) -> int:
    """FLOPs of an attention call: cuDNN's two products forward, five backward; of
    Mosaic's kernels by the pairs that the module's mask leaves."""
    target = each.custom_call_target
    if "mosaic_gpu" in target and BY_LAYOUT in each.op_name:
        # Tiles, a row each: two products forward, of two backward kernels dq three, dk
        # and dv four.
        q, k = (computation.by_name[name].arrays[0] for name in each.operands[:2])
        batch, q_tokens, heads, size = q.dims
        products = 2 if FORWARD in each.op_name else 2 + len(each.arrays)
        return products * 2 * batch * q_tokens * k.dims[1] * heads * size
    steps = STEPS.search(each.op_name)
    if steps and each.opcode == "while" and trip_count(each) is None:
        trips, rows = map(int, steps.groups())
        if module.sparse:
            trips *= module.sparse.layout_fraction(rows)
        return int(trips * _flops_inside(module, each, attention_flops))
    if BY_TILES in each.op_name and each.opcode == "while":
        # Two kernels on tiles: seven products, of all pairs of a tile.
        blocks, _, block, heads, size = _accumulator(each)
        batch = int(search(rf"{BY_TILES}/(\d+)_rows", each.op_name))
        blocks //= batch
        tiles = module.pairs.tiles(blocks, block) if module.pairs else blocks**2
        return int(7 * 2 * batch * tiles * block**2 * heads * size)
    if "mosaic_gpu" in target and FORWARD in each.op_name:
        batch, q_tokens, heads, size = each.arrays[0].dims
        fraction = module.pairs.fraction(q_tokens) if module.pairs else 1
        keys = computation.by_name[each.operands[1]].arrays[0].dims[1]
        return int(2 * 2 * batch * q_tokens * keys * fraction * heads * size)
    if "fmha" in target.lower():
        q = computation.by_name[each.operands[0]].arrays[0].dims
        k = computation.by_name[each.operands[1]].arrays[0].dims
        batch, q_tokens, heads, size = q
        products = 5 if "backward" in target.lower() else 2
        causal = re.search(r'"mask_type":\s*"[^"]*CAUSAL', each.attributes)
        pairs = q_tokens * k[1] / (2 if causal else 1)
        window = search(r'"sliding_window_length":\s*"?(\d+)', each.attributes)
        if causal and 0 < int(window or 0) < q_tokens:
            # The first queries have fewer keys than the window.
            pairs = q_tokens * int(window) - int(window) ** 2 / 2
        return int(products * 2 * batch * pairs * heads * size)
    return _flops_inside(module, each, attention_flops)


def _accumulator(loop: Instruction) -> tuple[int, ...]:
    """Dims of dq, `[blocks, 1, block, N, H]`, which a loop over tiles adds to."""
    return next(x.dims for x in loop.arrays if x.dtype == "f32" and len(x.dims) == 5)


def _flops_inside(module: Module, each: Instruction, flops: Callable[..., int]) -> int:
    """Of what an instruction calls; of a conditional's branches the greatest runs."""
    found = [
        sum(flops(module, called, inner) for inner in called.instructions)
        for name in each.called
        if (called := module.computations.get(name))
    ]
    if each.opcode == "conditional":
        return max(found, default=0)
    trips = (trip_count(each) or 1) if each.opcode == "while" else 1
    return trips * sum(found)


def _dot_flops(each: Instruction, left: Instruction | None, dims: str) -> int:
    if left is None or not left.arrays:
        return 0
    contracted = math.prod(left.arrays[0].dims[int(n)] for n in dims.split(",") if n)
    return 2 * each.arrays[0].num_elements * contracted
