"""The longest sequence: bracketed to 1 %, in few compiles, never one too long."""

import itertools
import math
from dataclasses import replace

import pytest

from ulysses_jax import config as configs
from ulysses_jax.complete import complete
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan import longest as longest_module
from ulysses_jax.plan.longest import MAX_TOKENS, longest
from ulysses_jax.plan.plan import Cluster

H100 = TARGETS["h100"]
LIMIT = H100.memory_bytes
HOST_LIMIT = 10**12
STATE, EXTRAS = 8 * 10**9, 10**9
UNIT = 128 * 8


@pytest.fixture
def compiled(monkeypatch):
    """`compiled(device, host)` plants memory as functions of tokens; lists the runs."""

    def plant(device, host=lambda tokens: 0, state=STATE):
        runs = []

        def fake(config, cluster):
            runs.append(config)
            tokens = config.training.sequence_tokens
            memory = {
                "device_bytes": int(state + device(tokens)),
                "estimated_bytes": EXTRAS,
                "limit_bytes": LIMIT,
                "parameters_bytes": state // 4,
                "gradients_bytes": state // 4,
                "optimizer_bytes": state // 2,
                "host_bytes_per_device": int(host(tokens)),
                "host_bytes_per_node": 8 * int(host(tokens)),
                "host_limit_bytes_per_node": HOST_LIMIT,
            }
            fits = memory["device_bytes"] + EXTRAS <= LIMIT
            fits &= memory["host_bytes_per_node"] <= HOST_LIMIT
            return {"fits": bool(fits), "memory": memory, "advice": "buy more"}

        monkeypatch.setattr(longest_module, "make_plan", fake)
        return runs

    return plant


def run(tokens, *, seq=8, **model):
    config = configs.Config(
        model=configs.Model(width=64, num_heads=8, vocab_size=64, **model),
        training=configs.Training(batch_size=8, sequence_tokens=tokens),
        mesh=configs.Mesh(seq=seq),
    )
    return complete(config, name="run")


def find(tokens=131_072, **options):
    return longest(run(tokens), Cluster(H100, 1, 8), **options)


# Bytes of a GPU by tokens, and of the host.
MEMORIES = {
    "linear": (lambda t: 2e4 * t, None),
    "with an intercept": (lambda t: 5e9 + 2e4 * t, None),
    "convex": (lambda t: 1e4 * t + 1e-2 * t * t, None),
    "concave": (lambda t: 2e7 * t**0.5, None),
    "steps": (lambda t: 2**30 * (2e4 * t // 2**30), None),
    "large steps": (lambda t: 2**34 * (2e4 * t // 2**34), None),
    "a cliff": (lambda t: 1e3 * t + 6e10 * (t > 777_777), None),
    "host": (lambda t: 1e3 * t, lambda t: 1e5 * t),
    "host, then GPU": (lambda t: 2e4 * t, lambda t: 3.3e4 * t + 2e9),
}


@pytest.mark.parametrize("start", [64, 131_072, 10**7, 2 * 10**9])
@pytest.mark.parametrize("name", MEMORIES)
def test_brackets_to_one_percent_in_few_compiles(compiled, name, start):
    device, host = MEMORIES[name]
    runs = compiled(device, host or (lambda tokens: 0))
    result = find(start)
    found = result["longest_tokens"]
    assert found % UNIT == 0 and result["fits"]
    trials = {trial["tokens"]: trial["fits"] for trial in result["trials"]}
    assert trials[found] and found == max(t for t, fits in trials.items() if fits)
    above = min(t for t, fits in trials.items() if not fits)
    assert found < above <= max(found * 1.01, found + UNIT)
    assert len(runs) == len(trials) <= 12


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 50, 99, 101, 1000, 54_321])
def test_any_limit_from_any_start(compiled, most):
    """Where all that is known is whether it fits; brackets of one unit too."""
    for start, height in itertools.product(
        (1, most, most + 1, 3 * most, 100), (1, 1e3)
    ):
        compiled(lambda tokens, h=height: h * LIMIT * (tokens > most * UNIT))
        found = find(start * UNIT)["longest_tokens"]
        assert most / 1.01 <= found / UNIT <= most


def test_a_linear_memory_takes_few_compiles(compiled):
    runs = compiled(lambda tokens: 2e4 * tokens)
    find()
    assert len(runs) <= 6


def test_where_nothing_fits(compiled):
    runs = compiled(lambda tokens: 1e11)
    with pytest.raises(ValueError, match=r"not even 1,024 tokens fit h100:1x8.*buy"):
        find(10**7)
    assert len(runs) <= 8
    runs = compiled(lambda tokens: tokens, state=10**11)
    with pytest.raises(ValueError, match="not even"):
        find()
    assert len(runs) == 2  # parameters alone are too much: no search


def test_where_all_fits_up_to_the_last_position(compiled):
    runs = compiled(lambda tokens: tokens)
    found = find()["longest_tokens"]
    assert found == MAX_TOKENS // UNIT * UNIT > 2**31 - 2 * UNIT
    assert len(runs) <= 8
    # Just below: the last length is compiled, not assumed.
    compiled(lambda tokens: LIMIT * (tokens > 2**31 - 10**8))
    assert 0.99 * (2**31 - 10**8) < find()["longest_tokens"] <= 2**31 - 10**8


def test_learned_positions_grow_along(compiled):
    runs = compiled(lambda tokens: 2e4 * tokens)
    longest(run(1024, positions="learned"), Cluster(H100, 1, 8))
    assert len({each.training.sequence_tokens for each in runs}) == len(runs)
    for each in runs:
        assert each.model.max_positions == each.training.sequence_tokens
    runs = compiled(lambda tokens: 2e4 * tokens)
    longest(run(1024), Cluster(H100, 1, 8))
    assert all(each.model.max_positions is None for each in runs)


def test_shards_are_whole_blocks_also_where_seq_takes_what_is_left(compiled):
    compiled(lambda tokens: 2e4 * tokens)
    found = longest(run(1024, seq=-1), Cluster(H100, 8, 8))["longest_tokens"]
    assert found % (128 * 64) == 0


def test_tolerance_and_progress(compiled):
    compiled(lambda tokens: 1e9 + 2e4 * tokens)
    seen = []
    result = find(tolerance=1e-3, on_trial=lambda *trial: seen.append(trial))
    exact = (LIMIT - EXTRAS - STATE - 1e9) / 2e4
    assert math.isclose(result["longest_tokens"], exact, rel_tol=1.5e-3)
    assert len(seen) == len(result["trials"])
    assert {tokens: plan["fits"] for tokens, plan in seen} == {
        trial["tokens"]: trial["fits"] for trial in result["trials"]
    }


def test_groups_of_heads_that_are_left_open_are_chosen_at_each_length(compiled):
    """Not once, at the config's own length: a run of the longest chooses at that."""
    runs = compiled(lambda tokens: 2e4 * tokens)
    config = run(2**15)
    config = replace(config, memory=replace(config.memory, auto=True))
    longest(config, Cluster(H100, 1, 8))
    assert all(each.memory.head_chunks is None for each in runs)
    runs.clear()
    given = replace(config.memory, head_chunks=1)
    longest(replace(config, memory=given), Cluster(H100, 1, 8))
    assert all(each.memory.head_chunks == 1 for each in runs)
