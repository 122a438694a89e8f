"""Reads a run: a YAML file, and any field from the command line."""

import argparse
import dataclasses
import difflib
import keyword
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
import yaml

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Lora, Memory, Model
from ulysses_jax.families.config_json import source_model
from ulysses_jax.fields import typed
from ulysses_jax.run_folder import is_run_folder

T = TypeVar("T")


def load_from_command_line(argv: Sequence[str], *, program: str) -> tuple[Config, ...]:
    """Reads `--config FILE` and overrides of any field, such as `--mesh.seq 4`.

    Returns:
      The config of each stage of the file, as `load_stages`.

    Raises:
      ValueError: as `load_stages`.
      SystemExit: for the command line's own errors, and for --help.
    """
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", action="append")
    own, overrides = parser.parse_known_args(argv)
    if own.config is None:
        if {"-h", "--help"} & set(
            overrides
        ):  # without a file: the fields' own defaults
            tyro.cli(Config, args=overrides, prog=f"{program} --config FILE")
        raise ValueError("say which run: --config configs/tiny.yaml")
    if len(own.config) > 1:
        raise ValueError(f"--config stands twice, {' and '.join(own.config)}: keep one")
    (path,) = own.config
    return load_stages(path, overrides, program=f"{program} --config {path}")


def load(path: str | Path, argv: Sequence[str] = (), *, program: str = "") -> Config:
    """Reads a YAML file, applies command-line overrides, fills in what follows.

    A run's own config.yaml means the run in whose folder it lies.

    Raises:
      ValueError: an unknown key, a wrong type or an impossible value, by name; a file
        with stages.
      SystemExit: for the command line's own errors, and for --help.
    """
    first, *others = load_stages(path, argv, program=program)
    if others:
        raise ValueError(
            f"{path} has {1 + len(others)} stages, each a run: "
            "ulysses_jax.config_file.load_stages reads all of them"
        )
    return first


def load_stages(
    path: str | Path, argv: Sequence[str] = (), *, program: str = ""
) -> tuple[Config, ...]:
    """Reads a YAML file as `load`; of one with `stages`, a config each.

    A stage says which fields are others than the file's own; the command line wins in
    all of them. Stage 2 of runs/x has its folder runs/x/stage_2, starts from the last
    parameters of runs/x/stage_1, and reads the data in another order: its seed is one
    more than that of stage 1.

    Raises:
      ValueError: as `load`, naming the stage.
    """
    path = Path(path)
    values = read_values(path)
    stages = values.pop("stages", None) if isinstance(values, dict) else None
    if stages is None:
        return (_load(path, values, argv, program),)
    if not isinstance(stages, list) or not stages:
        raise ValueError(
            f"{path}: stages is a list of sections, one or more, such as "
            "- training: {sequence_tokens: 65536}"
        )
    configs: list[Config] = []
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, dict):
            raise ValueError(
                f"{path}: stage {number} is a section of sections, such as training: "
                f"{{sequence_tokens: 65536}}, not {stage!r}"
            )
        try:
            config = _load(path, _merged(values, stage), argv, program)
        except ValueError as error:
            raise ValueError(f"stage {number} of {len(stages)}: {error}") from None
        run = dataclasses.replace(
            config.run,
            folder=f"{config.run.folder}/stage_{number}",
            seed=config.run.seed + number - 1,
            after=configs[-1].run.folder if configs else config.run.after,
        )
        configs.append(dataclasses.replace(config, run=run))
    return tuple(configs)


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections field by field."""
    merged = dict(values)
    for name, value in over.items():
        mine = merged.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            value = _merged(mine, value)
        merged[name] = value
    return merged


def read_values(path: Path) -> Any:
    """What a YAML file holds, of any form.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise yaml.YAMLError(
                f"it has more than {_MOST_BYTES:,} bytes, and a config has a few "
                "thousand: give a run's"
            )
        values = yaml.load(data, Loader=_Loader)
    except OSError as error:
        raise ValueError(
            f"cannot read the config {path}: {error.strerror}; {_near(path)}"
        ) from None
    # ValueError: of a number of thousands of digits, or of what follows !!int.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {said}") from None
    return {} if values is None else values


