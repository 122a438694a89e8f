"""From prompts on, token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P

from ulysses_jax import layout
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.inference.context import ContextMemory
from ulysses_jax.inference.decode import read_prompt, read_token
from ulysses_jax.inference.request import Request, check_request, rounded
from ulysses_jax.inference.sampling import next_tokens
from ulysses_jax.inference.states import keeps_state
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.models.attention import Angles, Attention
from ulysses_jax.models.rope import frequencies
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import activation
from ulysses_jax.weights.parameter import has_letters, is_matrix
from ulysses_jax.weights.whole import Unbound, Values, unbind

Prompts = Sequence[Sequence[int]]


def generate(
    model: Any,
    tokens: Prompts,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ends: Sequence[int] = (),
    cache_tokens: int | None = None,
    context: ContextMemory | None = None,
) -> list[list[int]]:
    """The tokens with which a model goes on from prompts.

    Args:
      model: a `Transformer`, such as `from_pretrained` gives, on the mesh that is set;
        its layers full, window, linear or delta.
      tokens: ids of each prompt, of any lengths: a row's result does not depend on
        the other rows.
      context: a token reads a part of the cache: `context.ContextMemory`.
      others: as `request.Request` says.

    Returns:
      New ids of each row; an id of `ends` is the last of its row.

    Raises:
      ValueError: before anything is compiled: what `check_request` refuses; a model
        that is no such; parameters on another mesh than the one that is set.

    Cost: one forward pass over the prompts, T over seq; then a step a token, each
    device with its heads' cache (`cache.cache_bytes`) and weights as they lie, beside
    which there is a copy in the compute dtype.
    """
    request = Request(
        max_tokens, temperature, top_p, seed, tuple(ends), cache_tokens, context
    )
    made: list[list[int]] = [[] for _ in tokens]
    for new in stream(model, tokens, request):
        for row, token in zip(made, new, strict=True):
            if token is not None:
                row.append(token)
    return made


def stream(model: Any, tokens: Prompts, request: Request) -> Iterator[list[int | None]]:
    """`generate`, a step at a time: of each row its next id; None: it has ended."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"generation runs a ulysses_jax.Transformer, not a {type(model).__name__}"
        )
    rows = [[int(i) for i in row] for row in tokens]
    check_request(request, rows, complete_model(model.model))
    for layer in (*model.layers, *model.rest):
        attention = getattr(layer, "attention", None)
        if not isinstance(attention, Attention) and not keeps_state(attention):
            raise ValueError(
                f"a layer of kind {getattr(layer, 'kind', None)!r} has a "
                f"{type(attention).__name__}, for which there is no cache: generate "
                "with layers of kinds full, window, linear and delta; model(tokens) "
                "gives the logits of any"
            )
    module, values = unbind(model)
    for array in values:
        layout.check_mesh(array)
    return _Continuation(model, module, values, rows, request).steps()


class _Continuation:
    """Rows of tokens that grow."""

    def __init__(
        self,
        model: Transformer,
        module: Unbound,
        values: Values,
        rows: list[list[int]],
        request: Request,
    ):
        self.model = complete_model(model.model)
        self.module, self.request = module, request
        self.cache_tokens = request.cached(rows)
        self.context = request.context_of(rows)
        self.num_rows = len(rows)
        convolves = "delta" in self.model.kinds()
        self.tokens_before = convolves * (self.model.convolution_tokens - 1)
        # Rows that the mesh divides; those put in have ended from the first.
        added = -len(rows) % layout.degree("data", "fsdp")
        self.rows = [*rows, *([0] for _ in range(added))]
        self.ended = np.arange(len(self.rows)) >= len(rows)
        # Once, and not again for each token.
        dtype = jnp.dtype(self.model.compute_dtype)
        self.values = tuple(
            w.astype(dtype) if has_letters(of) and is_matrix(of) else w
            for of, w in zip(module.variables, values, strict=True)
        )

    def steps(self) -> Iterator[list[int | None]]:
        request = self.request
        options: dict[str, Any] = dict(
            seed=np.uint32(request.seed),
            temperature=np.float32(request.temperature),
            top_p=np.float32(request.top_p),
            greedy=request.temperature == 0,
        )
        with allow_promotion():
            logits, cache = self._read_prompts()
            for step in range(request.max_tokens):
                new = np.asarray(next_tokens(logits, step=np.int32(step), **options))
                shown = zip(new.tolist(), self.ended, strict=True)
                shown = [None if ended else token for token, ended in shown]
                for row, token in zip(self.rows, new.tolist(), strict=True):
                    row.append(token)
                self.ended |= np.isin(new, request.ends)
                yield shown[: self.num_rows]
                if self.ended.all() or step + 1 == request.max_tokens:
                    return
                if self._turns_anew():
                    del cache
                    logits, cache = self._read_prompts()
                else:
                    logits, cache = self._read(new, cache)

    def _read_prompts(self) -> Any:
        """All tokens that there are, at once."""
        lengths = self._lengths()
        # As many as a convolution reads on each device.
        least = self.tokens_before * layout.degree("seq")
        tokens = np.zeros((len(lengths), rounded(max(lengths.max(), least))), np.int32)
        for row, ids in zip(tokens, self.rows, strict=True):
            row[: len(ids)] = ids
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        spec = activation("BT", layout.axes())
        angles = jax.tree.map(
            lambda x: _put(x, spec), turned(self.model, positions, lengths)
        )
        return read_prompt(
            self.module,
            self.cache_tokens,
            self.context,
            self.values,
            _put(tokens, spec),
            lengths,
            angles,
        )

    def _read(self, new: np.ndarray, cache: Any) -> Any:
        lengths = self._lengths()
        angles = turned(self.model, lengths[:, None] - 1, lengths)
        return read_token(
            self.module, self.context, self.values, cache, new, lengths - 1, angles
        )

    def _lengths(self) -> np.ndarray:
        return np.asarray([len(row) for row in self.rows], np.int32)

    def _turns_anew(self) -> bool:
        """Whether a row is now longer than longrope's short factors are for: then its
        cached keys are turned by the wrong ones."""
        rope = self.model.rope
        if self.model.positions != "rope" or rope.scaling != "longrope":
            return False
        assert rope.original_tokens
        lengths = self._lengths()
        return bool((~self.ended & (lengths == rope.original_tokens + 1)).any())


def turned(
    model: Model, positions: np.ndarray, lengths: np.ndarray
) -> dict[str, Angles]:
    """Cosines and sines of RoPE by kind of layer, float32 `[B, T, half]`; made on the
    host, since dynamic's and longrope's are those of each row's own length.

    Args:
      positions: `[B, T]`.
      lengths: of the sequences, `[B]`.
    """
    kinds = sorted(set(model.attending_kinds()))
    if model.positions != "rope":
        return {kind: () for kind in kinds}
    assert model.head_size
    found: dict[str, Any] = {}
    for kind in kinds:
        rows = []
        for its_positions, length in zip(positions, lengths.tolist(), strict=True):
            turns, scale = frequencies(model.rope, model.head_size, length, kind=kind)
            angles = its_positions[:, None] * turns
            rows.append((np.cos(angles) * scale, np.sin(angles) * scale))
        cosines, sines = zip(*rows, strict=True)
        found[kind] = tuple(np.stack(x).astype(np.float32) for x in (cosines, sines))
    return found


def _put(x: np.ndarray, spec: P) -> Any:
    """To where it lies, and not whole to every device before."""
    if get_abstract_mesh().empty:
        return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))
