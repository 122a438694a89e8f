"""Numbers for TensorBoard, written by the thread that has them."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

_FLUSH_SECONDS = 10.0


class Events:
    """A file of scalars in `folder`, which is made where it is missing.

    tensorboardX's own `SummaryWriter` writes in a thread: on a full disk that dies, and
    its queue then blocks the run for ever. Here `add` raises the OSError.

    Args:
      first_step: events of this step and later ones, of an interrupted run, are void.
    """

    def __init__(self, folder: Path, *, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=first_step, session_log=start))
        self._flush()

    def add(self, name: str, value: float, step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()
