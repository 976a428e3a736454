"""What is known of a fleet as JSONL, as CSV and as one HTML page, the worst first."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.fleets.ledger import FleetRow
from adapterkit.fleets.running import TABLES, FleetReport
from adapterkit.output import staged

_COLUMNS = ("path", "action", "state", "exit_code", "tries", "seconds", "headline")
_SCALAR = (str, int, float, type(None))
# A page of more rows is no page; the tables hold all.
_MOST_ROWS = 2000
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid #8884; overflow-wrap: anywhere }
td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
.failed, .error { color: #b3261e } .refused { color: #9a5b00 } .warning { color: #7a6a00 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e4e4e4 }
  .failed, .error { color: #ff8a80 } .refused { color: #ffb74d } .warning { color: #e6d36a } }
"""


def write_fleet_tables(report: FleetReport, folder: Path | str) -> tuple[Path, ...]:
    """Write ACTION.jsonl, ACTION.csv and ACTION.html into a folder.

    Beside the ledger they replace those of an earlier run; elsewhere nothing is replaced.

    Raises:
        WriteError: if one cannot be written.
    """
    written: list[Path] = []
    beside = Path(report.ledger).parent.absolute() == Path(folder).absolute()
    texts = (_jsonl(report), _csv(report), _page(report))
    for suffix, text in zip(TABLES, texts, strict=True):
        path = Path(folder) / f"{report.action}.{suffix}"
        with staged(path, force=beside) as staging:
            staging.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        written.append(path)
    return tuple(written)


def _jsonl(report: FleetReport) -> str:
    rows = [{**_fields(row), "result": row.result} for row in report.results]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _fields(row: FleetRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _COLUMNS}


def _csv(report: FleetReport) -> str:
    """Return one row for each adapter; the single values of its result are columns too."""
    results = [dict(_single(row)) for row in report.results]
    names = dict.fromkeys(name for result in results for name in result)
    text = io.StringIO()
    table = csv.DictWriter(text, [*_COLUMNS, *(name for name in names if name not in _COLUMNS)])
    table.writeheader()
    for row, result in zip(report.results, results, strict=True):
        table.writerow({**result, **_fields(row)})
    return text.getvalue()


def _single(row: FleetRow) -> Iterator[tuple[str, Any]]:
    for name, value in row.result.items():
        if isinstance(value, _SCALAR):
            yield name, value
        elif name == "summary":  # of an audit
            yield from ((k, v) for k, v in value.items() if isinstance(v, _SCALAR))


def _page(report: FleetReport) -> str:
    shown = report.results[:_MOST_ROWS]
    more = len(report.results) - len(shown)
    return "".join(
        (
            "<!doctype html>\n<html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'>",
            f"<title>adapterkit fleet: {html.escape(report.action)}</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(report.action)}: {report.adapters:,} adapters</h1>",
            f"<p>{report.done:,} done, {report.refused:,} refused, {report.failed:,} failed</p>",
            _common(report),
            "<table><tr><th>adapter<th>state<th>what was found<th>seconds</tr>",
            *map(_row, shown),
            "</table>",
            f"<p>and {more:,} more; the CSV file has all</p>" if more else "",
            "</html>\n",
        )
    )


def _common(report: FleetReport) -> str:
    """Return how often each code was found, for actions whose results have findings."""
    found = Counter(
        f"{finding['severity']} {finding['code']}"
        for row in report.results
        for finding in row.result.get("findings", ())
    )
    if not found:
        return ""
    items = "".join(
        f"<tr><td class={name.split()[0]}>{html.escape(name)}<td class=number>{count:,}</tr>"
        for name, count in found.most_common()
    )
    return f"<table><tr><th>finding<th>how often</tr>{items}</table>"


def _row(row: FleetRow) -> str:
    seconds = "" if row.seconds is None or math.isnan(row.seconds) else f"{row.seconds:.2f}"
    return (
        f"<tr><td>{html.escape(row.path)}<td class={row.state}>{row.state}"
        f"<td>{html.escape(row.headline)}<td class=number>{seconds}</tr>\n"
    )
