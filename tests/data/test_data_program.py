"""`python -m ulysses_jax.data`: prepare, verify, inspect."""

import os
import re
import subprocess
import sys

import pytest
from corpus_cases import write
from source_cases import json_lines
from word_tokenizer import write_tokenizer

from ulysses_jax.data.__main__ import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    texts = ["a long text", "", "long long long", "text ?"]
    write(tmp_path, {"in/a.jsonl": json_lines(texts, field="body")})
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PREPARE = "prepare --files in --text-field body --tokenizer model --to out --workers 1"


def test_from_lines_to_a_row(here, capsys):
    main(PREPARE.split())
    out = capsys.readouterr().out
    assert "out: 3 documents, 14 tokens of uint16, 1 shard; skipped 1 document" in out
    main(["verify", "out"])
    assert "out: 1 shard, as written: 3 documents" in capsys.readouterr().out
    inspect = "inspect --files out --sequence-tokens 6 --validation-fraction 0"
    seen = ""
    for row in range(3):
        main([*inspect.split(), "--row", str(row)])
        seen += capsys.readouterr().out
    assert "row 0 of 3 of training" in seen
    assert "skipped 1 document without text" in seen
    # A document's first token, and a row's, is no label; padding is said.
    # Special tokens are seen, by their names.
    assert "[<s>]long long long </s>" in seen and "[a]long text </s>" in seen
    assert "positions 0 to 4, 5 tokens, 4 count" in seen
    assert "tokens 2 to 5: padding" in seen
    for word in ("a long text", "long long long", "text ?"):
        assert word.split()[-1] in seen
    main([*inspect.split()[:-1], "0.3", "--validation", "--png", "row.png"])
    assert (here / "row.png").read_bytes().startswith(b"\x89PNG")
    assert "of validation" in capsys.readouterr().out


def test_a_runs_own_config(here, capsys):
    (here / "my.yaml").write_text(
        "model: {vocab_size: 320}\ndata: {files: in, text_field: body}\n"
        "training: {sequence_tokens: 16}\n"
    )
    main("inspect --config my.yaml --data.validation-fraction 0".split())
    out = capsys.readouterr().out
    assert "row 0 of 3 of training" in out and "ong long long<256>" in out


@pytest.mark.parametrize(
    "line, message",
    [
        (
            PREPARE.replace("body", "text"),
            "a.jsonl:1 has no field 'text' .*--text-f",
        ),
        (PREPARE.replace("in ", "nowhere "), "--files 'nowhere' gives no file"),
        ("verify in", "in has no index.json: give one that .* prepare wrote"),
        ("verify nowhere", "nowhere is no folder: give one that .* prepare wrote"),
        ("verify in/a.jsonl", "a.jsonl is no folder: give one that"),
        (
            "inspect --files in --text-field body --row 99",
            "--row 99: there are rows 0",
        ),
        ("inspect", "say what to read: --config FILE, or --files FOLDER"),
        ("inspect --files in", "a.jsonl:1 has no field 'text'"),
    ],
)
def test_refusals(here, capsys, line, message):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, err), err
    assert err.count("\n") == 1


def test_verify_names_the_shard(here, capsys):
    main(PREPARE.split())
    data = bytearray((here / "out" / "ids-00000.bin").read_bytes())
    data[0] ^= 1
    (here / "out" / "ids-00000.bin").write_bytes(data)
    with pytest.raises(SystemExit) as end:
        main(["verify", "out"])
    assert end.value.code == 2
    assert "out/ids-00000.bin is not what was written" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program(here):
    done = subprocess.run(
        [sys.executable, "-m", "ulysses_jax.data", *PREPARE[:-1].split(), "2"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
