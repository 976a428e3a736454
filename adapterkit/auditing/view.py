"""An audit as text: at most forty lines for any adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.auditing.outliers import notable
from adapterkit.auditing.places import short_names
from adapterkit.auditing.tables import certain, family_cells, left_out, number, span
from adapterkit.text import PLAIN, Pen, columns, count, printable, sheet, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.auditing.base_report import BaseAudit
    from adapterkit.auditing.interference import Interference
    from adapterkit.auditing.reference_report import ReferenceAudit
    from adapterkit.auditing.report import AdapterAudit, AuditReport
    from adapterkit.lowrank.rank_plan import Suggestion

_LINES = 40
_FAMILIES = 12
_HEALTH = 3
_CLASHES = 4
_ADAPTERS, _COPIES = 16, 8
_STANDINGS = 5
_MANY = 1e6
# Exit code of what could not be checked.
_UNCHECKED = 5


def view(report: AuditReport, pen: Pen = PLAIN) -> str:
    """Return the whole view of one adapter, or one line for each of several and what clashes."""
    if len(report.adapters) == 1:
        lines = _single(report.adapters[0], next(iter(report.suggestions), None), pen)
    else:
        lines = _several(report, pen)
    lines += [
        f"{'not compared' if each.exit_code == _UNCHECKED else 'unreadable'}: "
        + printable(each.source)
        for each in report.failed
    ]
    if len(lines) > _LINES and not pen.whole:
        lines = [
            *lines[: _LINES - 1],
            f"and {len(lines) - _LINES + 1} more lines; --json or -v has all",
        ]
    return "\n".join(lines)


def _single(audited: AdapterAudit, suggestion: Suggestion | None, pen: Pen) -> list[str]:
    lines = sheet(_header(audited), pen=pen).split("\n")
    lines += ["", *_families(audited, pen)]
    if standing := notable(audited.modules):
        lines += ["", "stands out of its family (robust z):"]
        rows = [(f"  {module.name}", metric, f"{z:+.1f}") for module, metric, z in standing]
        lines += columns(rows, pen=pen).split("\n")
    if audited.reference:
        lines += ["", *_standings(audited.reference, pen)]
    if suggestion:
        lines += ["", *_advice(audited, suggestion, pen)]
    return lines


def _header(audited: AdapterAudit) -> list[tuple[str, str]]:
    whole = audited.summary
    updates = f", {whole.updates:,} matrices" if whole.updates != whole.modules else ""
    covered = audited.tensors - len(audited.unaudited)
    reasons = sorted({each.reason for each in audited.unaudited})
    return [
        ("adapter", f"{audited.source or 'in memory'} ({audited.format or 'no file'})"),
        ("base model", audited.base_model or "not recorded"),
        (
            "factors",
            (
                f"{count(whole.modules, 'module')}{updates}, "
                f"{count(whole.parameters, 'parameter')}, rank {span(whole.ranks)}, "
                f"scale {span(whole.scales)}, {', '.join(audited.dtypes)}, "
                f"{size(audited.bytes)}"
            ),
        ),
        ("coverage", f"{covered:,} of {count(audited.tensors, 'tensor')} measured"),
        *(("not measured", reason) for reason in reasons[:_HEALTH]),
        *(("health", sentence) for sentence in _health(audited)),
        *(_against(audited.base) if audited.base else ()),
        (
            "spectrum",
            (
                f"stable rank {number(whole.stable_rank_mean)} "
                f"(utilization {number(whole.utilization_mean)}), "
                f"effective rank {number(whole.effective_rank_mean)}; rank for 90 % of the energy "
                f"{number(whole.energy_rank_90_p50)}, for 99 % {number(whole.energy_rank_99_p50)}"
            ),
        ),
        (
            "size",
            (
                f"‖ΔW‖ {number(whole.frobenius_norm)}, largest σ₁ {number(whole.spectral_norm_max)}"
                f"; layers: concentration {number(whole.concentration_index_by_size)} "
                f"(even {number(1 / len(audited.layers))})"
            ),
        ),
    ]


def _against(found: BaseAudit) -> list[tuple[str, str]]:
    whole = found.summary
    largest = max(found.weights, key=lambda row: row.udr or 0.0)
    return [
        (
            "against W",
            (
                f"‖ΔW‖₂ / ‖W‖₂ {number(whole.udr_median)}, at most {number(whole.udr_max)} "
                f"({largest.name}); amplification {number(whole.amplification_median)}"
            ),
        ),
        *(("not compared", sentence) for sentence in left_out(found)[:_HEALTH]),
        (
            "intruders",
            (
                f"{whole.intruder_dimensions:,} of the {whole.leading_directions:,} leading "
                f"directions of W + ΔW are not W's ({certain(found)}), least retention "
                f"{number(whole.retention_min)}"
            ),
        ),
    ]


def _health(audited: AdapterAudit) -> list[str]:
    shown = list(audited.health[:_HEALTH])
    if len(audited.health) > _HEALTH:
        shown.append(f"and {len(audited.health) - _HEALTH} more; --json has all")
    return shown or ["every factor is finite, every update is trained and of full rank"]


def _families(audited: AdapterAudit, pen: Pen) -> list[str]:
    short = short_names(row.family for row in audited.families)
    rows = [
        (
            short[row.family],
            *family_cells(row),
            "-" if row.energy_share is None else f"{row.energy_share:.0%}",
        )
        for row in audited.families[:_FAMILIES]
    ]
    header = ("family", "n", "rank", "stable", "eff.", "k90", "k99", "rms", "σ₁ max", "energy")
    lines = columns(rows, header=header, pen=pen).split("\n")
    if len(audited.families) > _FAMILIES:
        lines.append(f"and {len(audited.families) - _FAMILIES:,} more families; --json has all")
    return lines


def _standings(found: ReferenceAudit, pen: Pen) -> list[str]:
    """Return what lies furthest out of the bank; how far is too far, no one knows."""
    scored = [(row, row.z) for row in found.standings if row.z is not None]
    scored.sort(key=lambda item: -abs(item[1]))
    rows = [
        (
            f"  {row.family}",
            row.statistic,
            number(row.value),
            number(row.mean),
            f"{z:+.1f}",
            number(row.percentile),
        )
        for row, z in scored[:_STANDINGS]
    ]
    others = f", {found.other_bases} of another base model" if found.other_bases else ""
    title = f"furthest from the {count(found.members, 'adapter')} of the bank{others}:"
    if not rows:
        return [title, "  no z-score: that takes two adapters that differ; --json has the values"]
    header = ("  family", "statistic", "value", "mean", "z", "percentile")
    return [title, *columns(rows, header=header, pen=pen).split("\n")]


def _advice(audited: AdapterAudit, suggestion: Suggestion, pen: Pen) -> list[str]:
    plan, before = suggestion.plan, audited.summary.parameters
    rows = [
        (f"  error {row.limit:.2g}", _millions(row.parameters), f"{row.parameters / before:.0%}")
        for row in suggestion.bounds
    ]
    energy = suggestion.energy_90
    different = len(plan.peft["rank_pattern"])
    others = f", {count(different, 'module')} by rank_pattern" if different else ""
    return [
        "ranks by energy per parameter, for a relative error of the whole update:",
        *columns(rows, header=("  at most", "parameters", "of now"), pen=pen).split("\n"),
        (
            f"90 % of every module's energy: {_millions(energy.parameters)} parameters, but "
            f"{energy.relative_error:.0%} relative error"
        ),
        (
            f"advice ({plan.policy}): r {plan.peft['r']}{others}; "
            f"{_millions(plan.parameters)} parameters, relative error {plan.relative_error:.3f}"
        ),
        "--json has rank_pattern and alpha_pattern for PEFT; `adapterkit compress` carries it out",
    ]


def _several(report: AuditReport, pen: Pen) -> list[str]:
    rows = [
        (
            f"{index + 1}",
            audited.source or "in memory",
            f"{audited.summary.modules:,}",
            span(audited.summary.ranks),
            number(audited.summary.stable_rank_mean),
            number(audited.summary.frobenius_norm),
            "; ".join(audited.health) or "sound",
        )
        for index, audited in enumerate(report.adapters)
    ]
    header = ("", "adapter", "modules", "rank", "stable", "‖ΔW‖", "health")
    shown = rows if len(rows) <= _ADAPTERS else rows[: _ADAPTERS - 1]
    lines = columns(shown, header=header, pen=pen).split("\n")
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown):,} more adapters; --json has all")
    return lines + (_together(report, report.interference, pen) if report.interference else [])


def _together(report: AuditReport, found: Interference, pen: Pen) -> list[str]:
    """Return copies, every two adapters held against each other, and what clashes."""
    lines = [*_copies(report, found), ""]
    if found.pairs:
        lines += _pairs(found, pen)
    if found.left_out:
        lines.append(f"{found.left_out:,} more pairs have smaller cosines, by sketches")
    lines += ["", f"added together: {number(found.merge_energy_ratio)} of the sum of energies"]
    for pair in found.pairs:
        if pair.clashes:
            shown = ", ".join(map(printable, pair.clashes[:_CLASHES]))
            more = len(pair.clashes) - _CLASHES
            rest = f" and {more:,} more" if more > 0 else ""
            lines.append(f"clash of {pair.a + 1} and {pair.b + 1}: {shown}{rest}")
        if pair.mismatched:
            lines.append(
                f"{pair.a + 1} and {pair.b + 1}: {len(pair.mismatched):,} modules have other "
                f"shapes, such as {printable(pair.mismatched[0])}: another base?"
            )
    return lines


def _copies(report: AuditReport, found: Interference) -> list[str]:
    """Name adapters that are the same."""
    return [
        f"{printable(report.adapters[group[0]].source or 'in memory')} ({group[0] + 1}) "
        f"is the same, bit for bit, as {_listed(group[1:])}"
        for group in found.copies
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number + 1) for number in numbers[:_COPIES])
    more = len(numbers) - _COPIES
    return shown + (f" and {more:,} more" if more > 0 else "")


def _pairs(found: Interference, pen: Pen) -> list[str]:
    """Return the table of every two adapters."""
    rows = [
        (
            f"{pair.a + 1} {pair.b + 1}",
            f"{pair.shared:,}",
            number(pair.cosine),
            number(pair.merge_energy_ratio),
            number(pair.left_overlap),
            number(pair.right_overlap),
            number(pair.interference),
            number(pair.sign_conflict),
            pair.words,
        )
        for pair in found.pairs
    ]
    header = ("pair", "shared", "cosine", "energy", "left", "right", "STI", "signs", "verdict")
    return columns(rows, header=header, pen=pen).split("\n")


def _millions(value: int) -> str:
    return f"{value / _MANY:.2f} M" if value >= _MANY else f"{value:,}"
