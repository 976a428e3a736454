"""A fixed slice of `make fuzz`: no crash, no hang, and nothing is read that a reference refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from terminal import ROOT

from fuzz.harness import Room, outcome
from fuzz.samples import KEPT, kept
from fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

INPUTS = 40
# What `make fuzz` imports from: a slice fails where that would.
_, FOUND_IN, _ = re.split(r"PYTHONPATH=(\S+) .* -m fuzz", (ROOT / "Makefile").read_text())
SEEDS = [(target, name) for target in TARGETS for name in kept(target)]


def test_every_target_has_samples_and_every_kept_seed_a_target() -> None:
    """A format without a fixture is one that nobody fuzzes."""
    unfuzzed = [name for name, target in TARGETS.items() if not target.samples]
    assert not unfuzzed, f"{unfuzzed}: no file under fixtures/ is told to be of it, 64 KiB at most"
    assert len(SEEDS) == sum(1 for _ in KEPT.glob("*/*"))


@pytest.mark.parametrize("name", TARGETS)
def test_a_slice_of_fuzzing_is_clean(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.harness", name, "7", "60", str(INPUTS)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": FOUND_IN},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["findings"] == []
    assert found["inputs"] == INPUTS
    assert found["peak_mebibytes"] < 1024


@pytest.mark.parametrize(("target", "name"), SEEDS)
def test_what_once_failed_is_read_or_refused(target: str, name: str, tmp_path: Path) -> None:
    path = Room(tmp_path).put(kept(target)[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        kind, words = outcome(TARGETS[target], path)
    assert kind in {"read", "refused"}, words
