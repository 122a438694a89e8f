"""Conversations as transformers has them; the answers count, and nothing else does."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from make_chat_fixtures import SHAPES
from tokenizers import normalizers, processors

from ulysses_jax.data.chat_template import ChatTemplate
from ulysses_jax.data.chats import ExampleEncoder
from ulysses_jax.data.tokenizer import END_OF_DOCUMENT

FIXTURES = Path(__file__).with_name("chat_fixtures")
CASES = json.loads((FIXTURES / "cases.json").read_bytes())
MARKED = [case for case in CASES if "mask" in case]
CHAT = [dict(role="user", content="Hi?"), dict(role="assistant", content="Ho.")]


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / name, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    return tmp_path


@pytest.fixture
def of_template(folder):
    def make(template):
        (folder / "chat_template.jinja").write_text(template)
        return ExampleEncoder(folder)

    return make


def counted_text(encoder, counted):
    """The text of each run of tokens that count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counted.counts, [0]])))
    decode = encoder.tokenizer._own.decode
    return [
        decode(counted.ids[first:last], skip_special_tokens=False)
        for first, last in edges.reshape(-1, 2)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["shape"])
def test_text_and_ids_are_those_of_transformers(folder, of_template, case):
    encoder = of_template(SHAPES[case["shape"]])
    example = {name: case[name] for name in ("messages", "tools")}
    assert encoder.encode(example).ids.tolist() == case["ids"]
    template, given = ChatTemplate(folder), (case["messages"],)
    assert template.render(*given, tools=case["tools"]).text == case["text"]
    prompt = template.render(*given, tools=case["tools"], add_generation_prompt=True)
    assert prompt.text == case["prompt"]


@pytest.mark.parametrize("case", MARKED, ids=range(len(MARKED)))
def test_what_a_template_marks_counts_as_in_transformers(of_template, case):
    encoder = of_template(SHAPES[case["shape"]])
    counted = encoder.encode({name: case[name] for name in ("messages", "tools")})
    assert counted.counts.astype(int).tolist() == case["mask"]


@pytest.mark.parametrize(
    "shape, answers",
    [
        ("chatml", ["The sum is 5.<|im_end|>", "πέντε 😀\n<|im_end|>"]),
        ("chatml_marked", ["The sum is 5.<|im_end|>", "πέντε 😀\n<|im_end|>"]),
        ("llama3", ["The sum is 5.<|eot_id|>", "πέντε 😀<|eot_id|>"]),
        ("gemma", ["The sum is 5.<end_of_turn>", "πέντε 😀<end_of_turn>"]),
        ("mistral", ["The sum is 5.</s>", "πέντε 😀\n</s>"]),
    ],
)
def test_the_answers_count_with_the_sign_that_ends_them(of_template, shape, answers):
    case = next(case for case in CASES if case["shape"] == shape)
    encoder = of_template(SHAPES[shape])
    counted = encoder.encode(dict(messages=case["messages"]))
    assert counted_text(encoder, counted) == answers


def test_an_answer_without_a_sign(of_template):
    encoder = of_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    counted = encoder.encode(dict(messages=CHAT))
    assert counted_text(encoder, counted) == ["Ho.\n"]


def test_a_token_counts_where_one_of_its_letters_does(of_template):
    # A token of the prompt's last letter and the answer's first.
    marked = "as{% generation %}s{% endgeneration %}is"
    encoder = of_template(marked)
    ids, places = encoder.tokenizer.encode_with_places("assis", around=False)
    assert any(first < 2 < last for first, last in places)
    counts = encoder.encode(dict(messages=CHAT)).counts
    assert counts.tolist() == [first < 3 and last > 2 for first, last in places]


