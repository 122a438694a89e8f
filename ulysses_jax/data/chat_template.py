"""A tokenizer's chat template: Jinja in a sandbox, bounded in what it may do."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.runtime import Context
from jinja2.utils import pass_context

from ulysses_jax.data.bounded_jinja import (
    SOURCE_LETTERS,
    STATE,
    Bounds,
    Environment,
    TooMuch,
)
from ulysses_jax.outside import read_bounded, read_object

# A template that asks for more is taken not to end.
_CALLS, _CALLS_A_MESSAGE = 2**15, 2**10
_LETTERS, _LETTERS_A_LETTER = 2**20, 2**4
_MADE, _MADE_A_LETTER_AND_MESSAGE = 2**26, 2**4
_SECONDS, _SECONDS_A_MESSAGE = 0.5, 0.02
_WORDS = 300  # of an error, in letters

Message = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      answers: (start, stop) of what the template says the model writes, in characters.
    """

    text: str
    answers: list[tuple[int, int]]


class ChatTemplate:
    """Of a folder: chat_template.jinja, else what tokenizer_config.json has.

    Text and answers are those of `apply_chat_template` of transformers, whose functions
    and filters a template finds here too.

    Attributes:
      path: where it is.
      marks_answers: whether it has {% generation %} blocks.

    Args:
      date: 2026-01-31, at whose midnight `strftime_now` stands; None: now.

    Raises:
      ValueError: there is none, or it is none.
    """

    def __init__(self, folder: Path, date: str | None = None):
        config_path, own = (
            folder / "tokenizer_config.json",
            folder / "chat_template.jinja",
        )
        config = read_object(config_path) if config_path.is_file() else {}
        if own.is_file():
            self.path, source = own, _text(own)
        else:
            self.path, source = config_path, _default(config.get("chat_template"))
        if not isinstance(source, str):
            raise ValueError(
                f"{folder} has no chat template, neither {own.name} nor chat_template "
                f"in {config_path.name}: put the model's own there"
            )
        self._tokens = {
            name: _content(value)
            for name, value in config.items()
            if name.endswith("_token") and isinstance(_content(value), str)
        }

        @pass_context
        def strftime_now(context: Context, form: str) -> str:
            context[STATE].check_format(form, ())
            if date is None:
                return datetime.datetime.now().strftime(form)
            return datetime.datetime.fromisoformat(date).strftime(form)

        environment = Environment({"strftime_now": strftime_now})
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # of Jinja, and of Python that compiles it
            raise ValueError(
                f"{self.path} is no Jinja template: {_words(error)}: take the model's "
                "own"
            ) from None
        self.marks_answers = environment.marks_answers

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Raises ValueError: the template raises, or does not end."""
        given = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        size = len(json.dumps([given, tools]))
        bounds = Bounds(
            calls=_CALLS + _CALLS_A_MESSAGE * len(given),
            letters=_LETTERS + _LETTERS_A_LETTER * size,
            made_letters=_MADE + _MADE_A_LETTER_AND_MESSAGE * size * (1 + len(given)),
            seconds=_SECONDS + _SECONDS_A_MESSAGE * len(given),
        )
        variables: dict[str, Any] = {
            **self._tokens,
            "messages": given,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            STATE: bounds,
        }
        parts = []
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                bounds.write(len(part))
        except TooMuch as error:
            raise ValueError(
                f"{self.path} {error}: take the model's own template"
            ) from None
        except Exception as error:  # a template's code may raise any
            raise ValueError(
                f"{self.path} raises {type(error).__name__}: {_words(error)}"
            ) from None
        text = "".join(parts)
        return Rendered(text, [(at, at + len(each)) for at, each in bounds.answers])


def _words(error: Exception) -> str:
    words = str(error) or "no words"
    return words if len(words) <= _WORDS else f"{words[:_WORDS]}..."


def _text(path: Path) -> str:
    try:
        return read_bounded(path, 4 * SOURCE_LETTERS).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): take the "
            "model's own"
        ) from None


def _default(template: Any) -> Any:
    """Of several, each with a name, the one for conversations."""
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        found = [
            each.get("template") for each in named if each.get("name") == "default"
        ]
        return found[-1] if found else None
    return template


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
