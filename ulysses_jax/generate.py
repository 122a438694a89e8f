"""Text from a model and a prompt: `python -m ulysses_jax.generate`."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ulysses_jax import layout
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.data.tokenizer import Tokenizer, check_vocabulary, tokenizer_of
from ulysses_jax.inference.cache import cache_bytes
from ulysses_jax.inference.context import ContextMemory, remembered_bytes
from ulysses_jax.inference.generation import stream
from ulysses_jax.inference.opening import (
    add_model_options,
    mesh_of,
    model_of_folder,
)
from ulysses_jax.inference.request import Request, check_request
from ulysses_jax.inference.states import states_bytes
from ulysses_jax.inference.text import Spelled, asked, encoded, file_text, ids_of
from ulysses_jax.interop import from_pretrained
from ulysses_jax.training.endings import ends_in_words
from ulysses_jax.training.output import print_every_name

PROGRAM = "python -m ulysses_jax.generate"

_CONTEXT = dataclasses.asdict(ContextMemory())


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words."""
    options = _parser().parse_args(argv)
    with ends_in_words(PROGRAM), print_every_name(), mesh_of(options):
        _run(options, *_asked(options))


def _run(
    options: argparse.Namespace,
    tokenizer: Tokenizer | None,
    prompts: list[list[int]],
    ends: tuple[int, ...],
    model: Model,
) -> None:
    request = Request(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        ends=ends,
        cache_tokens=options.cache_tokens,
        context=_context(options),
    )
    check_request(request, prompts, model)
    loaded = from_pretrained(options.model, compute_dtype=options.compute_dtype)
    tokens = request.cached(prompts)
    over = layout.degree("data", "fsdp")
    rows = -(-len(prompts) // over) * over
    model, context = complete_model(loaded.model), request.context_of(prompts)
    each = cache_bytes(model, rows, tokens) + states_bytes(model, rows)
    if context:
        each += remembered_bytes(model, context, rows, tokens)
    _say(
        f"{sum(map(len, prompts)):,} tokens of {len(prompts)} prompts; a cache of "
        f"{tokens:,} tokens a row, {each / 2**20:,.2f} MiB a device"
        + (f"; a token reads {context.read_tokens:,} of them" if context else "")
    )
    _show(stream(loaded, prompts, request), prompts, tokenizer)


def _context(options: argparse.Namespace) -> ContextMemory | None:
    """None: no option of it was given."""
    given = {name: getattr(options, f"context.{name}") for name in _CONTEXT}
    given = {name: number for name, number in given.items() if number is not None}
    return ContextMemory(**given) if given else None


def _asked(
    options: argparse.Namespace,
) -> tuple[Tokenizer | None, list[list[int]], tuple[int, ...], Model]:
    """The tokenizer, if text was asked for; the prompts' ids, and those that end what
    follows; and the model, of which nothing is read yet but its config."""
    model = model_of_folder(options.model)
    # As `from_pretrained` gives it.
    model = dataclasses.replace(model, strategy="auto", zigzag=False)
    texts = [*options.prompt, *map(file_text, options.prompt_file)]
    if options.prompt_tokens:
        if texts:
            raise ValueError(
                "--prompt-tokens gives ids, --prompt and --prompt-file text: give one "
                "or the other"
            )
        if options.chat:
            raise ValueError(
                "--chat writes a text as a chat template does, and --prompt-tokens "
                "gives ids: leave one of them out"
            )
        return None, [ids_of(each) for each in options.prompt_tokens], (), model
    if not texts:
        raise ValueError(
            "say what to go on from: --prompt TEXT, --prompt-file FILE, or ids, "
            "--prompt-tokens 1,2,3"
        )
    tokenizer = tokenizer_of(options.model)
    try:
        check_vocabulary(model.vocab_size, tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}; or give ids, --prompt-tokens 1,2,3") from None
    if options.chat:
        return tokenizer, *asked(options.model, tokenizer, texts), model
    prompts = [encoded(tokenizer, text) for text in texts]
    return tokenizer, prompts, tokenizer.ends, model


def _show(
    steps: Iterator[list[int | None]],
    prompts: list[list[int]],
    tokenizer: Tokenizer | None,
) -> None:
    """One prompt's text as it comes; of several, one after another."""
    spelled = [_Ids() if tokenizer is None else Spelled(tokenizer, p) for p in prompts]
    several, texts = len(prompts) > 1, [""] * len(prompts)
    num_tokens, began, first = 0, time.monotonic(), 0.0
    for new in steps:
        first = first or time.monotonic()
        for row, token in enumerate(new):
            if token is not None:
                num_tokens += 1
                text = spelled[row].add(token)
                texts[row] += text
                if not several:
                    print(text, end="", flush=True)
    for row, each in enumerate(spelled):
        if several:
            print(f"--- prompt {row + 1}\n{texts[row]}{each.rest()}")
        else:
            print(each.rest(), flush=True)
    now = time.monotonic()
    _say(
        f"{num_tokens:,} new tokens: the first after {first - began:.1f} s, the others "
        f"in {now - first:.1f} s, with what was compiled"
    )


class _Ids:
    """As `Spelled`, of ids themselves."""

    def __init__(self):
        self._between = ""

    def add(self, token: int) -> str:
        text, self._between = f"{self._between}{token}", ","
        return text

    def rest(self) -> str:
        return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Goes on from prompts, with a model's own words.",
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add_model_options(parser)
    many: Any = dict(action="append", default=[])
    add("--prompt", metavar="TEXT", help="to go on from; may stand often", **many)
    add("--prompt-file", type=Path, metavar="FILE", help="a whole file's", **many)
    add("--prompt-tokens", metavar="1,2,3", help="ids; ids are printed", **many)
    add(
        "--chat",
        action="store_true",
        help="each prompt is what a user says, by the folder's chat template",
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="new; default: 128")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0, the default: the likeliest token each time; 1: as the model says",
    )
    add("--top-p", type=float, default=1.0, help="of all that is likely, this part")
    add("--seed", type=int, default=0, help="of what is drawn")
    add(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="that a row's cache holds; default: as many as are needed",
    )
    for name, default in _CONTEXT.items():
        add(
            f"--context.{name.replace('_', '-')}",
            type=int,
            metavar="N",
            dest=f"context.{name}",
            help=f"any of these: a token reads a part of the cache; default: {default}",
        )
    return parser


if __name__ == "__main__":
    main()
