"""The answers of commands that take any number of adapters: one shape, and one exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit_cli import manner, rendering
from adapterkit_cli.boundary import report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from adapterkit import Attempt

_Result = TypeVar("_Result")
_Record = "Callable[[_Result], Mapping[str, object]]"


def single(attempts: Sequence[Attempt[_Result]]) -> _Result | None:
    """Return the one result that is to be shown as text; None for several, or for programs.

    Raises:
        Exception: the error of the one source, if nothing but text was asked for.
    """
    if len(attempts) == 1 and manner.shape() == "text":
        return attempts[0].get()
    return None


def emit(
    attempts: Sequence[Attempt[_Result]],
    record: Callable[[_Result], object] = rendering.plain,
    fields: Sequence[str] = (),
) -> bool:
    """Write what programs read; return False where text was asked for.

    Args:
        attempts: one for each source.
        record: what is written of a result: a mapping, or a dataclass.
        fields: columns of a table, where they are not those of the first record.
    """
    from adapterkit.attempts import failure

    shape = manner.shape()
    if shape not in {"json", "jsonl", "csv"}:
        return False
    records: list[Any] = [
        rendering.plain(record(attempt.get()) if attempt.error is None else failure(attempt))
        for attempt in attempts
    ]
    if shape == "json":
        rendering.emit_json({"results": records})
    elif shape == "jsonl":
        for each in records:
            rendering.emit(rendering.json_line(each))
    else:
        rendering.emit(_table(records, fields))
    return True


def _table(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    from adapterkit.spreadsheet import csv_text

    sound = [each for each in records if "error" not in each]
    names = list(fields or dict.fromkeys(["source", *(name for each in sound for name in each)]))
    rows = (
        [*(each.get(name) for name in names), each.get("error", {}).get("message")]
        for each in records
    )
    return csv_text([*names, "error"], rows).rstrip("\n")


def tell_failures(attempts: Iterable[Attempt[Any]]) -> None:
    """Write the errors to stderr, one line each."""
    for attempt in attempts:
        if attempt.error is not None:
            report(attempt.message)


def exit_code(
    attempts: Iterable[Attempt[_Result]], code: Callable[[_Result], int] = lambda _: 0
) -> int:
    """Return the worst exit code of several inputs."""
    from adapterkit.attempts import worst

    return worst(
        attempt.exit_code if attempt.result is None else code(attempt.result)
        for attempt in attempts
    )
