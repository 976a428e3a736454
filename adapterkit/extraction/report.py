"""What an extraction found; every field is a number, a text or a list of these."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.notes import Loss
from adapterkit.text import PLAIN, Pen, Shown, columns, count, line, printable, short, size, span

# Left-over tensors that are listed.
_LISTED = 8
# Shares below this are not worth a word.
_SOME = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedModule:
    """One matrix whose difference was factored; experts of one parameter count together.

    Attributes:
        module: Hugging Face path in the adapter.
        tensor: name in the tuned checkpoint.
        rank: inner dimension that was written.
        norm: ‖ΔW‖, Frobenius.
        relative_norm: ‖ΔW‖ / ‖W‖ of the base; None where W is zero.
        relative_error: ‖ΔW - B·A‖ / ‖ΔW‖ of the stored factors, measured against both checkpoints.
        rounding: ‖E‖ / ‖ΔW‖, where E is the rounding of the tuned weights to their stored type, by
            its statistics; None for quantised types other than Q8_0.
        explained: share of ‖ΔW - B·A‖² that this rounding explains, 1 at most; None where that is
            not known, or nothing is left.
        dtype: stored type of the factors.
    """

    module: str
    tensor: str
    rank: int
    norm: float
    relative_norm: float | None
    relative_error: float
    rounding: float | None
    explained: float | None
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOver:
    """A tensor that differs, and that no factors hold.

    Attributes:
        tensor: name in the tuned checkpoint.
        reason: why.
        relative_norm: ‖ΔW‖ / ‖W‖; None where the shapes differ, W is zero, or it holds no numbers.
        saved: whether the adapter holds it whole, as a saved module.
        rounding: whether it differs by no more than the rounding of its stored type.
    """

    tensor: str
    reason: str
    relative_norm: float | None
    saved: bool = False
    rounding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExtractReport(Shown):
    """A whole extraction.

    Attributes:
        base: path of the base checkpoint.
        tuned: path of the tuned checkpoint.
        destination: path that was written.
        format: name of the format that was written.
        rank: the number that was asked for, or `auto`.
        tolerance: largest relative error that was asked for; None where noise decided.
        seed: of the random directions.
        modules: every factored matrix, in the tuned checkpoint's order.
        left_over: every tensor that differs and is in no factors.
        equal: tensors that are the same in both checkpoints.
        parameters: stored elements that were written.
        bytes: size of the file, or of all files of the directory.
        max_relative_error: largest of the modules.
        worst_module: where that is.
        proof_error: largest relative error of an update read back from the file, against the
            factors that were computed.
        losses: what the target cannot hold and was dropped, with `allow_lossy`.
        warnings: what the user should know.
        notes: what was decided on the way.
    """

    base: str
    tuned: str
    destination: str
    format: str
    rank: int | str
    tolerance: float | None
    seed: int
    modules: tuple[ExtractedModule, ...]
    left_over: tuple[LeftOver, ...]
    equal: int
    parameters: int
    bytes: int
    max_relative_error: float
    worst_module: str | None
    proof_error: float
    losses: tuple[Loss, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, its error, the proof, and what no factors hold."""
        modules, parameters = (
            count(len(self.modules), "module"),
            count(self.parameters, "parameter"),
        )
        written = line(self.destination, self.format, modules, parameters, size(self.bytes))
        return "\n".join([written, *self._error(), *self._left_over(pen)])

    def _error(self) -> list[str]:
        if not self.modules:
            return []
        ranks = span("rank", (module.rank for module in self.modules))
        error = short(self.max_relative_error)
        said = f"{ranks}, largest relative error {error} ({printable(self.worst_module or '')})"
        worst = max(self.modules, key=lambda module: module.relative_error)
        if worst.explained is not None and worst.explained >= _SOME:
            kind = "of which rounding of the tuned weights explains"
            said += f", {kind} {worst.explained:.0%}"
        proof = short(self.proof_error)
        return [said, f"proof: written as computed, largest relative error {proof}"]

    def _left_over(self, pen: Pen) -> list[str]:
        # Rounding alone is a note: it may be in every tensor of the model.
        found = [left for left in self.left_over if not left.rounding]
        rows = [
            (
                left.tensor,
                short(left.relative_norm),
                left.reason + (" (saved whole)" if left.saved else ""),
            )
            for left in pen.shown(found, _LISTED)
        ]
        if not rows:
            return []
        more = len(found) - len(rows)
        table = columns(rows, header=("not in factors", "‖ΔW‖/‖W‖", "because it"), pen=pen)
        return [table, *([f"and {more:,} more, which --json lists"] if more else [])]
