"""Cases of which a few run with every change, and all of them in `make test-all`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_for(quick: list, *choices: Iterable) -> list[Any]:
    """Parameters: the product of the choices; those not in `quick` are marked slow.

    Of one choice a case is the value itself, of more a tuple of a value of each.
    """
    cases: list = list(choices[0])
    if len(choices) > 1:
        cases = list(itertools.product(*choices))
    assert all(case in cases for case in quick)
    return [
        pytest.param(
            *(case if len(choices) > 1 else (case,)),
            marks=[] if case in quick else pytest.mark.slow,
            id="-".join(map(_name, case if len(choices) > 1 else (case,))),
        )
        for case in cases
    ]


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return getattr(value, "__name__", str(value))
