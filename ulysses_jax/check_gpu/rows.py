"""A row of a table: what is measured, how, and the sizes at which all rows are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_jax.check_gpu.problems import Heads


class Skip(Exception):
    """Raised where a row cannot or should not be measured; the message says why."""


@dataclass(frozen=True)
class Row:
    """Nothing happens before `prepare` is called, in a thread of its own.

    Attributes:
      table: the table it stands in.
      name: the columns that tell it from the others.
      lacks: why it is skipped; None: it is not.
      prepare: compiles, and runs nothing.
      measure: takes what was prepared; returns the other columns, and `status` "FAIL"
        where they are not as they must be.
    """

    table: str
    name: dict[str, Any]
    lacks: str | None
    prepare: Callable[[], Any]
    measure: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """Lengths are tokens; a span is a document's, or a window's."""

    # Three of `mosaic.BLOCK_TOKENS`, the last not full, and no multiple of any block.
    error_tokens: int = 2500
    error_span: int = 700
    error_heads: tuple[Heads, ...] = tuple(Heads(8, 2, size) for size in (128, 64, 256))
    spot_tokens: int = 131_072
    spot_span: int = 40_000
    spot_heads: Heads = Heads(8, 2, 128)
    matmul_width: int = 8192
    timed_tokens: tuple[int, ...] = (8192, 32_768, 131_072)
    timed_span: int = 4096
    timed_heads: Heads = Heads(32, 8, 128)
    longest_call_seconds: float = 10.0
    step_tokens: int = 32_768
    step_span: int = 4096
    step_width: int = 2048
    step_layers: int = 16


QUICK = Sizes(
    error_tokens=200,
    error_span=60,
    error_heads=(Heads(4, 2, 16),),
    spot_tokens=1024,
    spot_span=300,
    spot_heads=Heads(4, 2, 16),
    matmul_width=256,
    timed_tokens=(256,),
    timed_span=64,
    timed_heads=Heads(4, 2, 16),
    longest_call_seconds=1.0,
    step_tokens=256,
    step_span=64,
    step_width=64,
    step_layers=2,
)
