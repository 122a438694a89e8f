"""A tokenizer's chat template: Jinja in a sandbox, bounded in what it may do."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

# A template that asks for more calls and loops, or for more letters, is taken not to
# end.
_CALLS, _CALLS_A_MESSAGE = 2**15, 2**8
_LETTERS, _LETTERS_A_LETTER = 2**20, 2**4

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

    Raises:
      ValueError: there is none, or it is none.
    """

    def __init__(self, folder: Path):
        config_path, own = (
            folder / "tokenizer_config.json",
            folder / "chat_template.jinja",
        )
        config = _read_config(config_path)
        if own.is_file():
            self.path, source = own, own.read_text(encoding="utf-8")
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
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{self.path} is no Jinja template: {error}: take the model's own"
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
        state = _State(
            _CALLS + _CALLS_A_MESSAGE * len(given), _LETTERS + _LETTERS_A_LETTER * size
        )
        variables: dict[str, Any] = {
            **self._tokens,
            "messages": given,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "range": state._range,
            _STATE: state,
        }
        parts = []
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                state._write(len(part))
        except _TooMuch as error:
            raise ValueError(
                f"{self.path} {error}: take the model's own template"
            ) from None
        except Exception as error:  # a template's code may raise any
            raise ValueError(
                f"{self.path} raises {type(error).__name__}: {error or 'no words'}"
            ) from None
        text = "".join(parts)
        for start, answer in state._answers:
            if text[start : start + len(answer)] != answer:
                raise ValueError(
                    f"{self.path} has a generation block within a macro or a filter, "
                    "so that where it stands cannot be told: move it out"
                )
        return Rendered(text, [(at, at + len(each)) for at, each in state._answers])


_STATE = "_state"


class _TooMuch(Exception):
    pass


class _State:
    """Of one rendering. No name is a template's to use: each has an underscore."""

    def __init__(self, most_calls: int, most_letters: int):
        self._most_calls, self._most_letters = most_calls, most_letters
        self._calls, self._written = 0, 0
        self._answers: list[tuple[int, str]] = []

    def _count(self, calls: int) -> None:
        self._calls += calls
        if self._calls > self._most_calls:
            raise _TooMuch(f"does not end within {self._most_calls:,} calls and loops")

    def _check_size(self, letters: int) -> None:
        if letters > self._most_letters:
            raise _TooMuch(f"writes more than {self._most_letters:,} letters")

    def _write(self, letters: int) -> None:
        self._written += letters
        self._check_size(self._written)

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        self._count(len(found))
        return found


class _Code(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        """a ~ b, by a call that counts what it makes."""
        self.write("environment.join(context, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """As that of transformers, with bounds."""

    intercepted_binops = frozenset(["+", "*", "**"])
    code_generator_class = _Code
    marks_answers = False

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def call(self, context, /, *args, **kwargs):
        context[_STATE]._count(1)
        return super().call(context, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        state = context[_STATE]
        state._count(1)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            state._check_size(len(left) + len(right))
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if hasattr(some, "__len__") and isinstance(times, int):
                    state._check_size(len(some) * times)
        elif operator == "**" and max(abs(left), abs(right)) > 1000:
            raise _TooMuch(f"computes {left} ** {right}")
        return super().call_binop(context, operator, left, right)

    def join(self, context, parts) -> str:
        texts = [str(part) for part in parts]
        context[_STATE]._check_size(sum(map(len, texts)))
        return "".join(texts)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(parser.environment, _Environment)
        parser.environment.marks_answers = True
        call = self.call_method("_keep", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _keep(self, context, caller) -> str:
        state, answer = context[_STATE], caller()
        state._answers.append((state._written, answer))
        return answer


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
    """Jinja's own escapes what HTML does."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object: take the model's own")
    return found


def _default(template: Any) -> Any:
    """Of several, each with a name, the one for conversations."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template}
        return named.get("default")
    return template


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
