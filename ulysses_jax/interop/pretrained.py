"""From a Hugging Face folder, or a run's, to a model that is called, and back."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.data.tokenizer import files_of
from ulysses_jax.families.config_json import (
    CONFIG,
    config_of,
    family_of,
    read_config,
    source_model,
)
from ulysses_jax.interop.peft import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    check_whole,
    kept_of,
    peft_folder,
)
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.outside import check_inside
from ulysses_jax.run_folder import is_run_folder
from ulysses_jax.tensors.expected import expected, open_source
from ulysses_jax.tensors.files import DTYPES, Shape, Tensors, write, write_file
from ulysses_jax.tensors.reading import described, read_parameters
from ulysses_jax.tensors.writing import written
from ulysses_jax.training.load import load_run


def from_pretrained(
    folder: str | Path,
    *,
    compute_dtype: Literal["bfloat16", "float32"] | None = None,
) -> Any:
    """The model of a folder: `model(tokens)` gives its logits.

    Args:
      folder: of Hugging Face's format (config.json and safetensors), of a family in
        `families.config_json.FAMILIES`; or of a run, `runs/tiny`.
      compute_dtype: of its products. None: float32 where the file's weights are, else
        bfloat16; of a run, what its config says. Parameters are float32 in any case.

    Returns:
      A `Transformer` on the mesh that is set with `jax.set_mesh`, its parameters
      sharded as `sharding.parameter` says, or on one device. `model.model.from_` is the
      folder, which `save_pretrained` reads again.

    Raises:
      ValueError: before anything is allocated: what is no such folder; an unknown
        family, activation or rope; tensors that are missing, too many, of another shape
        or dtype; a broken or a short file; dims that the mesh does not divide.

    Cost: each process reads the pieces of its own devices, and holds in its memory
    these (4 bytes a parameter, on CPU devices) and the pieces of one parameter more.
    """
    folder = Path(folder)
    if is_run_folder(folder):
        model = load_run(folder)
        if compute_dtype is None:
            return model
        own = dataclasses.replace(model.model, compute_dtype=compute_dtype)
        return _filled(own, nnx.to_pure_dict(nnx.state(model)))
    model = source_model(folder)
    tensors, wanted = open_source(model)
    dtype = compute_dtype or ("float32" if tensors.dtype() == "float32" else "bfloat16")
    model = dataclasses.replace(model, compute_dtype=dtype)
    parameters = read_parameters(tensors, wanted, described(_abstract(model)))
    return _filled(model, parameters)


def _filled(model: Model, parameters: dict[str, Any]) -> Any:
    """The module with these parameters."""
    graph, state = nnx.split(_abstract(model))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def _abstract(model: Model) -> Any:
    return nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    max_tokens: int | None = None,
    file_bytes: int = 5_000_000_000,
    adapters: bool = False,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a folder that `transformers` opens, and `from_pretrained`.

    Adapters of `model.lora` are added to their weights, in float32.

    Args:
      model: a `Transformer`. What it came from (`model.model.from_`) gives the other
        fields of config.json, and the tokenizer's files, which are copied.
      folder: must not exist, or be empty.
      dtype: of the weights. None: that of the folder it came from, else float32.
      max_tokens: of a sequence, that the model is for; None: as where it came from.
      file_bytes: of a file of weights, at most, or of one tensor.
      tokenizer: a folder whose tokenizer's files are copied in the place of those of
        what it came from, such as the run's.
      adapters: write these alone, as a folder of PEFT's (`interop.peft`); dtype None is
        float32 then.

    Raises:
      ValueError: the folder is not empty; no family has such a model, or nothing says
        its `max_tokens`; adapters, and the model has none, or PEFT has not these;
        frozen weights that lie in fewer bits than are to be written.
      OSError: it could not be written.

    It is written aside and then renamed: there is a whole folder, or none. Cost: the
    process holds one parameter of all layers of a kind beside the model. On a pod every
    process calls it, and process 0 writes.
    """
    if not isinstance(model, Transformer):
        raise ValueError(
            f"save_pretrained writes a ulysses_jax.Transformer, not a "
            f"{type(model).__name__}"
        )
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(
            f"dtype is {', '.join(DTYPES.values())} or None, not {dtype!r}"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens} is no length: give 1 or more")
    folder, own = Path(folder), complete_model(model.model)
    if (
        folder.is_symlink()
        or folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ValueError(f"{folder} is there already: give one that does not exist")
    source = None if own.from_ is None else Path(own.from_)
    if source is not None and not source.exists():
        raise ValueError(
            f"the model came from {source}, which is not there: the rest of its "
            "config.json and its tokenizer would be lost. Put it back; or, to write "
            "the model alone, model.model = replace(model.model, from_=None), of "
            "dataclasses"
        )
    values = None if source is None else read_config(source)
    if adapters:
        family = family_of(config_of(own, values, max_tokens))
        fields, shapes, tensors = peft_folder(model, family, dtype or "float32")
        with _folder_aside(folder, tensors) as aside:
            if aside is not None:
                write_file(aside / ADAPTER_FILE, shapes, tensors, dtype or "float32")
                (aside / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        return
    stored = dtype or ("float32" if source is None else Tensors(source).dtype())
    made = config_of(own, values, max_tokens)
    said = "dtype" if "dtype" in made else "torch_dtype"
    made[said] = stored
    wanted = expected(family_of(made), own)
    kept = kept_of(model)
    check_whole(kept, stored)
    tensors = written(kept, wanted, stored)
    with _folder_aside(folder, tensors) as aside:
        if aside is None:
            return
        shapes = [Shape(each.name, each.shape) for each in wanted]
        write(aside, shapes, tensors, dtype=stored, file_bytes=file_bytes)
        (aside / CONFIG).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
        if source is not None:
            _copy_beside(source, aside)
        if tokenizer is not None:
            _copy_beside(Path(tokenizer), aside)


def _copy_beside(source: Path, folder: Path) -> None:
    """A tokenizer's files, and the license."""
    for path in (*files_of(source), *sorted(source.glob("LICENSE*"))):
        check_inside(path)
        shutil.copy(path, folder / path.name)


@contextmanager
def _folder_aside(folder: Path, tensors: Iterator[Any]) -> Iterator[Path | None]:
    """A folder to write into, which becomes `folder`; None on all processes but the
    first, which gathers each of the tensors with them."""
    if jax.process_index():
        for _ in tensors:
            pass
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
