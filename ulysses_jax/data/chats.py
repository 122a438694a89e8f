"""Examples as ids, and which of them the loss asks for: of a chat, the answers."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ulysses_jax.data.tokenizer import Bytes, Tokenizer, tokenizer_of
from ulysses_jax.outside import MOST_BYTES, read_bounded

if TYPE_CHECKING:
    from ulysses_jax.data.chat_template import ChatTemplate

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
ROLES = ("system", "developer", "user", "assistant", "tool")
KINDS = (("messages",), ("prompt", "completion"), ("text",))


class Counted(NamedTuple):
    """A document's tokens.

    Attributes:
      counts: whether the loss asks for a token: it is a label.
    """

    ids: Int32[np.ndarray, "n"]
    counts: Bool[np.ndarray, "n"]


class ExampleEncoder:
    """Examples, a JSON object each, to tokens: a `data.workers.Encoder`. One has

    - `messages`, a list of {role, content}, and perhaps `tools`: as the folder's chat
      template writes them. What counts is what the assistant says: {% generation %}
      blocks where the template has them; else what it writes behind the prompt for an
      answer, up to the sign that ends it.
    - `prompt` and `completion`: one text. The completion counts, and the id that ends
      it.
    - `text`, of which all counts, and the id that ends it.

    A token counts where one of its letters does.

    Args:
      folder: that has the tokenizer, and its chat template; None: bytes.
      date: 2026-01-31, what a template that asks for the time is told; None: today.
    """

    def __init__(self, folder: Path | None, date: str | None = None):
        self._folder, self._date = folder, date
        self._own: Tokenizer | None = None
        self._template: ChatTemplate | None = None

    def __call__(self, data: bytes) -> Counted:
        """Raises ValueError: as `encode`, or no JSON."""
        try:
            example = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"this is no JSON: {error}: mend the line, or take it out"
            ) from None
        return self.encode(example)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None, "_template": None}

    def of_date(self, date: str) -> "ExampleEncoder":
        """Raises ValueError: it is no date."""
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise ValueError(
                f"--date {date} is no date: give one as 2026-01-31"
            ) from None
        return ExampleEncoder(self._folder, date)

    def writes_date(self) -> bool:
        """Whether the folder's template asks for the time."""
        return any(b"strftime_now" in data for data in self._template_files())

    def _template_files(self) -> list[bytes]:
        if self._folder is None:
            return []
        paths = (self._folder / name for name in TEMPLATE_FILES)
        return [read_bounded(path, MOST_BYTES) for path in paths if path.is_file()]

    @property
    def tokenizer(self) -> Tokenizer:
        if self._own is None:
            self._own = Bytes() if self._folder is None else tokenizer_of(self._folder)
        return self._own

    @property
    def template(self) -> "ChatTemplate":
        """Raises ValueError: there is none, or no Jinja to read it."""
        if self._template is None:
            if self._folder is None or isinstance(self.tokenizer, Bytes):
                raise ValueError(
                    "messages need a chat template, and bytes have none: take a "
                    "folder's tokenizer, or give prompt and completion"
                )
            self._template = template_of(self._folder, self._date)
        return self._template

    def template_digest(self) -> str | None:
        """Of what decides how messages are written; None: nothing does, they are
        refused."""
        if self._folder is None:
            return None
        digest = hashlib.sha256()
        for name in TEMPLATE_FILES:
            path = self._folder / name
            there = path.is_file()
            digest.update(read_bounded(path, MOST_BYTES) if there else b"none")
        return digest.hexdigest()

    def encode(self, example: Any) -> Counted:
        """Raises ValueError: what is no example, or a template that raises or whose
        answers cannot be told."""
        kind = _kind(example)
        if kind == ("messages",):
            counted = self._counted(*self._conversation(example), around=False)
            if not counted.counts.any():
                raise ValueError(
                    "nothing in it is an answer to learn: give it a message of role "
                    "assistant with content, or take it out"
                )
            return counted
        parts = [example[name] for name in kind]
        if not all(isinstance(part, str) for part in parts) or not parts[-1]:
            raise ValueError(
                f"{' and '.join(kind)} must be text, and {kind[-1]} not "
                "empty: mend the line, or give messages"
            )
        text = "".join(parts)
        start = len(text) - len(parts[-1])
        counted = self._counted(text, [(start, len(text))], around=True)
        return self._ended(counted)

    def _counted(
        self, text: str, spans: list[tuple[int, int]], *, around: bool
    ) -> Counted:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"it has half of a pair of surrogates ({text[error.start]!r}), which "
                "is no letter: mend the line, or take it out"
            ) from None
        ids, places = self.tokenizer.encode_with_places(text, around=around)
        is_answer = np.zeros(len(text) + 1, np.int64)
        for start, stop in spans:
            is_answer[start:stop] = 1
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_answer)])
        first, last = np.array(places, np.int64).reshape(-1, 2).T
        return Counted(np.array(ids, np.int32), before[last] > before[first])

    def _ended(self, counted: Counted) -> Counted:
        ends = self.tokenizer.ends
        ids, counts = counted
        if len(ids) and ids[-1] in ends:
            counts[-1] = True  # the tokenizer's own, which stands nowhere in the text
        elif ends:
            ids = np.append(ids, np.int32(ends[0]))
            counts = np.append(counts, True)
        return Counted(ids, counts)

    def _conversation(self, example: dict) -> tuple[str, list[tuple[int, int]]]:
        messages, tools = example["messages"], example.get("tools")
        _check_messages(messages)
        template = self.template
        text, answers = template.render(messages, tools=tools)
        if template.marks_answers:
            return text, answers
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(_answer(template, messages[:i], message, tools, text))
        return text, spans


