"""A recurrence and the shards of a sequence, put together: states cross, not tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Bool, Int

from ulysses_jax.api import mesh_for, remedies_for
from ulysses_jax.attention import convolution, delta, linear
from ulysses_jax.attention.chunks import Shard
from ulysses_jax.ids import int32_ids
from ulysses_jax.parallel.spread import (
    BATCH,
    HEADS,
    TOKENS,
    check_axes,
    check_divides,
    free_axes,
    laid_like,
    map_shards,
)
from ulysses_jax.parallel.states import AxisNames, state_before, with_before
from ulysses_jax.sharding import ACTIVATION, activation

SegmentIds = Int[Array, "B T"] | None
AnyMesh = Mesh | AbstractMesh
Arrays = tuple[Array, ...]


class Rule(Protocol):
    """What a device computes, a plain value: equal ones are one program."""

    @property
    def name(self) -> str:
        """Of the function that is called, in messages and programs."""
        ...

    def __call__(self, arrays: Arrays, ids: SegmentIds, over: AxisNames) -> Array:
        """The output `[B, t, N, V]` of a shard, inside `shard_map`.

        Args:
          over: the axes over which the tokens are spread; none: all are here.
        """
        ...


@dataclass(frozen=True)
class Recurrence(ABC):
    """A rule of q, k, v and what there is of every token and head, or every head."""

    name: ClassVar[str]
    scale: float
    chunk_tokens: int

    @abstractmethod
    def apply(self, change: Array, state: Array) -> Array:
        """As `attention.chunks.Shard` says."""

    @abstractmethod
    def shard(
        self,
        arrays: tuple[Any, ...],
        begins: Bool[Array, "B t"],
        *,
        is_alone: bool,
        start: Array | None = None,
    ) -> Shard:
        """Of local arrays, as `attention.linear.linear_shard`."""

    def __call__(self, arrays: Arrays, ids: SegmentIds, over: AxisNames) -> Array:
        begins = jnp.zeros(arrays[2].shape[:2], bool)
        if ids is not None:
            begins = begins_of(with_before(ids, 1, over))
        return self.run(arrays, begins, over)[0]

    def run(
        self, arrays: Arrays, begins: Bool[Array, "B t"], over: AxisNames
    ) -> tuple[Array, Array]:
        """The output of a shard, in v's dtype, and the state after its tokens."""
        own = self.shard(arrays, begins, is_alone=not over)
        out, state = own.out, own.state
        assert out is not None
        if over:
            assert own.change is not None and own.reads is not None
            before = state_before(
                own.change, own.state, apply=self.apply, axis_names=over
            )
            out += jnp.einsum("BTNH,BNHV->BTNV", own.reads, before)
            state += self.apply(own.change, before)
        return out.astype(arrays[2].dtype), state

    def numbers(self) -> dict[str, Any]:
        return dict(scale=self.scale, chunk_tokens=self.chunk_tokens)


@dataclass(frozen=True)
class Linear(Recurrence):
    """Of q, k, v, log_decay: linear attention with decay."""

    name = linear.NAME

    def apply(self, change, state):
        return linear.apply(change, state)

    def shard(self, arrays, begins, *, is_alone, start=None):
        q, k, v, log_decay = arrays
        log_decay = _by_token(log_decay, v)
        return linear.linear_shard(
            q, k, v, log_decay, begins, **self.numbers(), is_alone=is_alone, start=start
        )


@dataclass(frozen=True)
class Delta(Recurrence):
    """Of q, k, v, log_decay, beta: the gated delta rule."""

    name = delta.NAME
    unit_lengths: bool = True

    def apply(self, change, state):
        return delta.apply(change, state)

    def shard(self, arrays, begins, *, is_alone, start=None):
        q, k, v, *by_token = arrays
        if self.unit_lengths:
            q, k = jax.tree.map(delta.unit_length, (q, k))
        log_decay, beta = (_by_token(x, v) for x in by_token)
        return delta.delta_shard(
            q,
            k,
            v,
            log_decay,
            beta,
            begins,
            **self.numbers(),
            is_alone=is_alone,
            start=start,
        )


