"""The part of an HTML report that holds several adapters against each other."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.auditing.charts import bars, diverging, shown
from adapterkit.auditing.places import place_of
from adapterkit.auditing.tables import number

if TYPE_CHECKING:
    from adapterkit.auditing.interference import Interference, PairInterference
    from adapterkit.auditing.report import AuditReport

_CLASHES = 12


def interference_section(report: AuditReport) -> str:
    """Return the matrix, the layers' cosines, energy ratios and clashes of a report with pairs."""
    found = report.interference
    if found is None:
        return ""
    names = "".join(
        f"<li>{shown(audited.source or 'in memory')}</li>" for audited in report.adapters
    )
    ratios = bars(
        [
            (f"{_pair_name(pair)}: {number(pair.merge_energy_ratio)}", (pair.merge_energy_ratio,))
            for pair in found.pairs
        ]
    )
    return (
        f"<h1>{len(report.adapters)} adapters</h1><ol>{names}</ol>"
        "<h2>Interference</h2>"
        '<p class="soft">Below the diagonal: cosine of the updates, red where they agree, blue '
        "where they oppose. Above: overlap of the output / input directions.</p>"
        f"{_matrix(found, len(report.adapters))}"
        f"<h2>Cosine by layer</h2>{''.join(_strip(pair) for pair in found.pairs)}"
        "<h2>Energy that is left after adding</h2>"
        f'<p class="soft">1 is independent, 2 is equal, below 1 cancels.</p>{ratios}'
        f"<h2>Pairs</h2>{_table(found)}{''.join(_clashes(pair) for pair in found.pairs)}"
    )


def _pair_name(pair: PairInterference) -> str:
    return f"{pair.a + 1} and {pair.b + 1}"


def _matrix(found: Interference, count: int) -> str:
    pairs = {(pair.a, pair.b): pair for pair in found.pairs}
    head = "".join(f'<th scope="col">{column + 1}</th>' for column in range(count))
    body = ""
    for row in range(count):
        cells = ""
        for column in range(count):
            if row == column:
                cells += "<td>·</td>"
            elif row > column:
                cosine = pairs[column, row].cosine
                cells += f'<td style="{diverging(cosine)}">{_two(cosine)}</td>'
            else:
                pair = pairs[row, column]
                cells += f"<td>{_two(pair.left_overlap)} / {_two(pair.right_overlap)}</td>"
        body += f'<tr><th scope="row">{row + 1}</th>{cells}</tr>'
    return (
        '<div class="scroll"><table class="heat"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _strip(pair: PairInterference) -> str:
    layers: defaultdict[tuple[str, int], list[tuple[str, float | None]]] = defaultdict(list)
    for module in pair.modules:
        place = place_of(module.module.partition("[")[0])
        layers[place.stack, -1 if place.layer is None else place.layer].append(
            (module.module, module.cosine)
        )
    cells = ""
    for (stack, layer), members in sorted(layers.items()):
        known = [cosine for _, cosine in members if cosine is not None]
        mean = sum(known) / len(known) if known else None
        name = "(no layer)" if layer < 0 else f"{stack}.{layer}".lstrip(".")
        label = "·" if layer < 0 else str(layer)
        cells += (
            f'<td style="{diverging(mean)}" title="{shown(name)}: mean cosine {_two(mean)}">'
            f"{label}</td>"
        )
    return (
        f'<div class="scroll"><table class="heat"><tbody><tr><th scope="row">{_pair_name(pair)}'
        f"</th>{cells or '<td>nothing shared</td>'}</tr></tbody></table></div>"
    )


def _table(found: Interference) -> str:
    labels = ("pair", "shared", "cosine", "energy", "left", "right", "STI", "signs", "verdict")
    head = "".join(f'<th scope="col">{label}</th>' for label in labels)
    body = "".join(
        f"<tr><td>{_pair_name(pair)}</td><td>{pair.shared:,}</td>"
        + "".join(
            f"<td>{number(value)}</td>"
            for value in (
                pair.cosine,
                pair.merge_energy_ratio,
                pair.left_overlap,
                pair.right_overlap,
                pair.interference,
                pair.sign_conflict,
            )
        )
        + f"<td>{pair.words}</td></tr>"
        for pair in found.pairs
    )
    return (
        f'<div class="scroll"><table class="list"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _clashes(pair: PairInterference) -> str:
    if not pair.clashes:
        return ""
    names = ", ".join(shown(name) for name in pair.clashes[:_CLASHES])
    more = len(pair.clashes) - _CLASHES
    rest = f" and {more:,} more" if more > 0 else ""
    return f"<p>{_pair_name(pair)} clash in {names}{rest}.</p>"
