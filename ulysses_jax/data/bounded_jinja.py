"""Jinja in a sandbox that ends: in calls, seconds, letters and memory.

Every call, filter, test, loop and product is counted, by rewriting the template's tree;
what would make a long text or number is refused before it is made. So a template that
was written to harm takes seconds and some hundred MB, whatever it says.
"""

import json
import re
import time
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer, NodeVisitor

STATE = "_state"
SOURCE_LETTERS = 2**16
_MOST_BITS = 2**13  # of a whole number; Python writes none of more than 4,300 digits
_LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_VIEWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(Exception):
    """A template goes over a bound."""


class Bounds:
    """Of one rendering: what it has used, and how much it may.

    Args:
      calls: with loops, filters and tests.
      letters: of any value, written out, and of the whole text.
      made_letters: of all values together.
      seconds: of this thread's processor, so that a busy machine changes nothing.

    Attributes:
      answers: (start, text) of every {% generation %} block, by letters.
      written: letters of the text, so far.
    """

    def __init__(self, *, calls: int, letters: int, made_letters: int, seconds: float):
        self.answers: list[tuple[int, str]] = []
        self.written = 0
        self._calls, self._most_calls = 0, calls
        self._most_letters = letters
        self._made, self._most_made = 0, made_letters
        self._seconds, self._started = seconds, time.thread_time()

    def write(self, letters: int) -> None:
        self.written += letters
        self.check(self.written)

    def count(self, calls: int = 1) -> None:
        self._calls += calls
        if self._calls > self._most_calls:
            raise TooMuch(f"does not end within {self._most_calls:,} calls and loops")
        if time.thread_time() - self._started > self._seconds:
            raise TooMuch(f"does not end within {self._seconds:.1f} seconds")

    def check(self, letters: int) -> None:
        if letters > self._most_letters:
            raise TooMuch(f"writes more than {self._most_letters:,} letters")

    def made(self, value: Any) -> Any:
        """The value, charged; a namespace itself is a place for values, and none."""
        if not isinstance(value, Namespace):
            self._made += self.size(value)
            if self._made > self._most_made:
                raise TooMuch(f"makes more than {self._most_made:,} letters in all")
        return value

    def size(self, value: Any) -> int:
        """Letters of a value if it was written out, each part as often as it occurs."""
        found, left = 0, [value]
        while left:
            each = left.pop()
            if isinstance(each, str | bytes):
                found += len(each)
            elif isinstance(each, Mapping):
                found += 1 + len(each)
                left += [*each.keys(), *each.values()]
            elif isinstance(each, _VIEWS):
                found += 1 + len(each)
                left += each
            elif isinstance(each, Namespace):
                raise TooMuch("writes a namespace, or puts it into another value")
            else:
                if isinstance(each, int) and each.bit_length() > _MOST_BITS:
                    raise TooMuch(f"computes a number of more than {_MOST_BITS} bits")
                found += 1
            self.check(found)
        return found

    def check_arguments(self, *arguments: Any) -> None:
        for each in arguments:
            if isinstance(each, int):
                self.check(abs(each))

    def check_format(self, form: str | bytes, arguments: Any) -> None:
        """Of % and format: no width, and no value at every sign, is too much."""
        text = form if isinstance(form, str) else form.decode(errors="replace")
        widths = re.findall(r"\d+", text)
        self.check(max((len(each) for each in widths), default=0) * 10**4)
        total = len(text) + sum(map(int, widths))
        signs = text.count("%") + text.count("{")
        numbers = arguments if isinstance(arguments, tuple | list) else [arguments]
        total += signs * sum(abs(n) for n in numbers if isinstance(n, int))
        self.check(total + signs * self.size(arguments))

    def check_method(self, name: str, owner: Any, args: tuple, kwargs: dict) -> None:
        """Of text and bytes: those that make more than they are given."""
        if name == "format":
            self.check_format(owner, [*args, *kwargs.values()])
        elif name == "format_map":
            self.check_format(owner, list(dict(*args).values()))
        elif name == "translate":
            raise TooMuch("calls translate, which is not bounded")
        elif name == "expandtabs":
            (tab, *_) = (*args, *kwargs.values(), 8)
            self.check(len(owner) + owner.count("\t") * abs(int(tab)))
        elif name == "replace" and len(args) > 1:
            self.check_replace(owner, *args[:2])
        elif name == "join" and args:
            parts = args[0]
            if not isinstance(parts, (str, bytes, Mapping, *_VIEWS)):
                raise TooMuch("calls join with what is no list")
            self.check(self.size(parts) + len(owner) * len(parts))

    def check_replace(self, text: Any, old: Any, new: Any) -> None:
        self.check(len(text) + text.count(old) * len(new))


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """As that of transformers for chat templates, within `Bounds`.

    Attributes:
      marks_answers: whether what it has parsed has {% generation %} blocks.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    marks_answers = False

    def __init__(self, functions: dict[str, Callable]):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_finalize,
        )
        self.code_generator_class = _Code
        filters = self.filters | {"tojson": _to_json}
        self.filters = {
            name: _counted(name, each)
            for name, each in filters.items()
            if name not in _LEFT_OUT
        }
        self.filters |= {"_made": _made, "_tick": _tick}
        self.tests = {name: _counted("", each) for name, each in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "range": _range, **functions}

    def _parse(self, source: str, name: str | None, filename: str | None):
        if len(source) > SOURCE_LETTERS:
            raise jinja2.TemplateError(
                f"{len(source):,} letters are more than {SOURCE_LETTERS:,}"
            )
        tree = super()._parse(source, name, filename)
        _Generations().visit(tree)
        return _Counting().visit(tree)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        bounds: Bounds = context[STATE]
        bounds.count()
        if isinstance(obj, Namespace):
            raise TooMuch("calls a namespace")
        bounds.check_arguments(*args, *kwargs.values())
        method = getattr(obj, "__wrapped__", obj)  # format has one around it
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            bounds.check_method(method.__name__, owner, args, kwargs)
        return bounds.made(super().call(context, obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, Namespace):
            raise TooMuch("has a namespace as a key")
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any):
        bounds: Bounds = context[STATE]
        bounds.count()
        sized = [hasattr(each, "__len__") for each in (left, right)]
        whole = [isinstance(each, int) for each in (left, right)]
        if operator == "+" and all(sized):
            bounds.check(len(left) + len(right))
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if hasattr(some, "__len__") and isinstance(times, int):
                    bounds.check(len(some) * times)
        elif operator == "**" and all(whole) and max(abs(left), abs(right)) > 1000:
            raise TooMuch(f"computes {left} ** {right}")
        elif operator == "%" and isinstance(left, str | bytes):
            bounds.check_format(left, right)
        return bounds.made(super().call_binop(context, operator, left, right))

    def concatenated(self, context: Context, parts: tuple) -> str:
        """Of a ~ b."""
        bounds: Bounds = context[STATE]
        bounds.count()
        bounds.check(sum(bounds.size(part) for part in parts))
        return bounds.made("".join(str(part) for part in parts))


class _Code(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenated(context, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(parser.environment, Environment)
        parser.environment.marks_answers = True
        call = self.call_method("_keep", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _keep(self, context, caller) -> str:
        bounds, answer = context[STATE], caller()
        bounds.answers.append((bounds.written, answer))
        return answer


class _Generations(NodeVisitor):
    """Refuses generation blocks in what is written elsewhere than where it stands."""

    _depth = 0

    def _buffered(self, node: nodes.Node) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_Macro = visit_FilterBlock = visit_AssignBlock = visit_Block = _buffered

    def visit_For(self, node: nodes.For) -> None:
        (self._buffered if node.recursive else self.generic_visit)(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> None:
        callee = node.call.node
        marks = isinstance(callee, nodes.ExtensionAttribute) and callee.name == "_keep"
        if marks and self._depth:
            raise jinja2.TemplateError(
                "it has a generation block within a macro, a set, a filter, a "
                "recursive loop or another block, so that where it stands cannot be "
                "told: move it out"
            )
        self._buffered(node)


class _Counting(NodeTransformer):
    """Makes loops tick, and values that are made be charged."""

    def _filter(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = self._filter(nodes.Const(True, lineno=node.lineno), "_tick")
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def _charged(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # names that are set
            return node
        return self._filter(node, "_made")

    visit_List = visit_Tuple = visit_Dict = _charged

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self._charged(node)
        self.generic_visit(node)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    bounds: Bounds = context[STATE]
    bounds.count(0)
    if isinstance(value, Namespace):
        raise TooMuch("writes a namespace")
    return bounds.made(value)


@pass_context
def _made(context: Context, value: Any) -> Any:
    context[STATE].count()
    return context[STATE].made(value)


@pass_context
def _tick(context: Context, value: Any) -> Any:
    context[STATE].count()
    return value


def _counted(name: str, own: Callable) -> Callable:
    """A filter or, without a name, a test, within the bounds of its rendering."""
    kind = _PassArg.from_obj(own)

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        bounds: Bounds = context[STATE]
        bounds.count()
        if name:
            if any(isinstance(each, Namespace) for each in args):
                raise TooMuch("has a namespace as an argument")
            bounds.check_arguments(*args[1:], *kwargs.values())
            args, kwargs = _CHECKS.get(name, _as_is)(bounds, args, kwargs)
        given = {
            _PassArg.context: [context],
            _PassArg.eval_context: [context.eval_ctx],
            _PassArg.environment: [context.environment],
        }
        found = own(*given.get(kind, []), *args, **kwargs)  # pyright: ignore
        return bounds.made(found) if name else found

    return run


def _raise(message: Any) -> None:
    text = "a namespace" if isinstance(message, Namespace) else str(message)
    raise jinja2.TemplateError(text)


@pass_context
def _range(context: Context, *bounds: int) -> range:
    found = range(*bounds)
    context[STATE].count(len(found))
    return found


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _as_is(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    return args, kwargs


def _check_join(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    parts = list(args[0])
    between = args[1] if len(args) > 1 else kwargs.get("d", "")
    bounds.check(bounds.size(parts) + bounds.size(between) * len(parts))
    return (parts, *args[1:]), kwargs


def _check_replace(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    values = [*args, *kwargs.values()]
    if len(values) > 2:
        bounds.check_replace(*map(str, values[:3]))
    return args, kwargs


def _check_indent(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    width = [*args[1:], kwargs.get("width", 4)][0]
    step = len(width) if isinstance(width, str) else int(width)
    (text, *_) = map(str, args)
    bounds.check(len(text) + (1 + len(text.splitlines())) * step)
    return args, kwargs


def _check_form(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    bounds.check_format(str(args[0]), [*args[1:], *kwargs.values()])
    return args, kwargs


def _check_json(bounds: Bounds, args: tuple[Any, ...], kwargs: dict) -> Arguments:
    for each in (*args[1:], *kwargs.values()):
        if isinstance(each, int):
            bounds.check(abs(each) * 2**14)
        elif bounds.size(each) > 64:
            raise TooMuch("gives tojson a long separator or indent")
    return args, kwargs


_CHECKS = {
    "join": _check_join,
    "replace": _check_replace,
    "indent": _check_indent,
    "format": _check_form,
    "tojson": _check_json,
}


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
