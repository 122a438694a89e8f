"""Needles in a haystack, by depth and length: `python -m ulysses_jax.retrieval`."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ulysses_jax.inference.needles import Haystack, bare, filler
from ulysses_jax.inference.opening import (
    add_model_options,
    add_result_options,
    batch_shape,
    mesh_of,
    say,
    source_of,
    text_of_data,
    write_whole,
)
from ulysses_jax.inference.picture import draw_recall
from ulysses_jax.inference.retrieval import retrieve
from ulysses_jax.training.endings import ends_in_words, ends_with_the_others

PROGRAM = "python -m ulysses_jax.retrieval"


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words."""
    options = _parser().parse_args(argv)
    with ends_in_words(PROGRAM), mesh_of(options) as mesh, ends_with_the_others():
        lengths, depths = _checked(options)
        source = source_of(options.model)
        shapes = {
            length: batch_shape(source.model, length, options.batch_size, mesh)
            for length in lengths
        }
        if options.data is None:
            hay = filler(source.tokenizer)
        else:
            text = text_of_data(options)
            hay = np.array(bare(source.tokenizer, text), np.int32)
        haystack = Haystack(
            source.tokenizer, hay, options.needles, ask_all=options.ask == "all"
        )
        haystack.row(min(lengths), 0.0, np.random.default_rng(0))  # refused here
        accuracy = retrieve(
            source.read(options),
            haystack.row,
            shapes,
            depths,
            num_trials=options.trials,
            seed=options.seed,
            on_cell=lambda length, depth, share: say(
                f"{length:,} tokens, depth {depth:.0%}: {share:.0%}"
            ),
        )
        say(f"{accuracy.mean():.1%} of {accuracy.size * options.trials:,} rows right")
        names = ("needles", "ask", "trials", "seed")
        result = {
            "model": str(options.model),
            "data": options.data,
            **{name: getattr(options, name) for name in names},
            "lengths": lengths,
            "depths": depths,
            "accuracy": accuracy.tolist(),
        }
        panel = f"{options.model.name}: {accuracy.mean():.1%}", accuracy.tolist()
        picture = draw_recall([panel], depths, lengths) if options.png else b""
        write_whole(options.json, json.dumps(result, indent=1).encode())
        write_whole(options.png, picture)


def _checked(options: argparse.Namespace) -> tuple[list[int], list[float]]:
    for name in ("needles", "trials"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.needles > 1000:
        raise ValueError(
            f"--needles {options.needles}: there are keys for 1000 at most in a row"
        )
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: give 0 or more")
    wrong = [each for each in options.depths if not 0 <= each <= 1]
    if wrong:
        raise ValueError(f"--depths: {wrong[0]} is not from 0 to 1")
    return sorted(set(options.lengths)), sorted(set(options.depths))


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(each) for each in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"  # argparse says it
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="How many keys a model finds in long rows of text.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_result_options(parser)
    add = parser.add_argument
    add(
        "--lengths",
        type=_list_of(int),
        default=[1024, 4096],
        metavar="T,T,...",
        help="tokens of a row; default: 1024,4096",
    )
    add(
        "--depths",
        type=_list_of(float),
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D,D,...",
        help="0 is the row's start; default: 0,0.25,0.5,0.75,1",
    )
    add("--needles", type=int, default=1, metavar="N", help="of a row; default: 1")
    add(
        "--ask",
        choices=("one", "all"),
        default="one",
        help="for the needle at the depth, or for all of them",
    )
    add("--trials", type=int, default=8, metavar="N", help="rows a cell; default: 8")
    add("--seed", type=int, default=0)
    add("--data", metavar="FILES", help="the hay; default: the same few sentences")
    return parser


if __name__ == "__main__":
    main()