def begins_of(ids: Int[Array, "B 1+t"]) -> Bool[Array, "B t"]:
    """Where a document begins: after the first, which is of a token before."""
    return ids[:, 1:] != ids[:, :-1]


def _by_token(x: Array, v: Array) -> Array:
    return jnp.broadcast_to(x.astype(jnp.float32), v.shape[:3])


@dataclass(frozen=True)
class Convolution:
    """Of x, weights."""

    name = convolution.NAME

    def __call__(self, arrays: Arrays, ids: SegmentIds, over: AxisNames) -> Array:
        x, weights = arrays
        before = len(weights) - 1
        ids = None if ids is None else with_before(ids, before, over)
        return convolution.convolve(with_before(x, before, over), weights, ids)


def recur(
    rule: Rule,
    arrays: Arrays,
    letters: tuple[str, ...],
    *,
    mesh: AnyMesh | None,
    segment_ids: SegmentIds,
    tokens_before: int = 1,
) -> Array:
    """The rule on every device's shards, with what comes from the shards before.

    Args:
      arrays: global, the first of tokens.
      letters: of the dims of each; the output is like the last one of `BTNH`.
      tokens_before: that the rule needs of the shard before.

    Raises:
      ValueError: ids of another shape; arrays that do not fit the mesh, with the
        numbers and what would; tokens that are spread already.
    """
    mesh = mesh_for(mesh, arrays[0])
    if segment_ids is not None:
        segment_ids = int32_ids(segment_ids, "segment_ids", arrays[0].shape[:2])
    if not mesh.empty:
        _check_mesh(rule.name, mesh, arrays, letters, tokens_before)
    with remedies_for(mesh):
        return _compiled(arrays, segment_ids, rule=rule, letters=letters, mesh=mesh)


# Of the module: where the caller has no jit, the second call finds the first's program.
@partial(jax.jit, static_argnames=("rule", "letters", "mesh"))
def _compiled(
    arrays: Arrays,
    ids: SegmentIds,
    *,
    rule: Rule,
    letters: tuple[str, ...],
    mesh: AnyMesh,
) -> Array:
    axes = free_axes(mesh)
    over = tuple(axis for axis in ACTIVATION.tokens if axes.get(axis, 1) > 1)

    def local(*args):
        *arrays, ids = args
        with jax.named_scope(rule.name):
            return rule(tuple(arrays), ids, over)

    if mesh.empty:
        return local(*arrays, ids)
    specs = [activation(each, axes) for each in letters]
    of_ids = None if ids is None else activation("BT", axes)
    spec = activation("BTNH", axes)
    like = [x for x, each in zip(arrays, letters, strict=True) if each == "BTNH"][-1]
    out = map_shards(local, (*arrays, ids), (*specs, of_ids), spec, mesh)
    return laid_like(out, like, spec, mesh)


def _check_mesh(
    name: str,
    mesh: AnyMesh,
    arrays: Arrays,
    letters: tuple[str, ...],
    tokens_before: int,
) -> None:
    manual = [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Manual and axis in ACTIVATION.tokens
    ]
    if manual:
        raise ValueError(
            f"{name} takes global arrays, but it is called inside a shard_map over "
            f"{manual[0]!r}: call it outside, or map over data and fsdp alone"
        )
    axes, (batch, tokens, *_) = free_axes(mesh), arrays[0].shape
    check_axes(arrays[0], mesh, axes)
    heads = [x.shape[2] for x, dims in zip(arrays, letters, strict=True) if "T" in dims]
    check_divides(
        axes,
        ("batch", batch, BATCH),
        ("number of tokens", tokens, TOKENS),
        *(("number of heads", each, HEADS) for each in heads),
    )
    ring, seq = (axes.get(axis, 1) for axis in ACTIVATION.tokens)
    shards = ring * seq
    if shards > 1 and tokens // shards < tokens_before:
        fits = [n for n in range(1, shards) if tokens % n == 0]
        most = max((n for n in fits if tokens // n >= tokens_before), default=1)
        raise ValueError(
            f"{name} reaches {tokens_before} tokens back, but a shard has "
            f"{tokens // shards} ({tokens} tokens over ring {ring} x seq {seq}): use "
            f"ring=1, seq={most}, or sequences of {tokens_before * shards} tokens or "
            "more"
        )
