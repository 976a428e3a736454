"""A fleet on a real Dask cluster whose workers are killed in the middle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import LocalCluster
from fleet_calls import call

from adapterkit import run_fleet
from adapterkit.errors import UsageError
from adapterkit.fleets.execution import carried_out, dask_executor

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "fixtures" / "peft" / "tiny"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    # A task may kill as many workers before it is given up; three by default.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made,
    ):
        yield made


@pytest.mark.filterwarnings("ignore")  # of Dask itself, when its workers die
def test_killed_workers_take_nothing_with_them(cluster: Any, tmp_path: Path) -> None:
    names = [*(f"plain-{i}" for i in range(20)), "once-1", "always-1"]
    found: dict[str, str] = {}
    with dask_executor(cluster.scheduler_address) as (executor, workers):
        assert workers == 2
        carried_out(
            names[::-1],
            lambda name: (call, name, str(tmp_path)),
            lambda: executor,
            found.update,
            lambda name, _: f"{name} died",
            workers=workers,
        )
    expected = {name: f"{name} is done" for name in names} | {"always-1": "always-1 died"}
    assert found == expected


@pytest.mark.filterwarnings("ignore")
def test_a_fleet_runs_on_the_cluster(cluster: Any, tmp_path: Path) -> None:
    for number in range(12):
        shutil.copytree(TINY, tmp_path / "fleet" / str(number))
    address = cluster.scheduler_address
    report = run_fleet("audit", [tmp_path / "fleet"], tmp_path / "r", dask=address)
    assert (report.adapters, report.looked_at, report.done) == (12, 12, 12)
    again = run_fleet("audit", [tmp_path / "fleet"], tmp_path / "r", dask=address)
    assert (again.looked_at, again.done) == (0, 12)


def test_nothing_at_the_address_is_said(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "a")
    with pytest.raises(UsageError, match="no Dask scheduler answers"):
        run_fleet("audit", [tmp_path / "a"], tmp_path / "r", dask="tcp://127.0.0.1:9")
