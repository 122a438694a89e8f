"""Rematerialisation changes what is kept and computed again, and no result."""

import pytest
from memory_cases import (
    FAMILIES,
    MESHES,
    assert_same,
    compiled,
    loss_and_gradients,
    make_config,
    plain,
)
from slow import slow_but_for

from ulysses_jax.costs.flops import matmul_flops
from ulysses_jax.costs.hlo import parse

OPTIONS = [
    dict(remat="full"),
    dict(remat="attention"),
    dict(remat="attention", mlp_tile_tokens=9),
    dict(remat="products"),
    dict(remat="products", offload=("inputs", "parameters")),
]


@pytest.mark.parametrize(
    "family, options",
    slow_but_for(
        [
            ("llama", OPTIONS[0]),
            ("gpt", OPTIONS[1]),
            ("llama", OPTIONS[2]),
            ("gpt", OPTIONS[3]),
        ],
        FAMILIES,
        OPTIONS,
    ),
)
def test_same_loss_and_gradients(family, options):
    config = make_config(family, MESHES["data 2, seq 4"], **options)
    assert_same(loss_and_gradients(config), plain(family, "data 2, seq 4"))


@pytest.mark.parametrize(
    "mesh_name",
    slow_but_for(
        ["fsdp 2, seq 2, tensor 2"], ["one device", "fsdp 2, seq 2, tensor 2"]
    ),
)
def test_attention_on_every_mesh(mesh_name):
    config = make_config("llama", MESHES[mesh_name], remat="attention")
    assert_same(loss_and_gradients(config), plain("llama", mesh_name))


@pytest.fixture(scope="module")
def programs():
    """A sequence of many blocks, so that no loop of blockwise attention unrolls."""
    options = {
        "none": dict(remat="none"),
        "full": dict(remat="full"),
        "attention": dict(remat="attention"),
        "products": dict(remat="products"),
    }
    return {
        name: compiled(
            make_config(
                "llama",
                dict(data=2, seq=4),
                tokens=4096,
                model=dict(num_layers=8),
                **each,
            )
        )
        for name, each in options.items()
    }


def num_loops(program):
    return program.text.count(" while(")


def test_attention_runs_its_forward_once(programs):
    """Its forward is two loops in one another; only `full` has them twice."""
    assert num_loops(programs["full"]) == num_loops(programs["none"]) + 2
    assert num_loops(programs["attention"]) == num_loops(programs["none"])
    assert num_loops(programs["products"]) == num_loops(programs["none"])


def test_products_and_exchanges_run_once(programs):
    def flops_and_exchanges(name):
        module = parse(programs[name].text)
        entry = module.computations[module.entry]
        exchanges = sum(
            module.runs[computation.name]
            for computation, each in module.top_level()
            if each.opcode == "all-to-all"
        )
        flops = sum(matmul_flops(module, entry, each) for each in entry.instructions)
        return flops, exchanges

    assert flops_and_exchanges("products") == flops_and_exchanges("none")
    attention, none = (flops_and_exchanges(name) for name in ("attention", "none"))
    assert all(more > less for more, less in zip(attention, none, strict=True))


def test_what_each_keeps(programs):
    """Bytes of 8 layers on a device: attention's results."""
    temp = {name: program.stats["temp_size"] for name, program in programs.items()}
    assert temp["full"] < temp["attention"] < temp["products"] < temp["none"]
    kept = 8 * 2 * 4096 * 2 * (4 * 4 + 4)  # out and logsumexp of 2 of 8 heads
    assert temp["attention"] - temp["full"] == pytest.approx(kept, rel=0.2)
