"""The parts of a page that need more than the adapter: its base, or a bank of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.audit.charts import shown
from adapterkit.audit.tables import number

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.audit.base_report import BaseAudit
    from adapterkit.audit.reference_report import ReferenceAudit

_ROWS = 2000


def base_section(found: BaseAudit) -> str:
    """Return updates beside their weights, one row for each."""
    whole = found.summary
    rows = [
        (
            row.name,
            *map(number, (row.udr, row.udr_f, row.amplification)),
            number(min(row.retention)) if row.retention else "-",
            "-" if row.intruder_dimensions is None else str(row.intruder_dimensions),
            row.dtype,
        )
        for row in found.weights[:_ROWS]
    ]
    rows += [(row.module, row.reason) for row in found.not_compared[:_ROWS]]
    head = ("module", "spectral", "Frobenius", "amplification", "least retention", "intruders", "W")
    return (
        f'<h2>Against the base</h2><p class="soft">‖ΔW‖ / ‖W‖ in {shown(found.path)}. '
        f"{whole.intruder_dimensions:,} of {whole.leading_directions:,} leading directions of "
        f"W + ΔW are not W's ({found.method}); largest residual {number(whole.residual_max)}.</p>"
        f"{_table(head, rows)}"
    )


def reference_section(found: ReferenceAudit) -> str:
    """Return where an adapter stands in a bank, the furthest first; no verdict."""
    rows = [
        (
            row.family,
            row.statistic,
            *map(number, (row.value, row.mean, row.deviation, row.z, row.percentile)),
        )
        for row in sorted(found.standings, key=lambda row: -abs(row.z or 0.0))[:_ROWS]
    ]
    head = ("family", "statistic", "value", "mean", "deviation", "z", "percentile")
    return (
        f'<h2>Beside {found.members:,} others</h2><p class="soft">Statistics that have told '
        f"backdoored adapters apart, and where they lie in the bank {shown(found.path)}. Far out "
        f"is unusual; neither far nor near is a verdict.</p>{_table(head, rows)}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    labels = "".join(f'<th scope="col">{label}</th>' for label in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll tall"><table class="list"><thead><tr>{labels}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
