"""Every kernel under every strategy with every mask: float64's output and gradients.

Plain functions stand in for Mosaic's and cuDNN's kernels, with the same arguments: no
CPU runs cuDNN's, and JAX's interpreter cannot run Mosaic's (docs/decisions.md).
"""

import contextlib
import dataclasses
from typing import Any

import cudnn_stand_in
import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from jax.sharding import AxisType
from slow import slow_but_for
from strategy_cases import POSITIONS, SEGMENTS, B, T, mesh_of

from ulysses_jax.attend import BY_BLOCKS, attend
from ulysses_jax.attention import blockwise, mosaic, select
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.tiling import tiling_of
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.strategies import STRATEGIES, num_members

H, BLOCK = 8, 4

# The dtype in which a kernel is tried with every mask: the most exact that it has.
KERNELS = {"blockwise": "float32", "mosaic": "float16", "cudnn": "float16"}
# Of the greatest element: in half precision five roundings.
TOLERANCES = {"float32": 1e-5, "float16": 5 * 2**-11, "bfloat16": 5 * 2**-8}

SPREADS: dict[str, dict[str, Any]] = {
    "ulysses": dict(data=2, seq=2),
    "ring": dict(ring=2),
    "hybrid": dict(ring=2, seq=2, axis_type=AxisType.Explicit),
    "all_gather": dict(seq=4),
    "megatron": dict(data=2, seq=2),
}
ZIGZAG = "hybrid"  # in that order where the mask is causal

