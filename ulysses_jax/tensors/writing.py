"""From parameters to whole tensors, one parameter after another."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.tensors.expected import Expected, Path


def written(
    parameters: dict[Path, "Kept"], wanted: list[Expected], dtype: str
) -> Iterator[np.ndarray]:
    """Every tensor, whole, on every process; a weight with its adapter in it.

    Args:
      parameters: by path.
      wanted: those of one parameter one after another, as `expected` has them: one
        parameter at a time is in host memory.
    """
    held: dict[Path, OnHost] = {}
    for each in wanted:
        paths = [path for _, path, _ in each.parts]
        held = {path: held[path] for path in paths if path in held}  # the last one goes
        for path in paths:
            if path not in held:
                held[path] = OnHost(parameters[path])
        parts = []
        for part, path, layer in each.parts:
            letters = parameters[path].letters
            order = part.stored.replace(" ", "").replace("1", "")
            values = held[path].layer(layer)
            values = values.transpose([letters.index(letter) for letter in order])
            sizes = dict(zip(order, values.shape, strict=True)) | {"1": 1}
            dims = [math.prod(sizes[x] for x in dim) for dim in part.stored.split()]
            # Turns are a dim of their own, so that parts are joined in each.
            turns = [*dims[: each.dim], each.groups, -1, *dims[each.dim + 1 :]]
            parts.append(values.reshape(turns))
        joined = np.concatenate(parts, axis=each.dim + 1)
        yield joined.reshape(each.shape).astype(np.dtype(dtype))


class Kept(NamedTuple):
    """A parameter to be written.

    Attributes:
      adapter: what is added, float32: `scale a b`, of two more.
    """

    letters: str
    array: jax.Array
    adapter: tuple["Kept", "Kept", float] | None = None


class OnHost:
    """A parameter, or a stack of them, in this process's memory."""

    def __init__(self, kept: Kept):
        self.array = array = kept.array
        self.adapter = None
        if kept.adapter is not None:
            a, b, self.scale = kept.adapter
            self.adapter = OnHost(a), OnHost(b)
        self.pieces = [
            (shard.index, _on_host(shard.data))
            for shard in array.addressable_shards
            if array.is_fully_addressable and shard.replica_id == 0
        ]

    def layer(self, number: int | None) -> np.ndarray:
        """Whole; of a stack, one layer; with its adapter."""
        whole = self._layer(number)
        if self.adapter is None:
            return whole
        a, b = (each.layer(number) for each in self.adapter)
        added = np.tensordot(a, b, axes=1) * np.float32(self.scale)
        return whole.astype(np.float32) + added

    def _layer(self, number: int | None) -> np.ndarray:
        array, stacked = self.array, number is not None
        if not self.pieces:
            part = array[number] if stacked else array
            return np.asarray(multihost_utils.process_allgather(part, tiled=True))
        pieces = [(i, x[number] if stacked else x) for i, x in self.pieces]
        if len(pieces) == 1:
            return pieces[0][1]
        out = np.empty(array.shape[stacked:], array.dtype)
        for index, piece in pieces:
            out[index[stacked:]] = piece
        return out


def _on_host(x: jax.Array) -> np.ndarray:
    """Of one device; NumPy's own copy of what is not a CPU's would stay with x."""
    (device,) = x.devices()
    if device.platform != "cpu":
        x = jax.device_put(x, jax.local_devices(backend="cpu")[0])
    return np.asarray(x)
