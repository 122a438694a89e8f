"""XLA's options for programs whose values, not speed, a test asks for."""

from typing import Any

import jax

QUICK: dict[str, Any] = dict(
    xla_backend_optimization_level=0,
    xla_llvm_disable_expensive_passes=True,
)
if jax.__version_info__ < (0, 11):
    # Half the time to compile; later XLA has no other emitters.
    QUICK["xla_cpu_use_fusion_emitters"] = False
