"""Documents from outside: junk is refused in words, soon, and in little memory."""

import ast
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from doors import DOORS
from files import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from junk import judged, mutated, spoilt, structured
from word_tokenizer import write_tokenizer

from ulysses_jax.data.tokenizer import tokenizer_of
from ulysses_jax.families.config_json import read_config
from ulysses_jax.tensors.files import Tensors

# The same inputs every time, and no limit of seconds but that of `judged`.
ALIKE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
# A kind of documents and a way to spoil them: all of them together make 100,000.
QUICK, SLOW = 6, 2_600
BY_NAME = {door.__name__: door for door in DOORS}


def made(name, folder):
    """A door, and valid documents; the first that goes through it loads what it
    needs."""
    door = BY_NAME[name](folder)
    whole = [*door.whole, *(spoilt(each, []) for each in door.documents)]
    with suppress(ValueError, OSError):
        door.read(whole[0])
    return door, whole


def ways(door):
    found = [structured(door.documents, door.values)] if door.documents else []
    return found + ([mutated(door.whole)] if door.whole else [])


@pytest.mark.parametrize("num", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BY_NAME)
def test_junk_is_taken_as_it_is_meant_or_refused_in_words(name, num, tmp_path):
    door, valid = made(name, tmp_path)
    for each in valid:
        said = judged(door.read, each, door.names)
        assert said is None or name in ("splits", "zipped"), said
    found = {True: 0, False: 0}
    for way in ways(door):

        @settings(ALIKE, max_examples=max(num // door.share, QUICK))
        @given(way)
        def each(data):
            found[judged(door.read, data, door.names) is None] += 1

        each()
    assert sum(found.values()) >= num // door.share * len(ways(door))
    if num == SLOW:
        print(f"\n{name}: {found[True]:,} taken, {found[False]:,} refused")


def test_all_of_them_are_100_000(tmp_path):
    num = 0
    for name, door in BY_NAME.items():
        (tmp_path / name).mkdir()
        here = door(tmp_path / name)
        num += SLOW // here.share * len(ways(here))
    assert num >= 100_000


DEEP = "[" * 2000 + "]" * 2000
LONG = "9" * 400
BOMB = "[&a0 [x, x], " + "".join(f"&a{i + 1} [*a{i}, *a{i}], " for i in range(40))
MERGES = "[&a0 {a: 1}, " + "".join(
    f"&a{i + 1} {{<<: [{f'*a{i}, ' * 9}]}}, " for i in range(20)
)
GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
EMPTY = {"version": "1.0", "added_tokens": []} | dict.fromkeys(
    ("normalizer", "pre_tokenizer", "post_processor", "decoder")
)
EMPTY |= {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}


def misnamed(door):
    """A column whose name is no UTF-8."""
    return door.whole[1].replace(b"text", b"\x82ext")


def steps(kind, *each):
    plural = {"normalizer": "normalizers", "decoder": "decoders"}
    return json.dumps({"type": "Sequence", plural.get(kind, "pretokenizers"): each})


# (kind, place, text in the place of what is there, words; None: it is taken).
CLASSICS = [
    ("config", None, "training: " + BOMB + "1]", "stand for more than 65,536 values"),
    ("config", None, "training: " + MERGES + "1]", "stand for more than 65,536"),
    ("config", None, "model: &a {b: *a}", "in line 1 has itself in it"),
    ("config", None, "a: &a {b: *a}\nstages: [{a: *a}]", "has itself in it"),
    ("config", None, "#" * 2**16 + "\n", "more than 65,536 bytes"),
    ("config", None, "x: " + DEEP, "brackets in 64 brackets"),
    ("config", None, "x: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ("config", ("training", "num_steps"), LONG, "num_steps must be below"),
    ("config", ("training", "num_steps"), "0x" + "f" * 5000, "a number of 20,000 bits"),
    ("config", ("model", "num_layers"), str(2**31 - 1), "is more than 4096"),
    ("config", ("model", "num_heads"), str(2**31 - 2), "is more than 65536"),
    ("config", ("mesh", "seq"), LONG, None),
    ("index", (), DEEP, "is no JSON"),
    ("index", ("shards", 0, "tokens"), LONG, "not a whole number"),
    ("unfinished", ("shards",), DEEP, "is no JSON"),
    ("dataset", (), DEEP, "is no JSON"),
    ("dataset", ("_data_files", 0, "filename"), '"../x.arrow"', "is not there"),
    ("dataset", ("_data_files", 0, "filename"), '"/etc/passwd"', "is not there"),
    ("splits", ("splits", 0), DEEP, "is no JSON"),
    ("lines", ("text",), DEEP, "is not JSON"),
    ("lines", ("text",), '"\\ud800"', "half of a pair of surrogates"),
    ("arrow", None, misnamed, "is no whole table"),
    ("chat", ("messages", 0), DEEP, "this is no JSON"),
    ("tokenizer_config", (), DEEP, "is no JSON"),
    ("tokenizer_config", ("chat_template",), "[null, {}]", "has no chat template"),
    ("tokenizer_config", ("chat_template",), '[{"name": []}]', "has no chat template"),
    ("tokenizer_config", ("eos_token",), DEEP, "is no JSON"),
    ("generation_config", (), DEEP, "is no JSON"),
    ("template", None, "a" * 2**16 + "b", "letters are more than 65,536"),
    ("template", None, b"\xff", "not UTF-8"),
    (
        "template",
        None,
        "{% set s = 'a' * 1000000 %}{% for i in range(9999) %}{{ s.count('ab') }}"
        "{% endfor %}",
        "does not end within 0.5 seconds",
    ),
    ("tokenizer", ("normalizer",), steps("normalizer", *[GROWS] * 11), "of one: take"),
    ("tokenizer", ("normalizer",), steps("normalizer", *[GROWS] * 10), None),
    ("tokenizer", ("decoder",), steps("decoder", *[GROWS] * 40), "of one: take"),
    ("tokenizer", ("pre_tokenizer",), steps("", *[BYTES] * 40), "1,024 letters of one"),
    (
        "tokenizer",
        ("normalizer",),
        '{"type": "Precompiled", "precompiled_charsmap": "////fwAAAAAA"}',
        "is shorter than it says",
    ),
    (
        "tokenizer",
        ("pre_tokenizer",),
        '{"type": "FixedLength", "length": 0}',
        "at a te",
    ),
    ("tokenizer", ("model", "unk_token"), '"none"', "fails at a text"),
    ("tokenizer", None, json.dumps(EMPTY), "has no token: take"),
    ("header", ("lm_head.weight", "shape"), "[]", "no whole safetensors file"),
    ("header", ("lm_head.weight", "shape"), "[1152]", "1152., and is not the embed"),
    ("safetensors", None, (10**15).to_bytes(8, "little"), "header of 1,000,000,000,00"),
    ("model_index", (), DEEP, "is no JSON"),
    ("model_index", ("weight_map",), "[1]", "is no index"),
    ("model_index", ("weight_map", "model.norm.weight"), '"../x"', "leaves the folder"),
    ("model_index", ("weight_map", "model.norm.weight"), '"/x"', "leaves the folder"),
    ("model_index", ("weight_map", "model.norm.weight"), '"."', "leaves the folder"),
    ("model_index", ("weight_map", "model.norm.weight"), '"\\u0000"', "names no file"),
    ("model_index", ("weight_map", "model.norm.weight"), '"\\ud800"', "names no file"),
    ("model_config", (), DEEP, "is no JSON"),
    ("model_config", ("num_hidden_layers",), str(10**10), "must be at most 4096"),
    ("model_config", ("max_position_embeddings",), "[]", "must be of type int"),
    ("model_config", ("rope_parameters", "rope_theta"), LONG, "too large"),
    ("commit", (), "null", "no checkpoint to start from"),
    ("commit", (), DEEP, "no checkpoint to start from"),
    ("commit", ("files", "d/0"), "[1]", "no checkpoint to start from"),
    ("commit", ("files",), '{"../outside": [6, 1319822794]}', "out of"),
    ("commit", ("files",), '{"/etc/hostname": [6, 0]}', "out of"),
    ("commit", ("meta", "model"), "7", "meta.model must be dict, not 7"),
    ("commit", ("meta", "model", "lora"), "{}", "meta.model.lora has no rank"),
    ("commit", ("meta", "model", "lora", "alpha"), LONG, "alpha must be float"),
    ("commit", ("meta", "base"), "[]", "meta.base must be dict"),
    ("commit", ("meta", "schedule"), '{"x": 1}', "unexpected keyword argument 'x'"),
    ("commit", ("meta", "schedule", "num_steps"), "-1", "num_steps must be positive"),
    ("metrics", ("loss",), DEEP, None),
    ("metrics", ("loss",), LONG, None),
    ("call", ("process",), "1e999", None),
    ("call", ("process",), DEEP, None),
    ("call", ("process",), "7", None),
]


@pytest.mark.parametrize(
    "name, place, text, words",
    CLASSICS,
    ids=lambda x: getattr(x, "__name__", f"{x}")[:40],
)
def test_what_others_were_caught_by(name, place, text, words, tmp_path):
    door, _ = made(name, tmp_path)
    if callable(text):
        data = text(door)
    elif place is None:
        data = text if isinstance(text, bytes) else text.encode()
    else:
        data = spoilt(door.documents[0], [(place, "instead", text)])

    said = judged(door.read, data, door.names)
    assert said is words is None or re.search(words, said), said


def test_links_that_lead_out_of_a_folder(tmp_path):
    """Refused wherever a name in a folder is read, and in what is copied from it."""
    outside = tmp_path / "outside"
    for name, file in (
        ("index", "out/index.json"),
        ("index", "out/ids-00000.bin"),
        ("ends", "out/ends-00000.bin"),
        ("dataset", "state.json"),
        ("generation_config", "generation_config.json"),
        ("generation_config", "tokenizer.json"),
        ("tokenizer_config", "tokenizer_config.json"),
        ("template", "chat_template.jinja"),
        ("header", "config.json"),
        ("header", "model.safetensors"),
        ("model_index", "model/model.safetensors.index.json"),
        ("model_index", "model/model-00001-of-00002.safetensors"),
        ("commit", "run/checkpoints/7/d/0"),
    ):
        folder = tmp_path / f"{name} {Path(file).name}"
        folder.mkdir()
        door = BY_NAME[name](folder)
        whole = door.whole[0] if door.whole else spoilt(door.documents[0], [])
        assert judged(door.read, whole, door.names) is None
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)
        said = judged(door.read, whole, [str(folder)])
        assert said and f"{file} leads to {outside}, out of " in said, said


def test_a_tokenizer_is_copied_without_what_links_lead_to(tmp_path):
    folder = tmp_path / "model"
    for each in (folder, tmp_path / "copy"):
        each.mkdir()
    write_tokenizer(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.model").symlink_to("../secret")
    with pytest.raises(ValueError, match="tokenizer.model leads to .*secret, out of"):
        tokenizer_of(folder).copy_to(tmp_path / "copy")


def test_links_as_in_a_cache_of_models(tmp_path):
    """Hugging Face's: each file of a snapshot is a link to a blob beside it."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    for each in (snapshot, blobs):
        each.mkdir(parents=True)
    write_tokenizer(snapshot)
    (snapshot / "tokenizer.json").rename(blobs / "1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (tmp_path / "folder").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "folder"):
        assert tokenizer_of(folder).num_ids == 6
    (snapshot / "tokenizer.json").unlink()
    (blobs / "1").rename(tmp_path / "1")
    (snapshot / "tokenizer.json").symlink_to("../../../1")
    with pytest.raises(ValueError, match="leads to"):
        tokenizer_of(snapshot)


def test_files_that_are_too_large_or_are_none_are_not_read(tmp_path):
    """One that has 10^12 bytes, of which none is on the disk; and a pipe, which would
    keep who opens it."""

    def refused(read):
        return judged(lambda _: read(tmp_path), b"", [str(tmp_path)]) or "it is taken"

    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10**12)
    assert "has 1,000,000,000,000 bytes, and such a file at most 1,0" in refused(
        read_config
    )
    path.unlink()
    os.mkfifo(path)
    os.mkfifo(tmp_path / "model.safetensors")

    def waits(*_):
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(30)
    try:
        assert f"{path} is no file" in refused(read_config)
        assert "model.safetensors is no whole safetensors file (it is a fol" in refused(
            Tensors
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What runs code that it reads; what is safe of YAML is a subclass of SafeLoader.
_NAMES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "torch"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_WORDS = {"allow_pickle", "trust_remote_code", "unsafe_load", "full_load", "FullLoader"}
_WORDS |= {"UnsafeLoader", "Loader"}


def runs_code(source):
    """What of it would run code that is read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [each.name.split(".")[0] for each in node.names]
            found += [name for name in names if name in _NAMES]
        elif isinstance(node, ast.ImportFrom):
            found += [
                name for name in [(node.module or "").split(".")[0]] if name in _NAMES
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in _CALLS else []
        elif isinstance(node, ast.keyword | ast.Attribute):
            name = node.arg if isinstance(node, ast.keyword) else node.attr
            is_safe = isinstance(node, ast.keyword) and name == "Loader"
            is_safe &= is_safe and ast.unparse(node.value) == "_Loader"
            found += [name] if name in _WORDS and not is_safe else []
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            found += [base for base in bases if base in ("yaml.Loader", "Loader")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.unsafe_load(x)",
        "class A(yaml.Loader): pass",
        "from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_code_that_would_run_what_it_reads_is_seen(source):
    assert runs_code(source)


def test_nothing_here_runs_what_it_reads():
    files = [*(ROOT / "ulysses_jax").rglob("*.py"), ROOT / "train.py"]
    texts = {str(file): file.read_text() for file in files}
    assert len(texts) > 100
    words = re.compile("|".join([*_NAMES, *_CALLS, *_WORDS]))
    found = {file: runs_code(x) for file, x in texts.items() if words.search(x)}
    assert not {file: what for file, what in found.items() if what}


def test_numpy_and_orbax_unpickle_nothing():
    """NumPy's default is not to; nor do Orbax's modules for checkpoints and arrays."""
    import inspect

    import numpy as np
    import orbax.checkpoint as ocp

    assert inspect.signature(np.load).parameters["allow_pickle"].default is False
    readers = (ocp.PyTreeCheckpointHandler, ocp.BasePyTreeCheckpointHandler)
    for each in (*readers, ocp.type_handlers.ArrayHandler):
        module = inspect.getmodule(each)
        assert module is not None and not runs_code(inspect.getsource(module))
