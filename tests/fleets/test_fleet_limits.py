"""A fleet whose adapters hang, whose disk is full, and that is interrupted or run twice at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adapterkit import run_fleet
from adapterkit.errors import FormatError, UsageError
from adapterkit.fleets.discovery import identity
from adapterkit.fleets.running import LEDGER

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "fixtures" / "peft" / "tiny"
# A format whose files say how its reader hangs.
READER = """
import ctypes, time
from pathlib import Path
from adapterkit import FormatSpec

def read(path, options):
    how = path.read_text()
    if how == "sleep":
        time.sleep(600)
    if how == "deaf":  # holds the interpreter's lock, as compiled code may
        ctypes.PyDLL(None).sleep(600)
    raise ValueError(how)

def is_one(path):
    return path.suffix == ".hangs" and path.is_file()

HANGS = FormatSpec(
    name="hangs", title="Hangs", reader=read, probe="hangs_format:is_one", suffixes=(".hangs",)
)
"""
COMMAND = [sys.executable, "-m", "adapterkit", "fleet", "run"]


@pytest.fixture
def hanging(tmp_path: Path) -> dict[str, str]:
    """Return the environment with the plug-in."""
    place = tmp_path / "site"
    (place / "hangs-1.dist-info").mkdir(parents=True)
    (place / "hangs_format.py").write_text(READER)
    (place / "hangs-1.dist-info" / "METADATA").write_text("Name: hangs\nVersion: 1\n")
    (place / "hangs-1.dist-info" / "entry_points.txt").write_text(
        "[adapterkit.formats]\nhangs = hangs_format:HANGS\n"
    )
    paths = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths}


def ran(arguments: list[str], environment: dict[str, str], code: int) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def states(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {Path(row["path"]).name: (row["state"], row["headline"]) for row in report["results"]}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
def test_what_hangs_is_one_row_and_the_others_go_on(
    tmp_path: Path, hanging: dict[str, str]
) -> None:
    folder = tmp_path / "many"
    for number in range(6):
        shutil.copytree(TINY, folder / f"tiny-{number}")
    (folder / "asleep.hangs").write_text("sleep")
    (folder / "deaf.hangs").write_text("deaf")
    given = [str(folder), *(str(folder / f"{name}.hangs") for name in ("asleep", "deaf"))]
    line = ["inspect", *given, "-o", str(tmp_path / "r"), "--jobs", "2", "--timeout"]
    report = ran([*line, "8", "--tries", "1"], hanging, 5)
    assert (report["adapters"], report["done"], report["failed"]) == (8, 6, 2)
    found = states(report)
    for name in ("asleep.hangs", "deaf.hangs"):
        assert found[name][0] == "failed"
        assert "took longer than 8 s" in found[name][1]
    # They are not tried again, and what is known is not done again.
    assert ran([*line, "8", "--tries", "1"], hanging, 5)["looked_at"] == 0


def test_an_executor_keeps_its_own_time(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="processes of this machine"):
        run_fleet("inspect", [TINY], tmp_path / "r", dask="tcp://127.0.0.1:9", timeout=1)


def many(tmp_path: Path, count: int) -> tuple[Path, Path]:
    folder, results = tmp_path / "many", tmp_path / "results"
    for number in range(count):
        shutil.copytree(TINY, folder / f"{number:03}")
    return folder, results


def rows(results: Path) -> int:
    base = sqlite3.connect(f"file:{results / LEDGER}?mode=ro", uri=True)
    try:
        return int(base.execute("select count(*) from job").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        base.close()


def begun(results: Path, run: subprocess.Popen[str], least: int) -> None:
    deadline = time.monotonic() + 200
    while not (results / LEDGER).exists() or rows(results) < least:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupt_ends_it_and_it_goes_on(tmp_path: Path) -> None:
    folder, results = many(tmp_path, 60)
    line = [*COMMAND, "audit", str(folder), "-o", str(results), "--jobs", "2"]
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    begun(results, run, 5)
    os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C does to all of them
    _, said = run.communicate(timeout=120)
    assert run.returncode in {130, -signal.SIGINT}
    assert "Traceback" not in said
    left = rows(results)
    assert 5 <= left < 60
    report = run_fleet("audit", [folder], results, jobs=2)
    assert (report.done, report.looked_at) == (60, 60 - left)
    assert {row.tries for row in report.results} == {1}


def test_two_at_once_are_one_and_a_refusal(tmp_path: Path, hanging: dict[str, str]) -> None:
    folder, results = many(tmp_path, 3)
    asleep = folder / "asleep.hangs"
    asleep.write_text("sleep")
    line = [*COMMAND, "inspect", str(folder), str(asleep), "-o", str(results), "--jobs", "1"]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, text=True, env=hanging)
    begun(results, first, 3)
    second = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=200, env=hanging
    )
    assert second.returncode == 1
    assert "being written by another process" in second.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait(100) == 130
    assert rows(results) == 3


def test_a_full_disk_is_said_and_what_was_done_is_kept(tmp_path: Path) -> None:
    """The ledger may not grow: SQLite says what it says where a disk is full."""
    folder, results = many(tmp_path, 3)
    assert run_fleet("inspect", [folder], results, jobs=1).done == 3
    for number in range(3, 9):
        shutil.copytree(TINY, folder / f"{number:03}")
    script = tmp_path / "full.py"
    script.write_text(
        "import resource, signal, sys\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "    sys.argv[0] = 'adapterkit'\n"
        "    from adapterkit.__main__ import main\n"
        "    main()\n"
    )
    line = ["fleet", "run", "audit", str(folder), "-o", str(results), "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *line],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    report = run_fleet("inspect", [folder], results, jobs=1)
    assert (report.looked_at, report.done) == (6, 9)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="pipe: is not a regular file"):
        identity(tmp_path / "pipe")
