"""Who is whose copy: copies across formats, rescaled ones, near copies, sums of known adapters."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.base import BaseModel
from adapterkit.fingerprints import unit_distance
from adapterkit.fleets.ledger import FleetRow
from adapterkit.fleets.running import run_fleet
from adapterkit.loading import load
from adapterkit.text import PLAIN, Pen, Shown, count, from_here, printable, short

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.fleets.relations import Sum, Twin

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


# Two norms that print alike.
_EQUAL = 5e-4
_WORDS = {"same": "is", "rounded": "is, but for rounding,", "near": "is nearly"}
# Adapters that are listed of those about which there is something to remark.
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """An adapter that does what another does, up to a factor.

    Attributes:
        path: the later one by path.
        of: the nearest of those before it.
        kind: `same`, `rounded` as storage in another type leaves it, or `near`.
        ratio: ‖ΔW‖ over that of the other, negative where it does the opposite.
        distance: ‖ΔW/‖ΔW‖ ∓ ΔW'/‖ΔW'‖‖; 0 for the same update, 1.41 for unrelated ones.
        exact: whether the distance was computed from the factors; else it is the sketch's.
        partial: whether one of the two does more than its updates (DoRA's magnitudes, saved
            modules, replicated layers), which is not compared.
    """

    path: str
    of: str
    kind: str
    ratio: float
    distance: float
    exact: bool
    partial: bool

    def __str__(self) -> str:
        """Return it as a sentence."""
        times = "" if abs(self.ratio - 1) < _EQUAL else f"{self.ratio:.4g} times "
        apart = short(self.distance) + ("" if self.exact else " by its sketch")
        path, of = from_here(self.path), from_here(self.of)
        subject = f"the update of {path}" if self.partial else path
        other = f"that of {of}" if self.partial else of
        return f"{subject} {_WORDS[self.kind]} {times}{other} (distance {apart})"


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyMerge:
    """An adapter that is the weighted sum of others, as far as a sketch tells.

    Attributes:
        path: the adapter.
        parents: what it is made of, copies of them aside.
        weights: ΔW = Σ weight · ΔW of a parent.
        residual: ‖ΔW - Σ‖ / ‖ΔW‖, right to a few hundredths of itself.
        exact: whether that is what rounding explains; else it was cut, or made in another way.
        partial: whether one of all does more than its updates, which is not compared.
    """

    path: str
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    residual: float
    exact: bool
    partial: bool

    def __str__(self) -> str:
        """Return it as a sentence."""
        terms = " + ".join(
            f"{weight:.3g} · {from_here(parent)}"
            for weight, parent in zip(self.weights, self.parents, strict=True)
        )
        verb = "is" if self.exact else "is close to"
        subject = f"the update of {from_here(self.path)}" if self.partial else from_here(self.path)
        return f"{subject} {verb} {terms} (residual {short(self.residual)})"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SimilarityReport(Shown):
    """Who is whose copy in a fleet.

    Attributes:
        adapters: how many were compared.
        copies: one for each adapter that is a copy of an earlier one.
        clusters: sets of adapters that copies hold together, the first by path first.
        merges: sums of others.
        untrained: adapters that change nothing.
        unplaced: GGUF adapters in llama.cpp's row order, because no base was given: only with each
            other are they compared rightly.
        partial: adapters that do more than their updates say, which is not compared.
        unread: adapters without a fingerprint, and why.
        cosine_error: standard deviation of the cosine that the sketch gives two unrelated adapters.
    """

    adapters: int
    copies: tuple[Copy, ...]
    clusters: tuple[tuple[str, ...], ...]
    merges: tuple[LikelyMerge, ...]
    untrained: tuple[str, ...]
    unplaced: tuple[str, ...]
    partial: tuple[str, ...]
    unread: Mapping[str, str]
    cosine_error: float
    _entries = "copies"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return a sentence for each copy and each merge."""
        del pen
        head = (
            f"{count(self.adapters, 'adapter')}: {len(self.copies):,} copies in "
            f"{count(len(self.clusters), 'cluster')}, {count(len(self.merges), 'merge')}"
        )
        idle = (f"{from_here(path)} changes nothing" for path in self.untrained)
        return "\n".join(map(printable, [head, *map(str, (*self.copies, *self.merges)), *idle]))

    def remarks(self) -> list[tuple[str, str]]:
        """Return what was not compared, and why."""
        told = (
            (self.unplaced, "rows in llama.cpp's order; give --base to compare with other formats"),
            (
                self.partial,
                "what it does beside its updates (trained tensors, settings) is not compared",
            ),
        )
        notes = [("note", f"{from_here(n)}: {why}") for names, why in told for n in names[:_SHOWN]]
        return [*notes, *(("unread", f"{from_here(p)}: {why}") for p, why in self.unread.items())]


