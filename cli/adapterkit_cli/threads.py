"""How many threads numpy may use; to be settled before numpy is imported."""

from __future__ import annotations

import os


def single_threaded_blas() -> None:
    """Keep BLAS to one thread, unless the user said otherwise.

    The matrices are thin: several modules at once is faster than several threads for each, which
    on a busy machine mostly wait for each other and burn its processors.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
