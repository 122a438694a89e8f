"""What layers of a state keep: the state after a row's tokens, and the last tokens that
a convolution reads.

As long as a few hundred tokens' keys and values, whatever the row's length. Rows lie
over (data, fsdp), heads over tensor; every device of seq has all of its part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.convolution import convolve
from ulysses_jax.config import Model
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.linear import short_convolution
from ulysses_jax.models.kinds import OF_A_STATE
from ulysses_jax.sharding import ACTIVATION, ONE_TOKEN, Table, activation


def keeps_state(attention: Any) -> bool:
    """Whether this is a layer's part with a state, that computes as its `inputs`,
    `recurrence` and `project_out` say."""
    calls = [part.__call__ for part in OF_A_STATE]
    return isinstance(attention, OF_A_STATE) and type(attention).__call__ in calls


class State(NamedTuple):
    """Of one layer.

    Attributes:
      state: float32 `[B, N, H, V]`.
      before: of what each of its convolutions is given, `[B, W - 1, heads, size]`;
        zeros before the first token.
    """

    state: Float[Array, "B N H V"]
    before: tuple[Array, ...]


def states_bytes(model: Model, num_rows: int) -> int:
    """Of a device, on the mesh that is set, as `cache.cache_bytes`."""
    rows = num_rows // layout.degree("data", "fsdp")
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    total = 0
    for kind in model.kinds():
        if kind not in RECURRENT:
            continue
        sizes = model.state_sizes(kind)
        total += 4 * sizes.num_heads * sizes.state_size
        if kind == "delta":
            convolved = sizes.num_heads * sizes.value_size
            convolved += 2 * sizes.num_key_heads * sizes.key_size
            total += (model.convolution_tokens - 1) * convolved * itemsize
    return rows * total // layout.degree("tensor")


@dataclass(frozen=True)
class _Part:
    """In the place of a layer's part of a class in `OF_A_STATE`."""

    part: Any

    @property
    def products(self) -> Any:
        return self.part.products


@dataclass(frozen=True)
class Keeping(_Part):
    """Computes as the part does, and keeps what prompts leave.

    Attributes:
      lengths: of the prompts; what comes after leaves a state as it is.
    """

    lengths: Int[Array, "B"]
    kept: list[State] = field(default_factory=list)

    def __call__(self, x: Array, *_: Any, **__: Any) -> Array:
        before = []

        def convolved(y: Array, taps: Array) -> Array:
            last = jnp.arange(1 - len(taps), 0)
            before.append(tokens_at(y, self.lengths[:, None] + last))
            return short_convolution(y, taps, mesh=get_abstract_mesh())

        arrays, gate = _given(self.part, x, convolved)
        rule = self.part.recurrence
        over = ("seq",) if layout.degree("seq") > 1 else ()

        def local(arrays: Any, lengths: Array) -> tuple[Array, Array]:
            q, k, v, log_decay, *others = arrays
            place = layout.axis_index("seq") * k.shape[1] + jnp.arange(k.shape[1])
            is_read = (place < lengths[:, None])[..., None]
            k = jnp.where(is_read[..., None], k, 0)
            log_decay = jnp.where(is_read, log_decay, 0)
            nowhere = jnp.zeros(k.shape[:2], bool)
            out, state = rule.run((q, k, v, log_decay, *others), nowhere, over)
            is_last = layout.axis_index("seq") == layout.degree("seq") - 1
            return out, layout.psum(jnp.where(is_last, state, 0), ("seq",))

        specs = _specs(arrays, ACTIVATION)
        rows, state_lies = (activation(each, layout.axes()) for each in ("B", "BNHU"))
        run = layout.over_devices(local, (specs, rows), (specs[2], state_lies))
        with jax.named_scope(rule.name):
            out, state = run(arrays, self.lengths)
        self.kept.append(State(state, tuple(before)))
        return self.part.project_out(x, out, gate)


@dataclass(frozen=True)
class Reading(_Part):
    """As `Keeping`, of one token a row, after what is cached."""

    cached: State
    kept: list[State] = field(default_factory=list)

    def __call__(self, x: Float[Array, "B 1 D"], *_: Any, **__: Any) -> Array:
        old, before = iter(self.cached.before), []
        axes = layout.axes()
        token, taps_lie = activation("BTNH", axes, ONE_TOKEN), activation("WNH", axes)

        def convolved(y: Array, taps: Array) -> Array:
            def local(old: Array, y: Array, taps: Array) -> tuple[Array, Array]:
                tokens = jnp.concatenate((old, y), axis=1)
                return convolve(tokens, taps, None), tokens[:, 1:]

            given = token, token, taps_lie
            run = layout.over_devices(local, given, (token, token))
            out, last = run(next(old), y, taps)
            before.append(last)
            return out

        arrays, gate = _given(self.part, x, convolved)
        rule = self.part.recurrence

        def one_token(arrays: Any, state: Array) -> tuple[Array, Array]:
            nowhere = jnp.zeros(arrays[2].shape[:2], bool)
            own = rule.shard(arrays, nowhere, is_alone=True, start=state)
            return own.out.astype(arrays[2].dtype), own.state

        specs, state_lies = _specs(arrays, ONE_TOKEN), activation("BNHU", axes)
        run = layout.over_devices(one_token, (specs, state_lies), (token, state_lies))
        out, state = run(arrays, self.cached.state)
        self.kept.append(State(state, tuple(before)))
        return self.part.project_out(x, out, gate)


def tokens_at(x: Array, places: Int[Array, "B n"]) -> Array:
    """Some tokens of each row of `[B, T, D]` or `[B, T, N, H]`, whole in T, the others
    are not sent; zeros for a place below 0."""
    axes, letters = layout.axes(), "BTD" if x.ndim == 3 else "BTNH"

    def local(x: Array, places: Array) -> Array:
        here = places - layout.axis_index("seq") * x.shape[1]
        mine = (here >= 0) & (here < x.shape[1])
        here, mine = (
            each.reshape(*each.shape, *[1] * (x.ndim - 2)) for each in (here, mine)
        )
        tokens = jnp.take_along_axis(x, jnp.where(mine, here, 0), axis=1)
        return layout.psum(jnp.where(mine, tokens, 0), ("seq",))

    lies = activation(letters, axes), activation("BT", axes, ONE_TOKEN)
    out = activation(letters, axes, ONE_TOKEN)
    return layout.over_devices(local, lies, out)(x, places)


def _given(
    part: Any, x: Array, convolved: Callable[[Array, Array], Array]
) -> tuple[tuple[Array, ...], Array]:
    """What the recurrence takes, log decays of heads or tokens among it; the gate."""
    arrays, gate = part.inputs(x, convolved)
    decays = part.decays()
    if decays is None:
        return arrays, gate
    return (*arrays, jnp.log(jnp.asarray(decays, jnp.float32))), gate


def _specs(arrays: tuple[Array, ...], table: Table) -> tuple[Any, ...]:
    letters = {1: "N", 3: "BTN", 4: "BTNH"}
    return tuple(activation(letters[x.ndim], layout.axes(), table) for x in arrays)
