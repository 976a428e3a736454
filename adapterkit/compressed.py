"""What a compression gives: the smaller adapter, or its file, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterkit.lowrank.rank_plan import ModuleRank
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import Loss
from adapterkit.text import PLAIN, Pen, Shown, count, line, short, size, span


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompressReport(Shown):
    """What a compression did.

    Attributes:
        policy: how the ranks were chosen, in words.
        parameters_before: elements of all factors of the source.
        parameters: elements of all factors that are left.
        predicted_error: ‖ΔW - ΔW_k‖ / ‖ΔW‖ of all modules together, from the spectra.
        measured_error: the same, computed from the new factors as they are stored.
        max_module_error: largest predicted error of a single module.
        modules: the ranks, in file order.
        notes: what to know of the result, one sentence each.
    """

    policy: str
    parameters_before: int
    parameters: int
    predicted_error: float
    measured_error: float
    max_module_error: float
    modules: tuple[ModuleRank, ...]
    notes: tuple[str, ...] = ()
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what it cost."""
        del pen
        return (
            f"cost: relative error {short(self.measured_error)} of ΔW, "
            f"predicted {short(self.predicted_error)} ({self.policy})"
        )


@dataclass(frozen=True, slots=True, repr=False)
class CompressResult(Shown):
    """A compressed adapter.

    Attributes:
        adapter: the same modules and scales, with smaller factors.
        report: what that cost.
    """

    adapter: AdapterTensorSet
    report: CompressReport

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what it cost."""
        return self.report.text(pen)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each module."""
        return self.report.rows()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompressedFile(Shown):
    """A compressed adapter on disk.

    Attributes:
        source: path that was read.
        destination: path that was written.
        format: name of the format that was written.
        bytes_before: size of the source's tensors.
        bytes: size of the file, or of all files of the directory.
        max_relative_error: largest relative error of a single update of the written file against
            the compressed adapter: storage alone.
        worst_module: where that is.
        report: what the compression cost.
        losses: what was dropped, with `allow_lossy`.
        notes: what was normalised on the way.
    """

    source: str
    destination: str
    format: str
    bytes_before: int
    bytes: int
    max_relative_error: float
    worst_module: str | None
    report: CompressReport
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, what it cost, and the proof."""
        report = self.report
        share = (
            f"{report.parameters / report.parameters_before:.0%} of {report.parameters_before:,}"
        )
        written = line(
            self.destination,
            self.format,
            count(len(report.modules), "module"),
            span("rank", (module.rank for module in report.modules)),
            f"{count(report.parameters, 'parameter')} ({share})",
            size(self.bytes),
        )
        proof = (
            f"proof: written as computed, largest relative error {short(self.max_relative_error)}"
        )
        return f"{written}\n{report.text(pen)}\n{proof}"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each module."""
        return self.report.rows()

    def remarks(self) -> list[tuple[str, str]]:
        """Return what the file says, and then what the compression does."""
        return [*Shown.remarks(self), *self.report.remarks()]
