"""Junk in the place of documents from outside, and what may become of it."""

import copy
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import ulysses_jax

MOST_SECONDS, MOST_KIB = 1.0, 64 * 1024
_STOP_SECONDS = 10
PACKAGE = Path(ulysses_jax.__file__).parent

VALUES = (
    *("null", "true", "false", "0", "-1", "1", "7", "0.5", "-0.0", "NaN", "-Infinity"),
    *("1e999", "-1e999", "1e308", "1e-320", "9" * 400, "-" + "9" * 400, "9" * 5000),
    *(str(2**bits + more) for bits in (31, 32, 62, 63, 64) for more in (-1, 0)),
    *('""', '"x"', '" "', '"1"', '"\\ud800"', '"\\u0000"', '"auto"', '"__class__"'),
    *('"."', '".."', '"../x"', '"a/../../x"', '"/etc/passwd"', '"a\\\\b"', '"~"'),
    '"' + "x" * 20_000 + '"',
    '"' + "../" * 2000 + 'x"',
    *("[]", "{}", "[null]", "[[]]", "[1, 2]", '["x"]', '[""]', '{"a": 1}', '{"": {}}'),
    "[" * 50 + "]" * 50,
    '{"a":' * 50 + "1" + "}" * 50,
    "[" * 2_000 + "]" * 2_000,
    '{"a":' * 2_000 + "1" + "}" * 2_000,
    "[" * 100_000,
    "[" + "0," * 9_999 + "0]",
)
"""In the place of a value, as JSON or nearly."""

YAML = (
    *("0x" + "f" * 5000, "0b1" + "0" * 9000, "010", "1:30", "2001-01-01", ".inf", "~"),
    *("!!python/name:os.system", "!!python/object/apply:os.system [ls]", "!!int x"),
    *("!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!float x", "!!str {a: 1}"),
    *("&a [*a]", "&a {b: *a}", "*nowhere", "{<<: [1]}", "{<<: &a {<<: *a}}", "{? [] }"),
    # A billion, in a few lines.
    "[&a0 [x, x], " + "".join(f"&a{i + 1} [*a{i}, *a{i}], " for i in range(40)) + "1]",
    "{b: [&a0 {a: 1}, "
    + "".join(f"&a{i + 1} {{<<: [{f'*a{i}, ' * 9}]}}, " for i in range(20))
    + "1]}",
)

_KEYS = ("", "x", "name", "\0", "../x", "__class__", "x" * 9000, "0", "\ud800")


def places(document: Any, at: tuple = ()) -> list[tuple]:
    """Where a document has a value: keys and numbers that lead there."""
    inner = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    return [at, *(each for key, x in inner for each in places(x, (*at, key)))]


def spoilt(document: Any, edits: Sequence[tuple[tuple, str, str]]) -> bytes:
    """A document as JSON, with edits: (place, what, text).

    Args:
      what: `instead`: the text in the place of the value. `without`: it is left out.
        `twice`: its key once more, with the text. Else a key that is added there.
    """
    document, texts = copy.deepcopy(document), {}
    for number, (place, what, text) in enumerate(edits):
        mark = f"\x01{number}\x01"
        texts[json.dumps(mark)] = text
        *outer, last = place or (None,)
        owner = document
        try:
            for key in outer:
                owner = owner[key]
            if not place and what != "add":
                document = mark
            elif what == "instead":
                owner[last] = mark
            elif what == "without":
                del owner[last]
            elif isinstance(owner, dict):
                key = last if what == "twice" else what
                texts[f"{json.dumps(mark)}: null"] = f"{json.dumps(key)}: {text}"
                owner[mark] = None
        except (LookupError, TypeError):
            pass  # an edit before took it away
    found = json.dumps(document)
    for mark in sorted(texts, key=len, reverse=True):
        found = found.replace(mark, texts[mark])
    return found.encode(errors="surrogatepass")


def structured(documents: Sequence[Any], values: Sequence[str] = VALUES):
    """Documents that are valid but for one to three edits, as JSON."""
    numbers = st.integers(-(2**70), 2**70) | st.floats()
    text = st.text(max_size=9).map(json.dumps)
    value = st.sampled_from(values) | numbers.map(json.dumps) | text
    whole = st.recursive(
        value,
        lambda inner: st.lists(inner, max_size=3).map(lambda x: f"[{', '.join(x)}]"),
        max_leaves=4,
    )
    kinds = ("instead", "instead", "instead", "without", "twice", *_KEYS)

    def edited(document: Any):
        edit = st.tuples(
            st.sampled_from(places(document)), st.sampled_from(kinds), whole
        )
        edits = st.lists(edit, min_size=1, max_size=3)
        return edits.map(lambda found: spoilt(document, found))

    return st.sampled_from(range(len(documents))).flatmap(
        lambda which: edited(documents[which])
    )


def mutated(whole: Sequence[bytes]):
    """Bytes that are valid but for one to four places."""
    where = st.integers(0, 2**20)
    change = st.tuples(
        st.sampled_from(("flip", "set", "cut", "end", "insert", "splice", "count")),
        where,
        where,
        st.binary(max_size=8),
    )

    def changed(drawn: tuple[int, list]) -> bytes:
        data = bytearray(whole[drawn[0]])
        for what, at, other, some in drawn[1]:
            at, other = at % (len(data) + 1), other % (len(data) + 1)
            low, high = sorted((at, other))
            if what == "flip" and at < len(data):
                data[at] ^= 1 << other % 8
            elif what == "set":
                data[at : at + len(some)] = some
            elif what == "cut":
                del data[low:high]
            elif what == "end":
                del data[at:]
            elif what == "insert":
                data[at:at] = some
            elif what == "splice":
                data[at:at] = data[other : other + 200]
            elif what == "count":
                data[at : at + 8] = (other**3).to_bytes(8, "little")
        return bytes(data)

    number = st.integers(0, len(whole) - 1)
    return st.tuples(number, st.lists(change, min_size=1, max_size=4)).map(changed)


def judged(
    door: Callable[[bytes], Any], data: bytes, names: Sequence[str]
) -> str | None:
    """The words in which a door refuses it, soon and in little memory; None: it takes
    it.

    Args:
      names: one of which the words must have.

    Raises:
      AssertionError: what is wrong with the words, the seconds or the memory.
      Exception: another error than one in words.
    """
    _forget_peak()
    began, before = time.thread_time(), _peak_kib()
    said = None
    try:
        with _ends():
            door(data)
    except (ValueError, OSError) as error:
        said = str(error)
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        own = Path(raised_in).resolve().is_relative_to(PACKAGE)
        if not own and not isinstance(error, OSError):
            raise
    seconds, grown = time.thread_time() - began, _peak_kib() - before
    if said is not None:
        assert any(name in said for name in names), f"no name in: {said[:300]!r}"
    assert seconds < MOST_SECONDS, f"{seconds:.2f} seconds: {said!r:.300}"
    assert grown < MOST_KIB, f"{grown:,} KiB: {said!r:.300}"
    return said


@contextmanager
def _ends() -> Iterator[None]:
    """What does not is stopped where it is; its seconds are of the processor."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"{_STOP_SECONDS} seconds, and no end")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _STOP_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _forget_peak() -> None:
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def _peak_kib() -> int:
    """Of this process's resident memory; 0 where nobody says."""
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith("VmHWM"))
