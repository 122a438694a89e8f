"""Chats prepared once: a run's labels are the answers, and errors name the line."""

import datetime
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from make_chat_fixtures import SHAPES
from test_prepare import Ended, ended_at_shard

from ulysses_jax.data.__main__ import main
from ulysses_jax.data.chats import ExampleEncoder
from ulysses_jax.data.packed_rows import PackedRows
from ulysses_jax.data.prepared import PreparedTokens
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.data.tokens import TokenStream

FIXTURES = Path(__file__).with_name("chat_fixtures")
CASES = json.loads((FIXTURES / "cases.json").read_bytes())
EXAMPLES = [
    *({name: case[name] for name in ("messages", "tools")} for case in CASES),
    {"prompt": "2 + 3 =", "completion": " 5"},
    {"text": "All of it."},
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES, folder)
    (folder / "chat_template.jinja").write_text(SHAPES["chatml_marked"])
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


@pytest.fixture
def prepare(tmp_path, model):
    def run(lines, *options, name="chats.jsonl", to="out"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        words = f"prepare --chats --files {path} --tokenizer {model} --to "
        main([*words.split(), str(tmp_path / to), "--workers", "1", *options])
        return tmp_path / to

    return run


def refused(capsys, prepare, *given, **named):
    with pytest.raises(SystemExit) as stopped:
        prepare(*given, **named)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_labels_are_the_answers(prepare, model):
    tokens = PreparedTokens(prepare([json.dumps(each) for each in EXAMPLES]))
    encoder = ExampleEncoder(model)
    expected = [encoder.encode(each) for each in EXAMPLES]
    ids = np.concatenate([each.ids for each in expected])
    counts = np.concatenate([each.counts for each in expected])
    assert tokens.ids(0, len(ids)).tolist() == ids.tolist()
    found = tokens.counts(0, len(ids))
    assert found is not None and found.tolist() == counts.tolist()
    firsts = np.append(0, tokens.ends[:-1])
    rows = PackedRows(TokenStream(tokens), 256, mask_documents=True)
    labels = np.concatenate([rows.read(i, 0, 256)["labels"] for i in range(len(rows))])
    counts[firsts] = False  # nothing comes before them
    assert sorted(labels[labels != IGNORED]) == sorted(ids[counts])


@pytest.mark.slow
def test_two_processes_write_the_same(prepare, capsys):
    lines = [json.dumps(each) for each in 200 * EXAMPLES]
    one, two = prepare(lines), prepare(lines, "--workers", "2", to="two")
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes()
    lines[1500] = "{}"
    words = refused(capsys, prepare, lines, "--workers", "2", to="three")
    assert "chats.jsonl:1501: a line must have messages" in words


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [{"role": "human"}]}', "message 1 has role 'human': use one of"),
        ("{}", "a line must have messages or prompt and completion or text, one of"),
        ("[", "this is no JSON: "),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing in it is an ans"),
        ('{"messages": [{"role": "user"}]}', "chat_template.jinja raises Undefined"),
    ],
)
def test_an_error_names_its_line(prepare, capsys, line, message):
    words = refused(capsys, prepare, [json.dumps(EXAMPLES[0]), "", line])
    assert "chats.jsonl:3: " in words and message in words


def test_other_files_and_another_template(prepare, model, capsys):
    lines = [json.dumps(EXAMPLES[0])]
    words = refused(capsys, prepare, lines, name="chats.txt")
    assert "chats.txt is no JSON lines, and examples are objects a line: give" in words
    prepare(lines, to="done")
    prepare(lines, to="done")
    (model / "chat_template.jinja").write_text(SHAPES["chatml"])
    words = refused(capsys, prepare, lines, to="done")
    assert "chat_template was" in words


DATED = "{{ strftime_now('%Y-%m-%d') }}" + SHAPES["chatml"]


class Day(datetime.date):
    day_of_month = 1

    @classmethod
    def today(cls):
        return datetime.date(2026, 3, cls.day_of_month)


@pytest.fixture
def days(monkeypatch):
    module = types.SimpleNamespace(date=Day)
    monkeypatch.setattr("ulysses_jax.data.prepare.datetime", module)
    return Day


def test_the_date_is_the_folders_whatever_the_day(prepare, model, days, capsys):
    """Begun on one day and ended on another, or made again on another, by its date."""
    (model / "chat_template.jinja").write_text(DATED)
    lines = [json.dumps(dict(messages=case["messages"])) for case in CASES[:4]] * 3
    options = ("--shard-tokens", "99")
    days.day_of_month = 1
    whole = prepare(lines, *options, to="whole")
    assert "the chat template writes the date 2026-03-01" in capsys.readouterr().out
    with ended_at_shard(2), pytest.raises(Ended):
        prepare(lines, *options, to="parts")
    days.day_of_month = 2
    parts = prepare(lines, *options, to="parts")
    assert "the date 2026-03-01" in capsys.readouterr().out
    given = prepare(lines, *options, "--date", "2026-03-01", to="given")
    other = prepare(lines, *options, to="other")
    for path in whole.iterdir():
        data = path.read_bytes()
        assert data == (parts / path.name).read_bytes()
        assert data == (given / path.name).read_bytes()
    name = "ids-00000.bin"
    assert (other / name).read_bytes() != (whole / name).read_bytes()
    prepare(lines, *options, to="whole")
    assert "whole is prepared already" in capsys.readouterr().out
    main(f"inspect --files {whole} --sequence-tokens 64".split())
    assert "its chats have the date 2026-03-01" in capsys.readouterr().out


def test_a_date_that_is_refused(prepare, model, capsys):
    lines = [json.dumps(EXAMPLES[0])]
    words = refused(capsys, prepare, lines, "--date", "2026-01-31", to="a")
    assert "--date 2026-01-31: no chat template of this preparation writes the" in words
    (model / "chat_template.jinja").write_text(DATED)
    lines = [json.dumps(dict(messages=CASES[0]["messages"]))]
    words = refused(capsys, prepare, lines, "--date", "tomorrow", to="b")
    assert "--date tomorrow is no date: give one as 2026-01-31" in words
    prepare(lines, "--date", "2026-01-31", to="c")
    words = refused(capsys, prepare, lines, "--date", "2026-02-01", to="c")
    assert "date was '2026-01-31', is '2026-02-01'" in words
