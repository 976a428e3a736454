"""An audit as tables: CSV of every module, Markdown for a model card."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from adapterkit.auditing.places import short_names
from adapterkit.auditing.report import AdapterAudit, AuditReport, FamilyAudit, ModuleAudit
from adapterkit.notes import first_and_more
from adapterkit.spreadsheet import csv_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.auditing.base_report import BaseAudit
    from adapterkit.auditing.interference import Interference
    from adapterkit.lowrank.rank_plan import Suggestion

_MARKS = "\\`*_[]<>|#~&$:"


def csv_table(report: AuditReport) -> str:
    """Return one row for each matrix of each adapter; empty cells are null.

    The columns are `adapter` (its path) and the fields of `ModuleAudit`; shapes and singular values
    are separated by spaces. What cannot be printed is written as an escape, and text that a
    spreadsheet would take for a formula has an apostrophe before it.
    """
    names = [field.name for field in fields(ModuleAudit)]
    rows = (
        (audited.source, *(getattr(module, name) for name in names))
        for audited in report.adapters
        for module in audited.modules
    )
    return csv_text(["adapter", *names], rows)


def markdown(report: AuditReport) -> str:
    """Return a section for a model card: what each adapter is, by family, and what to cut."""
    suggestions = report.suggestions or (None,) * len(report.adapters)
    lines: list[str] = []
    for audited, suggestion in zip(report.adapters, suggestions, strict=True):
        lines += [*_adapter(audited), *(_advice(suggestion) if suggestion else ())]
    if report.interference:
        lines += _interference(report.adapters, report.interference)
    lines += [
        (
            "Stable rank: Σσ² / σ₁². Effective rank: exp of the entropy of σ / Σσ. Energy rank: "
            "fewest directions that hold the share of Σσ². All from the factors, scale included."
        ),
    ]
    return "\n".join(lines) + "\n"


def _adapter(audited: AdapterAudit) -> Iterator[str]:
    yield from (f"### Spectral audit of {_escaped(audited.source or 'an adapter')}", "")
    yield from _table(("", ""), _facts(audited))
    yield ""
    short = short_names(family.family for family in audited.families)
    yield from _table(
        ("family", "updates", "rank", "stable", "effective", "k90", "k99", "rms", "σ₁ max"),
        [(short[row.family], *family_cells(row)) for row in audited.families],
    )
    yield ""


def family_cells(row: FamilyAudit) -> tuple[str, ...]:
    """Return updates, rank, stable, effective, k90, k99, rms and largest σ₁ of a family."""
    return (
        f"{row.updates:,}",
        span(row.ranks),
        number(row.stable_rank_median),
        number(row.effective_rank_median),
        number(row.energy_rank_90_median),
        number(row.energy_rank_99_median),
        number(row.rms_median),
        number(row.spectral_norm_max),
    )


def facts(audited: AdapterAudit) -> list[tuple[str, str]]:
    """Return what an adapter is and the means of its modules, by name."""
    whole = audited.summary
    return [
        ("base model", audited.base_model or "not recorded"),
        ("format", f"{audited.format or 'in memory'}, {', '.join(audited.dtypes)}"),
        ("modules", f"{whole.modules:,}"),
        ("parameters", f"{whole.parameters:,}"),
        ("rank", span(whole.ranks)),
        ("scale", span(whole.scales)),
        ("stable rank, mean", number(whole.stable_rank_mean)),
        ("effective rank, mean", number(whole.effective_rank_mean)),
        ("utilization, mean", number(whole.utilization_mean)),
    ]


def _facts(audited: AdapterAudit) -> list[tuple[str, str]]:
    whole = audited.summary
    return [
        *facts(audited),
        ("energy rank 90 %, median", number(whole.energy_rank_90_p50)),
        ("energy rank 99 %, median", number(whole.energy_rank_99_p50)),
        ("‖ΔW‖, Frobenius", number(whole.frobenius_norm)),
        *(_against(audited.base) if audited.base else ()),
        *(("note", sentence) for sentence in audited.health),
    ]


def _against(found: BaseAudit) -> Iterator[tuple[str, str]]:
    whole = found.summary
    yield "‖ΔW‖₂ / ‖W‖₂, median", number(whole.udr_median)
    yield "‖ΔW‖₂ / ‖W‖₂, largest", number(whole.udr_max)
    yield (
        f"intruders ({certain(found)})",
        f"{whole.intruder_dimensions:,} of {whole.leading_directions:,} leading directions",
    )


def left_out(found: BaseAudit) -> list[str]:
    """Name what was not compared, the modules of one reason together."""
    reasons: dict[str, list[str]] = {}
    for row in found.not_compared:
        reasons.setdefault(row.reason, []).append(row.module)
    return [f"{first_and_more(modules)}: {reason}" for reason, modules in reasons.items()]


def certain(found: BaseAudit) -> str:
    """Say how certain a number of intruders is."""
    least, most = found.summary.intruder_range
    if least == most:
        return "exact"
    return f"estimate: {f'{least:,}' if least else 'none'} proven, {most:,} possible"


def _advice(suggestion: Suggestion) -> Iterator[str]:
    yield from ("Smaller adapters, by greedy rank per module:", "")
    yield from _table(
        ("relative error at most", "parameters", "predicted error"),
        [
            (f"{row.limit:.3g}", f"{row.parameters:,}", f"{row.relative_error:.3g}")
            for row in suggestion.bounds
        ],
    )
    yield ""


def _interference(adapters: Sequence[AdapterAudit], found: Interference) -> Iterator[str]:
    yield from ("### Interference", "")
    yield from _table(
        ("A", "B", "cosine", "energy ratio", "left", "right", "sign conflict", "verdict"),
        [
            (
                adapters[pair.a].source or f"adapter {pair.a + 1}",
                adapters[pair.b].source or f"adapter {pair.b + 1}",
                number(pair.cosine),
                number(pair.merge_energy_ratio),
                number(pair.left_overlap),
                number(pair.right_overlap),
                number(pair.sign_conflict),
                pair.words,
            )
            for pair in found.pairs
        ],
    )
    yield ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(_escaped, row)) + " |"


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, names from files included."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    for mark in _MARKS:
        flat = flat.replace(mark, "\\" + mark)
    # Addresses become links without any mark.
    return flat.replace("www.", "www\\.")


def number(value: float | None) -> str:
    """Return a measured number in three digits, or a dash where there is none."""
    return "-" if value is None else f"{value:z.3g}"


def span(ends: tuple[float, float]) -> str:
    """Return `8` or `8 to 64`."""
    low, high = ends
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
