"""The small arithmetic that the tables are written in.

`heads * head_dim`, `num_kv_heads if new_decoder_architecture else heads`: names, whole numbers,
`+ - * // %`, comparisons, `in`, `and or not`, a conditional, and `stated(name)`, whether the base
says anything under that name. Parsed by Python's own grammar, evaluated by an allow-list of nodes,
so a table can compute and nothing more. Arithmetic takes numbers only: the names stand for what
strangers' files say, and text times a number is a long text.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adapterkit.tables import shown

Lookup = Callable[[str], Any]
# Beyond this a float is no exact whole number any more, and nothing is that large.
LARGEST = 1 << 53
_LONGEST = 1000

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
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} letters, the most is {_LONGEST}")
    try:
        return ast.parse(text, mode="eval").body
    except (MemoryError, RecursionError):
        # The parser's own stack is full.
        raise ValueError("it is nested too deeply") from None


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
        ValueError: if the expression holds anything outside the allow-list, or computes with what
            is no number, divides by zero, or leads beyond `LARGEST`.
    """
    return _evaluate(_parse(text), lookup)


def _evaluate(node: ast.expr, lookup: Lookup) -> Any:  # noqa: C901, PLR0911  (a case per node kind)
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.Constant(value=int() | float() as value) if abs(value) <= LARGEST:
            return value
        case ast.Name(id=name):
            return lookup(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _computed(op, _operand(left, lookup), _operand(right, lookup))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _compared(op, _evaluate(left, lookup), _evaluate(right, lookup))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_evaluate(value, lookup) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_evaluate(value, lookup) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, lookup)
        case ast.Call(func=ast.Name(id="stated"), args=[ast.Name(id=name)], keywords=[]):
            return _stated(name, lookup)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, lookup) else orelse, lookup)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed in a table")


def _stated(name: str, lookup: Lookup) -> bool:
    try:
        lookup(name)
    except KeyError:
        return False
    except LookupError:
        return True  # it holds one value per layer
    return True


def _operand(node: ast.expr, lookup: Lookup) -> float:
    """Return a number, which bounds what arithmetic can cost."""
    value = _evaluate(node, lookup)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(  # noqa: TRY004  (one error for all that makes no sense)
            f"{ast.unparse(node)} is {shown(value)}, not a number"
        )
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{ast.unparse(node)} is {shown(value)}, which no size is")
    return value


def _computed(op: ast.operator, left: float, right: float) -> float:
    if right == 0 and isinstance(op, (ast.FloorDiv, ast.Mod)):
        raise ValueError("divides by zero")
    return _BINARY[type(op)](left, right)


def _compared(op: ast.cmpop, left: Any, right: Any) -> bool:
    try:
        return _COMPARE[type(op)](left, right)
    except TypeError:
        raise ValueError(f"compares {shown(left)} with {shown(right)}") from None