# By head: each sees others, and another number of blocks.
BLOCKS = T // BLOCK
LAYOUT = np.random.default_rng(4).random((4, BLOCKS, BLOCKS))
LAYOUT = LAYOUT < np.linspace(0.15, 0.6, 4)[:, None, None]
LAYOUT = BlockLayout(LAYOUT | np.eye(BLOCKS, dtype=bool), block_tokens=BLOCK)
# Queries of documents without keys: some of one row, all of another.
BLIND = {
    "q_segment_ids": jnp.asarray([[1] * 9 + [7] * 8 + [8] * 15, [9] * T]),
    "kv_segment_ids": jnp.asarray([[1] * 14 + [8] * 18, [1] * T]),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The mask's arguments, and what there is beside it; dtype None: of KERNELS."""

    mask: dict[str, Any]
    sinks: bool = False
    heads: tuple[int, int] = (4, 2)
    keys: int = T
    dtype: str | None = None

    def inputs(self, dtype):
        """q, k, v, the weights that make a scalar of the output, and sinks where there
        are any: numbers that every dtype has."""
        rng = np.random.default_rng(self.keys)
        shapes = [(T, self.heads[0]), (self.keys, self.heads[1])]
        q, k, v, weights = (
            jnp.asarray(rng.standard_normal((B, *shapes[i], H)), jnp.bfloat16)
            for i in (0, 1, 1, 0)
        )
        sinks = [jnp.array([-1.0, 2.0, 0.5, 3.0])] if self.sinks else []
        return *(x.astype(dtype) for x in (2 * q, k, v, weights)), *sinks

    def seen(self):
        """bool `[B or 1, N or 1, T, S]`, in NumPy."""
        given = {key: np.asarray(x) for key, x in self.mask.items() if key != "layout"}
        q_at = given.get("q_positions", np.arange(T)[None])
        kv_at = given.get("kv_positions", np.arange(self.keys)[None])
        after = q_at[:, :, None] - kv_at[:, None]
        seen = abs(after) < given.get("window", np.inf)
        if "causal" in given:
            seen &= after >= 0
        if "q_segment_ids" in given:
            of_q, of_kv = given["q_segment_ids"], given["kv_segment_ids"]
            seen = seen & (of_q[:, :, None] == of_kv[:, None])
        layout = self.mask.get("layout")
        return seen[:, None] & (layout.visible() if layout else True)


CAUSAL = dict(causal=True)
DOCUMENTS = Case(CAUSAL | SEGMENTS)
ROWS = Case(CAUSAL)  # of cuDNN, for which a row is a document
CASES = {
    "window": Case(CAUSAL | dict(window=7)),
    "segments, window, sinks": Case(CAUSAL | SEGMENTS | dict(window=6), sinks=True),
    "layout, segments, sinks": Case(
        CAUSAL | SEGMENTS | dict(layout=LAYOUT), sinks=True
    ),
    "positions": Case(CAUSAL | POSITIONS | dict(window=9)),
    "blind, window on both sides": Case(BLIND | dict(window=7)),
    "fewer key heads than devices": Case(CAUSAL, heads=(4, 1), dtype="bfloat16"),
    "more keys": Case({}, keys=2 * T),
    "fewer keys": Case(CAUSAL, keys=T // 2),
    "sinks, float32": Case(CAUSAL, sinks=True, dtype="float32"),
    "sinks, float16": Case(CAUSAL, sinks=True, dtype="float16"),
    "sinks, bfloat16": Case(CAUSAL, sinks=True, dtype="bfloat16"),
}


def exact(case, scale=None, sinks=None):
    """In float64, a head at a time, whose mask may be its own."""
    q, k, v, weights, *own = case.inputs("float32")
    sinks = own[0] if own and sinks is None else sinks
    seen, group = case.seen(), q.shape[2] // k.shape[2]
    heads = []
    for n in range(q.shape[2]):
        arrays = q[:, :, n], k[:, :, n // group], v[:, :, n // group], weights[:, :, n]
        heads.append(
            exact_attention(
                *(x[:, :, None] for x in arrays),
                seen[:, n % seen.shape[1]],
                scale=scale,
                sinks=None if sinks is None else sinks[n : n + 1],
            )
        )
    out, dq, dk, dv, *dsinks = zip(*heads, strict=True)
    out, dq, dk, dv = (np.concatenate(x, axis=2) for x in (out, dq, dk, dv))
    dk, dv = (x.reshape(B, case.keys, -1, group, H).sum(axis=3) for x in (dk, dv))
    return out, dq, dk, dv, *map(np.concatenate, dsinks)


def errors(got, want):
    """The greatest of each result, of its greatest element."""
    pairs = zip(got, want, strict=True)
    return np.array([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])


def run_of(kernel, spread, case):
    """`f(q, k, v, weights, *sinks) -> (out, dq, dk, dv, *dsinks)` of tokens as they
    must lie; and that order, of queries and of keys."""
    degrees = SPREADS[spread]
    zigzag = spread == ZIGZAG and "causal" in case.mask
    members = num_members(spread, *(degrees.get(axis, 1) for axis in ("ring", "seq")))
    of_q, of_kv = (
        zigzag_order(tokens, members) if zigzag else np.arange(tokens)
        for tokens in (T, case.keys)
    )
    mask = {
        key: x[:, of_q if key[0] == "q" else of_kv] if isinstance(x, jax.Array) else x
        for key, x in case.mask.items()
    }

    def weighted(q, k, v, weights, sinks=None):
        out = attend(
            q,
            k,
            v,
            mesh=mesh_of(**degrees),
            mask=Mask(**mask),
            strategy=spread,
            attention=kernel,
            zigzag=zigzag,
            sinks=sinks,
        )
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    def run(*arrays):
        argnums = [i for i in range(len(arrays)) if i != 3]
        gradients, out = jax.grad(weighted, argnums, has_aux=True)(*arrays)
        return out, *gradients

    return run, of_q, of_kv


def compiled(kernel, spread, case):
    """The same in the sequence's own order, compiled once."""
    run, of_q, of_kv = run_of(kernel, spread, case)
    run = jax.jit(run)

    def ordered(*arrays):
        orders = zip(arrays, (of_q, of_kv, of_kv, of_q), strict=False)
        results = run(*(x[:, order] for x, order in orders), *arrays[4:])
        for x, like in zip(results, (arrays[0], *arrays[:3], *arrays[4:]), strict=True):
            assert (x.shape, x.dtype) == (like.shape, like.dtype)
        results = [np.asarray(x, np.float32) for x in results]
        orders = zip(results, (of_q, of_q, of_kv, of_kv), strict=False)
        return [x[:, np.argsort(order)] for x, order in orders] + results[4:]

    return ordered


def refusal(kernel, spread, case, dtype):
    """None where the kernel has it; else what is said, and what `auto` takes instead:
    "" where it is refused as well."""
    if spread == "megatron" and case.heads[1] == 1:
        return "num_kv_heads 1 do not divide by 2: use .*strategy ulysses", ""
    if kernel == "blockwise":
        return None
    if dtype == "float32":
        said = "no kernel for products in float32: use attention auto"
        if kernel == "cudnn":
            said = "float32: cast q, k and v .*, or use .*blockwise"
        return said, "blockwise"
    if kernel == "mosaic":
        return None
    said = "cuDNN through jax.nn has no attention for .*: use .*blockwise"
    is_causal, has_window = "causal" in case.mask, "window" in case.mask
    if has_window and not is_causal:
        return said, "mosaic"
    # Block by block the order of tokens is positions, where blocks alone do not say it.
    by_index = spread not in BY_BLOCKS or not (
        has_window or (is_causal and case.keys != T)
    )
    if by_index and {*case.mask} <= {"causal", "window"}:
        return None
    return said, "mosaic"


# Of every kernel, strategy and case at least one.
QUICK = [
    ("blockwise", "ulysses", "segments, window, sinks"),
    ("blockwise", "megatron", "positions"),
    ("blockwise", "all_gather", "sinks, float32"),
    ("mosaic", "ulysses", "layout, segments, sinks"),
    ("mosaic", "megatron", "blind, window on both sides"),
    ("cudnn", "ulysses", "window"),
    ("cudnn", "ring", "more keys"),
    ("cudnn", "hybrid", "fewer key heads than devices"),
    ("cudnn", "megatron", "sinks, bfloat16"),
    ("cudnn", "megatron", "fewer keys"),
    ("cudnn", "ulysses", "sinks, float16"),
    ("cudnn", "ring", "window"),
    ("mosaic", "megatron", "sinks, float32"),
]


class TestEveryKernelUnderEveryStrategy:
    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        """Smaller than half-blocks, and of no size that divides them."""
        cudnn_stand_in.use(monkeypatch)
        mosaic_stand_in.use(monkeypatch)
        monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 5)
        monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 2)
        monkeypatch.setattr(mosaic, "BLOCK_STEP", BLOCK)
        tiles = lambda q, k, scale, *_: tiling_of(q, k, scale, 3, 5)  # noqa: E731
        monkeypatch.setattr(blockwise, "tiling_of", tiles)

    def test_none_is_left_out(self):
        assert {*KERNELS, "reference"} == {*select.ATTENTIONS}
        assert {*SPREADS} == {*STRATEGIES}
        assert {x for case in QUICK for x in case} == {*KERNELS, *SPREADS, *CASES}

    @pytest.mark.parametrize(
        "kernel, spread, name", slow_but_for(QUICK, KERNELS, SPREADS, CASES)
    )
    def test_is_exact_or_refused(self, monkeypatch, kernel, spread, name):
        case = CASES[name]
        dtype = case.dtype or KERNELS[kernel]
        arrays = case.inputs(dtype)
        refused = refusal(kernel, spread, case, dtype)
        if refused:
            self.check_refusal(monkeypatch, kernel, spread, case, arrays, *refused)
            return
        got = compiled(kernel, spread, case)(*arrays)
        if (kernel, name) == ("mosaic", "positions"):  # are not attended in silence
            assert np.isnan(got[0]).all()
            return
        off = errors(got, exact(case))
        assert (off < TOLERANCES[dtype]).all(), off
        blind = np.broadcast_to(~case.seen().any(axis=(1, 3)), (B, T))
        assert not any(x[blind].any() for x in got[:2])

    def check_refusal(self, monkeypatch, kernel, spread, case, arrays, said, instead):
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(run_of(kernel, spread, case)[0], *arrays)
        if not instead:
            return
        chosen, choose = [], select.choose
        monkeypatch.setattr(
            select, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1]
        )
        told = contextlib.nullcontext()
        if instead == "blockwise":
            told = pytest.warns(UserWarning, match="tens of times slower")
        with told:
            jax.eval_shape(run_of("auto", spread, case)[0], *arrays)
        assert {choice.name for choice in chosen} == {instead}

    @pytest.mark.parametrize(
        "kernel, spread",
        slow_but_for(
            [("blockwise", "ulysses"), ("mosaic", "ring"), ("cudnn", "megatron")],
            KERNELS,
            SPREADS,
        ),
    )
    def test_another_document_changes_no_bit(self, kernel, spread):
        """Of a document's output and gradients, which are exact, when all of another's
        arrays change."""
        case, changed = DOCUMENTS, np.asarray(SEGMENTS["q_segment_ids"]) == 2
        if kernel == "cudnn":
            case, changed = ROWS, np.repeat([[False], [True]], T, axis=1)
        run, arrays = compiled(kernel, spread, case), case.inputs(KERNELS[kernel])
        before = run(*arrays)
        off = errors(before, exact(case))
        assert (off < TOLERANCES[KERNELS[kernel]]).all(), off
        after = run(*(jnp.where(changed[..., None, None], -3 * x, x) for x in arrays))
        for a, b in zip(before, after, strict=True):
            assert (a[~changed] == b[~changed]).all()
            assert (a[changed] != b[changed]).any(axis=(1, 2)).mean() > 0.9

    @pytest.mark.parametrize("name", CASES)
    def test_the_tolerance_catches_faults(self, name):
        """A scale that is off by 1 in 100, in bfloat16 by 5; and what else is small."""
        case = CASES[name]
        dtype, want = case.dtype or "float16", exact(case)
        wrong = {
            "scale": exact(
                case, scale=(1.05 if dtype == "bfloat16" else 1.01) * H**-0.5
            )
        }
        if "window" in case.mask:
            more = case.mask | dict(window=case.mask["window"] + 1)
            wrong["window"] = exact(dataclasses.replace(case, mask=more))
        if case.sinks:
            wrong["sinks"] = exact(case, sinks=np.roll(case.inputs(dtype)[4], 1))
        for fault, got in wrong.items():
            off = errors(got, want)
            assert (off[:4] > TOLERANCES[dtype]).all(), (fault, off)
