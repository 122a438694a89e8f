"""Spikes of the loss: which steps are, and how often a run goes back from them."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_LOSSES = 50
_TIMES = 3


class Spikes:
    """Sees each step's loss; a spike is not one of those that the next is held to.

    Args:
      nats: `training.spike_nats`.
      meta: of the checkpoint that the run goes on from, or nothing.
    """

    def __init__(self, nats: float | None, meta: Mapping[str, Any]):
        self._nats = nats
        self._found: tuple[int, str] | None = None
        self._back: int | None = None  # the step gone back to last, and how often
        self._times = 0
        self._is_back = False  # and no step has been taken since
        self._restart(meta)

    def see(self, step: int, loss: float | None) -> None:
        self._is_back = False
        if self._nats is None or loss is None:
            return
        if len(self._losses) == _LOSSES:
            usual = median(self._losses)
            if loss > usual + self._nats:
                self._found = (
                    step,
                    f"the loss of step {step} is {loss:.4f}, and the median of the "
                    f"{_LOSSES} before it {usual:.4f}",
                )
                return
        self._losses.append(loss)

    def take(self) -> tuple[int, str] | None:
        """The step of a spike, and the words for it; once."""
        found, self._found = self._found, None
        return found

    def went_back(self, step: int, meta: Mapping[str, Any]) -> None:
        """To the checkpoint of this step, which has this meta.

        Raises:
          ValueError: too often to this one.
        """
        self._times = self._times + 1 if step == self._back else 1
        self._back = step
        if self._times > _TIMES:
            raise ValueError(
                f"{self._times} spikes after the checkpoint of step {step}, with "
                f"training.spike_nats {self._nats}: raise it, lower "
                "training.learning_rate, or start from an earlier checkpoint by "
                "removing this one"
            )
        self._is_back = True
        self._restart(meta)

    def saved(self, step: int) -> None:
        """Right after the way back it is the same state that is saved again: the times
        that count against the one count against the other."""
        if self._is_back:
            self._back = step

    def meta(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {} if self._nats is None else {"recent_losses": list(self._losses)}

    def _restart(self, meta: Mapping[str, Any]) -> None:
        self._losses = deque(meta.get("recent_losses", ()), maxlen=_LOSSES)
