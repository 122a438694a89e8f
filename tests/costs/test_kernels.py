"""The kernels that a program holds, beside those that were chosen."""

import pytest

from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.kernels import kernels_in, others_than_chosen

CALLS = {
    "cudnn forward": ("__cudnn$fmhaSoftmax", "jit(step)/jvp()"),
    "cudnn backward": ("__cudnn$fmhaSoftmaxBackward", "jit(step)/transpose(jvp())"),
    "mosaic forward": ("mosaic_gpu_v2", "jit(step)/vmap()/flash_attention_sm90/call"),
    "mosaic backward": ("mosaic_gpu_v2", "step/attention_by_tiles/2_rows/while/call"),
    "mosaic by a layout": ("mosaic_gpu_v2", "step/attention_by_layout/while/call"),
    "another of mosaic": ("mosaic_gpu_v2", "jit(step)/matmul_sm90"),
    "blockwise forward": ("", "jit(step)/attention_blockwise/forward/while/body/exp"),
    "blockwise backward": ("", "step/attention_blockwise/backward/while/body/exp"),
    "a norm": ("", "jit(step)/norm/exp"),
}


def program(*names):
    lines = "".join(
        f'  %x{i} = f32[] custom-call(), custom_call_target="{CALLS[name][0]}", '
        f'metadata={{op_name="{CALLS[name][1]}"}}\n'
        for i, name in enumerate(names)
    )
    return parse(f"HloModule m\nENTRY %main () -> f32[] {{\n{lines}}}\n")


MOSAIC = "mosaic forward", "mosaic backward", "a norm", "another of mosaic"
CUDNN = "cudnn forward", "cudnn backward"
BLOCKWISE = "blockwise forward", "blockwise backward"


@pytest.mark.parametrize(
    "chosen, names, warned",
    [
        (["mosaic"], MOSAIC, []),
        (["mosaic"], ("mosaic forward", "mosaic by a layout"), []),
        (["mosaic", "cudnn"], MOSAIC + CUDNN, []),
        (["blockwise"], BLOCKWISE, []),
        (["reference"], ("a norm",), []),
        (
            ["mosaic"],
            ("mosaic forward", "blockwise backward"),
            ["not mosaic backward, which was", "blockwise backward, which was not"],
        ),
        (
            ["mosaic", "cudnn"],
            MOSAIC,
            ["not cudnn backward, which", "not cudnn forward, which"],
        ),
        (
            ["cudnn"],
            ("another of mosaic",),
            ["not cudnn backward, which", "not cudnn forward, which"],
        ),
        (["cudnn"], CUDNN + BLOCKWISE[:1], ["blockwise forward, which was not chosen"]),
    ],
)
def test_a_program_that_attends_otherwise_is_seen(chosen, names, warned):
    found = others_than_chosen(
        [{"kernel": name} for name in chosen], kernels_in(program(*names))
    )
    assert len(found) == len(warned)
    for said, words in zip(found, warned, strict=True):
        assert f"the program has {words}" in said
