"""A step whose rows hold documents, compiled for H100: the kernels it attends with.

Needs the CUDA plugin and tokamax: `make test-kernels`.
"""

from dataclasses import replace
from functools import cache

import pytest
from test_gpu_plan import exchange, tiny

from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan.compile import analyse, compile_step

pytestmark = pytest.mark.plan
pytest.importorskip("tokamax")

H100 = TARGETS["h100"]
TOKENS = 65536
CASES = {
    "documents": {},
    "a window and sinks in every second layer": dict(
        window=4096, pattern=("window", "full"), sinks=True
    ),
    "a window, heads of 256": dict(
        window=4096,
        pattern=("window",),
        num_heads=8,
        num_kv_heads=8,
        head_size=256,
    ),
}


@cache
def step(*, packed=True, remat="products", **changes):
    """On 8 GPUs: a layer in Llama's proportions, and what auto keeps of it."""
    config = tiny(seq=8, tokens=TOKENS, batch_size=1, memory=dict(remat=remat))
    size = dict(
        vocab_size=8192,
        width=2048,
        num_layers=8,
        num_heads=16,
        num_kv_heads=16,
        head_size=128,
        feed_forward_width=7168,
    )
    config = replace(
        config,
        model=replace(config.model, **size | changes),
        data=replace(config.data, mask_documents=packed, document_tokens=4096),
    )
    return analyse(compile_step(config, H100, 1, 8), H100, 8)


@pytest.mark.parametrize("name", CASES)
def test_documents_go_through_the_kernels(name):
    """Forward and backward, all of them; what is sent and held is as of a causal step,
    which cuDNN attends in."""
    found, causal = step(**CASES[name]), step(packed=False)
    assert found["kernels"] == {"mosaic": ["forward", "backward"]}
    assert causal["kernels"] == {"cudnn": ["forward", "backward"]}
    assert {row["kernel"] for row in found["attention"]} == {"mosaic"}
    assert found["warnings"] == causal["warnings"] == []
    assert exchange(found)["ratio"] == exchange(causal)["ratio"] == 1
    assert held(found) < 1.1 * held(causal)


@pytest.mark.parametrize("remat", ["products", "full"])
def test_layers_of_a_round_are_computed_again_one_by_one(remat):
    """All four together: 1.25 and 1.74 times what a loop over one layer holds."""
    pattern = dict(pattern=("full", "window", "window", "window"), window=4096)
    four, one = (
        step(packed=False, remat=remat, **changes) for changes in (pattern, {})
    )
    bound = {"products": 1.15, "full": 1.3}[remat]
    assert held(four) < bound * held(one)


def test_a_layout_among_documents_goes_through_the_kernels():
    """As without them, but for the loop over tiles, whose number is not known: fewer
    FLOPs, and no more bytes."""
    layout = dict(sparse="fixed", sparse_block_tokens=512, pattern=("sparse",))
    found, alone = step(**layout), step(packed=False, **layout)
    for each in (found, alone):
        assert each["kernels"] == {"mosaic": ["forward", "backward"]}
        assert [row["kernel"] for row in each["attention"]] == ["mosaic"]
        assert each["warnings"] == []
        assert exchange(each)["ratio"] == 1
    fractions = [each["attention"][0]["pairs_fraction"] for each in (found, alone)]
    assert fractions[0] < fractions[1]
    assert found["attention_flops"] < alone["attention_flops"]
    assert held(found) < 1.02 * held(alone)


def held(found):
    memory = found["memory"]
    return memory["device_bytes"] + memory["estimated_bytes"]
