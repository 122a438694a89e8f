"""Which attention is chosen, and what cuDNN refuses."""

import jax
import jax.numpy as jnp
import pytest
from attention_cases import PACKED, SHUFFLED

from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.cudnn import cudnn_attention, through_jax_nn
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.select import ATTENTIONS, local_attention

BF16 = jnp.bfloat16


def shaped(tokens=14, size=64, dtype=BF16):
    return jax.ShapeDtypeStruct((2, tokens, 4, size), dtype)


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(causal=True, window=4)], ids=repr
)
def test_cudnn_on_gpus(platform, mask):
    for dtype in (jnp.bfloat16, jnp.float16):
        for size in (8, 64, 128):
            q = shaped(size=size, dtype=dtype)
            assert local_attention(platform, q, q, mask) is cudnn_attention
    q, k = shaped(tokens=6), shaped(tokens=14)
    assert local_attention(platform, q, k, mask) is cudnn_attention


@pytest.mark.parametrize(
    "platform, q, mask",
    [
        ("cpu", shaped(), Mask(causal=True)),
        ("tpu", shaped(), Mask(causal=True)),
        ("cuda", shaped(dtype=jnp.float32), Mask(causal=True)),
        ("cuda", shaped(size=12), Mask(causal=True)),
        ("cuda", shaped(size=256), Mask(causal=True)),
        ("cuda", shaped(), Mask(causal=True, **PACKED)),
        ("cuda", shaped(), Mask(causal=True, **SHUFFLED)),
        ("cuda", shaped(), Mask(window=4)),
        ("cuda", shaped(tokens=13), Mask(causal=True)),
    ],
)
def test_blockwise_everywhere_else(platform, q, mask):
    assert local_attention(platform, q, q, mask) is blockwise_attention


def test_blockwise_for_a_window_with_more_queries_than_keys():
    mask = Mask(causal=True, window=4)
    chosen = local_attention("cuda", shaped(tokens=18), shaped(tokens=6), mask)
    assert chosen is blockwise_attention


@pytest.mark.parametrize(
    "dtype, keys, mask, message",
    [
        (jnp.float32, 13, Mask(causal=True), "not float32: cast q, k and v .*, or use"),
        (BF16, 13, Mask(**PACKED), "neither segment ids nor positions: use blockwise"),
        (BF16, 13, Mask(**SHUFFLED), "neither segment ids nor positions: use"),
        (BF16, 13, Mask(window=4), "a window only with causal=True: use blockwise"),
        (BF16, 5, Mask(causal=True, window=4), "13 queries and 5 keys: use blockwise"),
    ],
)
def test_cudnn_refuses(dtype, keys, mask, message):
    q, k = jnp.zeros((2, 13, 4, 8), dtype), jnp.zeros((2, keys, 4, 8), dtype)
    with pytest.raises(ValueError, match=message):
        cudnn_attention(q, k, k, mask=mask)


def test_cudnn_is_asked_for_what_xla_is(monkeypatch):
    """The same arguments, whose meaning test_attentions.py checks with XLA."""
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, **given: asked.append(given)
    )
    q = jnp.zeros((2, 13, 4, 8), BF16)
    for mask in (Mask(), Mask(causal=True), Mask(causal=True, window=4)):
        cudnn_attention(q, q, q, mask=mask, scale=0.3)
        through_jax_nn(q, q, q, mask=mask, scale=0.3, implementation="xla")
        cudnn, xla = asked[-2:]
        assert cudnn.pop("implementation") == "cudnn"
        assert xla.pop("implementation") == "xla"
        assert cudnn == xla


def test_names_for_a_config():
    assert list(ATTENTIONS) == ["blockwise", "cudnn", "reference"]
