"""What is asked for: refused in words where it cannot be done, before anything runs."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulysses_jax import layout
from ulysses_jax.config import Model
from ulysses_jax.config.model import RECURRENT
from ulysses_jax.ids import check_below
from ulysses_jax.inference.context import ContextMemory

# Cache and prompts are padded to multiples: requests of about a length share programs.
ROUND_TOKENS = 64

_KINDS = ("full", "window", *RECURRENT)


@dataclass(frozen=True)
class Request:
    """How to go on from prompts.

    Attributes:
      max_tokens: new ones of a row, at most.
      temperature: 0: the likeliest token each time; else logits are divided by it, and
        tokens drawn.
      top_p: tokens are drawn from the likeliest ones that add up to this probability.
      seed: of what is drawn, with a row's number.
      ends: ids after which a row is not gone on with.
      cache_tokens: that the cache of a row holds; None: as many as are needed, rounded.
      context: what a token reads of it; None, or where all fits: all.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: tuple[int, ...] = ()
    cache_tokens: int | None = None
    context: ContextMemory | None = None

    def cached(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that the cache holds."""
        return self.cache_tokens or rounded(_places(self, prompts))

    def context_of(self, prompts: Sequence[Sequence[int]]) -> ContextMemory | None:
        """None where a token may read all of the cache."""
        if self.context and self.context.read_tokens < self.cached(prompts):
            return self.context
        return None


def rounded(num_tokens: int) -> int:
    """Up, to what seq divides."""
    to = math.lcm(ROUND_TOKENS, layout.degree("seq"))
    return -(-num_tokens // to) * to


def check_request(
    request: Request, prompts: Sequence[Sequence[int]], model: Model
) -> None:
    """Raises ValueError: with the numbers, and what would do.

    Args:
      model: completed; on the mesh that is set.
    """
    _check_numbers(request)
    if request.context is not None:
        _check_context(request.context, request.cache_tokens)
    _check_model(model)
    if request.context is not None and "full" not in model.kinds():
        kinds = ", ".join(sorted(set(model.kinds())))
        raise ValueError(
            "a context memory says what a token reads of the cache of layers of kind "
            f"full, and the model has none, but {kinds}: leave it out"
        )
    if not prompts:
        raise ValueError("there is no prompt: give one")
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise ValueError(
                f"prompt {number} of {len(prompts)} has no token, and nothing says "
                "what follows: give it a word, or the token that begins a text"
            )
        name = f"tokens of prompt {number}"
        check_below(np.asarray(prompt), name, model.vocab_size, "model.vocab_size")
    longest, places = max(map(len, prompts)), _places(request, prompts)
    asked = (
        f"a prompt of {longest} tokens and max-tokens {request.max_tokens} take "
        f"{places} places"
    )
    for what, there in (
        ("the model learned positions for", model.max_positions),
        ("the cache holds, by cache-tokens,", request.cache_tokens),
    ):
        if there is None or places <= there:
            continue
        left = there - longest + 1
        fits = f"max-tokens {left}" if left > 0 else _shorter(there, request.max_tokens)
        raise ValueError(
            f"{asked}, and {what} {there}: use {fits}"
            + (f", or cache-tokens {places}" if what.startswith("the cache") else "")
        )


def _shorter(places: int, max_tokens: int) -> str:
    longest = places - max_tokens + 1
    if longest > 0:
        return f"a prompt of {longest} or fewer"
    return f"max-tokens 1 and a prompt of {places} or fewer"


def _places(request: Request, prompts: Sequence[Sequence[int]]) -> int:
    """Of all tokens but the last new one, which nothing reads."""
    return max(map(len, prompts)) + request.max_tokens - 1


def _check_numbers(request: Request) -> None:
    for name in ("max_tokens", "cache_tokens", "seed"):
        number: Any = getattr(request, name)
        if number is None and name == "cache_tokens":
            continue
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"{_said(name)} is a whole number, not {number!r}")
        least, most = (0, 2**32 - 1) if name == "seed" else (1, 2**31 - 1)
        if not least <= number <= most:
            raise ValueError(
                f"{_said(name)} {number} is not from {least} to {most}: use {least} "
                "or more" + ", and no more than that" * (number > most)
            )
    if not 0 <= request.temperature < math.inf:
        raise ValueError(
            f"temperature {request.temperature} draws nothing: use 0 for the likeliest "
            "token each time, or a positive number, such as 0.8"
        )
    if not 0 < request.top_p <= 1:
        raise ValueError(
            f"top-p {request.top_p} is no part of a probability: use a number above 0, "
            "up to 1 for all tokens"
        )


def _check_context(context: Any, cache_tokens: int | None) -> None:
    if not isinstance(context, ContextMemory):
        raise ValueError(
            f"context is an inference.context.ContextMemory, not {context!r}: give "
            "ContextMemory(num_blocks=16), or None to read all of the cache"
        )
    for name, number in dataclasses.asdict(context).items():
        least = 0 if name in ("initial_tokens", "num_blocks") else 1
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"{_of(name)} is a whole number, not {number!r}")
        if not least <= number < 2**31:
            raise ValueError(
                f"{_of(name)} {number} is not from {least} to {2**31 - 1}: use {least} "
                "or more"
            )
    size, initial = context.block_tokens, context.initial_tokens
    if initial % size:
        raise ValueError(
            f"{_of('initial_tokens')} {initial} is no number of whole blocks of "
            f"{_of('block_tokens')} {size}: use {initial // size * size} or "
            f"{-(-initial // size) * size}"
        )
    if context.representatives > size:
        raise ValueError(
            f"{_of('representatives')} {context.representatives} is more than a block "
            f"has, {_of('block_tokens')} {size}: use {size} or fewer"
        )
    if cache_tokens is None or context.read_tokens <= cache_tokens:
        return
    left = (cache_tokens - initial - context.window_tokens) // size - 1
    fewer = f"{_of('num_blocks')} {left}, " if left >= 0 else ""
    raise ValueError(
        f"a token reads up to {context.read_tokens} tokens ({initial} initial, a "
        f"window of {context.window_tokens}, {context.num_blocks} blocks of {size}, "
        "and one that leaves the window), and the cache holds, by cache-tokens, "
        f"{cache_tokens}: use {fewer}cache-tokens {context.read_tokens}, or no context "
        "memory: then all is read"
    )


def _of(name: str) -> str:
    return f"context.{_said(name)}"


def _said(name: str) -> str:
    return name.replace("_", "-")


def _check_model(model: Model) -> None:
    others = sorted(set(model.kinds()) - set(_KINDS))
    if others:
        raise ValueError(
            f"model.pattern has layers of kind {', '.join(map(repr, others))}, for "
            "which there is no cache: generate with a model of kinds full, window, "
            "linear and delta; model(tokens) gives the logits of any"
        )
    names = ["num_heads", "num_kv_heads"]
    names += ["delta_heads", "delta_key_heads"] * ("delta" in model.kinds())
    for axis, sizes in (
        ("ring", {}),
        ("tensor", {name: getattr(model, name) for name in names}),
    ):
        degree = layout.degree(axis)
        if axis == "ring" and degree > 1:
            raise ValueError(
                f"mesh.ring is {degree}, and the cache spreads heads over seq and "
                f"tensor: use mesh.ring 1 and mesh.seq {degree * layout.degree('seq')}"
            )
        for name, size in sizes.items():
            if size % degree:
                raise ValueError(
                    f"mesh.tensor {degree} does not divide model.{name} {size}: use "
                    f"mesh.tensor {math.gcd(size, degree)}, and mesh.seq for the rest"
                )
    if model.strategy == "megatron" or model.zigzag:
        what = "zigzag true" if model.zigzag else "strategy megatron"
        raise ValueError(
            f"model.{what} lays weights or tokens otherwise than generation does: use "
            "zigzag false and strategy auto, as from_pretrained gives them"
        )
