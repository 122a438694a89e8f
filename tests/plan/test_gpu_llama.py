"""Llama-3-8B on 8 H100, all of it: `memory: auto` computes next to nothing twice.

Needs the CUDA plugin.
"""

from dataclasses import replace

import pytest
from files import ROOT

from ulysses_jax.config_file import load
from ulysses_jax.costs.predict import step_flops
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.memory.auto import rungs
from ulysses_jax.plan.plan import Cluster, make_plan, placed_on

pytestmark = pytest.mark.plan

CLUSTER = Cluster(TARGETS["h100"], 1, 8)


@pytest.mark.parametrize(
    "tokens, rung, most",
    [
        (131_072, "recompute norms and activations", 1.08),
        (1_048_576, "inputs and attention wait on the host", 1.05),
    ],
)
def test_a_step_takes_little_more_than_attention_and_products_once(tokens, rung, most):
    """With what auto takes, if nothing cheaper fits; one sequence, one document."""
    given = f"--training.sequence-tokens {tokens} --training.batch-size 1"
    config = load(
        ROOT / "configs" / "llama3_8b.yaml",
        [*given.split(), "--data.no-mask-documents"],
    )
    config = placed_on(config, CLUSTER)
    plan = make_plan(replace(config, memory=dict(rungs(config))[rung]), CLUSTER)
    assert plan["fits"] and plan["warnings"] == []
    flops = step_flops(config, tokens)
    target = CLUSTER.target
    peak = target.peak_flops_per_second("bfloat16") * CLUSTER.num_devices
    products = flops["matmul"] / (peak * target.matmul_efficiency)
    # Six products, and the seventh that a flash attention's backward pass does again.
    attention = flops["attention"] * 7 / 6 / (peak * target.attention_efficiency)
    assert plan["predicted"]["step_seconds"] < most * (products + attention)
