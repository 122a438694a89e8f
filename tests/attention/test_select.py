"""Which attention is chosen, and what cuDNN refuses."""

import importlib.metadata
import sys
import tomllib
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_cases import PACKED, SHUFFLED
from files import ROOT
from mosaic_stand_in import A100, H100

from ulysses_jax.attention import mosaic, select
from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.cudnn import cudnn_attention, through_jax_nn
from ulysses_jax.attention.layouts import fixed
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.select import (
    ATTENTIONS,
    PARTS,
    Choice,
    attention_parts,
    choose,
    local_attention,
)
from ulysses_jax.mesh import Device

BF16 = jnp.bfloat16
CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5")


def shaped(tokens=14, size=64, dtype=BF16):
    return jax.ShapeDtypeStruct((2, tokens, 4, size), dtype)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(select, "tokamax_lacks", lambda: None)


@pytest.mark.parametrize("device", [H100, A100])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(causal=True, window=4)], ids=repr
)
def test_cudnn_on_gpus(device, mask):
    for dtype in (jnp.bfloat16, jnp.float16):
        for size in (8, 64, 128):
            q = shaped(size=size, dtype=dtype)
            assert local_attention("auto", device, q, q, mask) is cudnn_attention
    q, k = shaped(tokens=6), shaped(tokens=14)
    assert local_attention("auto", device, q, k, mask) is cudnn_attention


