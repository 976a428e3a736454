"""Regular expressions out of files that strangers wrote."""

from __future__ import annotations

import re

_LONGEST = 2000
# Every unbounded repeat multiplies the time by the length of the name.
_MOST_REPEATS = 4


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a module pattern as PEFT reads it: it must end the name, after a dot or alone.

    Raises:
        ValueError: as `bounded` does.
    """
    return _guarded(pattern, rf"(.*\.)?({pattern})$")


def bounded(pattern: str) -> re.Pattern[str]:
    """Compile an expression as it stands.

    Raises:
        ValueError: if it is no regular expression, or one that may take forever to match: Python's
            engine backtracks, exponentially where a repeated group holds a repeat or a choice.
    """
    return _guarded(pattern, pattern)


def _guarded(pattern: str, expression: str) -> re.Pattern[str]:
    """Compile `expression`, which is `pattern` or wraps it."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"has {len(pattern)} characters, more than {_LONGEST}")
    _check_bounded(pattern)
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression ({error})") from None


def _check_bounded(pattern: str) -> None:
    """Refuse nested repeats: a group under `*`, `+` or `{}` may hold neither repeat nor choice."""
    open_groups: list[bool] = []  # whether each open group holds a repeat or a choice so far
    closed: bool | None = None  # the same of the group that has just been closed
    repeats = 0
    for piece in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[\d,]*\}|.", pattern, re.DOTALL):
        repeat = piece in {"*", "+"} or (piece.startswith("{") and piece.endswith("}"))
        if repeat:
            repeats += 1
            if closed or repeats > _MOST_REPEATS:
                raise ValueError("nests or piles up repeats and may take forever to match")
        if (repeat or piece == "|") and open_groups:
            open_groups[-1] = True
        closed = None
        if piece == "(":
            open_groups.append(False)
        elif piece == ")" and open_groups:
            closed = open_groups.pop()
            if open_groups:
                open_groups[-1] |= closed
