"""Attention by `ringattention` from PyPI for strategies.py, on all the devices of this
process: it runs in the environment of `ringattention.txt`."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ringattention import ringattention  # pyright: ignore[reportMissingImports]
from side_by_side import Program, serve

# The fastest of those tried here, of 64 to 1,024 tokens each.
QUERY_CHUNK, KEY_CHUNK = 64, 128


def make(description: dict[str, Any]) -> Program:
    """Causal attention, forward and backward; returns out, dq, dk, dv."""
    tokens = description["tokens"]
    shape = 4, 1, tokens, description["heads"], description["head_size"]
    local = tokens // len(jax.devices())
    mesh = jax.make_mesh((len(jax.devices()),), ("ring",))
    spec = PartitionSpec(None, "ring", None, None)
    arrays = np.random.default_rng(0).standard_normal(shape, np.float32)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    def attention(q, k, v):
        return ringattention(
            q,
            k,
            v,
            None,  # bias
            None,  # segment ids
            axis_name="ring",
            float32_logits=True,
            cache_idx=None,
            blockwise_kwargs=dict(
                causal_block_size=1,
                deterministic=True,
                dropout_rng=None,
                attn_pdrop=0.0,
                query_chunk_size=min(QUERY_CHUNK, local),
                key_chunk_size=min(KEY_CHUNK, local),
                dtype=jax.numpy.float32,
                policy=jax.checkpoint_policies.nothing_saveable,
                precision=None,
                prevent_cse=False,
            ),
        )

    def both_passes(q, k, v, dout):
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    program = jax.jit(both_passes).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays))


if __name__ == "__main__":
    serve(make)
