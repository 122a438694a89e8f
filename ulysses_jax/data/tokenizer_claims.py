"""What a tokenizer.json claims, refused before the library makes room for it."""

import base64
import binascii
import math
from pathlib import Path
from typing import Any

_MOST_GROWTH = 2**10
_CHAINS = ("normalizers", "pretokenizers", "decoders")


def refuse_large(said: Any, path: Path) -> None:
    """Refuses a tokenizer whose steps make a text longer without end.

    Steps follow each other: forty that write each letter twice make 2^40 of one, and
    the library ends the process when memory ends.

    Raises:
      ValueError: it makes more than 1,024 letters of one; or has a table of characters
        that is shorter than it says; or is no object.
    """
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no tokenizer: it is no JSON object")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for step in _steps(said.get(name)):
            growth *= _growth(step)
            if growth > _MOST_GROWTH:
                raise ValueError(
                    f"{path}: the steps of its {name} make more than {_MOST_GROWTH:,} "
                    "letters of one: take the model's own"
                )
            if _is_short(step.get("precompiled_charsmap")):
                raise ValueError(
                    f"{path}: the precompiled_charsmap of its {name} is shorter than "
                    "it says: take the model's own"
                )


def _steps(part: Any) -> list[dict[str, Any]]:
    """Of a normalizer and the like, each by itself, in order."""
    found, left = [], [part]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            found.append(each)
            for name in _CHAINS:
                more = each.get(name)
                left += reversed(more) if isinstance(more, list) else []
    return found


def _growth(step: dict[str, Any]) -> int:
    """Letters that a step makes of one, at most; of those that grow with the text."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return 2  # of its own letters, which are 256
    if kind != "Replace":
        return 1
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    made = len(content) if isinstance(content, str) else 0
    if isinstance(text, str) and text:
        return max(math.ceil(made / len(text)), 1)
    return made + 1  # a pattern may match between letters


def _is_short(charsmap: Any) -> bool:
    """Its first four bytes say how many follow."""
    if not isinstance(charsmap, str) or not charsmap:
        return False
    try:
        data = base64.b64decode(charsmap)
    except (ValueError, binascii.Error):
        return False  # the library says so
    return int.from_bytes(data[:4], "little") > len(data) - 4
