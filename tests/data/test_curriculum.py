"""Which length and rows a step has: by the step alone, none before its turn."""

from collections import Counter

import numpy as np
import pytest

from ulysses_jax.data.curriculum import LengthSampler, odds

NUM_ROWS = {2: 40, 4: 21, 8: 9, 16: 3}


def sampler(**changes):
    return LengthSampler(**(dict(num_rows=NUM_ROWS, tokens_a_step=16) | changes))


def test_odds():
    assert odds("grow-p2", 6) == (32, 16, 8, 4, 2, 1)
    assert odds("grow-linear", 6) == (6, 5, 4, 3, 2, 1)
    assert odds("uniform", 6) == (1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="'grow' is none of uniform, grow-l"):
        odds("grow", 6)  # pyright: ignore


def test_every_step_is_one_length_and_the_same_number_of_tokens():
    lengths = sampler()
    for step in range(50):
        length, rows = lengths.at(step)
        assert length * len(rows) == 16
        assert rows.min() >= 0 and rows.max() < NUM_ROWS[length]


@pytest.mark.parametrize("cycle_steps", [None, 7, 40])
@pytest.mark.parametrize("curriculum", ["uniform", "grow-linear", "grow-p2"])
def test_a_buckets_rows_all_come_before_one_comes_again(curriculum, cycle_steps):
    lengths = sampler(curriculum=curriculum, cycle_steps=cycle_steps, seed=3)
    taken = {length: [] for length in NUM_ROWS}
    for step in range(5 * lengths.steps_a_pass):
        length, rows = lengths.at(step)
        taken[length] += rows.tolist()
    for length, num in NUM_ROWS.items():
        epochs = [taken[length][i : i + num] for i in range(0, len(taken[length]), num)]
        assert len(epochs) > 3
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(num))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert num < 9 or epochs[0] != epochs[1]


def test_the_step_is_all_there_is_to_keep():
    whole = [sampler(cycle_steps=9).at(step) for step in range(60)]
    one = sampler(cycle_steps=9)
    for step in (59, 0, 31, 7, 30, 31):
        length, rows = one.at(step)
        assert (length, rows.tolist()) == (
            whole[step].length,
            whole[step].rows.tolist(),
        )
    far = one.at(10**6)
    assert (one.at(10**6).rows == far.rows).all()


def test_the_seed_sets_lengths_and_rows():
    def drawn(seed):
        lengths = sampler(seed=seed)
        return [(n, rows.tolist()) for n, rows in map(lengths.at, range(25))]

    assert drawn(1) == drawn(1) != drawn(2)
    # Fixed: another order would break the resumption of runs that exist.
    assert [length for length, _ in drawn(0)[:8]] == [2, 8, 2, 4, 2, 8, 4, 4]
    assert drawn(0)[0][1] == [20, 30, 16, 26, 2, 21, 27, 23]


def test_a_pass_has_each_buckets_batches_and_a_cycle_its_share():
    num_rows = {2: 80, 4: 40, 8: 16, 16: 8}  # batches: 10, 10, 8, 8
    lengths = sampler(num_rows=num_rows, cycle_steps=18)
    assert lengths.steps_a_pass == 36
    for begin in (0, 18, 36):
        cycle = Counter(lengths.at(step).length for step in range(begin, begin + 18))
        assert cycle == {2: 5, 4: 5, 8: 4, 16: 4}


@pytest.mark.parametrize("cycle_steps", [1, 7, 25, 26, 60])
def test_a_cycle_of_any_steps_has_each_lengths_share(cycle_steps):
    lengths = sampler(cycle_steps=cycle_steps)
    share = np.array([5, 5, 4, 3]) / lengths.steps_a_pass
    counts, num = np.zeros(4), 3 * cycle_steps + 2
    for step in range(num):
        counts[list(NUM_ROWS).index(lengths.at(step).length)] += 1
        assert list(lengths.num_steps(step + 1).values()) == counts.tolist()
        if (step + 1) % cycle_steps == 0:
            assert (abs(counts - share * (step + 1)) <= 1).all()


@pytest.mark.parametrize("curriculum", ["uniform", "grow-linear", "grow-p2"])
def test_the_first_length_of_a_pass_has_the_curriculums_odds(curriculum):
    """Of buckets with the same number of batches."""
    num_rows = {2**k: 5 * 2 ** (5 - k) for k in range(6)}
    lengths = LengthSampler(num_rows, 32, curriculum=curriculum)
    num = 1500
    first = Counter(lengths.at(i * lengths.steps_a_pass).length for i in range(num))
    wanted = np.array(odds(curriculum, 6)) / sum(odds(curriculum, 6))
    found = np.array([first[2**k] for k in range(6)]) / num
    # Four standard deviations.
    assert (abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / num)).all()


def test_lengths_grow_in_every_cycle():
    num_rows = {2**k: 60 * 2 ** (5 - k) for k in range(6)}

    def mean_lengths(**changes):
        lengths = LengthSampler(num_rows, 32, **changes)
        drawn = [lengths.at(step).length for step in range(lengths.steps_a_pass)]
        return [np.mean(np.log2(part)) for part in np.array_split(drawn, 4)]

    early, _, _, late = mean_lengths(curriculum="grow-p2")
    assert early < 1.5 and late > 4
    early, _, _, late = mean_lengths(curriculum="uniform")
    assert abs(early - late) < 1
    half = LengthSampler(num_rows, 32).steps_a_pass // 2
    first, second, third, fourth = mean_lengths(curriculum="grow-p2", cycle_steps=half)
    assert first < 2 < 3 < second and third < 2 < 3 < fourth


def test_a_bucket_with_few_rows_or_none():
    lengths = sampler(num_rows={2: 3, 4: 0, 16: 2})
    drawn = [lengths.at(step) for step in range(9)]
    assert Counter(each.length for each in drawn) == {2: 3, 16: 6}
    rows = np.concatenate([each.rows for each in drawn if each.length == 2])
    assert len(rows) == 24 and Counter(rows.tolist()) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(tokens_a_step=24),
            r"24 tokens is no whole number of rows of \[16\]: use",
        ),
        (dict(num_rows={2: 0}), "no document gives a row of .2. tokens"),
        (dict(cycle_steps=0), "a cycle of 0 steps has none: use 1 or more"),
    ],
)
def test_what_cannot_be_drawn(changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(**changes)
