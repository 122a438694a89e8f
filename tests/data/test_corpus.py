"""Which files are found, and which are refused."""

import os

import pytest
from corpus_cases import names, write

from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.split import fingerprint, shuffled


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


@pytest.fixture
def linked(tmp_path):
    """A corpus with links to a folder elsewhere, twice, to itself, and inside of it."""
    write(
        tmp_path, {"corpus/own/a.txt": b"1", "wiki/w.txt": b"2", "wiki/in/x.md": b"3"}
    )
    corpus = tmp_path / "corpus"
    for name, target in {
        "again": "../wiki",
        "linked": "../wiki",
        "also_own": "own",
        "own/up": "../../corpus",
        "self": ".",
    }.items():
        (corpus / name).symlink_to(target)
    return corpus


@pytest.mark.parametrize("where", ["", "/**", "/**/*"])
def test_linked_folders_are_read_once(linked, where):
    """As a folder and as a glob; what lies there without a link keeps its name."""
    found = names(find_documents(f"{linked}{where}").documents)
    assert found == ["again/in/x.md", "again/w.txt", "own/a.txt"]


def test_a_glob_through_linked_folders(linked, monkeypatch):
    monkeypatch.chdir(linked)
    assert names(find_documents("**/*.txt").documents) == ["again/w.txt", "own/a.txt"]
    assert names(find_documents("**/in/**/*").documents) == ["again/in/x.md"]
    assert names(find_documents("l*/*.txt").documents) == ["linked/w.txt"]


def test_a_corpus_of_links_alone(linked):
    write(linked.parent, {"links/.keep": b""})
    (linked.parent / "links" / "wiki").symlink_to(linked.parent / "wiki")
    (linked.parent / "root").symlink_to("links")
    for corpus in ("links", "root"):
        found = find_documents(f"{linked.parent}/{corpus}").documents
        assert names(found) == ["wiki/in/x.md", "wiki/w.txt"]


RUN = {"config.yaml": b"x", "metrics.jsonl": b"y", "checkpoints/2/z": b"z"}


@pytest.mark.parametrize("where", ["", "/**/*", "/**"])
def test_what_runs_write_is_left_out_aloud(tmp_path, where):
    write(tmp_path, {"runs/notes.txt": b"1", "runs/mine/a.yaml": b"1", "b.txt": b"2"})
    write(tmp_path / "runs" / "other", RUN)
    write(tmp_path / "config", {"config.yaml": b"of no run"})
    corpus = find_documents(f"{tmp_path}{where}", f"{tmp_path}/runs/../runs/mine")
    assert (
        "left out what runs or preparations wrote, in runs/mine, runs/other"
        in corpus.notes[0]
    )
    assert names(corpus.documents) == ["b.txt", "config/config.yaml", "runs/notes.txt"]
    with pytest.raises(
        ValueError, match="no text: what runs or preparations wrote, in mine, other"
    ):
        find_documents(f"{tmp_path}/runs/*/*", f"{tmp_path}/runs/mine")
    # A run that is named itself is a corpus like another.
    assert len(find_documents(f"{tmp_path}/runs/other").documents) == 3


def test_a_run_into_its_own_corpus_is_refused(tmp_path):
    write(tmp_path, {"a.txt": b"x"})
    with pytest.raises(ValueError, match="use a --run.folder below it or elsewhere"):
        find_documents(str(tmp_path), f"{tmp_path}/../{tmp_path.name}")
    below = f"{tmp_path}/run"
    assert names(find_documents(str(tmp_path), below).documents) == ["a.txt"]
    # Nothing is wrong with a corpus inside of the run's folder.
    assert names(find_documents(str(tmp_path), f"{tmp_path}/..").documents) == ["a.txt"]


def test_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path, {"text/a.txt": b"x"})
    monkeypatch.setenv("HOME", str(tmp_path))
    for files in ("~/text", "~/text/*.txt", "~/text/a.txt"):
        assert names(find_documents(files).documents) == ["a.txt"]
    (tmp_path / "text" / "a.txt").unlink()
    with pytest.raises(ValueError, match="the folder ~/text .*holds no file"):
        find_documents("~/text")


@pytest.mark.parametrize(
    "files, message",
    [
        ("~nobody-of-that-name/x", "'~nobody-of-that-name/x' gives no file"),
        ("", "data.files '' is empty: give a folder"),
        (" ", "data.files ' ' is empty"),
        ("a\0b", "gives no file"),
    ],
)
def test_names_that_no_file_has(files, message):
    with pytest.raises(ValueError, match=message):
        find_documents(files)


def test_a_name_that_the_locale_cannot_say(monkeypatch):
    def candidates(*_):
        "\u65e5".encode("ascii")

    monkeypatch.setattr("ulysses_jax.data.corpus._candidates", candidates)
    with pytest.raises(ValueError, match="in this locale.*LC_ALL=C.UTF-8"):
        find_documents("\u65e5")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_text_with_a_byte_order_mark_is_no_binary(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    write(tmp_path, {"a.txt": f"{mark}text".encode(encoding), "b.txt": b"b"})
    assert names(find_documents(str(tmp_path)).documents) == ["a.txt", "b.txt"]


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
