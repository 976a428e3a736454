"""The parts of a page that need more than the adapter: its base, or a bank of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.auditing.tables import certain, number
from adapterkit.page import Cell, shown, table

if TYPE_CHECKING:
    from adapterkit.auditing.base_report import BaseAudit
    from adapterkit.auditing.reference_report import ReferenceAudit

_ROWS = 1000


def _cell(value: float | None) -> Cell:
    return number(value), value


def base_section(found: BaseAudit) -> str:
    """Return updates beside their weights, one row for each."""
    whole = found.summary
    rows = [
        (
            row.name,
            *map(_cell, (row.udr, row.udr_f, row.amplification, row.least_retention)),
            _cell(row.intruder_dimensions),
            row.dtype,
        )
        for row in found.weights[:_ROWS]
    ]
    head = ("module", "spectral", "Frobenius", "amplification", "least retention", "intruders", "W")
    left = len(found.weights) - _ROWS
    more = f" {left:,} more rows: see --json." if left > 0 else ""
    return (
        f'<h2>Against the base</h2><p class="soft">‖ΔW‖ / ‖W‖ in {shown(found.path)}. '
        f"{whole.intruder_dimensions:,} of {whole.leading_directions:,} leading directions of "
        f"W + ΔW are not W's ({certain(found)}); largest residual {number(whole.residual_max)}."
        f"{more}</p>{_missing(found)}{table(head, rows)}"
    )


def _missing(found: BaseAudit) -> str:
    """Return the modules that no weight was found for, the first of each reason by name."""
    reasons: dict[str, list[str]] = {}
    for row in found.not_compared:
        reasons.setdefault(row.reason, []).append(row.module)
    lines = "".join(
        f'<li class="look">not compared: {shown(modules[0])}'
        f"{f' and {len(modules) - 1:,} more' if len(modules) > 1 else ''}: {shown(reason)}</li>"
        for reason, modules in reasons.items()
    )
    return f'<ul class="health">{lines}</ul>' if lines else ""


def reference_section(found: ReferenceAudit) -> str:
    """Return where an adapter stands in a bank, the furthest first; no verdict."""
    rows = [
        (
            row.family,
            row.statistic,
            *map(_cell, (row.value, row.mean, row.deviation, row.z, row.percentile)),
        )
        for row in sorted(found.standings, key=lambda row: -abs(row.z or 0.0))[:_ROWS]
    ]
    head = ("family", "statistic", "value", "mean", "deviation", "z", "percentile")
    return (
        f'<h2>Beside {found.members:,} others</h2><p class="soft">Statistics that have told '
        f"backdoored adapters apart, and where they lie in the bank {shown(found.path)}. Far out "
        f"is unusual; neither far nor near is a verdict.</p>{table(head, rows)}"
    )
