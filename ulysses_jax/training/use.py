"""How well a run uses its devices: their FLOP/s, and their memory."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulysses_jax.costs.predict import check_kinds, model_flops_of, step_flops
from ulysses_jax.costs.targets import target_of
from ulysses_jax.training.by_length import Split
from ulysses_jax.training.model import MakeModel, own_name


class Use:
    """What a row says of the devices, where that is known.

    Args:
      splits: of the steps, by the tokens of their rows.
    """

    def __init__(self, splits: Mapping[int, Split], make_model: MakeModel):
        self._longest = max(splits)
        self._seconds_at_peak: dict[int, float] = {}
        for tokens, (config, mesh) in splits.items():
            target = target_of(mesh.devices.flat[0])
            if target is None or own_name(config, make_model) is not None:
                continue
            try:
                check_kinds(config.model)
            except ValueError:
                continue
            flops = step_flops(config, config.training.sequence_tokens)
            peak = target.peak_flops_per_second(config.model.compute_dtype)
            at_peak = model_flops_of(flops) / (peak * mesh.size)
            self._seconds_at_peak[tokens] = at_peak

    def row(self, seconds: float, tokens: int | None) -> dict[str, float]:
        """Of a step of `seconds` with rows of `tokens`; None: of the longest.

        Returns:
          `mfu`: as the plan predicts it (`costs.predict.predict`), of a GPU that is one
          of `costs.targets` and of this library's own model. `device_peak_bytes`: the
          most that any of this process's devices has held, where they say so.
        """
        row: dict[str, float] = {}
        if at_peak := self._seconds_at_peak.get(tokens or self._longest):
            row["mfu"] = at_peak / seconds
        if held := [bytes_ for bytes_ in _local_peaks() if bytes_]:
            row["device_peak_bytes"] = max(held)
        return row


def peak_bytes_by_device() -> list[int] | None:
    """Of each device of all processes, by its number; None where one does not say.

    All processes call it at one place.
    """
    peaks = np.array(_local_peaks(), np.int64)
    if jax.process_count() > 1:
        halves = peaks.view(np.int32)  # JAX would cut int64 down to its lower half
        peaks = multihost_utils.process_allgather(halves, tiled=True).view(np.int64)
    return None if (peaks == 0).any() else peaks.tolist()


def _local_peaks() -> list[int]:
    return [
        (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        for device in jax.local_devices()
    ]
