"""A fixed slice of `make fuzz`: no crash, no hang, and nothing is read that a reference refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fuzz.targets import TARGETS
from terminal import ROOT

INPUTS = 80


@pytest.mark.parametrize("name", TARGETS)
def test_a_slice_of_fuzzing_is_clean(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.harness", name, "7", "60", str(INPUTS)],
        cwd=ROOT / "tests",
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
