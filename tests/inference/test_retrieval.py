"""Needles: where they stand, what is asked, and what counts as found."""

import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax.sharding import AxisType
from tokenizers import decoders, models, pre_tokenizers, processors

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.data.tokenizer import IGNORED, Bytes, Folder
from ulysses_jax.inference import retrieval
from ulysses_jax.inference.needles import Haystack, around, filler
from ulysses_jax.inference.scoring import Scores
from ulysses_jax.interop import save_pretrained
from ulysses_jax.retrieval import main


@pytest.fixture
def own(tmp_path):
    """Joins letters, begins a text with an id of its own and ends it with another."""
    text = "The pass key of is 12345 67890 . " * 9
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 0), ("</s>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return Folder(tmp_path)


@pytest.mark.parametrize("of_folder", [False, True])
@pytest.mark.parametrize("ask_all", [False, True])
def test_a_row(own, of_folder, ask_all):
    tokenizer = own if of_folder else Bytes()
    before = around(tokenizer)[0]
    assert around(tokenizer) == (([0], [1]) if of_folder else ([], []))
    haystack = Haystack(tokenizer, filler(tokenizer), num_needles=3, ask_all=ask_all)
    tokens, labels = haystack.row(700, 0.5, np.random.default_rng(7))
    assert len(tokens) == len(labels) == 700
    assert tokens[: len(before)].tolist() == before and 1 not in tokens.tolist()
    text = tokenizer.decode(tokens.tolist())
    said = re.findall(r"The pass key of (\w{4}) is (\d{5})\.", text)
    asked = re.findall(r"The pass key of (\w{4}) is (\d{5})(?!\d|\.)", text)
    assert len(dict(said)) == 3 and len(asked) == (3 if ask_all else 1)
    assert set(asked) <= set(said)
    assert text.endswith(asked[-1][1])
    # Labels are the answers, and nothing else.
    where = np.flatnonzero(labels != IGNORED)
    assert (labels[where] == tokens[where + 1]).all()
    found = tokenizer.decode(labels[where].tolist())
    assert found.replace(" ", "") == "".join(value for _, value in asked)


def test_the_depth_is_the_needles():
    hay = np.zeros(11, np.int32)  # no byte of a needle
    haystack = Haystack(Bytes(), hay)
    starts = []
    for depth in (0.0, 0.25, 1.0):
        tokens, _ = haystack.row(400, depth, np.random.default_rng(0))
        starts.append(np.flatnonzero(tokens)[0])
    needle = len(" The pass key of abcd is 12345.")
    left = 400 - needle - (needle - 1)  # the question ends without its full stop
    assert starts == [0, round(left / 4), left]
    with pytest.raises(ValueError, match="rows of 40 tokens have no room for hay"):
        haystack.row(40, 0.0, np.random.default_rng(0))


def test_right_is_every_token_of_every_answer(monkeypatch):
    """A model that misses one token in rows at depth 0, and none at depth 1."""

    def make_score(model):
        def score(batch):
            labels = np.asarray(batch["labels"])[0]
            likeliest = np.where(labels == IGNORED, 5, labels)
            tokens = np.asarray(batch["tokens"])[0]
            likeliest[(tokens == 0) & (labels == 9)] += 1
            assert (np.asarray(batch["positions"])[0, 0, :6] == np.arange(6)).all()
            return Scores(np.zeros(labels.shape), likeliest, labels, labels)

        return score

    def row(num_tokens, depth, rng):
        labels = np.full(num_tokens, IGNORED, np.int32)
        labels[-3:] = 7, 9, 8
        return np.full(num_tokens, int(depth), np.int32), labels

    monkeypatch.setattr(retrieval, "make_score", make_score)
    with jax.set_mesh(make_mesh(data=2, seq=4, axis_type=AxisType.Explicit)):
        found = retrieval.retrieve(
            None, row, {6: (4, 8), 12: (4, 16)}, [0.0, 1.0], num_trials=6, seed=0
        )
    assert found.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_the_program(tmp_path, capsys):
    size = Model(vocab_size=264, width=16, num_layers=1, num_heads=8)
    model = Transformer(size, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model", dtype="float32", max_tokens=512)
    words = [f"--model={tmp_path}/model", "--mesh.seq=8", "--trials=2"]
    words += ["--lengths=150", "--depths=0,1", f"--json={tmp_path}/a.json"]
    main([*words, f"--png={tmp_path}/a.png", "--batch-size=2"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["accuracy"] == [[0.0], [0.0]]  # nobody guesses five digits
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "150 tokens, depth 100%: 0%" in capsys.readouterr().out
    for more, said in (
        (["--lengths=40"], "have no room for hay"),
        (["--depths=2"], "--depths: 2.0 is not from 0 to 1"),
        (["--trials=0"], "--trials 0: give 1 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more, f"--json={tmp_path}/b.json"])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
