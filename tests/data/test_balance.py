"""A step's rows, all of them, dealt so that groups of devices have the same work."""

import itertools

import numpy as np
import pytest

from ulysses_jax.data.balance import deal, imbalance, step_work, work


def draw(seed, num):
    return np.random.default_rng(seed).lognormal(0, 1.5, num)


def in_order(num, accumulation_steps):
    return np.arange(num).reshape(accumulation_steps, -1)


def test_work_is_the_sum_of_squares():
    assert work([3, 4]) == 12.5
    # Beyond what int32 holds.
    assert work([2**20, 2**20]) == 2**40


@pytest.mark.parametrize(
    "accumulation_steps, num_groups, places", [(1, 8, 2), (3, 4, 3)]
)
def test_every_row_once_and_the_same_every_time(accumulation_steps, num_groups, places):
    works = draw(0, accumulation_steps * num_groups * places)
    dealt = deal(works, accumulation_steps, num_groups)
    assert dealt.shape == (accumulation_steps, num_groups * places)
    assert sorted(dealt.reshape(-1)) == list(range(len(works)))
    np.testing.assert_array_equal(dealt, deal(works, accumulation_steps, num_groups))


def test_one_row_a_group_and_microbatch_is_the_best_there_is():
    """Nothing but which rows meet in a microbatch can be chosen."""
    for seed in range(5):
        works = draw(seed, 6)
        best = min(
            step_work(works, np.reshape(order, (2, 3)), 3)
            for order in itertools.permutations(range(6))
        )
        assert step_work(works, deal(works, 2, 3), 3) == pytest.approx(best)


def test_rows_of_a_microbatch_are_near_the_best_there_is():
    for seed in range(5):
        works = draw(seed, 6)
        best = min(
            step_work(works, np.array([order]), 3)
            for order in itertools.permutations(range(6))
        )
        assert step_work(works, deal(works, 1, 3), 3) <= 1.001 * best


@pytest.mark.parametrize("accumulation_steps, most", [(1, 1.1), (4, 1.05)])
def test_four_rows_a_group_are_nearly_equal(accumulation_steps, most):
    """Of works of which none is more than a group's share."""
    before, after = [], []
    for seed in range(10):
        works = np.random.default_rng(seed).uniform(0, 1, 32 * accumulation_steps)
        own = in_order(len(works), accumulation_steps)
        before.append(imbalance(works, own, 8))
        after.append(imbalance(works, deal(works, accumulation_steps, 8), 8))
    assert np.mean(before) > 1.3 and max(after) < most


def test_alike_rows_meet_in_a_microbatch():
    dealt = deal([1, 9, 1, 9], accumulation_steps=2, num_groups=2)
    assert dealt.tolist() == [[1, 3], [0, 2]]
    # What a step takes is what the heaviest take, one microbatch after the other.
    works = np.array([1.0, 9, 1, 9])
    assert step_work(works, dealt, 2) == 10
    assert step_work(works, in_order(4, 2), 2) == 18
    assert imbalance(works, in_order(4, 2), 2) == 1.8


def test_a_swap_mends_what_going_from_the_heaviest_on_misses():
    works = np.array([7.0, 8, 1, 8, 5, 5])
    dealt = deal(works, 1, 2)
    assert works[dealt].reshape(2, 3).sum(axis=1).tolist() == [17, 17]
    # Fixed: another order would be other batches of runs that go on.
    assert dealt.tolist() == FIXED


FIXED = [[1, 3, 2, 0, 4, 5]]


def test_equal_works_and_one_group_stay_in_order():
    assert deal(draw(0, 6), 3, 1).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert deal(np.zeros(8), 2, 4).reshape(-1).tolist() == list(range(8))
    assert deal(np.ones(8), 1, 2).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="6 rows do not divide into 2 .* that 8 div"):
        deal(draw(0, 6), 2, 4)
