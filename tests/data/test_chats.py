"""Conversations as transformers has them; the answers count, and nothing else does."""

import json
import pickle
import shutil
import subprocess
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
MARK = "{% generation %}a{% endgeneration %}"
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
        (BRANCHES + "{{ f(40) }}", "does not end within 36,864 calls and loops"),
        (SLOW, "does not end within 36,864 calls and loops"),
        # Where x is written there is no telling: the same letter stands before it.
        ("{% set x %}" + MARK + "{% endset %}a{{ x }}", "generation block within a "),
        ("{% macro f() %}" + MARK + "{% endmacro %}aa{{ f() }}", "generation block wi"),
        ("{% filter upper %}" + MARK + "{% endfilter %}", "generation block within a "),
        ("{% block b %}" + MARK + "{% endblock %}{{ self.b() }}", "generation block w"),
        (
            "{% for m in messages recursive %}" + MARK + "{% endfor %}",
            "generation block within a macro, a set, a filter, a recursive loop",
        ),
        ("{% generation %}" + MARK + "{% endgeneration %}", "generation block within"),
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


LETTERS = "{% set s = 'a' * 1000000 %}"
GROW = "{% set n = namespace(x=FIRST) %}{% for i in range(9999) %}{% set n.x = NEXT %}"
HOSTILE = {
    "loops over texts": LETTERS
    + "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "a loop that picks none": LETTERS + "{% for a in s if a == 'b' %}{% endfor %}",
    "a recursive loop": LETTERS
    + "{% for a in s recursive %}{% if loop.depth < 9 %}{{ loop(s) }}{% endif %}"
    "{% endfor %}",
    "ranges in ranges": "{% for a in range(9999) %}{% for b in range(9999) %}"
    "{% endfor %}{% endfor %}",
    "a long range": "{{ range(10 ** 12) | list | length }}",
    "squares": GROW.replace("FIRST", "9").replace("NEXT", "n.x * n.x") + "{% endfor %}",
    "powers": "{{ 999 ** 999 ** 999 }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 11) }}",
    "center": "{{ 'a' | center(10 ** 11) }}",
    "mapped": "{{ ['a'] | map('center', 10 ** 11) | list }}",
    "zfill": "{% set f = 'a'.zfill %}{{ f(10 ** 11) }}",
    "expandtabs": "{{ ('\t' * 10000).expandtabs(999999) }}",
    "format": "{{ '%99999999999d' | format(1) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "braces": "{{ '{:>99999999999}'.format(1) }}",
    "braces in braces": "{{ '{:>{w}}'.format(1, w=10 ** 11) }}",
    "as often as it says": LETTERS + "{{ ('{0}' * 10000).format(s) }}",
    "replace": LETTERS + "{{ s.replace('a', s) }}",
    "replace as a filter": LETTERS + "{{ s | replace('a', s) }}",
    "join": LETTERS + "{{ s.join(s) }}",
    "join as a filter": LETTERS + "{{ s | join(s) }}",
    "a list of one": "{{ (['a' * 999999] * 99999) | join }}",
    "translate": LETTERS + "{{ s.translate({97: s}) }}",
    "indent": "{{ ('\n' * 100000) | indent(999999) }}",
    "tojson": "{{ [[[1]]] | tojson(indent=10 ** 10) }}",
    "lists in lists": GROW.replace("FIRST", "[1]").replace("NEXT", "[n.x, n.x]")
    + "{% endfor %}{{ n.x }}",
    "compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
    "{{ n.x == n.y }}",
    "namespaces": GROW.replace("FIRST", "1").replace("NEXT", "namespace(a=n.x, b=n.x)")
    + "{% endfor %}{{ n.x }}",
    "kept": LETTERS.replace("1000000", "90000")
    + GROW.replace("FIRST", "[]").replace("NEXT", "n.x + [s[i:]]")
    + "{% endfor %}",
    "sets": LETTERS + "{% for i in range(99999) %}{% set x %}{{ s }}{{ s }}{% endset %}"
    "{% endfor %}",
    "text in a set": "{% set x %}{% for i in range(99999) %}"
    + "a" * 9999
    + "{% endfor %}{% endset %}",
    "every in every": LETTERS.replace("1000000", "100000")
    + "{{ s | list | select('in', s.replace('a', 'b') | list) | list }}",
    "the date": "{{ strftime_now('%99999999999Y') }}",
    "an error of a long text": LETTERS + "{{ raise_exception(s) }}",
    "a source too long": "a" * 300_000,
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
IN_A_PROCESS = """
import json, resource, sys, time
from pathlib import Path
from ulysses_jax.data.chat_template import ChatTemplate
folder, hostile = Path(sys.argv[1]), json.loads(sys.stdin.read())
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
for name, source in hostile.items():
    (folder / "chat_template.jinja").write_text(source)
    started = time.thread_time()
    try:
        ChatTemplate(folder).render([{"role": "user", "content": "Hi?"}])
        found = "it is rendered"
    except ValueError as error:
        found = str(error)
    print(json.dumps([name, found, time.thread_time() - started]))
"""


@pytest.mark.slow
def test_what_a_hostile_template_says_ends_in_seconds_and_in_memory(tmp_path):
    """All of them in a process of 1.5 GiB of addresses, each within seconds of it."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(HOSTILE)
    for name, words, seconds in found:
        assert words.startswith(f"{tmp_path}/chat_template.jinja "), (name, words[:200])
        assert "MemoryError" not in words and len(words) < 600, (name, words[:200])
        assert seconds < 8, (name, seconds)


def test_bounds_leave_room_for_a_long_conversation(of_template):
    """Three hundred messages and half a million letters, also built up in one text."""
    chat = [m | dict(content=m["content"] * 500) for m in CHAT] * 150
    encoder = of_template(SHAPES["chatml"])
    assert (
        "is_it"
        in encoder.template.render(chat[:-1] + [dict(CHAT[1], content="is_it")]).text
    )
    built = (
        "{% set n = namespace(x='') %}{% for m in messages %}"
        "{% set n.x = n.x + m.content | trim %}"
        "{% if messages[:loop.index] | selectattr('role', 'eq', 'user') | list "
        "| length and m.content.split('?')[0].strip() %}{{ m.role }}{% endif %}"
        "{% endfor %}{{ n.x }}"
    )
    text = of_template(built).template.render(chat).text
    assert text.endswith("".join(m["content"] for m in chat))


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
    for name in ("chat_template", "bounded_jinja"):
        monkeypatch.delitem(sys.modules, f"ulysses_jax.data.{name}", raising=False)
    for name in [name for name in sys.modules if name.startswith("jinja2.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install 'ulysses-jax\[data\]'"):
        ExampleEncoder(folder).encode(dict(messages=CHAT))


STYLES = {
    "chatml": lambda role, content, first: (
        ("<|im_start|>system\nBy default.<|im_end|>\n" if first else "")
        + f"<|im_start|>{role}\n",
        f"{content}<|im_end|>",
        "\n",
    ),
    "llama3": lambda role, content, first: (
        ("<s>" if first else "") + f"<|start_header_id|>{role}<|end_header_id|>\n\n",
        f"{content.strip()}<|eot_id|>",
        "",
    ),
    "gemma": lambda role, content, first: (
        ("<s>" if first else "")
        + f"<start_of_turn>{'model' if role == 'assistant' else role}\n",
        f"{content.strip()}<end_of_turn>",
        "\n",
    ),
    "mistral": lambda role, content, first: (
        ("<s>" if first else "") + ("[INST] " if role == "user" else ""),
        f"{content} [/INST]" if role == "user" else f"{content}</s>",
        "",
    ),
}
"""By hand: of a message what stands before it, it with its sign, and what is behind."""
CONTENTS = (
    *("Ho.", ">", "|>", "end|>", "_of_turn>", "s>", "/s>", "|eot_id|>", "im_end|>"),
    *("a <|im_end|> b", "</s>", "<end_of_turn>", " spaces \n", "\nassistant\n", "."),
    *(
        "\u03b1 \U0001f600",
        "user",
        "model",
        "[/INST]",
        "x\n\n",
        "<|im_start|>assistant",
    ),
)


@pytest.mark.parametrize("shape", STYLES)
def test_labels_are_those_of_a_text_written_by_hand(of_template, shape):
    """Letter by letter: what an answer says, and its sign; answers that look like
    signs, headers, or what stands around them, too."""
    encoder = of_template(SHAPES[shape])
    rng = np.random.default_rng(0)
    for _ in range(40):
        chat, text, counts = [], "", []
        for turn in range(2 * rng.integers(1, 4)):
            role = ("user", "assistant")[turn % 2]
            content = str(rng.choice(CONTENTS))
            chat.append(dict(role=role, content=content))
            parts = STYLES[shape](role, content, turn == 0)
            text += "".join(parts)
            for part, is_answer in zip(parts, (False, True, False), strict=True):
                counts += [is_answer and role == "assistant"] * len(part)
        assert encoder.template.render(chat).text == text
        _, places = encoder.tokenizer.encode_with_places(text, around=False)
        found = encoder.encode(dict(messages=chat)).counts
        assert found.tolist() == [any(counts[a:b]) for a, b in places], chat


IGNORES = SHAPES["chatml"].replace("{% if add_generation_prompt %}", "{% if false %}")
BEHIND = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SOMETIMES = SHAPES["mistral"].replace(
    "+ eos_token", "+ ('!' if 'H' in message.content else eos_token)"
)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            IGNORES,
            r"message 2 behind '<.im_start.>assistant.n', and leaves that out of",
        ),
        (BEHIND, "message 2 behind 'assistant: ', and leaves that"),
        (SOMETIMES, "message 2 with another end than '</s>', that of other answers"),
        (
            SHAPES["mistral"].replace(
                "message['content'] +", "message.content|upper +"
            ),
            "message 2 in another way when",
        ),
    ],
)
def test_answers_that_cannot_be_told(of_template, template, message):
    with pytest.raises(ValueError, match=rf"chat_template.jinja writes {message}"):
        of_template(template).encode(dict(messages=CHAT))


def test_thoughts_that_a_template_writes_in_front_of_an_answer(of_template):
    """As those of models that may think: the prompt for an answer is without them."""
    thinks = SHAPES["chatml"].replace(
        "message['content']",
        "('<t></t>' if message.role == 'assistant' else '') + message.content",
    )
    encoder = of_template(thinks)
    counted = encoder.encode(dict(messages=CHAT))
    assert counted_text(encoder, counted) == ["<t></t>Ho.<|im_end|>"]


def test_a_date_is_what_strftime_now_says(folder):
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y %H:%M') }}")
    text = ChatTemplate(folder, "2025-02-03").render(CHAT).text
    assert text == "03 Feb 2025 00:00"


def test_the_day_is_what_strftime_now_says(folder):
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert 2026 <= int(ChatTemplate(folder).render(CHAT).text) < 2100