def _near(path: Path) -> str:
    """What to give in the place of a file that is none."""
    if is_run_folder(path):
        return f"give the file in that run's folder, {path / 'config.yaml'}"
    for folder in (path if path.is_dir() else path.parent, Path("configs")):
        names = sorted(each.name for each in folder.glob("*.yaml"))
        if close := difflib.get_close_matches(path.name, names, n=1):
            return f"did you mean {folder / close[0]}?"
        if names:
            return f"give a YAML file, such as {folder / names[0]}"
    return "give a YAML file, such as the configs of ulysses_jax's repository"


def _load(path: Path, values: Any, argv: Sequence[str], program: str) -> Config:
    base = Config()
    if (folder := _source(values, argv)) is not None:
        base = dataclasses.replace(base, model=source_model(folder))
    config = _build(Config, values, f"{path}: ", (), base)
    if path.name == "config.yaml" and is_run_folder(path.parent):
        # It may have been copied or moved with its config.
        run = dataclasses.replace(config.run, folder=str(path.parent))
        config = dataclasses.replace(config, run=run)
    if argv:
        words = _as_tyro_writes(argv)
        config, words = _with_lora(config, words)
        config = tyro.cli(
            Config,
            default=config,
            args=words,
            prog=program or None,
            config=(tyro.conf.AvoidSubcommands,),
        )
    return complete(config, name=path.stem)


def _with_lora(config: Config, words: list[str]) -> tuple[Config, list[str]]:
    """The section there where words name its fields, and not where they say null:
    tyro knows fields alone, of a section that is there."""
    fields = [word for word in words if word.startswith("--model.lora.")]
    off = "--model.lora=None"
    if fields and off in words:
        raise ValueError(f"--model.lora null and {fields[0]} are both given: keep one")
    lora = config.model.lora or (Lora() if fields else None)
    lora = None if off in words else lora
    model = dataclasses.replace(config.model, lora=lora)
    rest = [word for word in words if word != off]
    return dataclasses.replace(config, model=model), rest


def _source(values: Any, argv: Sequence[str]) -> str | None:
    """The folder that says the model's other fields: `model.from`, of a file that does
    not say all of them, as a run's own config.yaml does."""
    section = values.get("model") if isinstance(values, dict) else None
    given = section if isinstance(section, dict) else {}
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--model.from", dest="folder")
    said = own.parse_known_args(argv)[0].folder or given.get("from")
    said = None if said in ("null", "None") else said
    says = {f.name.rstrip("_") for f in dataclasses.fields(Model)} - {"lora"}
    says_all = says <= set(given)
    return None if says_all or not isinstance(said, str) else said


_MOST_BYTES, _MOST_BITS, _MOST_DEPTH = 2**16, 2**13, 2**6
_MOST_NODES = 2**16  # as many as a file of that size can have, without aliases


class _Loader(yaml.SafeLoader):
    """YAML as people read it: no key twice, no numbers in base 8 or 60, no dates.

    And no more of it than is written down: aliases of aliases, a few lines, could stand
    for 2^40 values.
    """

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level == _MOST_DEPTH:  # the scanner's time goes by its square
            raise yaml.YAMLError(f"brackets in {_MOST_DEPTH} brackets")
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Of a node and all below it, an alias as what it stands for."""
        if (found := known.get(id(node))) is not None:
            if not found:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"what begins in line {line} has itself in it")
            return found
        known[id(node)], found = 0, 1
        below: Any = [] if isinstance(node, yaml.ScalarNode) else node.value
        for each in below:
            for inner in each if isinstance(each, tuple) else (each,):
                found += self._count(inner, known)
        if found > _MOST_NODES:
            raise yaml.YAMLError(
                f"its aliases (*) stand for more than {_MOST_NODES:,} values: write "
                "them out"
            )
        known[id(node)] = found
        return found

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when it is constructed
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice, in lines {lines[key.value]} and "
                    f"{line}: keep one"
                )
            lines[key.value] = line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """As it stands where YAML 1.1 has another base: 010 is 8, and 10:30 is 630."""
        text = node.value.lstrip("+-")
        if ":" in text or (text[:1] == "0" and text[1:2] in tuple("01234567_")):
            return node.value
        if node.tag.endswith("int"):
            number = self.construct_yaml_int(node)
            if number.bit_length() > _MOST_BITS:
                raise yaml.YAMLError(f"a number of {number.bit_length():,} bits")
            return number
        return self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def _as_tyro_writes(argv: Sequence[str]) -> list[str]:
    """YAML's null, true and false after an option, as tyro wants them said."""
    words: list[str] = []
    for word in argv:
        if word.partition("=")[0] == "--model.from":  # a field may not be named so
            word = word.replace("from", "from_", 1)
        option, _, value = word.rpartition("=")
        if not option and words and words[-1].startswith("--"):
            option, value = words[-1], word
        value = value.lower()
        if (option, value) == ("--model.lora", "none"):  # as tyro has it
            value = "null"
        if (option, value) == ("--memory", "auto"):  # as a file says it
            if words and words[-1] == option:
                words.pop()
            word = "--memory.auto"
        elif option and value in ("null", "true", "false"):
            if words and words[-1] == option:
                words.pop()
            section, _, name = option.removeprefix("--").rpartition(".")
            dot = "." if section else ""
            if value == "null" or types.NoneType in get_args(_hint(option)):
                value = {"null": "None"}.get(value, value.capitalize())
                word = f"{option}={value}"
            else:
                word = option if value == "true" else f"--{section}{dot}no-{name}"
        elif option and value not in ("none", "true", "false") and value[:2] != "--":
            hint = _hint(option)
            if hint is bool or bool in get_args(hint):  # refused as a file's is
                typed(hint, value, option.removeprefix("--").replace("-", "_"))
        words.append(word)
    return words


