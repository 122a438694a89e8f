"""Two programs: a whole prompt under Ulysses, and one token a row over the cache.

Both run the model's own layers, with what attends, or has a state, replaced: the one
keeps keys and values, or states, the other reads them. So no family's ways are written
twice.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.mask import Mask
from ulysses_jax.config import Model
from ulysses_jax.inference.cache import (
    KeysValues,
    attend_to_cache,
    kept_from_prompt,
    layer_tokens,
    written,
)
from ulysses_jax.inference.context import (
    ContextMemory,
    Remembered,
    Step,
    attend_to_remembered,
    remembered_from_prompt,
    written_remembered,
)
from ulysses_jax.inference.states import (
    Keeping,
    Reading,
    State,
    keeps_state,
    tokens_at,
)
from ulysses_jax.models.attention import Angles, Attend
from ulysses_jax.models.residual import to_residual
from ulysses_jax.models.stack import thread_stacks
from ulysses_jax.sharding import ONE_TOKEN, activation
from ulysses_jax.weights.in_place import IN_PLACE, embed_in_place, project_in_place
from ulysses_jax.weights.rows import embed
from ulysses_jax.weights.whole import Unbound, Values

Cache = list[KeysValues | Remembered | State]
"""Of each stack, with a leading dim of its layers, then of each layer after them."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def read_prompt(
    module: Unbound,
    cache_tokens: int,
    context: ContextMemory | None,
    values: Values,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    angles: dict[str, Angles],
) -> tuple[Float[Array, "B V"], Cache]:
    """One forward pass over prompts, T over seq.

    Args:
      module, values: of a `Transformer`, apart.
      cache_tokens: that the cache has places for.
      context: what a token will read of it; None: all.
      tokens: global; each row's prompt, then anything: no token of it is seen.
      lengths: of the prompts.
      angles: by kind of layer, lying as the tokens.

    Returns:
      Float32 logits of the token after each prompt, V over tensor; and the cache.
    """
    model, axes = module.bind(values), layout.axes()
    spec = activation("BT", axes)
    places = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    tokens, places = layout.lay(tokens, spec), layout.lay(places, spec)

    def run(place: int, layer: Unbound, values: Values, x: Array, _: Any, **__: Any):
        bound = layer.bind(values)
        attention = bound.attention
        if keeps_state(attention):
            bound.attention = keep = Keeping(attention, lengths)
            return bound(x, places), keep.kept[0]
        attention.attend = keep = _Keep(
            attention.attend,
            model.model,
            lengths,
            layer_tokens(cache_tokens, attention.window),
            None if attention.window else context,
        )
        return bound(x, places, angles=angles[attention.kind]), keep.kept[0]

    x = model.embedded(tokens, places, lambda *args: to_residual(embed(*args)))
    x, cache = thread_stacks(model.layers, model.rest, x, run)
    return _logits(model, tokens_at(x, lengths[:, None] - 1)), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_token(
    module: Unbound,
    context: ContextMemory | None,
    values: Values,
    cache: Cache,
    tokens: Int[Array, "B"],
    lengths: Int[Array, "B"],
    angles: dict[str, Angles],
) -> tuple[Float[Array, "B V"], Cache]:
    """One more token a row, at position `lengths`.

    Args:
      cache: of the tokens before; it is donated.
      angles: by kind of layer, of this one token.

    Returns: as `read_prompt`.
    """
    model = module.bind(values)
    spec = activation("BT", layout.axes(), ONE_TOKEN)
    ids, places = (layout.lay(x[:, None], spec) for x in (tokens, lengths))

    def run(
        place: int, layer: Unbound, values: Values, x: Array, cached: Any, **_: Any
    ):
        bound = layer.bind(values)
        attention = bound.attention
        for part in (attention, bound.feed_forward):
            if hasattr(part, "products"):  # else it is a user's own
                part.products = IN_PLACE
        if keeps_state(attention):
            bound.attention = read = Reading(attention, cached)
            return bound(x, places), read.kept[0]
        attention.attend = read = _Read(
            attention.attend, model.model, lengths, cached, context
        )
        return bound(x, places, angles=angles[attention.kind]), read.kept[0]

    x = model.embedded(ids, places, embed_in_place)
    x, own = thread_stacks(model.layers, model.rest, x, run, cache)
    num_stacks = len(model.layers)
    cache = [
        _written(context, cached, its, lengths, stacked=place < num_stacks)
        for place, (cached, its) in enumerate(zip(cache, own, strict=True))
    ]
    return _logits(model, x), cache


@dataclass(frozen=True)
class _Keep:
    """Attends as the layer does, and keeps the prompt's keys and values."""

    attend: Attend
    model: Model
    lengths: Array
    num_places: int
    context: ContextMemory | None
    kept: list[KeysValues | Remembered] = field(default_factory=list)

    def __call__(self, q: Array, k: Array, v: Array, mask: Mask, sinks: Any) -> Array:
        of = self.lengths, self.num_places
        self.kept.append(
            kept_from_prompt(self.model, k, v, *of)
            if self.context is None
            else remembered_from_prompt(self.model, self.context, q, k, v, *of)
        )
        return self.attend(q, k, v, mask, sinks)


@dataclass(frozen=True)
class _Read:
    """Attends to the cache, and keeps what this token leaves."""

    attend: Attend
    model: Model
    lengths: Array
    cached: KeysValues | Remembered
    context: ContextMemory | None
    kept: list[KeysValues | Step] = field(default_factory=list)

    def __call__(self, q: Array, k: Array, v: Array, mask: Mask, sinks: Any) -> Array:
        of: Any = q, (k, v), self.cached, self.lengths
        options: Any = dict(scale=self.attend.scale, sinks=sinks)
        if isinstance(self.cached, Remembered):
            assert self.context
            out, own = attend_to_remembered(self.model, self.context, *of, **options)
        else:
            options["window"] = mask.window
            out, own = attend_to_cache(self.model, *of, **options)
        self.kept.append(own)
        return out


def _written(
    context: ContextMemory | None, cached: Any, own: Any, *args: Any, stacked: bool
) -> Any:
    if isinstance(own, State):
        return own
    if isinstance(cached, Remembered):
        assert context
        return written_remembered(context, cached, own, *args, stacked=stacked)
    return written(cached, own, *args, stacked=stacked)


def _logits(model: Any, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    float32 = jnp.dtype(jnp.float32)
    return project_in_place("BTD,VD->BTV", model.norm(x), model.head, float32)[:, 0]
