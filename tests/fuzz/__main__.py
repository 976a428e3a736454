"""Fuzzes every target in turn: `python -m fuzz SECONDS [FIRST_SEED]`, from the folder `tests`."""

from __future__ import annotations

import json
import subprocess
import sys

from fuzz.targets import TARGETS


def main() -> int:
    """Share the seconds among the targets; print a line for each, and return 1 for a finding."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = sys.argv[2] if len(sys.argv) > 2 else "1"
    worst = 0
    for name in TARGETS:
        share = str(seconds / len(TARGETS))
        command = [sys.executable, "-m", "fuzz.harness", name, seed, share]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: the process ended with {done.returncode}: {done.stderr[-300:]}")
            worst = 1
            continue
        found = json.loads(done.stdout)
        findings = found.pop("findings")
        print(json.dumps(found))
        for finding in findings:
            print("  ", *finding)
            worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main())
