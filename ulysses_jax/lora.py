"""Low-rank adapters as a config has them: of which of a model's projections."""

from fnmatch import fnmatchcase

from ulysses_jax.config import Model

_ATTENTIONS = {
    "full",
    "window",
    "sparse",
}  # kinds of this library's: others' are theirs


def projections(model: Model) -> dict[str, tuple[int, int]]:
    """The features that each projection of a completed model's layers takes and gives,
    by its name."""
    assert model.pattern and model.num_kv_heads and model.head_size
    assert model.feed_forward_width
    width, hidden = model.width, model.feed_forward_width
    queries = model.num_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    found = {}
    if _ATTENTIONS & set(model.pattern):
        found |= {"q": (width, queries), "k": (width, keys), "v": (width, keys)}
        found |= {"out": (queries, width)}
        if model.attention_gate:
            found |= {"out_gate": (width, queries)}
    if model.is_gated:
        found |= {"gate": (width, hidden)}
    return found | {"up": (width, hidden), "down": (hidden, width)}


def adapted(model: Model) -> tuple[str, ...]:
    """The names of those that have an adapter, by `model.lora.targets`."""
    if model.lora is None:
        return ()
    targets = model.lora.targets
    return tuple(
        name
        for name in projections(model)
        if any(each == "all" or fnmatchcase(name, each) for each in targets)
    )


def adapter_elements(model: Model) -> int:
    """Of the adapters of one layer, whose attention is this library's."""
    sizes = projections(model)
    rank = model.lora.rank if model.lora else 0
    return rank * sum(sum(sizes[name]) for name in adapted(model))


def check_lora(model: Model) -> None:
    """Refuses adapters that a completed model cannot have.

    Raises:
      ValueError: a target that matches nothing; a rank that is no smaller one.
    """
    lora, sizes = model.lora, projections(model)
    if lora is None:
        return
    for target in lora.targets or ("",):
        if target != "all" and not any(fnmatchcase(name, target) for name in sizes):
            what = f"{target!r}, which matches none" if target else "no target"
            raise ValueError(
                f"model.lora.targets has {what} of this model's projections: use some "
                f"of {', '.join(sizes)}, a glob of them, or all"
            )
    name, least = min(
        ((name, min(sizes[name])) for name in adapted(model)), key=lambda each: each[1]
    )
    if lora.rank > least:
        raise ValueError(
            f"model.lora.rank {lora.rank} is more than the projection {name} has, "
            f"{sizes[name][0]} to {sizes[name][1]} features: use {least} or less"
        )
