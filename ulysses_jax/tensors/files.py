"""A folder of safetensors: what is in it, one piece of a tensor at a time."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (its bfloat16 is what NumPy reads one as)
import numpy as np
from safetensors import SafetensorError, safe_open

from ulysses_jax.outside import check_inside, read_object

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Those that are read, as safetensors and as NumPy call them."""
_MOST_BYTES = 2**24  # of a header: of some hundred thousand tensors


class Entry(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Tensors:
    """The tensors of a folder, by name. Only headers are read, until `read` is called.

    Attributes:
      entries: each tensor's file, shape and dtype.
    """

    def __init__(self, folder: str | Path):
        """Raises:
        ValueError: no safetensors are there; an index that names what is not there, or
          a path; a broken header, or a file cut short.
        """
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        placed = self._placed()
        for name in [ONE_FILE] if placed is None else dict.fromkeys(placed.values()):
            self._read_header(self.folder / name)
        if placed is None:
            return
        for tensor, name in placed.items():
            found = self.entries.get(tensor)
            if found is None or found.file.name != name:
                where = f"in {found.file.name}" if found else "in none of its files"
                raise ValueError(
                    f"{self.folder / INDEX} says that {tensor} is in {name}, and it is "
                    f"{where}: the folder is not whole; copy it again"
                )

    def _placed(self) -> dict[str, str] | None:
        """The index: the file of each tensor; None: there is one file."""
        path = self.folder / INDEX
        if (self.folder / ONE_FILE).exists():
            return None
        if not path.exists():
            pickled = any(self.folder.glob("pytorch_model*.bin"))
            raise ValueError(
                f"{self.folder} has neither {ONE_FILE} nor {INDEX}"
                + ", but pickled weights, which run code when they are read: save them "
                "with save_pretrained(..., safe_serialization=True)" * pickled
            )
        placed = read_object(path).get("weight_map")
        names = list(placed.values()) if isinstance(placed, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{path} is no index: it must be JSON with a weight_map of tensors' "
                "names and their files"
            )
        for name in dict.fromkeys(names):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(
                    f"{path} names the file {name!r}, which leaves the folder: the "
                    "files of a model lie beside its index"
                )
        return placed

    def _read_header(self, path: Path) -> None:
        check_inside(path)
        _check_header(path)
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                dtype = str(piece.get_dtype())
                if name in self.entries:
                    raise ValueError(
                        f"{name} is in {self.entries[name].file.name} and in "
                        f"{path.name}: a tensor is in one file"
                    )
                shape = tuple(piece.get_shape())
                self.entries[name] = Entry(path, shape, DTYPES.get(dtype, dtype))

    def dtype(self) -> str:
        """Of the most elements."""
        sizes = dict.fromkeys(DTYPES.values(), 0)
        for entry in self.entries.values():
            if entry.dtype in sizes:
                sizes[entry.dtype] += math.prod(entry.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def read(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """A piece of a tensor, as it is stored.

        The file is opened for it alone: what was read of it before counts to no
        process's memory.
        """
        with _opened(self.entries[name].file) as file:
            return file.get_slice(name)[where]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _check_header(path: Path) -> None:
    """Before the library makes room for it.

    Raises:
      ValueError: the header is longer than any, or the file is none.
    """
    if path.exists() and not path.is_file():  # to open a pipe may block for ever
        raise _broken(path, "it is a folder, or a pipe")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise _broken(path, error) from None
    if length > _MOST_BYTES:
        raise _broken(path, f"a header of {length:,} bytes")


def _broken(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is no whole safetensors file ({why}): copy it again")


class Shape(NamedTuple):
    """Of a tensor that is to be written."""

    name: str
    shape: tuple[int, ...]


def write(
    folder: Path,
    shapes: Sequence[Shape],
    tensors: Iterator[np.ndarray],
    *,
    dtype: str,
    file_bytes: int,
) -> None:
    """Writes tensors into files of at most `file_bytes`, or of one tensor, and where
    there are several their index.

    Args:
      tensors: of these shapes and of this dtype, in this order. One is held at a time:
        the library's own `save_file` wants all of a file's.

    Source: the format, github.com/huggingface/safetensors: the header's length in eight
    bytes, the header as JSON, and the tensors.
    """
    size = np.dtype(dtype).itemsize
    files: list[list[Shape]] = []
    left = 0
    for shape in shapes:
        taken = math.prod(shape.shape) * size
        if not files or taken > left:
            files.append([])
            left = file_bytes
        files[-1].append(shape)
        left -= taken
    index: dict[str, str] = {}
    for number, held in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        name = ONE_FILE if len(files) == 1 else name
        write_file(folder / name, held, tensors, dtype)
        index |= {shape.name: name for shape in held}
    if len(files) > 1:
        total = sum(math.prod(shape.shape) * size for shape in shapes)
        values = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(values, indent=2))


def write_file(
    path: Path, shapes: Sequence[Shape], tensors: Iterator[np.ndarray], dtype: str
) -> None:
    """One file of tensors, as `write` takes them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code = next(code for code, name in DTYPES.items() if name == dtype)
    size, start = np.dtype(dtype).itemsize, 0
    for name, shape in shapes:
        stop = start + math.prod(shape) * size
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, shape), tensor in zip(shapes, tensors, strict=False):
            assert tensor.shape == shape and tensor.dtype == np.dtype(dtype), name
            np.ascontiguousarray(tensor).view(np.uint8).tofile(file)
    assert path.stat().st_size == 8 + len(head) + start
