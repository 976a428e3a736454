"""Run every case that a speed or memory promise is made for, against its peer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from subprocess import check_call

import adapters
import extract
import merging
from cases import Case, kept
from measure import alternate, installed


def main() -> int:
    """Print the table; exit 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose title holds this text")
    parser.add_argument("--against", type=Path, help="another checkout, whose commands run in turn")
    arguments = parser.parse_args()
    for maker in ("inputs.py", "merging.py", "extract.py"):
        check_call([sys.executable, str(Path(__file__).with_name(maker))])
    broken = 0
    for case in (*adapters.cases(), *merging.cases(), *extract.cases()):
        if arguments.only not in case.title:
            continue
        if arguments.against:
            compare(case, arguments.against, arguments.rounds)
            continue
        commands = {"ours": case.ours} | ({"peer": case.peer} if case.peer else {})
        runs = alternate(commands, min(arguments.rounds, case.rounds or 100), case.fresh)
        print(case.title, flush=True)
        for name, run in runs.items():
            print(f"  {name:6} {run.wall:7.3f} s wall {run.cpu:7.3f} s CPU {run.peak:7.0f} MiB")
        for promise, (figure, holds) in kept(case, runs["ours"], runs.get("peer")).items():
            broken += not holds
            verdict = "kept" if holds else "BROKEN"
            limit = f"{case.promises[promise]:,g}"
            print(f"  {promise}: {figure:,.2f} (promised {limit}) {verdict}", flush=True)
    return 1 if broken else 0


def compare(case: Case, checkout: Path, rounds: int) -> None:
    """Print one line: medians of this checkout's command, and their ratios to another one's."""
    commands = {"ours": case.ours, "theirs": [*installed(checkout), *case.ours]}
    runs = alternate(commands, rounds, case.fresh)
    ours, theirs = runs["ours"], runs["theirs"]
    print(
        f"{case.title}: {ours.wall:.3f} s wall ({ours.wall / theirs.wall:.2f} times), "
        f"{ours.cpu:.3f} s CPU ({ours.cpu / theirs.cpu:.2f}), "
        f"{ours.peak:.0f} MiB ({ours.peak / theirs.peak:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
