"""Settings for all tests."""

from __future__ import annotations

import os
import signal
from difflib import get_close_matches
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]

# The same examples on every machine, so that a failure is the change's; to search for new ones:
# HYPOTHESIS_PROFILE=search pytest tests/properties
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Models are built here or not at all.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell in the background has its programs ignore these, and what is ignored stays ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The counts of tests/soak reach the end of the run through every process.
pytest_plugins = ["soak.counts"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the family that `make family` runs the checks of."""
    parser.addoption("--family", help="only what tests this family's tables and rows")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a family that nothing is named after, before the long work of finding its tests.

    Raises:
        pytest.UsageError: naming those that are spelled alike.
    """
    family = config.getoption("--family")
    folders = ("adapterkit/architectures/families", "tests/engine/families")
    known = sorted({file.stem for folder in folders for file in (ROOT / folder).glob("*.toml")})
    if family and family not in known:
        alike = ", ".join(get_close_matches(family, known))
        raise pytest.UsageError(
            f"there is no family {family!r}: NAME is that of a file in {folders[0]}"
            f"{', such as ' if alike else ''}{alike}"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one family, by its name or by a row of it.

    Raises:
        pytest.UsageError: if no test speaks of it.
    """
    family = config.getoption("--family")
    if not family:
        return
    from engine import family_row, family_rows

    rows = (*family_rows(), *family_rows(encoder=True))
    names = {family, *(row for row in rows if family_row(row).family == family)}
    kept = [item for item in items if names & set(_parameters(item))]
    if not kept:
        raise pytest.UsageError(
            f"no test speaks of a family {family!r}: NAME is that of a file in"
            " adapterkit/architectures/families"
        )
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _parameters(item: pytest.Item) -> list[str]:
    _, _, written = item.name.partition("[")
    return [written.removesuffix("]")]
