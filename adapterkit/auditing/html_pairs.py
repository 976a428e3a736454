"""The part of an HTML report that holds several adapters against each other."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.auditing.charts import bars, diverging
from adapterkit.auditing.places import place_of
from adapterkit.auditing.tables import number
from adapterkit.page import scrolled, shown, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.auditing.interference import Interference, PairInterference
    from adapterkit.auditing.report import AuditReport

_CLASHES = 12


def interference_section(report: AuditReport) -> str:
    """Return the matrix, the layers' cosines, energy ratios and clashes of a report with pairs."""
    found = report.interference
    if found is None:
        return ""
    names = _names(report)
    listed = "".join(
        f"<li>{shown(audited.source or 'in memory')}</li>" for audited in report.adapters
    )
    left = [(_pair_name(pair, names), pair.merge_energy_ratio) for pair in found.pairs]
    ratios = bars([(f"{name}: {number(ratio)}", (ratio,)) for name, ratio in left])
    clashes = "".join(_clashes(pair, names) for pair in found.pairs)
    return (
        f"<h1>{len(report.adapters)} adapters</h1><ol>{listed}</ol>"
        "<h2>Interference</h2>"
        '<p class="soft">Below the diagonal: cosine of the updates, red where they agree, blue '
        "where they oppose. Above: overlap of the output / input directions.</p>"
        f"{_matrix(found, names)}"
        f"<h2>Cosine by layer</h2>{''.join(_strip(pair, names) for pair in found.pairs)}"
        "<h2>Energy that is left after adding</h2>"
        f'<p class="soft">1 is independent, 2 is equal, below 1 cancels.</p>{ratios}'
        f"<h2>Pairs</h2>{_table(found, names)}{clashes}"
    )


def _pair_name(pair: PairInterference, names: Sequence[str]) -> str:
    return f"{names[pair.a]} and {names[pair.b]}"


def _names(report: AuditReport) -> list[str]:
    """Return each adapter's number and the last part of its path."""
    sources = [audited.source or "in memory" for audited in report.adapters]
    return [f"{place + 1} {Path(source).name}" for place, source in enumerate(sources)]


def _matrix(found: Interference, names: Sequence[str]) -> str:
    count = len(names)
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
        body += f'<tr><th scope="row">{shown(names[row])}</th>{cells}</tr>'
    return scrolled(
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"


def _strip(pair: PairInterference, names: Sequence[str]) -> str:
    """Return the mean cosine of each layer, in cells that wrap at any width."""
    layers: defaultdict[tuple[str, int], list[float | None]] = defaultdict(list)
    for module in pair.modules:
        place = place_of(module.module.partition("[")[0])
        layers[place.stack, -1 if place.layer is None else place.layer].append(module.cosine)
    cells = ""
    for (stack, layer), members in sorted(layers.items()):
        known = [cosine for cosine in members if cosine is not None]
        mean = sum(known) / len(known) if known else None
        name = "(no layer)" if layer < 0 else f"{stack}.{layer}".lstrip(".")
        cells += (
            f'<li style="{diverging(mean)}" title="{shown(name)}: mean cosine {_two(mean)}">'
            f"<small>{'no layer' if layer < 0 else layer}</small> {_two(mean)}</li>"
        )
    cells = cells or "<li>nothing shared</li>"
    return f'<h3>{shown(_pair_name(pair, names))}</h3><ol class="strip">{cells}</ol>'


def _table(found: Interference, names: Sequence[str]) -> str:
    labels = ("pair", "shared", "cosine", "energy", "left", "right", "STI", "signs", "verdict")
    rows = [
        (
            _pair_name(pair, names),
            (f"{pair.shared:,}", pair.shared),
            *(
                (number(value), value)
                for value in (
                    pair.cosine,
                    pair.merge_energy_ratio,
                    pair.left_overlap,
                    pair.right_overlap,
                    pair.interference,
                    pair.sign_conflict,
                )
            ),
            pair.words,
        )
        for pair in found.pairs
    ]
    return table(labels, rows)


def _clashes(pair: PairInterference, names: Sequence[str]) -> str:
    if not pair.clashes:
        return ""
    modules = ", ".join(shown(name) for name in pair.clashes[:_CLASHES])
    more = len(pair.clashes) - _CLASHES
    rest = f" and {more:,} more" if more > 0 else ""
    return f"<p>{shown(_pair_name(pair, names))} clash in {modules}{rest}.</p>"
