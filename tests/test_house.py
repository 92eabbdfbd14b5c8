"""No module, function or list of arguments is longer than a person can hold in mind."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.tree import ROOT, modules

MOST_LINES = 400
MOST_LINES_OF_A_BODY = 80
MOST_ARGUMENTS = 10


@cache
def sources():
    """Return every module of the package and of what is built on it, by its path."""
    paths = {*modules().values(), *(ROOT / "simulations").rglob("*.py")}
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
    }


def functions(text):
    """Give each function of a module with its name, as in ``Class.method``."""

    def within(node, names):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ".".join((*names, child.name)), child
            named = (child.name,) if hasattr(child, "name") else ()
            yield from within(child, (*names, *named))

    yield from within(ast.parse(text), ())


def body_lines(function):
    """Count the lines of a function's body, its docstring apart."""
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def is_option(argument):
    """Tell whether an argument is an option of a command, which nobody passes on."""
    return argument.annotation is not None and (
        "typer." in ast.unparse(argument.annotation)
    )


def arguments(function):
    """Count the arguments that a caller can give."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg]
    return sum(
        argument is not None
        and argument.arg not in ("self", "cls")
        and not is_option(argument)
        for argument in (*named, given.kwarg)
    )


def test_no_module_is_too_long():
    lengths = {name: len(text.splitlines()) for name, text in sources().items()}
    assert len(lengths) > 200
    assert {n: lines for n, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_body_is_too_long():
    lengths = {
        f"{module}: {name}": body_lines(function)
        for module, text in sources().items()
        for name, function in functions(text)
    }
    assert len(lengths) > 1000
    assert {
        n: lines for n, lines in lengths.items() if lines > MOST_LINES_OF_A_BODY
    } == {}


def test_no_public_function_takes_too_much():
    """What a dataclass holds is no list of arguments: its fields have their words."""
    counts = {
        f"{module}: {name}": arguments(function)
        for module, text in sources().items()
        for name, function in functions(text)
        if not any(part.startswith("_") for part in name.split("."))
        or name.endswith("__init__")
    }
    assert len(counts) > 500
    assert {n: count for n, count in counts.items() if count > MOST_ARGUMENTS} == {}


@pytest.mark.parametrize(
    ("source", "lines", "count"),
    [
        ("def f(a, /, b, *c, d, **e):\n    '''Say.'''\n    return (\n  1)", 2, 5),
        ("class A:\n  def f(self, a):\n    '''Say.'''", 0, 1),
        ("def f(a: Annotated[int, typer.Option()], b: int):\n    g()", 1, 1),
    ],
)
def test_what_is_counted(source, lines, count):
    ((_, function),) = functions(source)
    assert body_lines(function) == lines
    assert arguments(function) == count