def _hint(option: str) -> Any:
    """The type of the field that an option names; None: there is no such field."""
    hint: Any = Config
    for name in option.removeprefix("--").replace("-", "_").split("."):
        is_section = dataclasses.is_dataclass(hint)
        hint = get_type_hints(hint).get(name) if is_section else None
    return hint


def from_dict(cls: type[T], values: Any, *, where: str = "") -> T:
    """Builds a dataclass from nested dicts; every key and type must be right.

    Raises:
      ValueError: names the field, and for an unknown one the nearest valid name.
    """
    return _build(cls, values, where, (), cls())


def _build(cls: Any, values: Any, where: str, path: tuple[str, ...], base: Any) -> Any:
    """Args: base: of this class; has the fields that values do not say."""
    if not isinstance(values, dict):
        name = ".".join(path) or "the config"
        if cls is Memory:
            name += ", but for the word auto,"
        raise ValueError(f"{where}{name} is a section of fields, not {values!r}")
    hints = get_type_hints(cls)
    built = {}
    for said, value in values.items():
        name = ".".join((*path, str(said)))
        key = f"{said}_" if keyword.iskeyword(str(said)) else said
        if key not in hints or (said == key and str(said).endswith("_")):
            near = _nearest(str(said), path)
            raise ValueError(f"{where}unknown field {name!r}{near}")
        if hints[key] is Memory and value == "auto":
            built[key] = Memory(auto=True)
        elif hints[key] == Lora | None and value is not None:
            of = getattr(base, key) or Lora()
            built[key] = _build(Lora, value, where, (*path, key), of)
        elif dataclasses.is_dataclass(hints[key]):
            of = getattr(base, key)
            built[key] = _build(hints[key], value, where, (*path, key), of)
        else:
            built[key] = typed(hints[key], value, f"{where}{name}")
    return dataclasses.replace(base, **built)


def _nearest(key: str, path: tuple[str, ...]) -> str:
    """Suggests the valid field whose name is most like `key`, in any section."""
    names = {
        ".".join(("" if s is None else s, f)).strip("."): f for s, f in _all_fields()
    }
    here = {n: f for n, f in names.items() if n.split(".")[:-1] == list(path)}
    for candidates in (here, names):
        close = difflib.get_close_matches(key, candidates.values(), n=1, cutoff=0.6)
        if close:
            full = next(n for n, f in candidates.items() if f == close[0])
            return f"; did you mean {full!r}?"
    return f"; valid here: {', '.join(here.values())}"


def _all_fields() -> list[tuple[str | None, str]]:
    pairs: list[tuple[str | None, str]] = []
    for section, hint in get_type_hints(Config).items():
        pairs.append((None, section))
        if dataclasses.is_dataclass(hint):
            pairs += _fields_of(section, hint)
    return pairs


def _fields_of(section: str, cls: Any) -> list[tuple[str | None, str]]:
    """As a file has their names."""
    pairs: list[tuple[str | None, str]] = []
    for name, hint in get_type_hints(cls).items():
        pairs.append((section, name.rstrip("_")))
        hint = Lora if hint == Lora | None else hint
        if dataclasses.is_dataclass(hint):
            pairs += _fields_of(f"{section}.{name}", hint)
    return pairs
