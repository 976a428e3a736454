"""Charts as inline SVG and HTML, drawn from plain numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterkit.page import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.lowrank.products import Array

# Dark to light with even steps of lightness, told apart with any colour vision (viridis).
RAMP = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
_COLD, _WARM = (33, 102, 172), (178, 24, 43)
# From here on white is read better than the page's own ink, on light and on dark pages.
_FULL = 0.75
_FLOOR = -5.0
_LINES = 64


def colour(share: float) -> str:
    """Return the colour at 0 to 1 of the ramp."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    return _mixed(RAMP[low], RAMP[low + 1], place - low)


def diverging(value: float | None) -> str:
    """Return a style for -1 (blue) over 0 (the page itself) to 1 (red), the ink to match."""
    if value is None:
        return ""
    red, green, blue = _WARM if value > 0 else _COLD
    share = min(abs(value), 1.0)
    ink = ";color:#fff" if share > _FULL else ""
    return f"background:rgba({red},{green},{blue},{share:.2f}){ink}"


def _mixed(low: tuple[int, int, int], high: tuple[int, int, int], share: float) -> str:
    parts = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    return "rgb({},{},{})".format(*parts)


def decay(
    spectra: Sequence[tuple[str, float, Sequence[float]]], null: tuple[Array, Array] | None
) -> str:
    """Draw σ_k / σ₁ on a logarithmic axis, one line for each layer, over the band of chance.

    Args:
        spectra: name, depth from 0 to 1, and σ of each line.
        null: 5 % and 95 % quantiles of σ_k / σ₁ of random factors.
    """
    step = math.ceil(len(spectra) / _LINES)
    lines = [(name, depth, _log_relative(values)) for name, depth, values in spectra[::step]]
    count = max(len(values) for _, _, values in lines)
    lowest = min(min(values) for _, _, values in lines)
    bottom = max(min(math.floor(lowest), -1), _FLOOR)
    parts = [_frame(count, int(bottom))]
    if null is not None:
        low, high = (_log_relative(each.tolist()) for each in null)
        edge = [*_places(high, bottom), *reversed(_places(low, bottom))]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    for name, depth, values in lines:
        points = " ".join(_places(values, bottom))
        # The ends of the ramp vanish on white and on black paper.
        stroke = colour(0.12 + 0.7 * depth)
        parts.append(
            f'<polyline class="curve" stroke="{stroke}" points="{points}">'
            f"<title>{shown(name)}</title></polyline>"
        )
    return f'<svg viewBox="0 0 240 150" role="img">{"".join(parts)}</svg>'


def _log_relative(values: Sequence[float]) -> list[float]:
    return [math.log10(v / values[0]) if v > 0 else 2 * _FLOOR for v in values]


def _places(values: Sequence[float], bottom: float) -> list[str]:
    width = 200 / max(len(values) - 1, 1)
    return [
        f"{32 + index * width:.1f},{8 + 120 * min(max(value, bottom) / bottom, 1.0):.1f}"
        for index, value in enumerate(values)
    ]


def _frame(count: int, bottom: int) -> str:
    ticks = [
        (8 + 120 * power / bottom, f"1e{power}" if power else "1")
        for power in range(0, bottom - 1, -1)
    ]
    marks = "".join(
        f'<path class="axis" d="M32 {y:.1f}H232"/><text x="28" y="{y + 3:.1f}" '
        f'text-anchor="end">{label}</text>'
        for y, label in ticks
    )
    ends = f'<text x="32" y="142">1</text><text x="232" y="142" text-anchor="end">{count}</text>'
    return f'{marks}{ends}<text x="132" y="142" text-anchor="middle">direction</text>'


def trade_off_chart(
    curves: Sequence[tuple[str, str, Sequence[tuple[int, float]]]],
    points: Sequence[tuple[str, int, float]],
    whole: int,
) -> str:
    """Draw predicted error over the share of parameters.

    Args:
        curves: name, colour and (parameters, error) of each line.
        points: name, parameters and error of single plans.
        whole: parameters of the adapter as it is.
    """
    top = max((error for _, _, line in curves for _, error in line), default=0.0)
    top = max(math.ceil(top * 10) / 10, 0.1)

    def place(parameters: int, error: float) -> tuple[float, float]:
        return 40 + 340 * parameters / whole, 10 + 190 * (1 - error / top)

    parts: list[str] = []
    for step in range(5):
        x, y = 40 + 85 * step, 10 + 47.5 * step
        parts.append(
            f'<path class="axis" d="M40 {y}H380M{x} 10V200"/>'
            f'<text x="36" y="{y + 3}" text-anchor="end">{top * (1 - step / 4):.3g}</text>'
            f'<text x="{x}" y="214" text-anchor="middle">{25 * step} %</text>'
        )
    for name, stroke, line in curves:
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        parts.append(
            f'<polyline class="curve" style="stroke:{stroke};stroke-width:2" points="{path}">'
            f"<title>{shown(name)}</title></polyline>"
        )
    for name, parameters, error in points:
        x, y = place(parameters, error)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--ink)"><title>{shown(name)}: '
            f"{parameters:,} parameters, error {error:.3g}</title></circle>"
            f'<text x="{x - 6:.1f}" y="{y + 12:.1f}" text-anchor="end">{shown(name)}</text>'
        )
    parts.append('<text x="210" y="230" text-anchor="middle">parameters kept</text>')
    return f'<svg class="wide" viewBox="0 0 400 236" role="img">{"".join(parts)}</svg>'


def bars(rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Draw one or two horizontal bars for each name, all on one scale from 0."""
    top = max((v for _, values in rows for v in values if v is not None), default=0.0) or 1.0
    cells = "".join(
        f"<b>{shown(name)}</b><div>"
        + "".join(
            f'<span style="width:{100 * (value or 0.0) / top:.2f}%" '
            f'title="{shown(name)}: {"none" if value is None else f"{value:.3g}"}"></span>'
            for value in values
        )
        + "</div>"
        for name, values in rows
    )
    return f'<div class="bars">{cells}</div>'
