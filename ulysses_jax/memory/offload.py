"""A check that what should lie in the host's memory does."""

from ulysses_jax.config import Memory


def check_offload(memory: Memory, host_bytes: int, platform: str) -> None:
    """Refuses a compiled step that keeps on the device what it should offload.

    Args:
      host_bytes: of the compiled program, in the host's memory.
      platform: of its devices. On "cpu" the two memories are one, so XLA drops the
        moves and nothing can be checked.

    Raises:
      ValueError: offload is asked for, and the program has nothing in host memory.
    """
    if memory.offload and platform != "cpu" and host_bytes == 0:
        raise ValueError(
            f"memory.offload {' '.join(memory.offload)}, but the compiled step has 0 "
            f"bytes in host memory: XLA left them on the {platform} device; use an "
            "empty memory.offload, or another version of jax"
        )
