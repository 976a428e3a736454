"""The small arithmetic that the tables are written in.

`heads * head_dim`, `num_kv_heads if new_decoder_architecture else heads`: names, whole numbers,
`+ - * // %`, comparisons, `in`, `and or not` and a conditional. Parsed by Python's own grammar,
evaluated by an allow-list of nodes, so a table can compute and nothing more.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Lookup = Callable[[str], Any]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda left, right: left // right,
    ast.Mod: lambda left, right: left % right,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A named transform and the expressions it is applied to, such as `rope(heads)`."""

    name: str
    arguments: tuple[str, ...]


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def parse_call(text: str) -> Call:
    """Read `name(expression, ...)`.

    Raises:
        ValueError: if `text` is anything else.
    """
    node = _parse(text)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        raise ValueError(f"{text!r} is not of the form name(argument, ...)")
    return Call(node.func.id, tuple(ast.unparse(argument) for argument in node.args))


def evaluate(text: str, lookup: Lookup) -> Any:
    """Return the value of the expression `text`.

    Args:
        text: the expression.
        lookup: gives the value of a name; raises KeyError for an unknown one.

    Raises:
        KeyError: if a name that is needed has no value.
        ValueError: if the expression holds anything outside the allow-list.
    """
    return _evaluate(_parse(text), lookup)


def _evaluate(node: ast.expr, lookup: Lookup) -> Any:  # noqa: PLR0911  (one return per node kind)
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            return lookup(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, lookup), _evaluate(right, lookup))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_evaluate(left, lookup), _evaluate(right, lookup))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_evaluate(value, lookup) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_evaluate(value, lookup) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, lookup)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, lookup) else orelse, lookup)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed in a table")