def template_of(folder: Path, date: str | None = None) -> "ChatTemplate":
    """Raises ValueError: the folder has none, or no Jinja is there to read it."""
    try:
        from ulysses_jax.data.chat_template import ChatTemplate
    except ImportError:
        raise ValueError(
            "a chat template is Jinja: pip install 'ulysses-jax[data]'"
        ) from None
    return ChatTemplate(folder, date)


# An answer whose place in what a template writes can be told.
_PROBE = "Probe7of7an7answer"


def _answer(
    template: "ChatTemplate",
    asked: list[dict],
    message: dict,
    tools: list | None,
    text: str,
) -> tuple[int, int]:
    """Where in the text of a conversation the answer to `asked` stands: behind the
    prompt for it, and up to the sign that ends it, or else to its own end.

    Raises:
      ValueError: that cannot be told.
    """

    def write(*more: dict, **options: bool) -> str:
        return template.render([*asked, *more], tools=tools, **options).text

    prompt, after = write(add_generation_prompt=True), write(message)
    probe = write({"role": "assistant", "content": _PROBE})
    at = probe.find(_PROBE, len(prompt))
    where = f"{template.path} writes message {len(asked) + 1}"
    remedy = "put {% generation %} and {% endgeneration %} around what the assistant "
    if not (
        at >= 0
        and probe.startswith(prompt)
        and after.startswith(prompt)
        and text.startswith(after)
    ):
        raise ValueError(
            f"{where} in another way when others follow or when it is asked for, so "
            f"that the answer cannot be told from the rest: {remedy}says there"
        )
    header = probe[len(prompt) : at]
    if header.strip() and prompt == write():
        raise ValueError(
            f"{where} behind {header!r}, and leaves that out of the prompt for an "
            "answer (it has no add_generation_prompt), so that the answer cannot be "
            f"told from it: {remedy}says there"
        )
    behind = probe[at + len(_PROBE) :]  # its sign, and white space
    if not behind.strip():
        return len(prompt), len(after)
    if not after.endswith(behind):
        raise ValueError(
            f"{where} with another end than {behind!r}, that of other answers, so that "
            f"where the answer ends cannot be told: {remedy}says there"
        )
    return len(prompt), len(after.rstrip())


def _kind(example: Any) -> tuple[str, ...]:
    kinds = " or ".join(" and ".join(kind) for kind in KINDS)
    if not isinstance(example, dict):
        raise ValueError(
            f"a line must be an object with {kinds}, and is a {type(example).__name__}"
        )
    found = [kind for kind in KINDS if all(name in example for name in kind)]
    if len(found) != 1:
        raise ValueError(
            f"a line must have {kinds}, one of these, and has "
            f"{', '.join(example) or 'nothing'}"
        )
    return found[0]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"messages must be a list of {{role, content}}, and is {_short(messages)}"
        )
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(
                f"message {i} must be {{role, content}}, and is {_short(message)}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {i} has role {_short(message['role'])}: use one of "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(
                f"the content of message {i} must be text, and is "
                f"{_short(message['content'])}"
            )


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:60]}..."
