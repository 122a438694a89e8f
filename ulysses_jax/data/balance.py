"""Which group of devices gets which rows of a step, so that none waits for another."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64


def work(lengths: Sequence[int] | Int64[np.ndarray, "documents"]) -> float:
    """Of a row, in attention: the pairs that causal documents of these lengths see.

    What grows with tokens is the same for all rows and groups, and not counted.
    """
    return float((np.asarray(lengths, np.float64) ** 2).sum() / 2)


def deal(
    works: Sequence[float] | Float[np.ndarray, "rows"],
    accumulation_steps: int,
    num_groups: int,
) -> Int64[np.ndarray, "A B"]:
    """Deals a step's rows to microbatches and, in each, to groups of devices.

    Groups meet in each microbatch: what a step takes is the sum over microbatches of
    the most that a group has in it. So a microbatch gets rows that are alike, which
    lets a heavy one stand beside heavy ones; and in a microbatch each row, from the
    heaviest on, goes to the group with the least work that has a place left. Then rows
    are swapped between the group with the most work and others for as long as that
    helps.

    Args:
      works: of each row of the step, in the order of the batch.
      accumulation_steps: A, microbatches.
      num_groups: data x fsdp, which divides B = rows / A. Group g has places
        [g B / num_groups, (g + 1) B / num_groups) of every microbatch.

    Returns:
      Which row stands at which place: every row once. With one group, whose work is
      the same however rows are dealt, that is the order of the batch. All follows from
      the arguments.

    Raises:
      ValueError: rows that do not divide.

    Cost: a sort, and B / num_groups x B comparisons a swap; of a few hundred rows a
    millisecond or two.
    """
    works = np.asarray(works, np.float64)
    num_rows = len(works)
    if num_rows % (accumulation_steps * num_groups):
        raise ValueError(
            f"{num_rows} rows do not divide into {accumulation_steps} accumulation "
            f"steps of {num_groups} groups: use a training.batch_size that "
            f"{accumulation_steps * num_groups} divides"
        )
    if num_groups == 1:
        return np.arange(num_rows).reshape(accumulation_steps, -1)
    heaviest_first = np.argsort(-works, kind="stable")
    parts = heaviest_first.reshape(accumulation_steps, -1)
    return np.stack([_among_groups(works, rows, num_groups) for rows in parts])


def step_work(
    works: Float[np.ndarray, "rows"],
    places: Int64[np.ndarray, "A B"],
    num_groups: int,
) -> float:
    """What a step takes: the sum over microbatches of the most that a group has."""
    return float(_by_group(works, places, num_groups).max(axis=1).sum())


def imbalance(
    works: Float[np.ndarray, "rows"],
    places: Int64[np.ndarray, "A B"],
    num_groups: int,
) -> float:
    """How many times as long a step takes as if all groups had the same work."""
    groups = _by_group(works, places, num_groups)
    return float(groups.max(axis=1).sum() / groups.mean(axis=1).sum())


def _by_group(works, places, num_groups) -> Float[np.ndarray, "A groups"]:
    return works[places].reshape(len(places), num_groups, -1).sum(axis=2)


def _among_groups(works, rows, num_groups: int) -> Int64[np.ndarray, "B"]:
    """Rows, the heaviest first, by group."""
    places = len(rows) // num_groups
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    total = np.zeros(num_groups)
    for row in rows:
        has_place = [len(group) < places for group in groups]
        group = int(np.argmin(np.where(has_place, total, np.inf)))
        groups[group].append(int(row))
        total[group] += works[row]
    dealt = np.array(groups)
    while places > 1 and _swap(works, dealt):
        pass
    return dealt.reshape(-1)


def _swap(works, dealt: Int64[np.ndarray, "groups places"]) -> bool:
    """Swaps the pair of rows that makes the heaviest group and its partner most alike;
    False: no swap makes the heavier of the two lighter."""
    total = works[dealt].sum(axis=1)
    heaviest = int(total.argmax())
    # By [place in the heaviest, group, place in it]: what the heaviest would lose.
    loses = works[dealt[heaviest]][:, None, None] - works[dealt][None]
    after = np.maximum(total[heaviest] - loses, total[None, :, None] + loses)
    after[:, heaviest] = np.inf
    place, group, other = np.unravel_index(after.argmin(), after.shape)
    # By more than what rounding could give back, or it would go on for ever.
    if after[place, group, other] >= total[heaviest] * (1 - 1e-9):
        return False
    mine = dealt[heaviest, place]
    dealt[heaviest, place] = dealt[group, other]
    dealt[group, other] = mine
    return True
