"""memory: auto takes the first rung that fits, and says what it tried."""

import dataclasses

import pytest
from memory_cases import assert_same, loss_and_gradients, make_config, mesh_of, plain

from ulysses_jax import config as configs
from ulysses_jax.config_file import from_dict
from ulysses_jax.memory.auto import RUNGS, Fit, choose, kept_bytes, rungs
from ulysses_jax.training.choose_memory import choose_memory

LIMITS = Fit(0, 1000, 0, 1000)


def config_of(**memory):
    return make_config("llama", dict(seq=4), auto=True, **memory)


def never_kept(monkeypatch):
    monkeypatch.setattr("ulysses_jax.memory.auto.kept_bytes", lambda _: (0, 0))


@pytest.mark.parametrize("first", range(len(RUNGS)))
def test_takes_the_first_that_fits(first, monkeypatch):
    never_kept(monkeypatch)
    config = config_of(loss_tile_tokens=7)
    memories = [memory for _, memory in rungs(config)]
    seen = []

    def compiled(candidate):
        seen.append(candidate.memory)
        fits = len(seen) > first
        return dataclasses.replace(LIMITS, device_bytes=1 if fits else 1001)

    chosen, trials = choose(config, compiled, LIMITS)
    assert chosen.memory == memories[first] and not chosen.memory.auto
    assert chosen.memory.loss_tile_tokens == 7
    assert seen == memories[: first + 1]
    assert [trial["fits"] for trial in trials] == [False] * first + [True]


def test_the_host_counts_too(monkeypatch):
    never_kept(monkeypatch)
    needs = iter([Fit(1001, 1000, 0, 1000), Fit(0, 1000, 1001, 1000), LIMITS])
    _, trials = choose(config_of(), lambda _: next(needs), LIMITS)
    assert len(trials) == 3


def test_what_cannot_fit_is_not_compiled():
    """Two layers of 14 tokens x 4 rows: inputs of 16, hidden of 20, heads of 32."""
    config = config_of()
    _, everything = rungs(config)[0]
    kept, host = kept_bytes(dataclasses.replace(config, memory=everything))
    assert (kept, host) == (4 * 14 * 2 * (16 + 32 + 20) * 4, 0)
    compiled = []

    def fits(candidate):
        compiled.append(candidate.memory.remat)
        return Fit(0, kept - 1, 0, kept)

    _, trials = choose(config, fits, Fit(0, kept - 1, 0, kept))
    assert compiled == ["attention"]
    assert [trial["is_compiled"] for trial in trials] == [False, False, True]


def test_nothing_fits():
    with pytest.raises(ValueError) as error:
        choose(
            config_of(), lambda _: Fit(2**31, 2**30, 0, 2**30), Fit(0, 2**30, 0, 2**30)
        )
    message = str(error.value)
    assert "nothing fits" in message and "2.0 of 1.0 GiB of a device" in message
    assert "Shorten the sequence (56 tokens)" in message


def test_every_rung_is_a_config_that_works():
    for _, memory in rungs(config_of()):
        values = dataclasses.asdict(memory) | dict(auto=False)
        config = make_config("llama", dict(seq=4), **values)
        assert configs.in_pieces(config.model, config.memory) == (
            memory.sequence_chunk_tokens is not None
        )


def test_lengths_without_a_fair_chunk_have_no_chunks():
    """And the rungs that need none remain, each once."""
    config = make_config("llama", dict(seq=4), auto=True, tokens=4 * 16411)
    memories = [memory for _, memory in rungs(config)]
    assert not any(memory.sequence_chunk_tokens for memory in memories)
    assert not any("keys" in memory.offload for memory in memories)
    assert memories[5].remat == "full" and "inputs" in memories[4].offload
    assert len(set(memories)) == len(memories) == len(RUNGS) - 1
    config = make_config("llama", dict(seq=4), auto=True, tokens=4 * 3 * 8192)
    assert rungs(config)[-1][1].sequence_chunk_tokens == 12288


def test_other_options_are_replaced():
    config = config_of(offload=("inputs",), mlp_tile_tokens=3, loss_tile_tokens=7)
    first = rungs(config)[0][1]
    assert first == configs.Memory(remat="none", loss_tile_tokens=7, head_chunks=1)


def test_groups_of_heads_stay_where_they_hide_something():
    found = [memory for _, memory in rungs(config_of(head_chunks=2))]
    assert [each.head_chunks for each in found] == [1, 1] + [2] * (len(found) - 2)


def test_what_is_not_cut_up_has_no_chunks():
    for strategy, degrees in (
        ("hybrid", dict(ring=2, seq=2)),
        ("megatron", dict(seq=4)),
    ):
        model = dict(strategy=strategy)
        config = make_config("llama", degrees, model=model, auto=True)
        assert config.model.strategy == strategy
        assert all(not memory.sequence_chunk_tokens for _, memory in rungs(config))
    model = dict(attention="reference")
    dense = make_config("llama", dict(seq=4), auto=True, model=model)
    assert all(not memory.sequence_chunk_tokens for _, memory in rungs(dense))


def test_chunks_keep_the_order_of_tokens():
    """Where keys alone would be cheaper to gather, in zigzag order."""
    model = dict(num_kv_heads=1, zigzag=None)
    gathers = make_config("llama", dict(seq=2), model=model)
    assert gathers.model.strategy == "all_gather" and gathers.zigzag_members() > 1
    config = make_config("llama", dict(seq=2), model=model, auto=True)
    assert config.model.strategy == "ulysses" and config.zigzag_members() == 1


def test_as_a_word():
    config = from_dict(configs.Config, dict(memory="auto"))
    assert config.memory.auto
    with pytest.raises(ValueError, match="memory, but for the word auto, is a section"):
        from_dict(configs.Config, dict(memory="other"))


def test_of_a_run_on_devices_that_are_here():
    config = config_of()
    mesh = mesh_of(**dataclasses.asdict(config.mesh))
    chosen, lines = choose_memory(config, mesh)
    assert chosen.memory.remat == "none"
    assert len(lines) == 1 and "keep everything" in lines[0]
    assert_same(loss_and_gradients(chosen), plain("llama", "data 2, seq 4"))
