"""Which documents validate, and in which order the others are read."""

import pytest
from corpus_cases import names, write

from ulysses_jax.data.corpus import Document, find_documents
from ulysses_jax.data.split import fingerprint, shuffled, split
from ulysses_jax.data.stream import read_bytes


def named(num, size=1):
    return [Document(f"{i}.txt", None, size) for i in range(num)]  # pyright: ignore


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.999])
@pytest.mark.parametrize("num", [2, 3, 30])
def test_each_part_has_files_and_each_file_one_part(fraction, num):
    train, validation = split(named(num), fraction)
    assert sorted(names(train) + names(validation)) == sorted(names(named(num)))
    assert train and validation


@pytest.mark.parametrize(
    ("num", "fraction", "wanted"),
    [(30, 0.1, 3), (30, 0.05, 2), (100, 0.07, 7)],  # 0.07 * 100 > 7 in floats
)
def test_the_split_is_exact(num, fraction, wanted):
    assert len(split(named(num), fraction)[1]) == wanted


def test_the_split_follows_from_the_names_alone():
    documents = named(40)
    train, validation = split(documents, 0.25)
    assert (train, validation) == split(documents[::-1], 0.25)
    assert names(validation) == names(split(named(40, size=9), 0.25)[1])
    # A fixed value: a new hash would make resumed runs train on validation files.
    assert sorted(names(split(named(10), 0.2)[1])) == FIXED_SPLIT
    # More files move a few over the border, and turn no order around.
    more = named(44)
    before, after = names(validation + train), names(sum(split(more, 0.25)[::-1], []))
    assert [name for name in after if name in before] == before


FIXED_SPLIT = ["5.txt", "6.txt"]


def bytes_of(part):
    """What the rows of a part read, by name."""
    return {d.name: read_bytes(d, 0, d.size) for d in part}


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.4, 0.9])
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_a_file_is_cut_so_that_the_fraction_holds(tmp_path, num, fraction):
    """At a line's end, to within a line; no byte in both parts, and none in neither."""
    texts = {
        f"{i}.txt": b"".join(b"%d of file %d\n" % (line, i) for line in range(90 + i))
        for i in range(num)
    }
    documents = find_documents(str(write(tmp_path, texts))).documents
    train, validation = split(documents, fraction)
    assert (train, validation) == split(documents[::-1], fraction)
    first, last = bytes_of(train), bytes_of(validation)
    assert len(first.keys() & last.keys()) <= 1
    joined = {n: first.get(n, b"") + last.get(n, b"") for n in first | last}
    assert joined == texts
    assert all(text.endswith(b"\n") for text in [*first.values(), *last.values()])
    total = sum(map(len, texts.values()))
    assert abs(sum(map(len, last.values())) - fraction * total) <= 13


def test_a_file_that_is_cut_may_not_change(tmp_path):
    documents = find_documents(str(write(tmp_path, {"a": b"1\n2\n3\n"}))).documents
    (train,), (validation,) = split(documents, 0.3)
    assert bytes_of([train, validation]) == {"a": b"3\n"}
    write(tmp_path, {"a": b"1\n2\n3\n4\n"})
    for part in (train, validation):
        with pytest.raises(ValueError, match="had 6 bytes when the run started"):
            bytes_of([part])


def test_no_line_ends_near_a_cut(tmp_path, monkeypatch):
    """The file goes to the part that it leaves nearer to the fraction."""
    monkeypatch.setattr("ulysses_jax.data.split._CUT_BYTES", 8)
    texts = {f"{i}.txt": b"x" * 100 + b"\n" for i in range(10)}
    documents = find_documents(str(write(tmp_path, texts))).documents
    for fraction, num in ((0.04, 1), (0.14, 1), (0.16, 2), (0.96, 9)):
        train, validation = split(documents, fraction)
        assert (len(train), len(validation)) == (10 - num, num)
    with pytest.raises(ValueError, match="use data.validation_fraction 0, or give 2"):
        split(documents[:1], 0.5)


def test_no_validation():
    train, validation = split(named(1), 0)
    assert names(train) == ["0.txt"] and validation == []


def test_one_file_cannot_be_parted():
    with pytest.raises(
        ValueError, match=r"1 file \(0.txt\).*validation_fraction 0, or"
    ):
        split(named(1), 0.05)


def test_the_order_follows_from_names_and_seed():
    documents = named(30)
    assert shuffled(documents, 1) == shuffled(documents[::-1], 1)
    assert shuffled(documents, 1) != shuffled(documents, 2)
    assert sorted(names(shuffled(documents, 1))) == sorted(names(documents))
    shuffled(documents, 10**100)


def test_the_fingerprint_sees_names_and_sizes():
    documents = named(5)
    same = fingerprint(documents)
    assert fingerprint(documents[::-1]) == same
    assert fingerprint(documents[1:]) != same
    assert fingerprint([*documents[1:], Document("0.txt", None, 2)]) != same  # pyright: ignore
    assert fingerprint([*documents[1:], Document("0.md", None, 1)]) != same  # pyright: ignore
