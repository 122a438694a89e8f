"""A train step of a Llama that fits one card: planned beside measured."""

from functools import partial
from typing import Any

import jax

from ulysses_jax.check_gpu.rows import Row, Sizes, Skip
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Mesh, Model, Training
from ulysses_jax.plan.check import check
from ulysses_jax.plan.compile import PlanError


def step_rows(sizes: Sizes) -> list[Row]:
    """One document a row, and packed documents; each is measured in a process of its
    own, as a device's high-water mark is the process's."""
    return [
        Row(
            "steps",
            {
                "documents": "one a row"
                if span is None
                else f"of {span} tokens on average"
            },
            None,
            lambda: None,
            partial(_measure, sizes, span),
        )
        for span in (None, sizes.step_span)
    ]


def config_of(sizes: Sizes, span: int | None) -> Config:
    heads = sizes.step_width // 128 or 2
    config = Config(
        model=Model(
            vocab_size=256 * 128 if sizes.step_width > 128 else 320,
            width=sizes.step_width,
            num_layers=sizes.step_layers,
            num_heads=heads,
            num_kv_heads=heads // 2,
            feed_forward_width=3 * sizes.step_width,
        ),
        data=Data(mask_documents=span is not None, document_tokens=span),
        training=Training(
            batch_size=jax.device_count(), sequence_tokens=sizes.step_tokens
        ),
        mesh=Mesh(data=-1),
    )
    return complete(config, name="check_gpu")


def _measure(sizes: Sizes, span: int | None, _: None) -> dict[str, Any]:
    """Planned and measured, by what: bytes of the state, high-water mark, seconds.

    Bytes that are too far apart FAIL; seconds are a prediction, which is shown.
    """
    config = config_of(sizes, span)
    try:
        found = check(config, num_steps=3)
    except PlanError:
        raise
    except ValueError as error:  # a kernel that is missing
        raise Skip(str(error)) from None
    model = config.model
    whys = [row["why"] for row in found["rows"] if "why" in row]
    failed = {"status": "FAIL", "why": "; ".join(whys)} if whys else {}
    return failed | {
        "model": f"{model.num_layers} layers of {model.width}, "
        f"{config.training.sequence_tokens} tokens, {model.compute_dtype}",
        "rows": found["rows"],
        "attention": found["plan"]["attention"],
        "compile seconds": found["plan"]["compile_seconds"],
    }
