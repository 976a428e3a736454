"""Fleets: what is found, what is kept, and what happens when anything is killed at any moment."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import fleet_calls
import pytest
from click.testing import CliRunner
from fleet_calls import call

from adapterkit import FleetReport, run_fleet, write_fleet_tables
from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    NotFoundError,
    UncheckableError,
    UsageError,
    WriteError,
)
from adapterkit.fleets.discovery import discover, identity
from adapterkit.fleets.execution import carried_out, process_pool
from adapterkit.fleets.running import LEDGER
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "peft" / "tiny"
BASE = FIXTURES / "peft" / "base"
CALLS = Path(fleet_calls.__file__)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Four adapters, of which one is broken, and what is none."""
    folder = tmp_path / "fleet"
    for name in ("a", "b/inner", "c"):
        shutil.copytree(TINY, folder / name)
    (folder / "c" / "adapter_model.safetensors").write_bytes(b"no tensors")
    shutil.copy(FIXTURES / "handwritten" / "raschka.pt", folder / "b" / "raschka.pt")
    shutil.copytree(BASE, folder / "base")
    (folder / "notes.md").write_text("nothing")
    return folder


def with_threads(action: str, folder: Path, results: Path, **more: object) -> FleetReport:
    with ThreadPoolExecutor(2) as pool:
        return run_fleet(action, [folder], results, executor=pool, **more)  # type: ignore[arg-type]


def states(report: FleetReport) -> dict[str, str]:
    return {Path(row.path).name: row.state for row in report.results}


# What is found.


def test_adapters_are_found_and_models_passed_over(fleet: Path, tmp_path: Path) -> None:
    found = [str(path.relative_to(fleet)) for path in discover([fleet])]
    assert found == ["a", "b/inner", "b/raschka.pt", "c"]
    listed = tmp_path / "some.txt"
    listed.write_text(f"{fleet / 'a'}\n\n{fleet / 'b'}\n{fleet / 'a'}\n")
    assert [p.name for p in discover([listed, fleet / "a"])] == ["a", "inner", "raschka.pt"]
    with pytest.raises(NotFoundError, match="nowhere"):
        discover([fleet / "nowhere"])