OTHERS = {  # what cuDNN through jax.nn has not
    "documents": (shaped(), Mask(causal=True, **PACKED)),
    "documents and a window": (shaped(), Mask(causal=True, window=4, **PACKED)),
    "positions": (shaped(), Mask(causal=True, **SHUFFLED)),
    "a window on both sides": (shaped(), Mask(window=4)),
    "head size 256": (shaped(size=256), Mask(causal=True)),
    "head size 12": (shaped(size=12), Mask(causal=True)),
    "from 13 queries": (shaped(tokens=13), Mask(causal=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_mosaic_on_hopper_for_the_rest(installed, name):
    q, mask = OTHERS[name]
    assert choose("auto", H100, q, q, mask) == Choice("mosaic")
    assert local_attention("auto", H100, q, q, mask) is ATTENTIONS["mosaic"]
    assert attention_parts("auto", H100, q, q, mask) is PARTS["mosaic"]


@pytest.mark.parametrize(
    "device, q, why",
    [
        (
            A100,
            shaped(),
            "cuDNN has not documents .*Mosaic not a GPU that is no Hopper",
        ),
        (H100, shaped(dtype=jnp.float32), "cuDNN has not products in float32"),
        (H100, shaped(size=264), "head size 264"),
    ],
)
def test_what_is_slow_on_a_gpu_says_so(installed, device, q, why):
    mask = Mask(causal=True, **PACKED)
    with pytest.warns(UserWarning, match=f"tens of times slower .*{why}"):
        assert local_attention("auto", device, q, q, mask) is blockwise_attention
    with pytest.warns(UserWarning, match=why):
        assert attention_parts("auto", device, q, q, mask) is PARTS["blockwise"]
    assert local_attention("blockwise", device, q, q, mask) is blockwise_attention


def test_blocks_that_no_kernel_has(installed):
    """Mosaic's are of a multiple of 64 tokens."""
    q = shaped(tokens=192)
    fits = Mask(causal=True, layout=fixed(3, block_tokens=64))
    other = Mask(causal=True, layout=fixed(2, block_tokens=96))
    for name in ("auto", "mosaic"):
        assert choose(name, H100, q, q, fits).name == "mosaic"
    lacks = "a layout's blocks of 96 tokens"
    with pytest.warns(UserWarning, match=f"a layout of blocks, Mosaic not {lacks}"):
        assert local_attention("auto", H100, q, q, other) is blockwise_attention
    with pytest.raises(ValueError, match=f"no kernel for {lacks}: use attention auto"):
        choose("mosaic", H100, q, q, other)


@pytest.mark.parametrize("device", [CPU, TPU])
def test_blockwise_on_other_devices(device):
    for q, mask in (*OTHERS.values(), (shaped(), Mask(causal=True))):
        assert local_attention("auto", device, q, q, mask) is blockwise_attention


@pytest.mark.parametrize(
    "name, device, q, message",
    [
        (
            "auto",
            H100,
            shaped(),
            "documents in a row, .*not installed: use Python 3.12",
        ),
        (
            "mosaic",
            H100,
            shaped(),
            "mosaic is not installed: use Python 3.12 .*tokamax",
        ),
        ("mosaic", A100, shaped(), "no kernel for a GPU that is no Hopper .*A100.*use"),
        ("mosaic", H100, shaped(dtype=jnp.float32), "for products in float32: use"),
        ("mosaic", CPU, shaped(), "mosaic needs GPUs, and these are cpu devices: use"),
        ("cudnn", CPU, shaped(), "cudnn needs GPUs, and these are cpu devices: use"),
        (
            "flash",
            H100,
            shaped(),
            "no attention 'flash': use 'auto', 'cudnn', 'mosaic'",
        ),
    ],
)
def test_refused_before_anything_is_compiled(monkeypatch, name, device, q, message):
    monkeypatch.setattr(select, "tokamax_lacks", lambda: "is not installed")
    with pytest.raises(ValueError, match=message):
        choose(name, device, q, q, Mask(causal=True, **PACKED))


TOO_OLD = "needs jax 0.11 or newer, and this is jax 0.10.2"
OTHER = f"calls kernels as tokamax {mosaic.TOKAMAX} .* this is tokamax 9.9 "


def kernel_of_9_9(q, k, v, *, scale):
    """Another signature than the one that is called."""


@pytest.mark.parametrize(
    "jax_version, kernel, message",
    [
        ((0, 10, 2), None, TOO_OLD),
        ((0, 11, 0), None, OTHER + r"\(ImportError: .*kernel_sm90"),
        ((0, 11, 0), object(), OTHER + r"\(AttributeError: .*Config"),
        (
            (0, 11, 0),
            SimpleNamespace(
                Config=SimpleNamespace, flash_attention_kernel=kernel_of_9_9
            ),
            OTHER + r"\(TypeError: kernel_of_9_9",
        ),
    ],
)
def test_another_jax_or_tokamax_is_refused_with_what_to_install(
    monkeypatch, jax_version, kernel, message
):
    package = ModuleType("tokamax._src.ops.attention")
    package.__spec__ = ModuleSpec("tokamax", None)
    if kernel is not None:
        package.pallas_mosaic_gpu_kernel_sm90 = kernel
    for name in ("tokamax", "tokamax._src", "tokamax._src.ops", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(jax, "__version_info__", jax_version)
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "9.9")
    monkeypatch.setattr(select, "tokamax_lacks", mosaic.tokamax_lacks.__wrapped__)
    remedy = f"pip install tokamax=={mosaic.TOKAMAX} 'jax.cuda13.>=0.11,<0.13'"
    q = shaped()
    for name in ("auto", "mosaic"):
        with pytest.raises(
            ValueError, match=f"{message}.*: use Python 3.12 .*{remedy}"
        ):
            choose(name, H100, q, q, Mask(causal=True, **PACKED))


def test_what_is_to_be_installed_is_the_extra():
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = " ".join(pins["optional-dependencies"]["gpu"])
    assert f"tokamax=={mosaic.TOKAMAX};" in pins and "<0.13" in pins
    assert mosaic.LEAST_JAX == (0, 11)


def test_what_needs_no_tokamax_imports_none(monkeypatch):
    """Which takes seconds."""
    monkeypatch.setattr(select, "tokamax_lacks", pytest.fail)
    q, packed = shaped(), Mask(causal=True, **PACKED)
    assert choose("auto", H100, q, q, Mask(causal=True)).name == "cudnn"
    assert choose("auto", A100, q, q, packed).name == "blockwise"
    assert choose("auto", CPU, q, q, packed).name == "blockwise"


@pytest.mark.parametrize(
    "dtype, keys, mask, message",
    [
        (
            jnp.float32,
            13,
            Mask(causal=True),
            "float32: cast q, k and v to bfloat16 .*or",
        ),
        (BF16, 13, Mask(**PACKED), "documents in a row: use attention auto"),
        (BF16, 13, Mask(**SHUFFLED), "positions: use"),
        (BF16, 13, Mask(window=4), "a window on both sides: use"),
        (
            BF16,
            5,
            Mask(causal=True, window=4),
            "window with more queries than keys: use",
        ),
    ],
)
def test_cudnn_refuses(dtype, keys, mask, message):
    q, k = jnp.zeros((2, 13, 4, 8), dtype), jnp.zeros((2, keys, 4, 8), dtype)
    with pytest.raises(ValueError, match=message):
        cudnn_attention(q, k, k, mask=mask)
    with pytest.raises(ValueError, match=message):
        choose("cudnn", H100, q, k, mask)


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
    assert list(ATTENTIONS) == ["cudnn", "mosaic", "blockwise", "reference"]
