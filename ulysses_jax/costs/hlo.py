"""Reads XLA's scheduled HLO text: instructions, shapes, and how often each runs.

Only what a plan asks of it: instructions in their scheduled order, operands, the bytes
of what they make, the computations they call, and the trips of loops.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ulysses_jax.costs.pairs import Pairs

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others say it: bf16, s32, f8e4m3fn, c64


@dataclass(frozen=True)
class Array:
    """An array's element type and dims, on one device."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    """The memory space: 0 is the device's, 5 the host's."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            match = re.match(r"[a-z]+(\d+)", self.dtype)
            if match is None:
                raise ValueError(f"unknown element type {self.dtype!r} in the HLO")
            bits = int(match[1])
        return math.ceil(self.num_elements * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line, after the operands."""

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the type, tuples flattened."""
        return arrays_of(self.type_text)

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @cached_property
    def op_name(self) -> str:
        """Where the instruction comes from in JAX, e.g. "jit(step)/jvp()/while/..."."""
        return search(r'op_name="([^"]*)"', self.attributes)

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls."""
        names: list[str] = []
        for text in re.findall(
            r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
            r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)",
            self.attributes,
        ):
            names += re.findall(r"[\w.\-]+", text)
        return tuple(names)

    @property
    def custom_call_target(self) -> str:
        return search(r'custom_call_target="([^"]*)"', self.attributes)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @cached_property
    def index(self) -> dict[str, int]:
        return {each.name: i for i, each in enumerate(self.instructions)}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                users.setdefault(operand, []).append(each)
        return users


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]
    runs: dict[str, int] = field(default_factory=dict)
    """How often a computation runs a step; loops count their trips, nested ones too."""
    unknown_trips: tuple[str, ...] = ()
    """Loops whose trips XLA does not know: counted once."""
    pairs: Pairs | None = None
    """Of the mask that its attention is given as ranges; None: all pairs are seen."""
    sparse: Pairs | None = None
    """Of its layers with a layout of blocks."""

    def top_level(self) -> Iterator[tuple[Computation, Instruction]]:
        """Instructions that run by themselves, not inside a fusion or a reduction."""
        inner = {
            name
            for computation in self.computations.values()
            for each in computation.instructions
            if each.opcode not in ("while", "conditional", "call")
            for name in each.called
        }
        for computation in self.computations.values():
            if computation.name not in inner and self.runs.get(computation.name):
                for each in computation.instructions:
                    yield computation, each


def parse(text: str, pairs: Pairs | None = None, sparse: Pairs | None = None) -> Module:
    """Reads `compiled.as_text()`, of a step whose mask leaves these pairs, in layers
    with a layout `sparse`.

    Raises:
      ValueError: no entry computation: not HLO text.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    body: list[Instruction] = []
    for line in text.splitlines():
        if name and line.startswith("}"):
            computations[name] = Computation(name, tuple(body))
            name = ""
        elif name:
            if instruction := _instruction(line):
                body.append(instruction)
        elif line.endswith("{") and (
            match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)
        ):
            name, body = match[2], []
            entry = name if match[1] else entry
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    runs, unknown = _count_runs(computations, entry)
    return Module(entry, computations, runs, unknown, pairs, sparse)


def arrays_of(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `(f32[8,4]{1,0:S(5)}, s32[])`, tuples flattened."""
    return tuple(
        Array(
            match[1],
            tuple(int(n.lstrip("<=")) for n in match[2].split(",") if n),
            int(search(r"S\((\d+)\)", match[3] or "") or 0),
        )
        for match in re.finditer(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?", type_text)
    )


def tuple_items(type_text: str) -> list[str]:
    """The items of a tuple type; a type that is none is its only item."""
    if not type_text.startswith("("):
        return [type_text]
    items, depth, start = [], 0, 1
    for i, character in enumerate(type_text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            items.append(type_text[start:i].strip())
            start = i + 1
    return [item for item in items if item]


def trip_count(instruction: Instruction) -> int | None:
    """The trips of a while loop, where XLA knows them."""
    text = search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    return int(text) if text else None


def _count_runs(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    runs: dict[str, int] = {}
    unknown: list[str] = []

    def visit(name: str, times: int) -> None:
        if name not in computations:
            return
        runs[name] = runs.get(name, 0) + times
        for each in computations[name].instructions:
            trips = 1
            if each.opcode == "while":
                known = trip_count(each)
                if known is None:
                    unknown.append(each.name)
                trips = 1 if known is None else known
            for called in each.called:
                visit(called, times * trips)

    visit(entry, 1)
    return runs, tuple(dict.fromkeys(unknown))


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opcode = search(r"^([\w\-]+)\(", rest)
    start = len(opcode)
    if not opcode:
        return None
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if not operands and opcode not in ("parameter", "constant", "iota"):
        operands = tuple(n.split()[-1] for n in inside.split(", ") if n)
    return Instruction(match[1], opcode, type_text, operands, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`, outside quotes."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        character = text[i]
        if character == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return i
    return len(text)


def search(pattern: str, text: str) -> str:
    """The first group of a pattern; "" where it is not found."""
    match = re.search(pattern, text)
    return match[1] if match else ""
