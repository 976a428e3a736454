"""What the program asks of the libraries under numpy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Wakes the threads of BLAS, and tells what they burn while nothing is to do.
IDLE = """
import time
from adapterkit_cli.runtime import settle_threads
settle_threads()
import numpy
square = numpy.ones((600, 600))
square @ square
time.sleep(0.02)
before = time.process_time()
time.sleep(0.3)
print(time.process_time() - before)
"""


def burnt(**environment: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", IDLE],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return float(done.stdout)


def test_idle_threads_of_blas_sleep() -> None:
    assert burnt() < 0.01


def test_what_the_user_says_of_them_stays() -> None:
    assert burnt(OPENBLAS_THREAD_TIMEOUT="30") > 0.02
