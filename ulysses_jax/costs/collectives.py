"""The collectives of a compiled program: what each sends, between which GPUs."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ulysses_jax.costs.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    arrays_of,
    tuple_items,
)

KINDS = (
    "all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """One collective of the program; bytes are those of one run on one GPU."""

    kind: str
    instruction: Instruction
    computation: Computation
    end: Instruction
    """Where its result is: its done, or the instruction itself."""
    is_asynchronous: bool
    """Whether anything may run between the two."""
    count: int
    """Runs a step."""
    results: tuple[Array, ...]
    sent_bytes: float
    between_hosts_bytes: float
    """What one GPU's network adapter sends, of `sent_bytes`."""
    group_size: int
    axes: str
    """The mesh axes it runs over, e.g. "seq" or "fsdp+seq"."""
    crosses_hosts: bool
    phase: str
    """forward, recompute, backward, or update: outside the loss and its gradient."""

    @property
    def is_exchange(self) -> bool:
        """Whether it swaps tokens for heads, or back."""
        return self.kind == "all-to-all" and self.axes == "seq"

    def between(self) -> tuple[Instruction, ...]:
        """What is scheduled between its start and its done."""
        if not self.is_asynchronous:
            return ()
        index = self.computation.index
        first, last = index[self.instruction.name] + 1, index[self.end.name]
        return self.computation.instructions[first:last]


