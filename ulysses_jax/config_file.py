"""Reads a run: a YAML file, and any field from the command line."""

import argparse
import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from ulysses_jax.config import Config, Memory
from ulysses_jax.placement import complete

T = TypeVar("T")


def load_from_command_line(argv: Sequence[str], *, program: str) -> Config:
    """Reads `--config FILE` and overrides of any field, such as `--mesh.seq 4`.

    Raises:
      ValueError: as `load`.
      SystemExit: for the command line's own errors, and for --help.
    """
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    own, overrides = parser.parse_known_args(argv)
    if own.config is None:
        if {"-h", "--help"} & set(
            overrides
        ):  # without a file: the fields' own defaults
            tyro.cli(Config, args=overrides, prog=f"{program} --config FILE")
        raise ValueError("say which run: --config configs/tiny.yaml")
    return load(own.config, overrides, program=f"{program} --config {own.config}")


def load(path: str | Path, argv: Sequence[str] = (), *, program: str = "") -> Config:
    """Reads a YAML file, applies command-line overrides, fills in what follows.

    A run's own config.yaml means the run in whose folder it lies.

    Raises:
      ValueError: an unknown key, a wrong type or an impossible value, by name.
      SystemExit: for the command line's own errors, and for --help.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    config = from_dict(Config, {} if values is None else values, where=f"{path}: ")
    if _is_of_a_run(path):  # which may have been copied or moved with it
        run = dataclasses.replace(config.run, folder=str(path.parent))
        config = dataclasses.replace(config, run=run)
    if argv:
        words = _as_tyro_writes(argv)
        config = tyro.cli(Config, default=config, args=words, prog=program or None)
    return complete(config, name=path.stem)


def _is_of_a_run(path: Path) -> bool:
    """Whether a run wrote the file into its folder."""
    others = (path.parent / name for name in ("checkpoints", "metrics.jsonl"))
    return path.name == "config.yaml" and any(each.exists() for each in others)


def _as_tyro_writes(argv: Sequence[str]) -> list[str]:
    """YAML's null, true and false after an option, as tyro wants them said."""
    words: list[str] = []
    for word in argv:
        option, _, value = word.rpartition("=")
        if not option and words and words[-1].startswith("--"):
            option, value = words[-1], word
        value = value.lower()
        if option and value in ("null", "true", "false"):
            if words and words[-1] == option:
                words.pop()
            section, _, name = option.removeprefix("--").rpartition(".")
            dot = "." if section else ""
            if value == "null" or _may_be_null(section, name):
                value = {"null": "None"}.get(value, value.capitalize())
                word = f"{option}={value}"
            else:
                word = option if value == "true" else f"--{section}{dot}no-{name}"
        words.append(word)
    return words


def _may_be_null(section: str, name: str) -> bool:
    """Whether a field, as the command line writes it, is of a type with None."""
    owner: Any = get_type_hints(Config).get(section, Config)
    return type(None) in get_args(get_type_hints(owner).get(name.replace("-", "_")))


def from_dict(cls: type[T], values: Any, *, where: str = "") -> T:
    """Builds a dataclass from nested dicts; every key and type must be right.

    Raises:
      ValueError: names the field, and for an unknown one the nearest valid name.
    """
    return _build(cls, values, where, ())


def _build(cls: Any, values: Any, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(values, dict):
        name = ".".join(path) or "the config"
        if cls is Memory:
            name += ", but for the word auto,"
        raise ValueError(f"{where}{name} is a section of fields, not {values!r}")
    hints = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        name = ".".join((*path, str(key)))
        if key not in hints:
            raise ValueError(f"{where}unknown field {name!r}{_nearest(str(key), path)}")
        if hints[key] is Memory and value == "auto":
            built[key] = Memory(auto=True)
        elif dataclasses.is_dataclass(hints[key]):
            built[key] = _build(hints[key], value, where, (*path, key))
        else:
            built[key] = _value(hints[key], value, f"{where}{name}")
    return cls(**built)


def _value(hint: Any, value: Any, name: str) -> Any:
    options = (
        get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    )
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option) and not isinstance(value, bool):
                return value
        elif get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_value(get_args(option)[0], each, name) for each in value)
        elif option is float and not isinstance(value, bool):
            try:  # YAML reads 3e-4, without a dot, as a string
                return float(value)
            except (TypeError, ValueError):
                continue
        elif type(value) is option:
            return value
    wanted = " or ".join(
        " | ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else "a list"
        if get_origin(option) is tuple
        else "null"
        if option is types.NoneType
        else option.__name__
        for option in options
    )
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


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
            pairs += [(section, f.name) for f in dataclasses.fields(hint)]
    return pairs
