"""A small model finds keys over all shards where they are exchanged, and only there."""

import jax
import numpy as np
import pytest
from files import module_of
from flax import nnx

from ulysses_jax import Transformer, make_mesh

recall = module_of("benchmarks/recall.py")


def test_needles_lie_evenly_and_are_asked_once():
    tokens, labels, which = recall.rows(np.random.default_rng(0), 2, 256, evenly=True)
    asked = labels >= 0
    assert asked.sum(axis=1).tolist() == [recall.NEEDLES] * 2
    for i in range(2):
        at = np.flatnonzero(tokens[i] < recall.NUM_KEYS)
        hay, question = at[: recall.NEEDLES], at[recall.NEEDLES :]
        assert hay[0] == 2 and hay[-1] == 256 - 2 * recall.NEEDLES - 2
        assert question.tolist() == np.flatnonzero(asked[i]).tolist()
        needle = hay[which[i, question]]
        assert (tokens[i, needle] == tokens[i, question]).all()
        assert (tokens[i, needle + 1] == labels[i, question]).all()


@pytest.mark.slow
def test_the_exchange_is_what_finds_them():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        start = Transformer(recall.MODEL, rngs=nnx.Rngs(0))
        model, _ = recall.lengthened(start, recall.SHORT[:1], recall.SHORT_RATE)
    found = {}
    with jax.set_mesh(make_mesh(seq=8)):
        for exchanged in (True, False):
            longer, _ = recall.lengthened(
                recall.on_mesh(model),
                ((256, 4, 30),),
                2e-3,
                exchanged=exchanged,
            )
            shares = recall.accuracy(longer, 256, 5, exchanged=exchanged)
            found[exchanged] = np.array(shares)
    assert found[True].mean() >= 0.9
    assert found[False].mean() < 0.2  # the last of eight shards is questions alone
