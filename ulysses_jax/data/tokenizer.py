"""Bytes are the tokens: ids 0 to 255, and one more that ends a document."""

END_OF_DOCUMENT = 256
NUM_IDS = 257

IGNORED = -1
"""The label of a token that has none."""


def check_vocabulary(vocab_size: int) -> None:
    """Raises ValueError where a model has fewer ids than the tokenizer makes."""
    if vocab_size < NUM_IDS:
        raise ValueError(
            f"model.vocab_size {vocab_size} is less than the {NUM_IDS} ids of the byte "
            f"tokenizer (256 bytes and the end of a document): use {NUM_IDS} or more, "
            "e.g. 320, which divides over more mesh.tensor degrees"
        )
