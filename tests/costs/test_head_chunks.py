"""Groups of heads by default: what the links, the length and the heads say."""

import dataclasses

import pytest

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Config, Memory, Mesh, Model, Training
from ulysses_jax.costs.head_chunks import GROUP_SECONDS, LEAST_SAVING, place_on
from ulysses_jax.costs.targets import TARGETS

H100 = TARGETS["h100"]


def chunks(
    tokens,
    *,
    gpus_per_host=8,
    target=H100,
    memory=None,
    model=None,
    batch_size=1,
    accumulation_steps=1,
    **degrees,
):
    shape = dict(num_heads=32, num_kv_heads=8, num_layers=2, strategy="ulysses")
    config = Config(
        model=complete_model(
            Model(
                width=4096,
                head_size=128,
                feed_forward_width=14336,
                compute_dtype="bfloat16",
                **shape | (model or {}),
            )
        ),
        training=Training(
            sequence_tokens=tokens,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
        ),
        memory=Memory(**(memory or {})),
    )
    degrees = dataclasses.asdict(Mesh()) | degrees
    return place_on(config, degrees, target, gpus_per_host).memory.head_chunks


def test_within_a_host_one_group_at_long_sequences():
    assert chunks(2**17, seq=8) == chunks(2**20, seq=8) == 1


def test_between_hosts_several():
    assert chunks(2**17, seq=16) == 2  # all the heads that a GPU has
    assert chunks(2**17, seq=8, gpus_per_host=4) == 4
    assert chunks(2**17, seq=8, tensor=1, gpus_per_host=8) == 1


def test_where_devices_of_one_host_are_tensors():
    """seq=2 strides over hosts of 4 where tensor=4 fills them."""
    apart = chunks(2**17, seq=2, tensor=4, gpus_per_host=4)
    assert apart > chunks(2**17, seq=2, tensor=4, gpus_per_host=8) == 1


def test_short_sequences_and_very_long_ones_need_none():
    """Between hosts: of 8K tokens a group costs more than it hides; of 4M the exchange
    is a hundredth of attention."""
    assert chunks(2**12, seq=16) == 1
    assert chunks(2**22, seq=16) == 1


def test_rows_share_the_cost_of_a_group():
    assert chunks(2**13, seq=16) == 1
    assert chunks(2**13, seq=16, batch_size=8) == 2
    parts = dict(batch_size=8, accumulation_steps=8)
    assert chunks(2**13, seq=16, **parts) == 1


def test_the_saving_is_worth_it():
    """At the length where the choice changes, by hand: E is an exchange's seconds, A
    attention's, M the matrix products'; two groups save E/2 less another group."""
    flops = H100.bf16_flops_per_second
    found = set()
    for tokens in (2**13, 2**15, 2**17, 2**19, 2**20, 2**21):
        # q, k, v and out: 2 x (32 + 16 KV slots) x 128 features, half of 15/16 outside.
        sent = 2 * (32 + 16) * 128 * tokens / 16 * 2
        outside = sent * 8 / 16 / (H100.network_bytes_per_second * 0.9)
        attention = 2 * tokens**2 * 4096 / 16 / (flops * H100.attention_efficiency)
        weights = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
        matmul = 2 * weights * tokens / 16 / (flops * H100.matmul_efficiency)
        saves = outside / 2 - max(outside - attention, 0) / 2 - GROUP_SECONDS
        worth = saves >= LEAST_SAVING * (attention + matmul)
        assert chunks(tokens, seq=16) == (2 if worth else 1), tokens
        found.add(worth)
    assert found == {True, False}


def test_layers_with_windows_hide_little():
    """At 32K tokens an exchange takes 0.56 ms, a full layer's attention 1.01, a window
    layer's 0.01; two groups save 0.28 ms less 0.1 of the one, and cost the other 0.1.
    The mean of attention alone would hide most of it with four windows of six too."""
    for num_windows, want in ((0, 2), (3, 2), (4, 1), (6, 1)):
        pattern = ("window",) * num_windows + ("full",) * (6 - num_windows)
        window = 128 if num_windows else None
        model = dict(num_layers=6, pattern=pattern, window=window)
        assert chunks(2**15, seq=16, model=model) == want, num_windows


@pytest.mark.parametrize(
    "changes",
    [
        dict(memory=dict(remat="none")),
        dict(model=dict(attention="reference")),
        dict(model=dict(strategy="all_gather")),
        dict(target=None),
        dict(memory=dict(head_chunks=1)),
    ],
    ids=str,
)
def test_one_where_groups_hide_nothing_or_are_given(changes):
    assert chunks(2**17, seq=8, gpus_per_host=4) == 4
    assert chunks(2**17, seq=8, gpus_per_host=4, **changes) == 1


def test_what_is_given_stays():
    assert chunks(2**17, seq=8, memory=dict(head_chunks=4)) == 4
