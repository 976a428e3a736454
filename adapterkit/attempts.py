"""One function on many adapters: what fails is an attempt too, and ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from adapterkit.base import BaseModel
from adapterkit.errors import UsageError, exit_code
from adapterkit.loading import open_model
from adapterkit.model import AdapterTensorSet
from adapterkit.several import Said, each_of, named, said_of_each
from adapterkit.work import in_threads, watched

_Result = TypeVar("_Result")

# Exit codes, the worst first: what one of several inputs gives decides.
_WORST_FIRST = (2, 3, 4, 1, 5, 0)
# Arguments that are said of all sources together.
_SAID = ("dialect", "alpha", "as_format")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[_Result]):
    """What became of one source.

    Attributes:
        source: what was named.
        result: what the function returned; None if it failed.
        error: why it failed; None if it did not.
    """

    source: str
    result: _Result | None = None
    error: Exception | None = None

    @property
    def exit_code(self) -> int:
        """What the command line ends with for the error, 0 without one."""
        return 0 if self.error is None else exit_code(self.error) or 1

    @property
    def message(self) -> str:
        """The error as a sentence that names the source; empty without one."""
        error = self.error
        if isinstance(error, OSError):
            return f"{error.filename}: {error.strerror or error}"
        if isinstance(error, MemoryError):
            return f"{self.source}: not enough memory" + (f" ({error})" if str(error) else "")
        return "" if error is None else str(error)

    def get(self) -> _Result:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result  # pyright: ignore[reportReturnType]  (a function may return None)


def attempted(
    source: AdapterTensorSet | Path | str,
    function: Callable[..., _Result],
    *arguments: Any,
    **settings: Any,
) -> Attempt[_Result]:
    """Return what a call gave or why it failed.

    What has no exit code is a bug and is raised, and so is what is wrong with the arguments.
    """
    try:
        return Attempt(named(source), function(*arguments, **settings))
    except Exception as error:
        if exit_code(error) is None or (isinstance(error, UsageError) and error.path is None):
            raise
        return Attempt(named(source), error=error)


def for_each(
    function: Callable[..., _Result],
    sources: Iterable[AdapterTensorSet | Path | str],
    *,
    base: BaseModel | Path | str | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> tuple[Attempt[_Result], ...]:
    """Return function(source, **arguments) of each source, in order, several at a time.

    An error that has an exit code is the attempt of its source; a bug is raised, and so is what is
    wrong with the arguments.

    Args:
        function: takes a source first, such as `inspect`, `validate` or `read`.
        sources: files, directories or hub ids, or adapters in memory.
        base: base model of all of them, opened once; None for what each names.
        jobs: how many at a time; by default one for each processor, up to four.
        progress: told how many of how many are done; of a single source, how far the work on it is.
        arguments: what the function is given beside the source; a `dialect` and an `alpha` are for
            those sources that need them.
    """
    every = each_of(sources)
    if base is not None:
        arguments["base"] = open_model(base)
    said = {name: arguments[name] for name in _SAID if arguments.get(name) is not None}
    each = said_of_each(every, base=arguments.get("base"), **said)
    own = [name for name in ("dialect", "alpha") if name in said]

    def one(source: AdapterTensorSet | Path | str, told: Said) -> Attempt[_Result]:
        given = arguments | {name: getattr(told, name) for name in own}
        with watched(progress if len(every) == 1 else None):
            return attempted(source, function, source, **given)

    if len(every) == 1:
        return (one(every[0], each[0]),)
    with watched(progress):
        return tuple(in_threads(lambda pair: one(*pair), list(zip(every, each, strict=True)), jobs))


def worst(codes: Iterable[int]) -> int:
    """Return the exit code of several inputs: the worst of theirs."""
    return min(codes, key=_WORST_FIRST.index, default=0)


def failure(attempt: Attempt[Any]) -> dict[str, object]:
    """Return what JSON holds in place of a result that there is not."""
    told = {
        "kind": type(attempt.error).__name__,
        "message": attempt.message,
        "exit": attempt.exit_code,
    }
    return {"source": attempt.source, "error": told}
