"""What crosses PCIe: the moves between host and device memory, and what runs beside."""

from collections.abc import Collection
from typing import Any

from ulysses_jax.costs.flops import attention_flops, matmul_flops
from ulysses_jax.costs.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    arrays_of,
    tuple_items,
)

HOST_SPACE = 5

# They name an array, and move none of it.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
}


def host_moves(module: Module) -> dict[str, Any]:
    """The bytes that a GPU moves to and from its host in a step.

    Returns:
      `to_device_bytes` and `to_host_bytes` a step; and `places`: for each computation
      that moves any, such as a loop's body, its `name`, `count` (runs a step), and a
      run's `to_device_bytes`, `to_host_bytes`, `matmul_flops` and `attention_flops`
      (without those of loops inside it that move something themselves).
    """
    places: dict[str, dict[str, Any]] = {}
    for computation, each in module.top_level():
        to_device, to_host = _moved(computation, each)
        if to_device or to_host:
            place = places.setdefault(
                computation.name,
                {
                    "name": computation.name,
                    "count": module.runs[computation.name],
                    "to_device_bytes": 0,
                    "to_host_bytes": 0,
                },
            )
            place["to_device_bytes"] += to_device
            place["to_host_bytes"] += to_host
    for name, place in places.items():
        computation = module.computations[name]
        inside = [
            each
            for each in computation.instructions
            if not any(_reaches(module, called, places) for called in each.called)
        ]
        for what, flops in (("matmul", matmul_flops), ("attention", attention_flops)):
            place[f"{what}_flops"] = sum(flops(module, computation, i) for i in inside)
    rows = list(places.values())
    return {
        f"{way}_bytes": sum(row["count"] * row[f"{way}_bytes"] for row in rows)
        for way in ("to_device", "to_host")
    } | {"places": rows}


def _reaches(module: Module, name: str, places: Collection[str]) -> bool:
    """Whether a computation, or one that it calls, is among the places."""
    return name in places or any(
        _reaches(module, called, places)
        for each in module.computations[name].instructions
        for called in each.called
        if called in module.computations
    )


def _moved(computation: Computation, each: Instruction) -> tuple[int, int]:
    """Bytes that one instruction moves: to the device, to the host."""
    if each.opcode in _FREE or each.opcode.endswith("-done"):
        return 0, 0
    operands = [
        array
        for name in each.operands
        if name in computation.by_name
        for array in computation.by_name[name].arrays
    ]
    from_host = any(array.space == HOST_SPACE for array in operands)
    if not from_host and all(array.space != HOST_SPACE for array in each.arrays):
        return 0, 0
    results = _results(each)
    if any(array.space == HOST_SPACE for array in results):
        # What is written is the operand on the device: all of the result, or a slice.
        return 0, max(
            (array.num_bytes for array in operands if array.space != HOST_SPACE),
            default=0,
        )
    return sum(array.num_bytes for array in results) if from_host else 0, 0


def _results(each: Instruction) -> tuple[Array, ...]:
    """The arrays that it makes; of a start, those that its done will give."""
    items = tuple_items(each.type_text)
    if each.opcode == "copy-start":
        return arrays_of(items[0])
    if each.opcode.endswith("-start"):
        return arrays_of(items[1])
    return each.arrays
