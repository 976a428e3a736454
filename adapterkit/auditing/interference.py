"""What holding adapters against each other found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInterference:
    """Two updates of one matrix.

    Attributes:
        module: Hugging Face path, the number of an expert in brackets.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); None if one is zero, like all below.
        merge_energy_ratio: ‖ΔW₁ + ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²): 0 cancelled, 1 independent, 2 equal.
        left_overlap: ‖U₁ᵀU₂‖² / min(r₁, r₂), of output directions: 0 orthogonal, 1 contained.
        right_overlap: likewise ‖V₁ᵀV₂‖², of input directions.
        left_chance: the overlap that random subspaces of these sizes have.
        right_chance: likewise of input directions.
        left_angles: principal angles of the output directions in degrees, ascending.
        right_angles: likewise of the input directions.
        singular_task_interference: ‖(UᵀU - I) Σ (VᵀV - I)‖₁ of both together, arXiv 2412.00081.
        interference: that over Σσ; 1 for equal updates.
        sign_conflict: share of entries with opposite signs; 0.5 is chance.
        lost_energy: ‖ΔW₁‖² + ‖ΔW₂‖² - ‖ΔW₁ + ΔW₂‖²; negative if they add up.
        verdict: `opposed` (cosine under -0.1), `redundant` (over 0.5), `entangled` (both overlaps
            a quarter of the way from chance to 1), else `independent`.
    """

    module: str
    cosine: float | None
    merge_energy_ratio: float | None
    left_overlap: float | None
    right_overlap: float | None
    left_chance: float | None
    right_chance: float | None
    left_angles: tuple[float, ...]
    right_angles: tuple[float, ...]
    singular_task_interference: float | None
    interference: float | None
    sign_conflict: float | None
    lost_energy: float
    verdict: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairInterference:
    """Two adapters.

    Attributes:
        a: number of the first adapter, from 0.
        b: number of the second adapter.
        shared: matrices that both update.
        mismatched: modules that both update in different shapes.
        cosine: of all updates as one vector; what only one has counts in its norm.
        merge_energy_ratio: as in `ModuleInterference`, of all updates together.
        left_overlap: mean over the shared matrices.
        right_overlap: likewise.
        interference: likewise.
        sign_conflict: likewise.
        verdict: that of all updates together, as in `ModuleInterference`.
        clashes: modules that are opposed or entangled, the worst first.
        modules: every shared matrix, in the first adapter's order.
    """

    a: int
    b: int
    shared: int
    mismatched: tuple[str, ...]
    cosine: float | None
    merge_energy_ratio: float | None
    left_overlap: float | None
    right_overlap: float | None
    interference: float | None
    sign_conflict: float | None
    verdict: str | None
    clashes: tuple[str, ...]
    modules: tuple[ModuleInterference, ...]

    @property
    def words(self) -> str:
        """The verdict for a reader: what is independent as a whole may clash in its parts."""
        if self.verdict is None:
            return "nothing shared"
        return f"{self.verdict}, {len(self.clashes):,} clash" if self.clashes else self.verdict


@dataclass(frozen=True, slots=True)
class JointInterference:
    """One matrix in all adapters that update it.

    Attributes:
        module: Hugging Face path, the number of an expert in brackets.
        adapters: how many update it.
        merge_energy_ratio: ‖ΣΔW‖² / Σ‖ΔW‖²; None if all are zero, or not every two of them
            were compared, like both below.
        singular_task_interference: of all together, arXiv 2412.00081.
        interference: that over Σσ.
    """

    module: str
    adapters: int
    merge_energy_ratio: float | None
    singular_task_interference: float | None
    interference: float | None


@dataclass(frozen=True, slots=True)
class Interference:
    """Several adapters.

    Attributes:
        pairs: every two of them; of more than twelve, those of the largest cosines by sketches,
            copies left out.
        joint: every matrix that at least two update, for a merge of all at once.
        merge_energy_ratio: ‖ΣΔW‖² / Σ‖ΔW‖² of all adapters and modules together; of more than
            twelve an estimate from sketches.
        copies: numbers of adapters that are the same, bit for bit.
        left_out: pairs of different adapters that were compared by sketches alone.
    """

    pairs: tuple[PairInterference, ...]
    joint: tuple[JointInterference, ...]
    merge_energy_ratio: float | None
    copies: tuple[tuple[int, ...], ...] = ()
    left_out: int = 0
