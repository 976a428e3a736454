"""Fields of files are what they are asked for as, or an error that says what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import FormatError
from adapterkit.tables import (
    FLAG,
    TEXT,
    Kind,
    Table,
    either,
    listed,
    mapped,
    number,
    one_of,
    shown,
    text,
    whole,
)

HUGE = 10**400
EIGHT = whole(1, 65536)
WRONG: list[tuple[Any, Kind[Any], str]] = [
    ("8", EIGHT, "field: expects a whole number from 1 to 65536, has '8'"),
    (0, EIGHT, "has 0"),
    (True, EIGHT, "has true"),
    (8.0, EIGHT, "has 8.0"),
    (8.5, whole(1, 9, integral=True), "has 8.5"),
    (float("nan"), whole(1, 9, integral=True), "has nan"),
    (HUGE, EIGHT, "has a whole number of 1329 bits"),
    (HUGE, number(), "expects a finite number, has a whole number of 1329 bits"),
    (float("inf"), number(), "has inf"),
    ("1", number(), "has '1'"),
    ("nan", number(spelled=True), "has 'nan'"),
    (2.0, number(0, 1), "expects a number from 0 to 1, has 2.0"),
    (None, FLAG, "expects true or false, has null"),
    (1, FLAG, "has 1"),
    (["a"], TEXT, "expects text, has a list of 1"),
    ("x" * 99, text(9), f"expects text of at most 9 characters, has '{'x' * 40}...'"),
    ({}, one_of("a", "b"), "expects one of a, b, has a mapping of 0"),
    ([1, "x"], listed(EIGHT), "field[1]: expects a whole number from 1 to 65536, has 'x'"),
    ([], listed(TEXT, 3, 1), "expects a list of 1 to 3 (text each), has a list of 0"),
    ({"a": [1, {}]}, mapped(listed(EIGHT)), "field.a[1]: expects a whole number"),
    ({1: 2}, mapped(EIGHT), "has a mapping of 1"),
    ({"a\x1b[2J": 0}, mapped(EIGHT), r"field.'a\x1b[2J': expects"),
    ([], either(EIGHT, TEXT), "expects a whole number from 1 to 65536 or text, has a list of 0"),
]


@pytest.mark.parametrize(("value", "kind", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_what_is_there_and_what_is_expected_are_named(
    value: Any, kind: Kind[Any], message: str
) -> None:
    with pytest.raises(FormatError) as caught:
        Table({"field": value}, Path("c.json")).inner("inner", {"field": value}).get("field", kind)
    assert str(caught.value).startswith("c.json: inner.field")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


RIGHT: list[tuple[Any, Kind[Any], Any]] = [
    (8, EIGHT, 8),
    (8.0, whole(1, 9, integral=True), 8),
    (8, number(), 8.0),
    ("1e-3", number(spelled=True), 1e-3),
    ("auto", either(EIGHT, one_of("auto")), "auto"),
    (["a"], listed(TEXT), ("a",)),
    ({"a": 1}, mapped(EIGHT), {"a": 1}),
]


@pytest.mark.parametrize(("value", "kind", "taken"), RIGHT)
def test_what_fits_is_taken(value: Any, kind: Kind[Any], taken: Any) -> None:
    found = Table({"field": value}, None).get("field", kind)
    assert found == taken
    assert type(found) is type(taken)


def test_a_field_that_is_not_there() -> None:
    table = Table({"none": None}, Path("c.json"))
    assert table.get("r", EIGHT, 4) == 4
    assert table.optional("r", EIGHT) is None
    assert table.optional("none", EIGHT) is None
    assert table.table("none") is None
    with pytest.raises(FormatError, match="r: is missing; expects a whole number"):
        table.get("r", EIGHT)
    with pytest.raises(FormatError, match=r"none: expects a whole number .* has null"):
        table.get("none", EIGHT, 4)
    with pytest.raises(FormatError, match="none: unknown key; known are r, alpha"):
        table.only(("r", "alpha"), "key")


def test_anything_is_shown_in_a_short_printable_line() -> None:
    for value in (HUGE, -HUGE, "\n" * 9999, b"\0", object, [[]] * 9, {"a": HUGE}, float("nan")):
        assert shown(value).isprintable()
        assert len(shown(value)) < 200
