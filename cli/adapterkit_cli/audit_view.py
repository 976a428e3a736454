"""An audit on a terminal: at most forty lines for any adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.auditing.outliers import notable
from adapterkit.auditing.places import short_names
from adapterkit.auditing.tables import certain, family_cells, left_out, number, span
from adapterkit_cli import rendering

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit import (
        AdapterAudit,
        AuditReport,
        BaseAudit,
        Interference,
        ReferenceAudit,
        Suggestion,
    )

_LINES = 40
_FAMILIES = 12
_HEALTH = 3
_CLASHES = 4
_ADAPTERS, _COPIES = 16, 8
_STANDINGS = 5
_MANY = 1e6


def view(report: AuditReport) -> str:
    """Return the whole view of one adapter, or one line for each of several and what clashes."""
    if report.interference is None:
        lines = _single(report.adapters[0], next(iter(report.suggestions), None))
    else:
        lines = _several(report, report.interference)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"and {len(lines) - _LINES + 1} more lines; --json has all"]
    return "\n".join(lines)


def _single(audited: AdapterAudit, suggestion: Suggestion | None) -> list[str]:
    lines = rendering.sheet(_header(audited)).split("\n")
    lines += ["", *_families(audited)]
    if standing := notable(audited.modules):
        lines += ["", "stands out of its family (robust z):"]
        rows = [(f"  {module.name}", metric, f"{z:+.1f}") for module, metric, z in standing]
        lines += rendering.columns(rows).split("\n")
    if audited.reference:
        lines += ["", *_standings(audited.reference)]
    if suggestion:
        lines += ["", *_advice(audited, suggestion)]
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
                f"{rendering.count(whole.modules, 'module')}{updates}, "
                f"{rendering.count(whole.parameters, 'parameter')}, rank {span(whole.ranks)}, "
                f"scale {span(whole.scales)}, {', '.join(audited.dtypes)}, "
                f"{rendering.size(audited.bytes)}"
            ),
        ),
        ("coverage", f"{covered:,} of {rendering.count(audited.tensors, 'tensor')} measured"),
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


def _families(audited: AdapterAudit) -> list[str]:
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
    lines = rendering.columns(rows, header=header).split("\n")
    if len(audited.families) > _FAMILIES:
        lines.append(f"and {len(audited.families) - _FAMILIES:,} more families; --json has all")
    return lines


def _standings(found: ReferenceAudit) -> list[str]:
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
    title = f"furthest from the {rendering.count(found.members, 'adapter')} of the bank{others}:"
    if not rows:
        return [title, "  no z-score: that takes two adapters that differ; --json has the values"]
    header = ("  family", "statistic", "value", "mean", "z", "percentile")
    return [title, *rendering.columns(rows, header=header).split("\n")]


def _advice(audited: AdapterAudit, suggestion: Suggestion) -> list[str]:
    plan, before = suggestion.plan, audited.summary.parameters
    rows = [
        (f"  error {row.limit:.2g}", _millions(row.parameters), f"{row.parameters / before:.0%}")
        for row in suggestion.bounds
    ]
    energy = suggestion.energy_90
    different = len(plan.peft["rank_pattern"])
    others = f", {rendering.count(different, 'module')} by rank_pattern" if different else ""
    return [
        "ranks by energy per parameter, for a relative error of the whole update:",
        *rendering.columns(rows, header=("  at most", "parameters", "of now")).split("\n"),
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


def _several(report: AuditReport, found: Interference) -> list[str]:
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
    rows = rows if len(rows) <= _ADAPTERS else rows[: _ADAPTERS - 1]
    lines = rendering.columns(rows, header=header).split("\n")
    if len(report.adapters) > len(rows):
        lines.append(f"and {len(report.adapters) - len(rows):,} more adapters; --json has all")
    lines += [*_copies(report, found), ""]
    if found.pairs:
        lines += _pairs(found)
    if found.left_out:
        lines.append(f"{found.left_out:,} more pairs have smaller cosines, by sketches")
    lines += ["", f"added together: {number(found.merge_energy_ratio)} of the sum of energies"]
    for pair in found.pairs:
        if pair.clashes:
            shown = ", ".join(map(rendering.printable, pair.clashes[:_CLASHES]))
            more = len(pair.clashes) - _CLASHES
            rest = f" and {more:,} more" if more > 0 else ""
            lines.append(f"clash of {pair.a + 1} and {pair.b + 1}: {shown}{rest}")
        if pair.mismatched:
            lines.append(
                f"{pair.a + 1} and {pair.b + 1}: {len(pair.mismatched):,} modules have other "
                f"shapes, such as {rendering.printable(pair.mismatched[0])}: another base?"
            )
    return lines


def _copies(report: AuditReport, found: Interference) -> list[str]:
    """Name adapters that are the same."""
    return [
        f"{rendering.printable(report.adapters[group[0]].source or 'in memory')} ({group[0] + 1}) "
        f"is the same, bit for bit, as {_listed(group[1:])}"
        for group in found.copies
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number + 1) for number in numbers[:_COPIES])
    more = len(numbers) - _COPIES
    return shown + (f" and {more:,} more" if more > 0 else "")


def _pairs(found: Interference) -> list[str]:
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
    return rendering.columns(rows, header=header).split("\n")


def _millions(value: int) -> str:
    return f"{value / _MANY:.2f} M" if value >= _MANY else f"{value:,}"
