"""The layer by module heat map of a page, with a switch between metrics."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from adapterkit.auditing.charts import RAMP
from adapterkit.auditing.places import short_names
from adapterkit.page import scrolled, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.auditing.base_report import BaseAudit, WeightAudit
    from adapterkit.auditing.report import AdapterAudit, ModuleAudit

_Metrics = tuple[tuple[str, str, bool], ...]

# label, field, whether differences are a matter of factors
_OF_UPDATE: _Metrics = (
    ("utilization (stable rank / r)", "utilization", False),
    ("stable rank", "stable_rank", False),
    ("effective rank", "effective_rank", False),
    ("energy rank 90 %", "energy_rank_90", False),
    ("energy rank 99 %", "energy_rank_99", False),
    ("stable rank over chance", "null_ratio", False),
    ("root mean square of ΔW", "rms", True),
    ("spectral norm of ΔW", "spectral_norm", True),
    ("energy in the top 8 rows", "row_top8", False),
    ("energy in the top 8 columns", "column_top8", False),
)
_BESIDE_WEIGHT: _Metrics = (
    ("‖ΔW‖₂ / ‖W‖₂", "udr", True),
    ("‖ΔW‖ / ‖W‖, Frobenius", "udr_f", True),
    ("amplification", "amplification", True),
    ("least retention", "least_retention", False),
    ("intruder dimensions", "intruder_dimensions", False),
)
_PRINTED_COLUMNS = 16
_Cell = tuple[str, str]


def heat_map(audited: AdapterAudit, name: str) -> str:
    """Return the map of one adapter; with a base, its metrics too.

    Args:
        audited: the adapter.
        name: unique on the page.
    """
    cells: defaultdict[_Cell, list[ModuleAudit]] = defaultdict(list)
    short = short_names(family.family for family in audited.families)
    for module in audited.modules:
        cells[_row_name(module), short[module.family]].append(module)
    weights = _weights(audited.base)
    columns = list(short.values())
    head = "".join(f'<th scope="col">{shown(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{shown(label)}</th>'
        + "".join(_cell(cells.get((row, column), []), weights, (row, column)) for column in columns)
        + "</tr>"
        for row, label in _labels(audited).items()
    )
    ramp = ", ".join("rgb({},{},{})".format(*stop) for stop in RAMP)
    return (
        "<h2>Layer by module</h2>"
        f'<p><select data-heat="{name}" aria-label="metric">{_options(audited)}</select>'
        f'<span class="key" id="{name}-key"><span></span>'
        f'<i style="background:linear-gradient(90deg,{ramp})"></i><span></span></span></p>'
        + scrolled(
            f'<table class="heat" id="{name}" '
            f'data-numbers="{int(len(columns) <= _PRINTED_COLUMNS)}">'
            f"<thead><tr><th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    )


def _options(audited: AdapterAudit) -> str:
    groups = [("the update", _OF_UPDATE)]
    if audited.base is not None:
        groups.append(("beside its weight", _BESIDE_WEIGHT))
    options, place = "", 0
    for title, metrics in groups:
        options += f'<optgroup label="{title}">'
        for label, _, factors in metrics:
            options += f'<option value="{place}" data-log="{int(factors)}">{label}</option>'
            place += 1
        options += "</optgroup>"
    return options


def _labels(audited: AdapterAudit) -> dict[str, str]:
    """Return what to write beside each row: the number alone, where there is one stack only."""
    stacks = {layer.stack for layer in audited.layers if layer.layer is not None}
    return {
        layer.name: f"{layer.layer}" if len(stacks) == 1 and layer.layer is not None else layer.name
        for layer in audited.layers
    }


def _row_name(module: ModuleAudit) -> str:
    return "(no layer)" if module.layer is None else f"{module.stack}.{module.layer}".lstrip(".")


def _weights(base: BaseAudit | None) -> dict[tuple[str, int | None], WeightAudit] | None:
    """Return the row of each module, or expert; None without a base."""
    if base is None:
        return None
    return {(module, row.expert): row for row in base.weights for module in row.modules}


def _cell(
    modules: Sequence[ModuleAudit],
    weights: Mapping[tuple[str, int | None], WeightAudit] | None,
    place: _Cell,
) -> str:
    if not modules:
        return '<td class="none" title="not adapted"></td>'
    values = [_median(getattr(module, field) for module in modules) for _, field, _ in _OF_UPDATE]
    if weights is not None:
        rows = [weights.get((module.module, module.expert)) for module in modules]
        values += [
            _median(getattr(row, field) for row in rows if row) for _, field, _ in _BESIDE_WEIGHT
        ]
    many = f" (median of {len(modules)})" if len(modules) > 1 else ""
    label = shown(f"{' '.join(place)}{many}")
    return f'<td data-v="{shown(json.dumps(values))}" data-t="{label}"></td>'


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{np.median(known):.5g}") if known else None
