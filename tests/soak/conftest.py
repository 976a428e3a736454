"""Inputs and reference outputs, made once for each scale."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from soak.commands import INTO_DIRECTORY
from soak.inputs import Inputs, make_inputs
from soak.references import References
from soak.runs import undisturbed
from soak.scales import QUICK, SOAK, Scale

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave rows that only the whole has out of the quick slice."""
    dropped = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("scale") is QUICK
        and item.get_closest_marker("soak")
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(QUICK, id=QUICK.name),
        pytest.param(SOAK, id=SOAK.name, marks=pytest.mark.soak),
    ],
)
def scale(request: pytest.FixtureRequest) -> Scale:
    """Size of the models and number of repetitions: the quick slice, or the whole."""
    return request.param


@pytest.fixture(scope="session")
def workshop(scale: Scale) -> Generator[Path]:
    """A folder for gigabytes, gone at the end whatever happens."""
    with tempfile.TemporaryDirectory(prefix=f"soak-{scale.name}-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def inputs(workshop: Path, scale: Scale) -> Inputs:
    """Base, adapters and a tuned model."""
    made = make_inputs(workshop / "inputs", scale)
    ended = undisturbed(INTO_DIRECTORY.words(made, made.tuned))
    assert ended.code == 0, ended
    return made


@pytest.fixture(scope="session")
def references(workshop: Path, inputs: Inputs) -> References:
    """What undisturbed runs write."""
    return References(workshop / "references", inputs)


@pytest.fixture
def place(workshop: Path) -> Generator[Path]:
    """An empty folder for destinations."""
    with tempfile.TemporaryDirectory(dir=workshop, prefix="place-") as folder:
        yield Path(folder)
