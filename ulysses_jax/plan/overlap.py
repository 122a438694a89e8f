"""What runs while a collective is under way, and what is copied around exchanges."""

from collections.abc import Iterable, Iterator
from typing import Any

from ulysses_jax.costs.collectives import Collective, phase_of
from ulysses_jax.costs.flops import attention_flops, matmul_flops
from ulysses_jax.costs.hlo import (
    Computation,
    Instruction,
    Module,
)

# They move no bytes, or only say which of several arrays is meant.
_FREE = {"bitcast", "get-tuple-element", "tuple", "reshape", "parameter", "constant"}
_ATTENTION, _MATMUL = "attention_flops_between", "matmul_flops_between"
_MOVES = {"copy", "transpose", "concatenate", "slice", "pad", "broadcast"}


def overlap(module: Module, collectives: Iterable[Collective]) -> dict[str, Any]:
    """The share of bytes sent while attention or a matrix product is scheduled.

    A collective counts as under compute when at least one attention or matrix product
    is scheduled between its start and its done; how long each takes is not looked at.

    Returns:
      `exchange_fraction` (None without exchanges), `exchange_attention_fraction` (under
      attention alone), `exchange_phases` (the first for each phase), `fractions` (for
      each kind and axis, "all-gather over fsdp"), and
      `collectives`: for each one its bytes a run, runs, and the FLOPs between its start
      and done.
    """
    rows = []
    for each in collectives:
        attention = matmul = 0
        for between in each.between():
            inside = attention_flops(module, each.computation, between)
            if not inside and is_attention_kernel(between):
                inside = 1  # FLOPs unknown to XLA
            attention += inside
            matmul += matmul_flops(module, each.computation, between)
        rows.append(
            {
                "name": each.instruction.name,
                "collective": each.kind,
                "axis": each.axes,
                "phase": each.phase,
                "count": each.count,
                "bytes": each.sent_bytes,
                "between_hosts_bytes": each.between_hosts_bytes,
                "is_asynchronous": each.is_asynchronous,
                _ATTENTION: attention,
                _MATMUL: matmul,
            }
        )
    exchanges = [row for row in rows if (row["collective"], row["axis"]) == _EXCHANGE]
    keys = dict.fromkeys((row["collective"], row["axis"]) for row in rows)
    phases = dict.fromkeys(row["phase"] for row in exchanges)
    return {
        "exchange_fraction": _fraction(exchanges),
        "exchange_attention_fraction": _fraction(exchanges, (_ATTENTION,)),
        "exchange_phases": {
            phase: _fraction(row for row in exchanges if row["phase"] == phase)
            for phase in phases
        },
        "fractions": {
            f"{kind} over {axis}": _fraction(
                row for row in rows if (row["collective"], row["axis"]) == (kind, axis)
            )
            for kind, axis in keys
        },
        "collectives": rows,
    }


_EXCHANGE = ("all-to-all", "seq")


def copies(
    module: Module, collectives: Iterable[Collective], num_layer_runs: int
) -> dict[str, Any]:
    """Layout-only copies of what goes into exchanges and of what comes out of them.

    Args:
      num_layer_runs: layers x accumulation steps: what `bytes_per_layer` is divided by.

    Returns:
      `bytes_per_layer` (written, each byte is read once too; all phases), `phases` (the
      same for each), and `copies`, the instructions, with bytes a run, runs, and where
      each comes from.
    """
    found: dict[tuple[str, str], tuple[Computation, Instruction, str]] = {}
    for exchange in collectives:
        if not exchange.is_exchange:
            continue
        computation = exchange.computation
        for copy in (
            *_copies_before(module, computation, exchange.instruction),
            *_copies_after(module, computation, exchange.end),
        ):
            # A copy of a value and its exchange belong to the same phase.
            phase = phase_of(copy) or exchange.phase
            found[computation.name, copy.name] = (computation, copy, phase)
    rows = [
        {
            "name": copy.name,
            "phase": phase,
            "count": module.runs[computation.name],
            "bytes": copy.num_bytes,
            "from": copy.op_name,
        }
        for computation, copy, phase in found.values()
    ]
    phases: dict[str, float] = {}
    for row in rows:
        bytes_per_layer = row["count"] * row["bytes"] / num_layer_runs
        phases[row["phase"]] = phases.get(row["phase"], 0) + bytes_per_layer
    return {
        "bytes_per_layer": sum(phases.values()),
        "phases": phases,
        "copies": sorted(rows, key=lambda row: -row["count"] * row["bytes"]),
    }


def is_attention_kernel(instruction: Instruction) -> bool:
    """Whether a custom call is attention: cuDNN's, or a Pallas kernel named so."""
    target = instruction.custom_call_target.lower()
    if "fmha" in target:
        return True
    text = f"{instruction.name} {instruction.op_name}".lower()
    words = ("attention", "mha", "flash")
    is_pallas = "triton" in target or "mosaic_gpu" in target
    return is_pallas and any(word in text for word in words)


def is_layout_only(module: Module, instruction: Instruction) -> bool:
    """Whether it writes the bytes that it reads, only elsewhere: no arithmetic."""
    if instruction.opcode in ("copy", "transpose"):
        return True
    if instruction.opcode != "fusion":
        return False
    opcodes = {
        each.opcode
        for name in instruction.called
        if name in module.computations
        for each in module.computations[name].instructions
    }
    return bool(opcodes & _MOVES) and opcodes <= _FREE | _MOVES


def _copies_before(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[Instruction]:
    for name in instruction.operands:
        made_by = computation.by_name.get(name)
        if made_by is None:
            continue
        if is_layout_only(module, made_by):
            yield made_by
        elif made_by.opcode not in _FREE:
            continue
        yield from _copies_before(module, computation, made_by)


def _copies_after(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[Instruction]:
    for user in computation.users.get(instruction.name, []):
        if is_layout_only(module, user):
            yield user
        elif user.opcode not in _FREE or user is computation.instructions[-1]:
            continue
        yield from _copies_after(module, computation, user)


def _fraction(
    rows: Iterable[dict[str, Any]], what: tuple[str, ...] = (_ATTENTION, _MATMUL)
) -> float | None:
    """The share of the bytes under any of these; None: there are none."""
    under = total = 0.0
    for row in rows:
        sent = row["count"] * row["bytes"]
        total += sent
        if any(row[each] for each in what):
            under += sent
    return under / total if total else None
