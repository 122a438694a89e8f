"""A run as a YAML file: what people write, read as they mean it, or refused."""

import pytest
import yaml
from files import ROOT

from ulysses_jax.config import Lora
from ulysses_jax.config_file import load, load_from_command_line, load_stages


@pytest.fixture
def load_text(tmp_path):
    def written(text, *, encoding="utf-8"):
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode(encoding))
        return load(path)

    return written


@pytest.mark.parametrize(
    "text, name, lines",
    [
        ("training:\n  num_steps: 5\n  num_steps: 7\n", "num_steps", "2 and 3"),
        ("mesh: {seq: 2}\nmodel: {width: 64}\nmesh: {data: 2}\n", "mesh", "1 and 3"),
        ("mesh: {seq: 2, data: 1,\n  seq: 4}\n", "seq", "1 and 2"),
        ("<<: {quiet: true}\n<<: {mesh: {seq: 2}}\n", "<<", "1 and 2"),
    ],
    ids=str,
)
def test_a_key_that_stands_twice_is_refused(load_text, text, name, lines):
    with pytest.raises(ValueError, match=f"{name}' stands twice, in lines {lines}"):
        load_text(text)


def test_anchors_and_merge_keys(load_text):
    config = load_text(
        "training: &t {num_steps: &n 5, warmup_steps: *n}\n"
        "model: {<<: {width: 64, num_heads: 4}, width: 32}\n"
    )
    assert config.training.num_steps == config.training.warmup_steps == 5
    assert (config.model.width, config.model.num_heads) == (32, 4)
    with pytest.raises(ValueError, match="what begins in line 1 has itself in it"):
        load_text("training: &t {num_steps: *t}")


@pytest.mark.parametrize(
    "text, value",
    [("12", 12), ("1_000", 1000), ("0x10", 16), ("0", 0), ("+7", 7)],
)
def test_whole_numbers(load_text, text, value):
    assert (
        load_text(f"training: {{warmup_steps: {text}}}").training.warmup_steps == value
    )


@pytest.mark.parametrize(
    "text", ["010", "-010", "0_10", "00", "08", "10:30", "!!int '010'", "1e6", "8.0"]
)
def test_no_number_in_base_8_or_60(load_text, text):
    """In YAML 1.1 `010` is 8, and `10:30` is 630."""
    with pytest.raises(ValueError, match="training.warmup_steps must be int, not"):
        load_text(f"training: {{warmup_steps: {text}}}")


@pytest.mark.parametrize(
    "text, value",
    [("3e-4", 3e-4), ("0.5", 0.5), ("007.5", 7.5), ("1", 1.0), ("1_0.5", 10.5)],
)
def test_fractions(load_text, text, value):
    text = f"training: {{weight_decay: {text}}}"
    assert load_text(text).training.weight_decay == value


@pytest.mark.parametrize("folder", ["010", "10:30", "1:30.5", "2024-01-01"])
def test_what_looks_like_another_base_or_a_date_is_a_name(load_text, folder):
    config = load_text(f"run: {{folder: {folder}}}\n")
    assert config.run.folder == folder
    assert load_text(config.to_yaml()) == config  # a resolved config is one itself