def find_similar(
    sources: Sequence[Path | str],
    *,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    folder: Path | str | None = None,
    confirm: bool = True,
    merges: bool = True,
    executor: Executor | None = None,
    dask: str | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimilarityReport:
    """Find adapters that are copies of each other, in any formats, and sums of each other.

    Every adapter is read once, for a sketch of 4 kB; pairs that are found are confirmed from their
    factors.

    Args:
        sources: as `run_fleet` takes them.
        base: the base model of all, where a format's row order depends on it.
        dialect: key grammar of hand-written files.
        alpha: scale numerator of files that do not hold it.
        as_format: name of the format to read all as, where their content does not tell.
        folder: where the sketches are kept, so that the next call reads what is new alone; by
            default nowhere.
        confirm: whether to compute the distance of every copy from the factors.
        merges: whether to look for sums.
        executor: where adapters are read; by default processes of this machine.
        dask: address of a Dask scheduler, in place of an executor.
        jobs: how many are read side by side.
        progress: takes how many adapters are read, and of how many.

    Raises:
        NotFoundError: if there is nothing at a source.
        WriteError: if another process uses the folder.
    """
    known = str(base.path) if isinstance(base, BaseModel) else base and str(base)
    given = {"base": known, "dialect": dialect, "alpha": alpha, "as_format": as_format}
    options = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        where = folder or stack.enter_context(TemporaryDirectory(prefix="adapterkit-"))
        report = run_fleet(
            "fingerprint",
            sources,
            where,
            options=options,
            executor=executor,
            dask=dask,
            jobs=jobs,
            progress=progress,
        )
    done = sorted((row for row in report.results if row.state == "done"), key=lambda row: row.path)
    trained = [row for row in done if row.result["norm"]]
    copies, clusters, found = _related(trained, merges=merges)
    if confirm:
        copies = [_confirmed(copy, options) for copy in copies]
    from adapterkit.lowrank.fingerprints import COSINE_ERROR

    return SimilarityReport(
        adapters=len(done),
        copies=tuple(copies),
        clusters=clusters,
        merges=found,
        untrained=tuple(
            row.path for row in done if not row.result["norm"] and not row.result["beside"]
        ),
        unplaced=tuple(row.path for row in done if row.result["unplaced"]),
        partial=tuple(row.path for row in done if row.result["beside"]),
        unread={row.path: row.headline for row in report.results if row.state != "done"},
        cosine_error=COSINE_ERROR,
    )


def _related(
    rows: Sequence[FleetRow], *, merges: bool
) -> tuple[list[Copy], tuple[tuple[str, ...], ...], tuple[LikelyMerge, ...]]:
    if not rows:
        return [], (), ()
    import numpy as np

    from adapterkit.fleets import relations

    sketches = [base64.b64decode(row.result["sketch"]) for row in rows]
    vectors = np.stack([np.frombuffer(each, "<f4") for each in sketches]).astype(np.float64)
    norms = [float(row.result["norm"]) for row in rows]
    paths = [row.path for row in rows]
    found = list(relations.twins(vectors))
    partial = [bool(row.result["beside"]) for row in rows]
    copies = [_copy(twin, paths, norms, partial) for twin in found]
    first = first_of_each(len(rows), found)
    groups: dict[int, list[str]] = defaultdict(list)
    for place, path in enumerate(paths):
        groups[first[place]].append(path)
    known = sorted(groups) if merges else []
    sums = relations.sums(vectors, known) if len(known) > 1 else []
    return (
        copies,
        tuple(tuple(group) for group in groups.values() if len(group) > 1),
        tuple(_merge(each, paths, norms, partial) for each in sums),
    )


def first_of_each(count: int, found: Iterable[Twin]) -> list[int]:
    """Return for each the first of its cluster; a twin is always of an earlier one."""
    first = list(range(count))
    for twin in found:
        first[twin.index] = first[twin.of]
    return first


def _copy(
    twin: Twin, paths: Sequence[str], norms: Sequence[float], partial: Sequence[bool]
) -> Copy:
    return Copy(
        path=paths[twin.index],
        of=paths[twin.of],
        kind=_kind(twin.distance),
        ratio=twin.sign * norms[twin.index] / norms[twin.of],
        distance=twin.distance,
        exact=False,
        partial=partial[twin.index] or partial[twin.of],
    )


def _kind(distance: float) -> str:
    from adapterkit.fleets.relations import ROUNDED, SAME

    return "same" if distance < SAME else "rounded" if distance < ROUNDED else "near"


def _merge(
    each: Sum, paths: Sequence[str], norms: Sequence[float], partial: Sequence[bool]
) -> LikelyMerge:
    from adapterkit.fleets.relations import ROUNDED

    weights = zip(each.weights, each.parents, strict=True)
    return LikelyMerge(
        path=paths[each.index],
        parents=tuple(paths[parent] for parent in each.parents),
        weights=tuple(weight * norms[each.index] / norms[parent] for weight, parent in weights),
        residual=each.residual,
        exact=each.residual <= ROUNDED,
        partial=any(partial[member] for member in (each.index, *each.parents)),
    )


def _confirmed(copy: Copy, options: Mapping[str, Any]) -> Copy:
    first, second = (load(path, **options).adapter for path in (copy.of, copy.path))
    distance = unit_distance(first, second, sign=-1 if copy.ratio < 0 else 1)
    return replace(copy, distance=distance, kind=_kind(distance), exact=True)
