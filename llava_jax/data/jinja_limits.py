"""Jinja for templates of unknown origin: the sandbox, with limits on how long they run and how much they make.

Whatever a template does asks first: each call, filter, operator, comparison, output and turn of a loop. What makes much
of little (`*`, a width, a replacement) is measured before it runs; where that is not to be known, it is left out.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SOURCE = 1 << 17  # characters of a template
SECONDS = 0.5  # of the processor, for one rendering
MOST = 1 << 20  # characters and elements of a value, and of all that a template writes
NUMBER = 1 << 7  # the largest width, count or exponent
# How much these make stands in a text that they are given.
METHODS_LEFT_OUT = ("format", "format_map", "expandtabs", "translate", "maketrans")
FILTERS_LEFT_OUT = ("format", "striptags", "urlize", "wordwrap", "pprint", "random")
BUDGET, TURN, CHECKED = "the budget", "a turn", "checked"  # names that no template can write

# What a template can raise, however it is written.
ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


class Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self._end, self._left = time.thread_time() + SECONDS, MOST

    def check(self, *values: Any) -> None:
        """Raise TemplateError where time is up, or the values are too large."""
        if time.thread_time() > self._end:
            raise jinja2.TemplateError(f"it takes more than {SECONDS:g} s")
        for value in values:
            check_size(len(value) if isinstance(value, str) else size_of(value))

    def write(self, size: int) -> None:
        """Count so many characters as written."""
        self._left -= size
        check_size(MOST - self._left)


def check_size(size: int) -> None:
    """Raise TemplateError where a size is beyond MOST."""
    if size > MOST:
        raise jinja2.TemplateError(f"it makes more than {MOST:,} characters")


def size_of(value: Any) -> int:
    """Count the characters, bits and elements in a value, at least until they are more than MOST."""
    size, left = 0, [value]
    while left and size <= MOST:
        each = left.pop()
        size += 1
        if isinstance(each, str | range):
            size += len(each)
        elif isinstance(each, int):
            size += each.bit_length()
        elif isinstance(each, Collection):
            if len(each) > MOST:
                return len(each)
            left += [*each, *each.values()] if isinstance(each, Mapping) else each
    return size


class Limited(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits, as transformers sets it up; see `compiled`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, extensions: Sequence[str | type[Extension]]):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=jinja2.pass_context(_written)
        )
        del self.globals["lipsum"]
        plain = ImmutableSandboxedEnvironment()
        self.filters = {name: _limited(name, plain) for name in plain.filters if name not in FILTERS_LEFT_OUT}
        self.filters |= {TURN: jinja2.pass_context(_turn), CHECKED: jinja2.pass_context(_checked)}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context.parent[BUDGET].check(left, right)
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateError("it formats a text with %")
        if operator == "**":
            _check_numbers(right)
            check_size(size_of(left) * NUMBER)
        if operator == "*" and isinstance(left, Collection) != isinstance(right, Collection):
            text, times = (left, right) if isinstance(left, Collection) else (right, left)
            check_size(size_of(text) * int(times))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget, name, owner = context.parent[BUDGET], getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
        budget.check(owner, *args, *kwargs.values())
        if name in METHODS_LEFT_OUT:
            raise jinja2.TemplateError(f"it calls {name}")
        if isinstance(owner, str):
            _check_method(name, owner, *args, *kwargs.values())
        result = super().call(context, obj, *args, **kwargs)
        budget.check(result)
        return result


def compiled(source: str, environment: Limited, names: dict[str, Any]) -> Callable[..., str]:
    """Return what renders a template, which may use `names`. Both raise one of ERRORS."""
    if len(source) > SOURCE:
        raise jinja2.TemplateError(f"it has {len(source):,} characters, at most {SOURCE:,} are read")
    template = environment.from_string(_Asking().visit(environment.parse(source)), globals=names)
    return lambda **values: template.render({**values, BUDGET: Budget()})


class _Asking(NodeTransformer):
    """Adds to a template that it asks at each turn of a loop, comparison and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(written), TURN, node), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for part in (node, *node.ops):
            if not isinstance(part.expr, nodes.Const):
                part.expr = _filtered(part.expr, CHECKED, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join", node)


def _filtered(value: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)


def _limited(name: str, plain: ImmutableSandboxedEnvironment) -> Callable[..., Any]:
    """Return a filter of Jinja that asks before and after."""

    @jinja2.pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.parent[BUDGET]
        budget.check(value, *args, *kwargs.values())
        if name == "join":
            value = value if isinstance(value, Collection) else list(_each(value, budget))
        _check_method(name, value, *args, *kwargs.values())
        result = plain.call_filter(name, value, args, kwargs, context)
        result = list(_each(result, budget)) if isinstance(result, Iterator) else result
        budget.check(result)
        return result

    return run


def _each(values: Iterable[Any], budget: Budget) -> Iterator[Any]:
    size = 0
    for value in values:
        budget.check(value)
        size += size_of(value)
        check_size(size)
        yield value


def _check_method(name: str, text: Any, *given: Any) -> None:
    """Raise TemplateError where a text, or a filter of this name, would make too much of what it is given."""
    if name == "replace" and len(given) > 1:
        check_size(size_of(text) // max(1, size_of(given[0]) - 1) * size_of(given[1]))
    elif name == "join":
        check_size(size_of(text) * size_of(given))
    elif name != "default":
        _check_numbers(*given)


def _check_numbers(*given: Any) -> None:
    for number in given:
        if isinstance(number, int | float) and abs(number) > NUMBER:
            raise jinja2.TemplateError(f"it names the number {number:.3g}, at most {NUMBER} is taken")


def _turn(context: Context, written: int) -> str:
    context.parent[BUDGET].check()
    context.parent[BUDGET].write(written)
    return ""


def _checked(context: Context, value: Any) -> Any:
    if not isinstance(value, str):  # whatever made a text asked
        context.parent[BUDGET].check(value)
    return value


def _written(context: Context, value: Any) -> str:
    text = str(_checked(context, value))
    context.parent[BUDGET].write(len(text))
    return text
