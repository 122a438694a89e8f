"""A run's model as a Hugging Face folder: `python -m ulysses_jax.export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ulysses_jax.config_file import load
from ulysses_jax.families.config_json import longest_of
from ulysses_jax.interop import from_pretrained, save_pretrained
from ulysses_jax.run_folder import check_run_folder
from ulysses_jax.training.endings import ends_in_words

PROGRAM = "python -m ulysses_jax.export"


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit: with code 2 for an error in words."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Writes a run's newest model as a Hugging Face folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="runs/tiny")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: of the folder that the run started from, else float32",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of a sequence; default: what the run trained on, or its folder "
        "says if that is longer",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="those of model.lora alone, as a folder of PEFT's; default: the weights "
        "with their adapters in them",
    )
    options = parser.parse_args(argv)
    with ends_in_words(PROGRAM):
        run = Path(options.run)
        check_run_folder(run)
        config = load(run / "config.yaml")
        longest = config.training.sequence_tokens
        if config.model.from_ is not None and options.max_tokens is None:
            longest = max(longest, longest_of(config.model.from_))
        save_pretrained(
            from_pretrained(run),
            options.to,
            dtype=options.dtype,
            max_tokens=options.max_tokens or longest,
            adapters=options.adapters,
            tokenizer=run,
        )
    print(f"{options.to}: written")


if __name__ == "__main__":
    main()