def find_collectives(
    module: Module, degrees: dict[str, int], gpus_per_host: int
) -> list[Collective]:
    """All collectives that run, in the order of the text.

    Args:
      degrees: the mesh axes, outermost first; device i of the program is the mesh's
        i-th, and lives on host i // gpus_per_host.
    """
    num_devices = math.prod(degrees.values())
    found = []
    phases: dict[str, str] = {}
    for computation, start in module.top_level():
        for inner, results in _collectives_of(module, computation, start):
            kind = inner.opcode.removesuffix("-start")
            if kind == "collective-permute":
                groups = _pairs(inner.attributes)
            else:
                groups = replica_groups(inner.attributes, num_devices)
            done = _done(computation, start)
            is_sync = done is None or '"is_sync":true' in start.attributes
            axes = axes_of(groups, degrees, paired=kind == "collective-permute")
            hosts = np.sort(groups // gpus_per_host, axis=1)
            num_hosts = 1 + int((np.diff(hosts, axis=1) > 0).sum(axis=1).max(initial=0))
            size = groups.shape[1]
            result_bytes = sum(array.num_bytes for array in results)
            sent = _sent_bytes(kind, result_bytes, size, groups)
            share = share_between_hosts(kind, size, num_hosts)
            if computation.name not in phases:
                phases[computation.name] = _phase_of_most(computation)
            found.append(
                Collective(
                    kind=kind,
                    instruction=start,
                    computation=computation,
                    end=done or start,
                    is_asynchronous=not is_sync,
                    count=module.runs[computation.name],
                    results=results,
                    sent_bytes=sent,
                    between_hosts_bytes=sent * share,
                    group_size=size,
                    axes=axes,
                    crosses_hosts=num_hosts > 1,
                    phase=phase_of(inner) or phases[computation.name],
                )
            )
    return found


def share_between_hosts(kind: str, size: int, num_hosts: int) -> float:
    """The part that its network adapter sends, of what a GPU sends in such a group."""
    if kind in ("all-to-all", "ragged-all-to-all"):
        return (size - size / num_hosts) / max(size - 1, 1)
    if kind == "collective-permute":
        return float(num_hosts > 1)
    # Rings: each enters and leaves a host once, spread over its adapters.
    return num_hosts / size if num_hosts > 1 else 0.0


def moving_loops_of_unknown_trips(module: Module, moves: Collection[str]) -> list[str]:
    """Loops that XLA cannot count and that move something: its bytes count once.

    The loop over blocks of keys, as long as a causal mask leaves it, moves nothing,
    unless the keys wait in the host's memory.

    Args:
      moves: computations that move bytes to or from the host.
    """

    def does(name: str) -> bool:
        computation = module.computations.get(name)
        if computation is None or name in moves:
            return name in moves
        return any(
            each.opcode.removesuffix("-start") in KINDS or any(map(does, each.called))
            for each in computation.instructions
        )

    return [
        each.name
        for computation in module.computations.values()
        for each in computation.instructions
        if each.name in module.unknown_trips and any(map(does, each.called))
    ]


def phase_of(instruction: Instruction) -> str:
    """The phase that the instruction's name in JAX says; "" where it has none."""
    name = instruction.op_name
    if not name:
        return ""
    if "rematted_computation" in name:
        return "recompute"
    if "transpose(" in name:
        return "backward"
    return "forward" if "jvp(" in name else "update"


def axes_of(groups: np.ndarray, degrees: dict[str, int], *, paired=False) -> str:
    """The mesh axes that groups of devices `[groups, members]` run over.

    "seq", or "fsdp+seq"; " in groups of n" follows where they are not whole axes.
    """
    coordinates = np.stack(np.unravel_index(groups, tuple(degrees.values())))
    varies = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    names = [axis for axis, v in zip(degrees, varies, strict=True) if v]
    if not names:
        return "none"
    size = groups.shape[1]
    if paired or math.prod(degrees[name] for name in names) == size:
        return "+".join(names)
    return f"{'+'.join(names)} in groups of {size}"


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, `[groups, members]`, from HLO's three notations.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`; `mesh['a'=2,'b'=2] {'a'}`, with
    `, device_ids=([2,2]T(1,0))` where the devices are in another order.

    Raises:
      ValueError: another notation, or groups of unequal sizes.
    """
    text = attributes.split("replica_groups=", 1)[-1]
    if "replica_groups=" not in attributes or text.startswith("{}"):
        return np.arange(num_devices)[None]
    if text.startswith("{{"):
        rows = re.findall(r"\{([\d, ]*)\}", text[1 : text.index("}}") + 1])
        members = [[int(n) for n in row.split(",") if n.strip()] for row in rows]
        if not any(members):
            return np.arange(num_devices)[None]
        if len({len(row) for row in members}) > 1:
            raise ValueError(f"replica groups of unequal sizes: {text[:200]}")
        return np.asarray(members)
    if text.startswith("["):
        match = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
        if match:
            return _iota(match[2]).reshape(_ints(match[1]))
    match = re.match(r"mesh\[([^\]]*)\](?:, ?device_ids=\((.*?)\))? ?\{([^}]*)\}", text)
    if match is None:
        raise ValueError(f"replica groups in a notation unknown here: {text[:200]}")
    sizes = {n: int(s) for n, s in re.findall(r"'?([\w.\-]+)'?=(\d+)", match[1])}
    devices = np.arange(math.prod(sizes.values()))
    if match[2]:
        is_iota = match[2].startswith("[")
        devices = _iota(f"<={match[2]}") if is_iota else np.asarray(_ints(match[2]))
    # Every axis as (before, chosen, after): a reference may choose a part of an axis.
    chosen = {
        name: (int(pre), int(size)) if pre else (1, sizes[name])
        for name, pre, size in re.findall(
            r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", match[3]
        )
    }
    if sum(1 for part in match[3].split(",") if part) != len(chosen):
        raise ValueError(f"replica groups over parts of one axis: {text[:200]}")
    shape: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        pre, part = chosen.get(name, (1, 1))
        if name in chosen:
            inside.append(len(shape) + 1)
        shape += [pre, part, size // (pre * part)]
    outside = [i for i in range(len(shape)) if i not in inside]
    members = math.prod(shape[i] for i in inside)
    return devices.reshape(shape).transpose(*outside, *inside).reshape(-1, members)


def _collectives_of(
    module: Module, computation: Computation, start: Instruction
) -> list[tuple[Instruction, tuple[Array, ...]]]:
    """The collectives of an instruction and what each makes; XLA may group several."""
    if start.opcode == "async-start":
        return [
            (each, each.arrays)
            for name in start.called
            if name in module.computations
            for each in module.computations[name].instructions
            if each.opcode in KINDS
        ]
    if start.opcode in KINDS:
        return [(start, start.arrays)]
    if start.opcode.removesuffix("-start") not in KINDS:
        return []
    done = _done(computation, start)
    if done is not None:
        return [(start, done.arrays)]
    items = tuple_items(start.type_text)
    is_result = start.opcode == "all-reduce-start" or len(items) < 2
    return [(start, start.arrays if is_result else arrays_of(items[1]))]


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    if not start.opcode.endswith("-start"):
        return None
    for user in computation.users.get(start.name, []):
        if user.opcode.endswith("-done"):
            return user
        if user.opcode == "async-update":
            for later in computation.users.get(user.name, []):
                if later.opcode.endswith("-done"):
                    return later
    return None


def _sent_bytes(kind: str, result_bytes: int, size: int, groups: np.ndarray) -> float:
    """Bytes that one GPU sends, in a ring or pairwise, for results of these bytes."""
    if kind in ("all-to-all", "ragged-all-to-all", "all-gather"):
        return result_bytes * (size - 1) / size
    if kind == "reduce-scatter":
        return result_bytes * (size - 1)
    if kind == "all-reduce":
        return 2 * result_bytes * (size - 1) / size
    if kind == "collective-permute":
        return float(result_bytes if (groups[:, 0] != groups[:, 1]).any() else 0)
    return float(result_bytes)


def _phase_of_most(computation: Computation) -> str:
    named = [phase for each in computation.instructions if (phase := phase_of(each))]
    # A backward loop holds the recomputation too: a gradient there is the backward's.
    if "backward" in named:
        return "backward"
    return max(set(named), key=named.count) if named else "update"


def _pairs(attributes: str) -> np.ndarray:
    text = attributes.split("source_target_pairs=", 1)[-1]
    end = text.find("}}")
    pairs = [_ints(p) for p in re.findall(r"\{(\d+,\d+)\}", text[1 : end + 1])]
    return np.asarray(pairs or [(0, 0)])


def _iota(text: str) -> np.ndarray:
    """Device ids in order, from `<=[4,2]T(1,0)`."""
    match = re.match(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"device ids in a notation unknown here: {text[:200]}")
    dims = _ints(match[1])
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_ints(match[2])) if match[2] else ids).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())