def test_a_checkpoint_of_several_files_is_one_adapter(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sharded", tmp_path / "sharded")
    shutil.copytree(FIXTURES / "tinylora" / "pack", tmp_path / "pack")
    found = [str(path.relative_to(tmp_path)) for path in discover([tmp_path])]
    sharded = ("dcp", "shards", "zero2/global_step1", "zero3/global_step1")
    assert found == ["pack", *(f"sharded/{name}" for name in sharded)]
    run = tmp_path / "sharded" / "zero2"
    shutil.copy(TINY / "adapter_config.json", run)
    assert discover([run]) == [run]


def test_a_format_that_is_said_overrules_what_files_tell(fleet: Path, tmp_path: Path) -> None:
    strange = fleet / "b" / "strange.safetensors"
    shutil.copy(FIXTURES / "tuners" / "base" / "model.safetensors", strange)
    assert strange not in discover([fleet])
    line = ["fleet", "run", "inspect", str(fleet / "b"), "-o", str(tmp_path / "r"), "--jobs", "1"]
    told = ["--from", "handwritten", "--dialect", "raschka-alpha", "--alpha", "8", "--json"]
    document = json.loads(CliRunner().invoke(cli, [*line, *told]).stdout)
    rows = {Path(row["path"]).name: row for row in document["results"]}
    assert rows["raschka.pt"]["result"]["format"] == "handwritten"
    assert rows["strange.safetensors"]["state"] == "refused"
    run = CliRunner().invoke(cli, [*line, "--from", "nothing"])
    assert (run.exit_code, "nothing" in run.output) == (2, True)


def test_the_hub_cache_is_searched(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fleet / "hub" / "models--org--name" / "snapshots" / "1234"
    shutil.copytree(TINY, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(fleet / "hub"))
    assert discover(["hub-cache"]) == [snapshot]
    assert discover(["org/name"]) == [snapshot]


def test_an_identity_is_that_of_the_content(fleet: Path) -> None:
    before = identity(fleet / "a")
    assert identity(fleet / "a") == before
    config = fleet / "a" / "adapter_config.json"
    kept = config.stat()
    config.write_bytes(config.read_bytes().replace(b"8", b"9", 1))
    os.utime(config, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert identity(fleet / "a") != before


# What is kept.


def test_what_is_known_is_not_done_again(fleet: Path, tmp_path: Path) -> None:
    first = with_threads("inspect", fleet, tmp_path / "results")
    assert states(first) == {"a": "done", "inner": "done", "raschka.pt": "refused", "c": "refused"}
    assert (first.adapters, first.looked_at, first.done, first.refused) == (4, 4, 2, 2)
    assert first.exit_code == 3
    again = with_threads("inspect", fleet, tmp_path / "results")
    assert again.looked_at == 0
    assert again.results == first.results
    shutil.copytree(TINY, fleet / "c", dirs_exist_ok=True)
    shutil.copytree(TINY, fleet / "d")
    mended = with_threads("inspect", fleet, tmp_path / "results")
    assert mended.looked_at == 2
    assert states(mended)["c"] == states(mended)["d"] == "done"
    # Another action, and the same with other options, are rows of their own.
    assert with_threads("audit", fleet, tmp_path / "results").looked_at == 5
    assert with_threads("inspect", fleet, tmp_path / "results").looked_at == 0
    options = {"base": str(BASE)}
    assert with_threads("inspect", fleet, tmp_path / "results", options=options).looked_at == 5


def test_a_changed_base_counts(fleet: Path, tmp_path: Path) -> None:
    options = {"base": str(fleet / "base")}
    assert with_threads("validate", fleet, tmp_path / "r", options=options).looked_at == 4
    config = fleet / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert with_threads("validate", fleet, tmp_path / "r", options=options).looked_at == 4


def test_what_fails_is_tried_again_but_not_for_ever(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import adapterkit.summary

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(adapterkit.summary, "inspect", fails)
        for tried in (1, 2, 3):
            report = with_threads("inspect", fleet, tmp_path / "r")
            assert (report.looked_at, report.failed) == (4, 4)
            assert {row.tries for row in report.results} == {tried}
            assert "Input/output error" in report.results[0].headline
        assert with_threads("inspect", fleet, tmp_path / "r").looked_at == 0
        assert with_threads("inspect", fleet, tmp_path / "r", tries=4).looked_at == 4
    assert with_threads("inspect", fleet, tmp_path / "r", tries=5).done == 2


def test_everything_is_converted_under_a_name_of_its_own(fleet: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, fleet / "elsewhere" / "a")
    options = {"to": "gguf", "base": str(BASE)}
    report = with_threads("convert", fleet, tmp_path / "r", options=options)
    written = sorted(path.name for path in (tmp_path / "r" / "converted").iterdir())
    assert [name.rsplit("-", 1)[0] for name in written] == ["a", "a", "inner"]
    assert all(name.endswith(".gguf") for name in written)
    done = [row for row in report.results if row.state == "done"]
    assert sorted(Path(row.result["destination"]).name for row in done) == written


def test_tables_and_a_page(fleet: Path, tmp_path: Path) -> None:
    (fleet / "a").rename(fleet / "<a>")
    report = with_threads("validate", fleet, tmp_path / "r", options={"targets": ["vllm"]})
    lines, table, page = write_fleet_tables(report, tmp_path / "r")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["path"] for row in rows] == [row.path for row in report.results]
    assert rows[-1]["result"]["source"] == rows[-1]["path"]
    with table.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row.path for row in report.results]
    text = page.read_text()
    assert "&lt;a&gt;" in text
    assert "<a>" not in text
    # The worst first.
    assert text.index("raschka.pt") < text.index("inner")


@pytest.mark.parametrize("known", [False, True], ids=["no ledger", "another action's"])
def test_tables_of_somebody_else_are_kept(fleet: Path, tmp_path: Path, known: bool) -> None:
    folder = tmp_path / "r"
    if known:
        with_threads("validate", fleet / "a", folder)
    folder.mkdir(exist_ok=True)
    (folder / "inspect.csv").write_text("mine")
    with pytest.raises(DestinationExistsError, match=r"inspect\.csv: exists already, and is no"):
        with_threads("inspect", fleet / "a", folder)
    assert (folder / LEDGER).exists() is known
    assert (folder / "inspect.csv").read_text() == "mine"
    report = with_threads("inspect", fleet / "a", tmp_path / "other")
    with pytest.raises(DestinationExistsError):
        write_fleet_tables(report, folder)
    assert (folder / "inspect.csv").read_text() == "mine"


def test_tables_of_an_empty_folder_are_written_again(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for _ in range(2):
        assert (
            len(write_fleet_tables(with_threads("inspect", tmp_path / "none", tmp_path), tmp_path))
            == 3
        )


def test_a_file_is_no_folder_for_a_ledger(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="is a file, and a ledger needs a folder; name another"):
        with_threads("inspect", fleet / "a", tmp_path / "file")


def test_a_folder_has_one_writer_and_a_ledger_is_one(fleet: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "r").mkdir()
    with (
        FileLock(tmp_path / "r" / f".{LEDGER}.lock"),
        pytest.raises(WriteError, match="being written by another process"),
    ):
        with_threads("inspect", fleet, tmp_path / "r")
    (tmp_path / "r" / LEDGER).write_text("no ledger " * 100)
    with pytest.raises(FormatError, match="is no ledger"):
        with_threads("inspect", fleet, tmp_path / "r")
    with pytest.raises(UsageError, match="known: validate, audit"):
        with_threads("bake", fleet, tmp_path / "r")


# What is killed.


def carried(executor: Callable[[], Executor], names: list[str], folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    twice: list[str] = []

    def note(rows: list[tuple[str, str]]) -> None:
        twice.extend(name for name, _ in rows if name in found)
        found.update(rows)

    carried_out(
        names,
        lambda name: (call, name, str(folder)),
        executor,
        note,
        lambda name, _: f"{name} died",
        workers=2,
    )
    assert not twice
    return found


NAMES = [*(f"plain-{i}" for i in range(30)), "once-1", "always-1", "once-2"]


def test_a_task_that_kills_its_worker_takes_no_other_with_it(tmp_path: Path) -> None:
    found = carried(lambda: process_pool(2), NAMES[::-1], tmp_path)
    died = [name for name in NAMES if found.pop(name) != f"{name} is done"]
    assert found == {}
    assert "always-1" in died
    assert set(died) <= {"once-1", "always-1", "once-2"}
    again = carried(lambda: process_pool(2), died, tmp_path)
    assert again == {name: f"{name} is done" for name in died} | {"always-1": "always-1 died"}


def test_a_script_that_guards_nothing_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import adapterkit\nadapterkit.find_similar([{str(TINY)!r}, {str(TINY)!r}], jobs=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "UncheckableError: no process could begin; in a script, call this under" in done.stderr


def test_a_broken_executor_of_the_callers_is_said(tmp_path: Path) -> None:
    with process_pool(1) as pool, pytest.raises(UncheckableError, match="run again"):
        carried(lambda: pool, ["always-1", "plain-1"], tmp_path)


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from adapterkit.fleets.execution import carried_out, process_pool
from fleet_calls import slow
if __name__ == "__main__":
    carried_out(["one", "two"], lambda n: (slow, n, sys.argv[1]), lambda: process_pool(2),
                print, lambda *a: a, workers=2)
"""


def test_workers_end_with_a_killed_driver(tmp_path: Path) -> None:
    script, marks = tmp_path / "driver.py", tmp_path / "marks"
    script.write_text(DRIVER.format(tests=str(CALLS.parent)))
    marks.mkdir()
    driver = subprocess.Popen([sys.executable, str(script), str(marks)])
    workers = waited(lambda: [int(path.name) for path in marks.iterdir()], 2)
    assert all(alive(pid) for pid in workers)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def waited(look: Callable[[], list[int]], count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := look()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """The real command, killed until it is done: every row once, the ledger whole."""
    folder, results = tmp_path / "many", tmp_path / "results"
    for number in range(60):
        shutil.copytree(TINY, folder / f"{number:03}")
    command = [sys.executable, "-m", "adapterkit", "fleet", "run", "audit", str(folder)]
    command += ["-o", str(results), "--jobs", "2"]
    counts = [0]
    while counts[-1] < 60 and len(counts) < 8:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while run.poll() is None and rows(results) < min(counts[-1] + 10, 60):
            time.sleep(0.02)
        run.kill()
        run.wait()
        counts.append(rows(results))
        assert counts[-1] >= counts[-2]
    assert len(counts) > 2
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["adapters"], report["done"], len(report["results"])) == (60, 60, 60)
    assert {row["tries"] for row in report["results"]} == {1}
    base = sqlite3.connect(results / LEDGER)
    assert base.execute("pragma integrity_check").fetchone() == ("ok",)
    base.close()


def rows(results: Path) -> int:
    if not (results / LEDGER).exists():
        return 0
    base = sqlite3.connect(results / LEDGER)
    try:
        return int(base.execute("select count(*) from job").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        base.close()


# The program.


def test_the_program_says_what_was_found(fleet: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        cli, ["fleet", "run", "inspect", str(fleet), "-o", str(tmp_path / "r"), "--jobs", "1"]
    )
    assert run.exit_code == 3
    assert "inspect: 4 adapters, 4 looked at now: 2 done, 2 refused, 0 failed" in run.output
    assert (tmp_path / "r" / "inspect.html").is_file()
    wrong = CliRunner().invoke(
        cli, ["fleet", "run", "audit", str(fleet), "-o", str(tmp_path / "r"), "--to", "gguf"]
    )
    assert wrong.exit_code == 2
    assert "--to says nothing to audit" in wrong.output
