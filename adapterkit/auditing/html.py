"""An audit as one self-contained HTML page: charts, tables and definitions, without a network."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterkit.auditing.charts import RAMP, bars, decay, trade_off_chart
from adapterkit.auditing.definitions import DEFINITIONS
from adapterkit.auditing.html_base import base_section, reference_section
from adapterkit.auditing.html_heat import heat_map
from adapterkit.auditing.html_pairs import interference_section
from adapterkit.auditing.null_model import null_model
from adapterkit.auditing.outliers import notable
from adapterkit.auditing.places import short_names
from adapterkit.auditing.plan import suggestion, trade_off
from adapterkit.auditing.report import AdapterAudit, AuditReport, LayerShare, ModuleAudit
from adapterkit.auditing.tables import facts, number
from adapterkit.lowrank.rank_plan import Suggestion
from adapterkit.page import copied, natural, page, scrolled, shown, table, write_page

_COLUMNS = (
    ("rank", "rank"),
    ("scale", "scale"),
    ("stable", "stable_rank"),
    ("util.", "utilization"),
    ("eff.", "effective_rank"),
    ("k90", "energy_rank_90"),
    ("k95", "energy_rank_95"),
    ("k99", "energy_rank_99"),
    ("num. rank", "numerical_rank"),
    ("cond.", "condition"),
    ("null ratio", "null_ratio"),
    ("σ₁", "spectral_norm"),
    ("‖ΔW‖", "frobenius_norm"),
    ("rms", "rms"),
    ("rms z", "rms_z"),
    ("rows top 8", "row_top8"),
    ("col. top 8", "column_top8"),
)
# A page stays under a megabyte: whoever has more rows than this, or more adapters, wants the CSV.
_ROWS = 1000
_DETAILED = 3


def html_page(report: AuditReport) -> str:
    """Return the whole page; it asks for nothing from anywhere, and its policy forbids it to."""
    names = [audited.source or "adapter" for audited in report.adapters]
    body = "".join(
        _title(audited, index, len(names))
        + _overview(audited, f"heat{index}")
        + _details(
            audited,
            next(iter(report.suggestions[index : index + 1]), None),
            len(names),
            f"advice{index}",
        )
        for index, audited in enumerate(report.adapters)
    )
    pairs = interference_section(report) if report.interference else ""
    words = "".join(f"<dt>{shown(w)}</dt><dd>{shown(text)}</dd>" for w, text in DEFINITIONS)
    return page(
        f"Spectral audit: {', '.join(names)}",
        f'{pairs}{body}<h2>Definitions</h2><dl class="words">{words}</dl>',
        data=f'<script id="ramp" type="application/json">{json.dumps(RAMP)}</script>',
    )


def write_html(report: AuditReport, destination: Path | str, *, force: bool = False) -> None:
    """Write the page.

    Args:
        report: what to show.
        destination: file to create.
        force: replace a page that is there.

    Raises:
        DestinationExistsError: if there is something at the destination that is no page, or
            `force` is false.
        WriteError: if it cannot be written.
    """
    write_page(html_page(report), destination, force=force)


def _title(audited: AdapterAudit, index: int, count: int) -> str:
    number_of_it = f"{index + 1}. " if count > 1 else ""
    return f"<h1>{number_of_it}{shown(audited.source or 'Adapter in memory')}</h1>"


def _overview(audited: AdapterAudit, name: str) -> str:
    return "".join(
        (_facts(audited), _health(audited), heat_map(audited, name), _layers(audited.layers))
    )


def _details(audited: AdapterAudit, advice: Suggestion | None, count: int, name: str) -> str:
    if count > _DETAILED:
        return (
            f'<p class="soft">Spectra and every module are on pages of up to {_DETAILED} adapters, '
            "and in --csv.</p>"
        )
    return "".join(
        (
            _decays(audited),
            base_section(audited.base) if audited.base else "",
            reference_section(audited.reference) if audited.reference else "",
            _trade_off(audited, advice or suggestion(audited), name),
            _table(audited),
        )
    )


def _facts(audited: AdapterAudit) -> str:
    whole = audited.summary
    rows = (
        *facts(audited),
        ("energy rank 90 / 99 %", _both(whole.energy_rank_90_p50, whole.energy_rank_99_p50)),
        ("‖ΔW‖ / largest σ₁", _both(whole.frobenius_norm, whole.spectral_norm_max)),
        ("tensors measured", f"{audited.tensors - len(audited.unaudited)} of {audited.tensors}"),
    )
    cells = "".join(f"<div><dt>{shown(k)}</dt><dd>{shown(v)}</dd></div>" for k, v in rows)
    return f'<dl class="facts">{cells}</dl>'


def _both(first: float | None, second: float | None) -> str:
    return f"{number(first)} / {number(second)}"


def _health(audited: AdapterAudit) -> str:
    lines = [f"<li>{shown(sentence)}</li>" for sentence in audited.health]
    lines += [
        f'<li class="look">stands out of its family: {shown(module.name)}, {metric}, '
        f"robust z {z:+.1f}</li>"
        for module, metric, z in notable(audited.modules)
    ]
    reasons: defaultdict[str, int] = defaultdict(int)
    for each in audited.unaudited:
        reasons[each.reason] += 1
    lines += [
        f'<li class="look">{count} not measured: {shown(why)}</li>'
        for why, count in reasons.items()
    ]
    if not audited.health:
        text = "every factor is finite, every update is trained and of full rank"
        lines.insert(0, f'<li class="good">{text}</li>')
    lines += [f'<li class="good">{shown(note)}</li>' for note in audited.notes]
    return f'<ul class="health">{"".join(lines)}</ul>'


def _decays(audited: AdapterAudit) -> str:
    figures: list[str] = []
    short = short_names(family.family for family in audited.families)
    for family in audited.families:
        members = [m for m in audited.modules if m.family == family.family and m.spectral_norm]
        if not members:
            continue
        deepest = max(1, *(module.layer or 0 for module in members))
        lines = [
            (module.name, (module.layer or 0) / deepest, module.singular_values)
            for module in members
        ]
        alike = {(module.shape, module.rank) for module in members}
        null = null_model(*members[0].shape, members[0].rank) if len(alike) == 1 else None
        chart = decay(lines, null.band() if null else None)
        figures.append(f"<figure><h3>{shown(short[family.family])}</h3>{chart}</figure>")
    return (
        "<h2>Decay of the singular values</h2>"
        '<p class="soft">σ over σ₁ by direction, one line for each layer, dark is early and light '
        "is late. The grey band is where random factors of the same shapes lie: a spectrum inside "
        f'it has no directions of its own.</p><div class="plots">{"".join(figures)}</div>'
    )


def _layers(layers: Sequence[LayerShare]) -> str:
    rows = [(layer.name, (layer.energy_share, layer.mean_square_share)) for layer in layers]
    return (
        "<h2>Where the update is</h2>"
        '<p class="legend"><i></i>share of the energy<i class="second"></i>the same, '
        f"normalised by the size of the matrices</p>{bars(rows)}"
    )


def _trade_off(audited: AdapterAudit, advice: Suggestion, name: str) -> str:
    whole, plan = audited.summary.parameters, advice.plan
    greedy = [(point.parameters, point.relative_error) for point in trade_off(audited)]
    uniform = [(point.parameters, point.relative_error) for point in advice.uniform]
    chart = trade_off_chart(
        [("greedy ranks", "var(--accent)", greedy), ("uniform rank", "var(--second)", uniform)],
        [
            ("advice", plan.parameters, plan.relative_error),
            ("90 % of each", advice.energy_90.parameters, advice.energy_90.relative_error),
        ],
        whole,
    )
    peft = json.dumps(dict(plan.peft), indent=1)
    rows = [
        (
            (f"{row.limit:.2g}", row.limit),
            (f"{row.parameters:,}", row.parameters),
            (f"{row.parameters / whole:.0%}", row.parameters / whole),
        )
        for row in advice.bounds
    ]
    return (
        "<h2>Size against error</h2>"
        '<p class="legend"><i></i>ranks by energy per parameter<i class="second"></i>one rank '
        "everywhere. The error is ‖ΔW - ΔW'‖ / ‖ΔW‖ of the whole update; keeping 90 % of the "
        f"energy is an error of 0.32.</p>{chart}"
        f"{table(('error at most', 'parameters', 'of now'), rows)}"
        f'<p class="soft">Advice ({shown(plan.policy)}), for PEFT:</p>'
        f"{copied(peft, name)}"
    )


def _table(audited: AdapterAudit) -> str:
    modules = sorted(audited.modules, key=lambda module: natural(module.name))
    head = "".join(
        f'<th scope="col"><button type="button">{shown(label)}</button></th>'
        for label in ("module", *(label for label, _ in _COLUMNS))
    )
    body = "".join(_row(module) for module in modules[:_ROWS])
    left = len(audited.modules) - _ROWS
    more = f'<p class="soft">{left:,} more rows: see --csv.</p>' if left > 0 else ""
    return f"<h2>Every module</h2>{more}" + scrolled(
        f'<table class="list sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        tall=True,
    )


def _row(module: ModuleAudit) -> str:
    return f"<tr><td>{shown(module.name)}</td>{''.join(_cells(module))}</tr>"


def _cells(module: ModuleAudit) -> Iterator[str]:
    for _, field in _COLUMNS:
        value = getattr(module, field)
        # Sorted by the number itself, not by its three digits.
        text, exact = number(value), "" if value is None else f"{value:.6g}"
        yield f"<td>{text}</td>" if text == exact else f'<td data-v="{exact}">{text}</td>'