@pytest.mark.parametrize(
    "text, message",
    [
        ("training: {sequence_tokens: 3000000000}", "sequence_tokens must be below"),
        ("training: {sequence_tokens: 1e30}", "sequence_tokens must be int"),
        ("training: {sequence_tokens: 1.0e+30}", "sequence_tokens must be int"),
        (f"training: {{sequence_tokens: {10**30}}}", "must be below 2.31, not 1000"),
        (f"model: {{window: {2**31}}}", "model.window must be below 2.31"),
        (f"training: {{num_steps: {'9' * 5000}}}", "not valid YAML.*4300 digits"),
        (f"training: {{learning_rate: {10**400}}}", "learning_rate must be float"),
        ("training: {learning_rate: .inf}", "learning_rate must be not negative"),
        ("training: {learning_rate: .nan}", "learning_rate must be not negative"),
        ("training: {num_steps: !!int x}", "not valid YAML"),
        ("[" * 400, "not valid YAML"),
        ("training:\n\tnum_steps: 3\n", "not valid YAML"),
        ("- a\n- b\n", "the config is a section of fields"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("training: {num_steps: 1}\n---\nmesh: {seq: 2}\n", "not valid YAML"),
        ("run: {folder: ''}", "run.folder '' names no folder .it is empty"),
        ("run: {folder: 'gs://bucket/x'}", "gs://bucket/x is not of a file system"),
        ("run: {folder: ~nobody-of-that-name/x}", "no home folder ~nobody-of-that-n"),
    ],
    ids=lambda text: text[:40],
)
def test_what_cannot_be_is_refused_in_words(load_text, text, message):
    with pytest.raises(ValueError, match=message):
        load_text(text)


def test_the_largest_numbers(load_text):
    config = load_text(
        f"training: {{num_steps: {2**31 - 1}}}\nrun: {{seed: {2**32 - 1}}}"
    )
    assert config.training.num_steps == 2**31 - 1 and config.run.seed == 2**32 - 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(load_text, encoding):
    config = load_text(
        "run: {folder: caf\xe9}\r\nmesh: {seq: 2}\r\n", encoding=encoding
    )
    assert config.run.folder == "caf\xe9" and config.mesh.seq == 2
    with pytest.raises(ValueError, match="not valid YAML"):
        load_text("run: {folder: caf\xe9}", encoding="latin-1")


def test_an_empty_file_is_a_run_of_defaults(load_text):
    assert load_text("").training.batch_size == 8


def test_the_home_folder(load_text, tmp_path, monkeypatch):
    """A shell expands --run.folder ~/x, but not --run.folder=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_text("run: {folder: ~/x}").run.folder == f"{tmp_path}/x"
    path = tmp_path / "run.yaml"
    assert load(path, ["--run.folder=~/y"]).run.folder == f"{tmp_path}/y"
    assert load(path, ["--run.folder=./~"]).run.folder == "./~"


def test_a_file_that_is_not_there(tmp_path):
    """The nearest one, or one that is, or what it could be."""
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "tiny.yaml", run / "config.yaml"):
        path.write_text("{}")
    for name, hint in (
        ("tinny.yaml", f"did you mean {tmp_path}/tiny.yaml?"),
        ("qq", f"give a YAML file, such as {tmp_path}/tiny.yaml"),
        ("runs/x", f"give the file in that run's folder, {run}/config.yaml"),
    ):
        with pytest.raises(ValueError, match="cannot read the config") as ended:
            load(tmp_path / name)
        assert str(ended.value).endswith(hint)


def test_sections_as_a_file_says_them(load_text, tmp_path):
    """Of a whole section the command line has null, which switches adapters off, and
    auto."""
    load_text("model: {from: null, lora: {rank: 2}}\nmemory: {remat: none}")

    def overridden(*argv):
        return load(tmp_path / "run.yaml", argv)

    off = ["--model.lora", "null"], ["--model.lora=null"], ["--model.lora", "None"]
    for words in off:
        config = overridden(*words, "--mesh.seq", "2")
        assert config.model.lora is None and config.mesh.seq == 2
    assert overridden("--model.lora.alpha", "3").model.lora == Lora(rank=2, alpha=3.0)
    with pytest.raises(ValueError, match="lora null and --model.lora.rank are both"):
        overridden("--model.lora", "null", "--model.lora.rank", "3")
    for words in ["--memory", "auto"], ["--memory=auto"]:
        assert overridden(*words, "--quiet").memory.auto
    load_text("model: {width: 256}")
    assert overridden("--model.lora", "null").model.lora is None
    assert overridden("--model.lora.rank", "3").model.lora == Lora(rank=3)


def test_a_pattern_of_layers(load_text, tmp_path):
    """A list in a file, words on the command line; null is the default again."""
    text = "model: {num_layers: 7, window: 9, pattern: [window, window, full]}"
    model = load_text(text).model
    assert model.windows() == (9, 9, None) * 2 + (9,)
    resolved = load_text(load_text(text).to_yaml())
    assert resolved.model == model

    def overridden(*argv):
        return load(tmp_path / "run.yaml", argv).model.pattern

    assert overridden("--model.pattern", "window", "full") == ("window", "full")
    assert overridden("--model.pattern", "window", "--quiet") == ("window",)
    assert overridden("--model.pattern", "null") == ("window",)
    assert overridden("--model.pattern=full", "--model.window=null") == ("full",)
    with pytest.raises(ValueError, match="has none: .* or set model.window to null"):
        overridden("--model.pattern", "full")
    with pytest.raises(ValueError, match="pattern must be a list or null, not 'full'"):
        load_text("model: {pattern: full}")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.stem
)
def test_every_config_here_loads_and_says_how_it_is_run(path):
    for config in load_stages(path):
        assert config.run.folder is not None
        assert config.run.folder.split("/stage_")[0] == f"runs/{path.stem}"
    assert f"--config configs/{path.name}" in path.read_text()


def test_one_config_at_a_time(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(yaml.safe_dump({"mesh": {"seq": 2}}))
    with pytest.raises(ValueError, match="--config stands twice.*a and .*b: keep one"):
        load_from_command_line(
            ["--config", f"{tmp_path}/a", "--config", f"{tmp_path}/b"], program="x"
        )
