"""Loss and perplexity of text under any mesh: `python -m ulysses_jax.evaluate`."""

import argparse
import json
import time
from collections.abc import Sequence

from ulysses_jax.data.rows import Rows
from ulysses_jax.inference.evaluate import evaluate
from ulysses_jax.inference.opening import (
    add_model_options,
    add_result_options,
    batch_shape,
    mesh_of,
    say,
    source_of,
    stream_of,
    write_whole,
)
from ulysses_jax.inference.picture import draw_by_position
from ulysses_jax.run_folder import is_run_folder
from ulysses_jax.training.endings import ends_in_words, ends_with_the_others

PROGRAM = "python -m ulysses_jax.evaluate"
_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words."""
    options = _parser().parse_args(argv)
    with ends_in_words(PROGRAM), mesh_of(options) as mesh, ends_with_the_others():
        source = source_of(options.model)
        shape = batch_shape(source.model, options.tokens, options.batch_size, mesh)
        # A run has learned to end a document; a folder's loss is of its text.
        ends = is_run_folder(source.folder)
        stream = stream_of(options, source.tokenizer, ends=ends)
        masks = options.mask_documents
        every = Rows(stream, options.tokens, mask_documents=masks)
        rows = Rows(
            stream, options.tokens, mask_documents=masks, most_rows=options.max_rows
        )
        first = ""
        if len(rows) < len(every):
            first = f", the first {len(rows):,} of them, by --max-rows"
        say(
            f"{len(stream.ends):,} documents, {every.num_tokens:,} tokens, "
            f"{len(every):,} rows of {options.tokens:,}{first}; {shape[0]} rows at a "
            "time"
        )
        said = time.monotonic()

        def show(done: int, loss: float) -> None:
            nonlocal said
            if time.monotonic() - said >= _SECONDS or done == len(rows):
                said = time.monotonic()
                say(f"rows {done:,} of {len(rows):,}: loss {loss:.5f}")

        found = evaluate(source.read(options), rows, shape, on_batch=show)
        say(
            f"loss {found.loss:.6f} nats a token, perplexity {found.perplexity:.4f}, "
            f"{found.tokens:,} tokens"
        )
        title = f"{options.model.name} on {options.data}: {found.loss:.4f} nats a token"
        picture = draw_by_position(found, title=title) if options.png else b""
        given = {name: str(getattr(options, name)) for name in ("model", "data")}
        given |= {"sequence_tokens": options.tokens, "mask_documents": masks}
        given |= {"rows": len(rows), "rows_in_data": len(every)}
        write_whole(
            options.json, json.dumps(given | found.to_dict(), indent=1).encode()
        )
        write_whole(options.png, picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="The loss and perplexity of a model on text files.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_result_options(parser)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="FILES",
        help="folder, glob, file or stdlib, or what was prepared",
    )
    add("--tokens", type=int, default=2048, metavar="T", help="of a row; default: 2048")
    add(
        "--max-rows",
        type=int,
        metavar="N",
        help="only the first rows of the data, at most so many; default: all",
    )
    add(
        "--mask-documents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="documents of a row do not see each other",
    )
    return parser


if __name__ == "__main__":
    main()
