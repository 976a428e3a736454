"""What the words of an audit mean, for readers of a report."""

from __future__ import annotations

_TEXT = """
ΔW, σ: The update of one matrix, scale · B · A, and its singular values in descending order.
Everything here is computed from them, and no data was looked at; only what stands under "against
the base" needs W.

stable rank, utilization: Σσ² / σ₁², between 1 and r; the same over r.

effective rank: exp of the entropy of σ / Σσ (Roy and Vetterli 2007).

energy rank, k90, k95, k99: The fewest directions that hold 90, 95 or 99 % of Σσ². Cutting there is
a relative error of up to 32, 22 or 10 %.

numerical rank, condition: How many σ are more than rounding of float64; σ₁ / σ_r, if all are.

null ratio, grey band: Compared with random Gaussian factors of the same shapes. A ratio of 1 is
chance, to 1 %; lower is structure.

rms, σ₁, ‖ΔW‖: Root mean square of the entries of ΔW, its spectral and its Frobenius norm.

top 8 rows, columns: Share of the energy in the eight largest rows or columns of B · A.

robust z: Distance from the median of the family in units of 1.4826 · MAD, the trend over depth
removed. Families under 16 modules have none. Over 3.5 is worth a look, and no verdict.

cosine, energy ratio: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); ‖ΔW₁ + ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²), which is 0 for
cancelled, 1 for independent and 2 for equal updates.

left and right overlap: How much of the smaller subspace of output (left) or input (right)
directions lies in the other: 0 orthogonal, 1 contained.

STI, sign conflict: Singular task interference, ‖(UᵀU - I) Σ (VᵀV - I)‖₁ over Σσ (arXiv 2412.00081);
the share of entries with opposite signs, where 0.5 is chance.

‖ΔW‖₂ / ‖W‖₂, amplification: How large an update is beside its weight; how far it raises the
directions that it writes to, ‖ΔW‖ / ‖UᵀWV‖ with U and V its singular vectors (arXiv 2106.09685).

retention, intruders: ‖Wᵀu‖ / σ of the leading singular vectors u of W + ΔW: 1 for what W had, near
0 for what is new. An intruder dimension has no cosine of ½ with any singular vector of W (arXiv
2410.21228). Weights up to 768 are decomposed for that where anything is open; for larger ones the
number is an estimate. Beside it stand how many are proven to be intruders, and how many are
possible, being not proven to be W's. None proven is not none: where many singular values of W are
close to each other or to 0, forty Lanczos steps do not tell their vectors apart, and one of them
could hold the direction. --exact decomposes all.

bank, z, percentile: Where five statistics of a family (σ₁, ‖ΔW‖, σ₁² / Σσ², entropy of σ / Σσ,
kurtosis of the entries; arXiv 2602.15195) lie among those of other adapters. Far out is unusual. It
says nothing of intent, and near says nothing either: those who know the statistics can hide from
them.

verdict: opposed is a cosine under -0.1, redundant is over 0.5, entangled is both overlaps a quarter
of the way from chance to 1, else independent. Updates that are independent here may still disturb
each other on real inputs.
"""

# (word, meaning) in the order of a report
DEFINITIONS = tuple(
    (word, " ".join(meaning.split()))
    for word, _, meaning in (entry.partition(": ") for entry in _TEXT.strip().split("\n\n"))
)