def test_a_template_in_the_config(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    named = [dict(name=n, template=n + "{{ bos_token }}") for n in ("tool", "default")]
    for template, text in (("{{ eos_token }}", "</s>"), (named, "default<s>")):
        path.write_text(json.dumps(config | {"chat_template": template}))
        assert ChatTemplate(folder).render(CHAT).text == text


def test_pairs_and_texts(folder):
    encoder = ExampleEncoder(folder)
    pair = encoder.encode(dict(prompt="2 + 3 =", completion=" 5"))
    assert counted_text(encoder, pair) == [" 5</s>"]
    assert pair.ids[0] == 0 and pair.ids[-1] == 1
    text = encoder.encode(dict(text="2 + 3</s>"))
    assert text.ids[-2:].tolist().count(1) == 1
    assert text.counts.tolist() == [False] + [True] * (len(text.ids) - 1)
    encoder.tokenizer._own.post_processor = processors.TemplateProcessing(
        "$A </s>", None, [("</s>", 1)]
    )
    pair = encoder.encode(dict(prompt="2 + 3 =", completion=" 5"))
    assert counted_text(encoder, pair) == [" 5</s>"]
    encoder.tokenizer._own.normalizer = normalizers.Strip()
    encoder.tokenizer._own.post_processor = processors.ByteLevel()
    assert encoder.encode(dict(text=" ")).ids.tolist() == [1]
    counted = ExampleEncoder(None).encode(dict(prompt="aé", completion="éb"))
    assert counted.ids.tolist() == [*"aéé".encode(), ord("b"), END_OF_DOCUMENT]
    assert counted.counts.tolist() == [False] * 3 + [True] * 4


def test_a_line_of_json(folder, of_template):
    encoder = of_template(SHAPES["chatml"])
    line = json.dumps(dict(messages=CHAT)).encode()
    first = encoder(line)
    # As a process of its own has it.
    again = pickle.loads(pickle.dumps(encoder))(line)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for wrong in (b'{"messages"', b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="this is no JSON: .*: mend the line"):
            encoder(wrong)


@pytest.mark.parametrize(
    "example, message",
    [
        ([], "must be an object with messages or prompt and completion or text"),
        ({}, "a line must have messages or .* and has nothing"),
        (dict(prompt="a"), "and has prompt"),
        (dict(text="a", messages=CHAT), "one of these, and has text, messages"),
        (dict(messages="a"), "messages must be a list of {role, content}, and is 'a'"),
        (dict(messages=[]), r"messages must be a list .* is \[\]"),
        (dict(messages=["a"]), "message 1 must be {role, content}, and is 'a'"),
        (dict(messages=[dict(role="gpt")]), "message 1 has role 'gpt': use one of sys"),
        (dict(messages=[dict(role="user", content=3)]), "content of message 1 must be"),
        (dict(messages=CHAT[:1]), "an answer to learn: give it a message of role ass"),
        (dict(prompt="a", completion=""), "must be text, and completion not empty"),
        (dict(prompt=CHAT, completion=CHAT), "prompt and completion must be text"),
        (dict(text=3), "text must be text"),
        (dict(text="a\ud800"), "half of a pair of surrogates .'.ud800'., which is no"),
    ],
)
def test_what_is_no_example(of_template, example, message):
    with pytest.raises(ValueError, match=message):
        of_template(SHAPES["chatml"]).encode(example)


HUGE = "{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}"
DOUBLE = "{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = OF %}"
WITHOUT_END = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
SLOW = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
BRANCHES = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
)
# An answer loses its thoughts when another message follows.
THOUGHTS = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %}"
    "(thinks){% endif %}{{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system') }}", "raises TemplateError: no system"),
        (
            "{{ messages[7].content.strip() }}",
            "raises UndefinedError: .*has no element",
        ),
        ("{{ messages.append(1) }}", "raises SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "raises SecurityError"),
        ("{% if %}", "is no Jinja template"),
        ("{% generation %}", "is no Jinja template"),
        (HUGE, "writes more than 1,.* letters"),
        ("{{ 'a' * 10**12 }}", "writes more than"),
        ("{{ 9**9**9 }}", r"computes 387420489 \*\* 9"),
        (DOUBLE.replace("OF", "s.x + s.x") + "{% endfor %}", "writes more than"),
        (DOUBLE.replace("OF", "s.x ~ s.x") + "{% endfor %}", "writes more than"),
        (WITHOUT_END, "raises RecursionError"),
        (BRANCHES + "{{ f(40) }}", "does not end within 33,792 calls and loops"),
        (SLOW, "does not end within 33,792 calls and loops"),
        (
            "{% macro f() %}{% generation %}b{% endgeneration %}{% endmacro %}"
            "aa{{ f() }}{% set x %}c{% generation %}d{% endgeneration %}{% endset %}"
            "{{ x }}",
            "generation block within a macro or a filter",
        ),
        (THOUGHTS, r"writes message 2 in another way .* put {% generation %} and"),
        (
            THOUGHTS.replace(" and m.role == 'assistant'", ""),
            "writes message 2 in another way when others follow or when it is asked",
        ),
    ],
)
def test_a_template_that_cannot_be_used(of_template, template, message):
    words = rf"^\S+chat_template.jinja .*{message}"
    with pytest.raises(ValueError, match=words):
        of_template(template).encode(dict(messages=CHAT + CHAT))


def test_no_template(folder):
    for own, message in (
        (folder, r"\S+ has no chat template, neither chat_template.jinja"),
        (None, "messages need a chat template, and bytes have none: take"),
    ):
        with pytest.raises(ValueError, match=message):
            ExampleEncoder(own).encode(dict(messages=CHAT))
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json is no JSON"):
        ChatTemplate(folder)


def test_without_jinja(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "ulysses_jax.data.chat_template")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install 'ulysses-jax\[data\]'"):
        ExampleEncoder(folder).encode(dict(messages=CHAT))


def test_the_day_is_what_strftime_now_says(folder):
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert 2026 <= int(ChatTemplate(folder).render(CHAT).text) < 2100
