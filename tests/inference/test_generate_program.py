"""`python -m ulysses_jax.generate`: text out, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from files import module_of
from flax import nnx

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.data.chat_template import ChatTemplate
from ulysses_jax.data.tokenizer import tokenizer_of
from ulysses_jax.generate import main
from ulysses_jax.inference import generate, generation
from ulysses_jax.inference.text import asked
from ulysses_jax.interop import from_pretrained, save_pretrained
from ulysses_jax.models.delta import GatedDelta
from ulysses_jax.models.kinds import KINDS

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "interop" / "fixtures"
CHATS = TESTS / "data" / "chat_fixtures"
GPT2 = FIXTURES / "gpt2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes."""
    sizes = Model(vocab_size=320, width=32, num_layers=1, num_heads=4, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = Transformer(sizes, rngs=nnx.Rngs(0))
    save_pretrained(model, folder, max_tokens=64)
    return folder


def test_text_comes_out(folder, tmp_path, capsys):
    """What Python's door gives, of a prompt and of two, on all devices."""
    with jax.set_mesh(make_mesh(seq=8)):
        model = from_pretrained(folder)
        prompts = [list(b"Once upon a time"), list("né".encode())]
        rows = generate(model, prompts, max_tokens=12)
    texts = [bytes(i for i in row if i < 256).decode(errors="replace") for row in rows]
    said = [f"--model={folder}", "--max-tokens=12"]
    (tmp_path / "prompt").write_text("né")
    main([*said, "--prompt=Once upon a time", f"--prompt-file={tmp_path / 'prompt'}"])
    shown = capsys.readouterr()
    assert shown.out == f"--- prompt 1\n{texts[0]}\n--- prompt 2\n{texts[1]}\n"
    assert "19 tokens of 2 prompts; a cache of 64 tokens a row" in shown.err
    main([*said, "--prompt-tokens", ",".join(map(str, prompts[0]))])
    shown = capsys.readouterr()
    assert shown.out == ",".join(map(str, rows[0])) + "\n"
    main([*said, "--prompt=Once upon a time"])
    assert capsys.readouterr().out == texts[0] + "\n"


def test_it_says_what_the_cache_of_a_device_is(folder, capsys, monkeypatch):
    """A row of one prompt on each of 4 data parts; a key head on each of 2 devices."""
    monkeypatch.setattr("ulysses_jax.generate.stream", lambda *_: iter(()))
    said = [f"--model={folder}", "--prompt=a", "--cache-tokens=65536"]
    main([*said, "--mesh.data=4", "--mesh.seq=2"])
    assert (
        f"row, {2 * 65536 * 8 * 4 / 2**20:.2f} MiB a device" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A model of words, and a template that ends what is said by a sign of its own."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    sizes = Model(vocab_size=320, width=32, num_layers=1, num_heads=4)
    save_pretrained(Transformer(sizes, rngs=nnx.Rngs(0)), folder, max_tokens=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHATS / name, folder)
    (folder / "chat_template.jinja").write_text(
        module_of("tests/data/make_chat_fixtures.py").SHAPES["chatml"]
    )
    return folder


def test_what_a_user_says(chatting, capsys, monkeypatch):
    """By the template, nothing put around it again; its sign ends the answer."""
    seen = []

    def stream(model, prompts, request):
        del model
        seen.append((prompts, request))
        return iter(())

    monkeypatch.setattr("ulysses_jax.generate.stream", stream)
    main([f"--model={chatting}", "--chat", "--prompt=Hi?", "--max-tokens=2"])
    ((prompt,), request) = seen[0]
    tokenizer = tokenizer_of(chatting)
    text = tokenizer._own.decode(prompt, skip_special_tokens=False)
    messages = [{"role": "user", "content": "Hi?"}]
    want = ChatTemplate(chatting).render(messages, add_generation_prompt=True)
    assert text == want.text and text.endswith("<|im_start|>assistant\n")
    sign = tokenizer._own.token_to_id("<|im_end|>")
    assert request.ends == (*tokenizer.ends, sign) and sign not in tokenizer.ends
    main([f"--model={chatting}", "--prompt=Hi?", "--max-tokens=2"])
    assert seen[1][1].ends == tokenizer.ends and len(seen[1][0][0]) < len(prompt)


@pytest.mark.parametrize("behind, sign", [("\\n<|eot_id|>", "<|eot_id|>"), ("!", None)])
def test_the_sign_behind_an_answer(chatting, tmp_path, behind, sign):
    """A word is none."""
    copy = Path(shutil.copytree(chatting, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ '" + behind + "' }}{% endfor %}"
    )
    tokenizer = tokenizer_of(copy)
    (prompt,), ends = asked(copy, tokenizer, ["Hi?"])
    assert (
        prompt
        == tokenizer.encode_with_places(
            "Hi?" + behind.replace("\\n", "\n"), around=False
        )[0]
    )
    found = () if sign is None else (tokenizer._own.token_to_id(sign),)
    assert ends == (*tokenizer.ends, *found)


def vocabulary_of(folder, to):
    """A copy whose tokenizer has more ids than the model."""
    copy = Path(shutil.copytree(folder, to / "copy"))
    words = {f"w{i}": i for i in range(400)}
    tokenizer = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (copy / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": tokenizer})
    )
    return copy


IDS = ["--prompt-tokens=1,2,3"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model=nowhere", "--prompt=a"], "nowhere is no model's folder"),
        ([], "say what to go on from: --prompt TEXT"),
        (["--prompt=a"], r"48 is less than the 257 ids.*or give ids, --prompt-tokens"),
        (["--model=MORE", "--prompt=a"], "320 is less than the 400 ids of the folder"),
        ([*IDS, "--prompt=a"], "give one or the other"),
        (["--prompt-tokens="], "prompt 1 of 1 has no token"),
        (["--prompt-file=no.txt"], "no.txt cannot be read .No such.*, --prompt TEXT"),
        ([*IDS, "--chat"], "and --prompt-tokens gives ids: leave one of them out"),
        (["--model=TINY", "--chat", "--prompt=a"], "tiny are bytes, which have none"),
        (["--model=TINY", "--prompt="], "prompt 1 of 1 has no token"),
        (["--prompt-tokens=1,48"], "are 1 to 48, but model.vocab_size is 48: use ids"),
        ([*IDS, "--max-tokens=0"], "max-tokens 0 is not from 1"),
        ([*IDS, "--max-tokens=8", "--temperature=-1"], "temperature -1.0 draws"),
        ([*IDS, "--temperature=nan"], "temperature nan draws"),
        ([*IDS, "--top-p=0"], "top-p 0.0 is no part"),
        ([*IDS, "--top-p=1.1"], "top-p 1.1 is no part"),
        ([*IDS, "--seed=-1"], "seed -1 is not from 0"),
        ([*IDS, "--max-tokens=31"], "3 tokens and max-tokens 31 take 33 places, and .*"
         "learned positions for 32: use max-tokens 30"),
        ([*IDS * 2, "--max-tokens=9", "--cache-tokens=8"], "take 11 places, and the "
         "cache holds, by cache-tokens, 8: use max-tokens 6, or cache-tokens 11"),
        ([*IDS, "--max-tokens=9", "--cache-tokens=2"],
         "max-tokens 1 and a prompt of 2 or fewer"),
        ([*IDS, "--max-tokens=2", "--cache-tokens=2"], "use a prompt of 1 or fewer"),
        ([*IDS, "--max-tokens=8", "--mesh.ring=8"], "mesh.ring is 8, and .*mesh.seq 8"),
        ([*IDS, "--max-tokens=8", "--mesh.tensor=4", "--mesh.seq=2"],
         "mesh.tensor 4 does not divide model.num_heads 6: use mesh.tensor 2"),
        ([*IDS, "--mesh.seq=3"], "takes 3 devices, but there are 8"),
        ([*IDS, "--simulated-cpu-devices=0"], "give 1 or more"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(words, message, folder, tmp_path, capsys, monkeypatch):
    """In a sentence, before anything is read or compiled."""
    monkeypatch.setattr("ulysses_jax.generate.from_pretrained", None)
    if not any(word.startswith("--model") for word in words):
        words = [f"--model={GPT2}", *words]
    if "--model=MORE" in words:
        words = [f"--model={vocabulary_of(folder, tmp_path)}", *words[1:]]
    words = [f"--model={folder}" if word == "--model=TINY" else word for word in words]
    with pytest.raises(SystemExit) as end:
        main(words)
    shown = capsys.readouterr()
    assert end.value.code == 2 and not shown.out
    assert re.match(f"python -m ulysses_jax.generate: .*{message}", shown.err)
    assert shown.err.count("\n") == 1


class Own(nnx.Module):
    def __init__(self, model, *, rngs):
        del model, rngs

    def __call__(self, x, *_, **__):
        return x


class OwnDelta(GatedDelta):
    def __call__(self, x, *_, **__):
        return x


def test_layers_that_there_is_no_cache_for(monkeypatch):
    monkeypatch.setattr(generation, "read_prompt", None)
    monkeypatch.setitem(KINDS, "own", Own)
    monkeypatch.setitem(KINDS, "full", Own)
    monkeypatch.setitem(KINDS, "delta", OwnDelta)
    sizes = dict(width=16, num_layers=1, num_heads=2)
    for fields, message in (
        (dict(sparse="fixed"), "kind 'sparse', for which there is no cache"),
        (dict(pattern=("own",)), "kind 'own', for which there is no cache"),
        (dict(pattern=("delta",)), "a layer of kind 'delta' has a OwnDelta, for which"),
        (dict(pattern=("full",)), "a layer of kind 'full' has a Own, for which"),
        (dict(zigzag=True), "zigzag true lays"),
    ):
        abstract = nnx.eval_shape(
            lambda fields=fields: Transformer(
                Model(**sizes, **fields), rngs=nnx.Rngs(0)
            )
        )
        with pytest.raises(ValueError, match=message):
            generate(abstract, [[1]], max_tokens=1)
    with pytest.raises(ValueError, match="not a Own"):
        generate(Own(None, rngs=None), [[1]])
