"""Run every case that a speed or memory promise is made for, against its peer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from subprocess import check_call

import adapters
import extract
import merging
from cases import kept
from measure import alternate


def main() -> int:
    """Print the table; exit 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose title holds this text")
    arguments = parser.parse_args()
    for maker in ("inputs.py", "merging.py", "extract.py"):
        check_call([sys.executable, str(Path(__file__).with_name(maker))])
    broken = 0
    for case in (*adapters.cases(), *merging.cases(), *extract.cases()):
        if arguments.only not in case.title:
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


if __name__ == "__main__":
    sys.exit(main())
