"""Loss and perplexity against float64 over whole logits, on every mesh and batch."""

import json
import math
import re

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from slow import slow_but_for
from tokenizers import models, pre_tokenizers, processors

from ulysses_jax import Model, Transformer
from ulysses_jax.evaluate import main
from ulysses_jax.interop import from_pretrained, save_pretrained

TOKENS = 37  # divides over no mesh below
TEXTS = (b"one short text", b"x", bytes(range(97, 123)) * 5, b"the last one, of words")
SIZE = Model(
    vocab_size=264,
    width=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    feed_forward_width=64,
    compute_dtype="float32",
)
CASES = {
    "data 2 x seq 4, 3 rows": ("--mesh.data=2", "--mesh.seq=4", "--batch-size=3"),
    "ring 2 x seq 2 x tensor 2, 1 row": (
        "--mesh.ring=2",
        "--mesh.seq=2",
        "--mesh.tensor=2",
    ),
    "seq 8, 8 rows": ("--mesh.seq=8", "--batch-size=8"),
    "seq 8, 3 rows": ("--mesh.seq=8", "--batch-size=3"),
    "fsdp 8, 1 row": ("--mesh.fsdp=8",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model far from the uniform one, and texts."""
    place = tmp_path_factory.mktemp("evaluate")
    model = Transformer(SIZE, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: 4 * x, state)
    save_pretrained(nnx.merge(graph, state), place / "model", max_tokens=64)
    (place / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (place / "texts" / f"{number}.txt").write_bytes(text)
    return place


def run(place, *words, json_file="found.json"):
    path = place / json_file
    path.unlink(missing_ok=True)
    words = [f"--model={place}/model", f"--data={place}/texts", *words]
    main([*words, f"--tokens={TOKENS}", f"--json={path}"])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def want(place):
    """Of whole rows on one device: (tokens before, nats) of all that count."""
    model = from_pretrained(place / "model")
    stream = [(byte, n) for n, text in enumerate(TEXTS) for byte in (*text, 256)]
    found = []
    for start in range(0, len(stream), TOKENS):
        row = stream[start : start + TOKENS]
        ids = np.array([token for token, _ in row])[None]
        segments = np.array([number for _, number in row])[None]
        places = np.array([sum(segments[0, :i] == n) for i, (_, n) in enumerate(row)])
        logits = np.asarray(model(ids, places[None], segments + 1)[0], np.float64)
        highest = logits.max(axis=-1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        for i, (_, number) in enumerate(row):
            after = stream[start + i + 1 : start + i + 2]
            if after and after[0][1] == number:
                found.append((places[i] + 1, total[i] - logits[i, after[0][0]]))
    return np.array(found)


@pytest.mark.parametrize("name", slow_but_for(list(CASES)[:2], CASES))
def test_the_loss_is_the_unsharded_one(place, want, name):
    found = run(place, *CASES[name])
    loss = want[:, 1].mean()
    assert found["tokens"] == len(want)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert sum(each["tokens"] for each in found["by_position"]) == len(want)
    for each in found["by_position"]:
        here = (want[:, 0] >= each["first"]) & (want[:, 0] <= each["last"])
        assert each["tokens"] == here.sum()
        assert each["loss"] == pytest.approx(want[here, 1].mean(), rel=3e-6)
    # A mean of rows' means would be seen, and the wrong tokens of a bucket.
    assert found["by_position"][0]["loss"] != pytest.approx(loss, rel=1e-2)


def test_the_first_rows_alone(place, want, capsys):
    """Of the label that follows the last of them, too; said, and in the JSON."""
    found = run(place, *CASES["data 2 x seq 4, 3 rows"], "--max-rows=2")
    ids = [token for text in TEXTS for token in (*text, 256)]
    ends = np.cumsum([len(text) + 1 for text in TEXTS])
    first = [i for i in range(2 * TOKENS) if i + 1 not in ends]
    assert found["tokens"] == len(first) < len(want)
    assert found["loss"] == pytest.approx(want[: len(first), 1].mean(), rel=1e-6)
    rows = -(-len(ids) // TOKENS)
    assert (found["rows"], found["rows_in_data"]) == (2, rows)
    said = capsys.readouterr().out
    assert f"{rows} rows of 37, the first 2 of them, by --max-rows; 4 rows at" in said
    more = run(place, "--mesh.seq=8", f"--max-rows={rows + 1}")
    assert more["tokens"] == len(want) and more["rows"] == rows
    assert "--max-rows" not in capsys.readouterr().out


@pytest.mark.slow
def test_bfloat16_as_unsharded(place, want):
    losses = [
        run(place, *words, "--compute-dtype=bfloat16")["loss"]
        for words in CASES.values()
    ]
    print(losses, want[:, 1].mean())
    assert max(losses) / min(losses) - 1 < 1e-3


def test_ids_of_a_tokenizer_and_a_picture(place, tmp_path, capsys):
    """Two documents, none with an id added: the first of each is not predicted."""
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("a $A", None, [("a", 0)])
    model = from_pretrained(place / "model")
    save_pretrained(model, tmp_path / "model")
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0").write_text("b a b b")
    (tmp_path / "texts" / "1").write_text("b b")
    found = run(tmp_path, "--mesh.seq=8", f"--png={tmp_path}/p.png")
    nats = []
    for ids in ([0, 1, 0, 1, 1], [0, 1, 1]):
        logits = np.asarray(model(np.array([ids]))[0], np.float64)
        for i, label in enumerate(ids[1:]):
            nats.append(np.log(np.exp(logits[i]).sum()) - logits[i, label])
    assert found["tokens"] == len(nats) == 6
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data={}/none.txt"], "--data '.*none.txt' gives no file"),
        (["--data={}/texts/1.txt", "--tokens=1"], "rows of 1 tokens predict nothing"),
        (["--model={}/texts"], "texts"),
        (["--json={}/none/a.json"], "there is no folder .*/none: make it"),
        (["--png={}/texts"], "texts cannot be written as a file"),
        (["--mesh.tensor=8", "--mesh.seq=1"], "num_kv_heads 4 does not divide over"),
        (["--mesh.seq=3"], "takes 3 devices, but there are 8"),
        (["--batch-size=0"], "--batch-size 0: give 1 or more"),
        (["--max-rows=0"], "--max-rows 0: give 1 or more"),
    ],
)
def test_refused_in_words(place, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        args = ["--model={}/model", "--data={}/texts", "--mesh.seq=8"]
        args = [each.format(place) for each in [*args, *words]]
        main([f"--json={tmp_path}/a.json", *args])
    assert ended.value.code == 2
    assert len(found := capsys.readouterr().err.splitlines()) == 1
    assert re.search(said, found[0]), found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_documents_of_one_token_have_no_loss(place, tmp_path, capsys):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    save_pretrained(from_pretrained(place / "model"), tmp_path / "model")
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SystemExit) as ended:
        words = [f"--model={tmp_path}/model", f"--data={tmp_path}/a.txt"]
        main([*words, "--mesh.seq=8", f"--tokens={TOKENS}", f"--json={tmp_path}/j"])
    assert ended.value.code == 2 and not (tmp_path / "j").exists()
    assert "none of 1 tokens counts" in capsys.readouterr().err
