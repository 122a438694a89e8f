"""Which files are found, which are refused, and which of them validate."""

import os

import pytest

from ulysses_jax.data.corpus import (
    Document,
    find_documents,
    fingerprint,
    shuffled,
    split,
)


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def named(num, size=1):
    return [Document(f"{i}.txt", None, size) for i in range(num)]  # pyright: ignore


def names(documents):
    return [document.name for document in documents]


def test_a_folder_gives_every_visible_file_below_it(tmp_path):
    files = {"b.txt": b"xy", "a/c.md": b"z", "a/.hidden/d": b"1", ".e": b"2"}
    corpus = find_documents(str(write(tmp_path, files)))
    assert names(corpus.documents) == ["a/c.md", "b.txt"]
    assert [d.size for d in corpus.documents] == [1, 2]
    assert corpus.documents[0].path.read_bytes() == b"z"
    assert corpus.notes == []


def test_a_glob_names_files_from_its_first_wildcard_on(tmp_path, monkeypatch):
    write(tmp_path, {"x/a.txt": b"1", "x/y/b.txt": b"2", "x/c.md": b"3"})
    for pattern in (f"{tmp_path}/x/**/*.txt", "x/**/*.txt", "./x/**/*.txt"):
        monkeypatch.chdir(tmp_path)
        assert names(find_documents(pattern).documents) == ["a.txt", "y/b.txt"]


def test_a_file_with_brackets_in_its_name_is_a_file(tmp_path):
    write(tmp_path, {"a[1].txt": b"x"})
    assert names(find_documents(f"{tmp_path}/a[1].txt").documents) == ["a[1].txt"]


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(b"x")
    (document,) = find_documents(str(tmp_path)).documents
    assert os.fsencode(document.name) == b"\xff.txt"
    fingerprint([document])
    shuffled([document], 0)


def test_what_looks_binary_is_left_out_aloud_but_not_when_it_is_named(tmp_path):
    files = {"a.bin": b"\0x", "late": b"x" * 8192 + b"\0", "odd": b"\xff\xfe"}
    write(tmp_path, files)
    for where in (tmp_path, f"{tmp_path}/*"):
        corpus = find_documents(str(where))
        assert names(corpus.documents) == ["late", "odd"]
        (note,) = corpus.notes
        assert "left out 1 file with a NUL byte in the first 8192 bytes" in note
        assert "a.bin" in note
    assert names(find_documents(f"{tmp_path}/a.bin").documents) == ["a.bin"]


def test_empty_files_are_left_out_aloud(tmp_path):
    write(tmp_path, {f"{i}": b"" for i in range(5)} | {"x": b"x"})
    corpus = find_documents(str(tmp_path))
    assert names(corpus.documents) == ["x"]
    assert "left out 5 files of 0 bytes: 0, 1, 2, and 2 more" in corpus.notes[0]


@pytest.mark.parametrize("where", ["", "/*", "/missing", "/*.txt"])
def test_no_file_is_an_error(tmp_path, where):
    with pytest.raises(ValueError, match="(gives|holds) no file.*give a"):
        find_documents(f"{tmp_path}{where}")


def test_no_text_is_an_error(tmp_path):
    write(tmp_path, {"a": b"", "b": b"\0"})
    with pytest.raises(ValueError, match="gives 2 files, but no text: 1 file of 0"):
        find_documents(str(tmp_path))


@pytest.mark.parametrize("where", ["", "/*", "/link"])
def test_a_file_that_does_not_open_is_an_error(tmp_path, where):
    write(tmp_path, {"a": b"x"})
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*link .*No such file.*: make"):
        find_documents(f"{tmp_path}{where}")


def test_a_file_that_may_not_be_opened_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {"a": b"x"})

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a"))

    monkeypatch.setattr("ulysses_jax.data.corpus.open", refuse, raising=False)
    with pytest.raises(ValueError, match="cannot read .*a of .*Permission denied"):
        find_documents(str(tmp_path))


def test_a_pipe_is_an_error_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe .*not a regular file: take it out"):
        find_documents(str(tmp_path))


def test_the_standard_library_is_long_and_has_long_documents():
    corpus = find_documents("stdlib")
    assert sum(d.size for d in corpus.documents) > 5_000_000
    assert max(d.size for d in corpus.documents) > 100_000
    assert all(d.name.endswith(".py") for d in corpus.documents)
    assert not any("site-packages" in d.name for d in corpus.documents)
    assert "argparse.py" in names(corpus.documents)


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
