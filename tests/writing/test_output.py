"""What is written appears whole, is written by one at a time, and replaces nothing of others."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from adapterkit import disk, output
from adapterkit.destination import Directory, check_destination
from adapterkit.errors import DestinationExistsError, UsageError, WriteError
from adapterkit.output import Output, staged, uninterrupted

if TYPE_CHECKING:
    from pathlib import Path

KIND = Directory("thing", lambda: ("thing.json",), lambda: ("thing.json", "thing-*.bin"))


def write(path: Path, **files: str) -> None:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)


def listed(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir()) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class TestNewNames:
    def test_a_file_appears_at_the_end(self, tmp_path: Path) -> None:
        with staged(tmp_path / "a") as path:
            path.write_text("new")
            assert not (tmp_path / "a").exists()
        assert listed(tmp_path) == {"a": "new"}

    @pytest.mark.parametrize("kind", [None, KIND])
    def test_an_error_leaves_nothing_parents_included(
        self, kind: Directory | None, tmp_path: Path
    ) -> None:
        def fails() -> None:
            with staged(tmp_path / "new" / "er" / "a", directory=kind) as path:
                path.mkdir() if kind else path.write_text("half")
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", [None, KIND])
    @pytest.mark.parametrize("own_call", [True, False])
    def test_a_name_taken_meanwhile_is_not_replaced(
        self,
        kind: Directory | None,
        own_call: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not own_call:
            monkeypatch.setattr(disk, "_rename_call", lambda: None)

        def late() -> None:
            with staged(tmp_path / "a", directory=kind) as path:
                if kind is None:
                    path.write_text("mine")
                    (tmp_path / "a").write_text("theirs")
                else:
                    write(path, thing_json="mine")
                    write(tmp_path / "a", theirs_txt="theirs")

        with pytest.raises(DestinationExistsError, match="meanwhile"):
            late()
        assert "theirs" in {*listed(tmp_path).values(), *listed_inside(tmp_path / "a")}
        assert hidden(tmp_path) == []

    def test_without_links_the_place_is_held(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "_rename_call", lambda: None)

        def unable(*_: object, **__: object) -> None:
            raise OSError(95, "not supported")

        monkeypatch.setattr(os, "link", unable)
        with staged(tmp_path / "a") as path:
            path.write_text("new")
        assert listed(tmp_path) == {"a": "new"}

    def test_an_empty_directory_is_a_new_name(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with staged(tmp_path / "a", directory=KIND) as path:
            write(path, thing_json="new")
        assert listed(tmp_path / "a") == {"thing.json": "new"}

    def test_a_name_of_any_length_that_the_system_allows(self, tmp_path: Path) -> None:
        with staged(tmp_path / ("n" * 255)) as path:
            path.write_text("new")
        assert [p.name for p in tmp_path.iterdir()] == ["n" * 255]
        with (
            pytest.raises(WriteError, match="too long"),
            staged(tmp_path / ("n" * 256)),
        ):
            pass
        with pytest.raises(UsageError, match="no path"):
            check_destination(tmp_path / "a\0b")


def listed_inside(path: Path) -> list[str]:
    return list(listed(path).values()) if path.is_dir() else []


class TestForce:
    def test_a_regular_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        with pytest.raises(DestinationExistsError, match="pass --force"), staged(tmp_path / "a"):
            pass
        with staged(tmp_path / "a", force=True) as path:
            path.write_text("new")
        assert listed(tmp_path) == {"a": "new"}

    @pytest.mark.parametrize("kind", [None, KIND])
    @pytest.mark.parametrize("what", ["fifo", "socket", "link", "loop", "other"])
    def test_nothing_else_is(self, kind: Directory | None, what: str, tmp_path: Path) -> None:
        target = tmp_path / "a"
        if what == "fifo":
            os.mkfifo(target)
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(target))
        elif what == "link":
            (tmp_path / "real").write_text("old")
            target.symlink_to(tmp_path / "real")
        elif what == "loop":
            target.symlink_to(target)
        elif kind is None:
            write(target, thesis_txt="mine")
        else:
            target.write_text("a file in the place of a directory")
        mode = target.lstat().st_mode
        with (
            pytest.raises(DestinationExistsError, match=r"name another|name what"),
            staged(target, force=True, directory=kind),
        ):
            pass
        assert target.lstat().st_mode == mode
        assert hidden(tmp_path) == []

    @pytest.mark.parametrize("in_one_step", [True, False])
    def test_a_directory_gets_new_parts_and_keeps_what_is_not_of_its_kind(
        self, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not in_one_step:
            monkeypatch.setattr(output, "exchange", lambda *_: False)
        target = tmp_path / "a"
        write(target, thing_json="old", **{"thing-1_bin": "old"}, notes_txt="mine")
        write(target / "log", deep_txt="mine", both_txt="mine")
        (target / "link").symlink_to("notes.txt")
        target.chmod(0o750)
        with staged(target, force=True, directory=KIND) as path:
            write(path, thing_json="new")
            write(path / "log", both_txt="new")
        assert listed(target) == {"link": "mine", "notes.txt": "mine", "thing.json": "new"}
        assert listed(target / "log") == {"both.txt": "new", "deep.txt": "mine"}
        assert (target / "link").is_symlink()
        assert stat.S_IMODE(target.stat().st_mode) == 0o750
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_a_directory_of_another_kind_is_not_replaced(self, tmp_path: Path) -> None:
        write(tmp_path / "a", thesis_txt="mine")
        for force in (True, False):
            with (
                pytest.raises(DestinationExistsError, match="is no thing"),
                staged(tmp_path / "a", force=force, directory=KIND),
            ):
                pass

    def test_what_it_is_made_from_is_not_replaced(self, tmp_path: Path) -> None:
        write(tmp_path / "a", thing_json="old")
        (tmp_path / "b").write_text("old")
        for target, kind, source in (
            (tmp_path / "a", KIND, tmp_path / "a"),
            (tmp_path / "a", KIND, tmp_path / "a" / "thing.json"),
            (tmp_path / "b", None, tmp_path / "b"),
        ):
            with (
                pytest.raises(UsageError, match="which it is made from"),
                staged(target, force=True, directory=kind, spared=[source]),
            ):
                pass

    def test_the_current_folder_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "a", thing_json="old")
        monkeypatch.chdir(tmp_path / "a")
        with (
            pytest.raises(WriteError, match="current folder"),
            staged(tmp_path / "a", force=True, directory=KIND),
        ):
            pass


class TestOthers:
    def test_the_second_is_told_who_is_first(self, tmp_path: Path) -> None:
        with staged(tmp_path / "a") as path:
            path.write_text("first")
            said = re.escape(f"process {os.getpid()} on {socket.gethostname()}")
            with pytest.raises(WriteError, match=said), staged(tmp_path / "a", force=True):
                pass
            with staged(tmp_path / "b") as other:
                other.write_text("another name")
        assert listed(tmp_path) == {"a": "first", "b": "another name"}
        assert hidden(tmp_path) == []

    def test_of_many_threads_exactly_one_wins(self, tmp_path: Path) -> None:
        barrier = threading.Barrier(4)
        won: list[int] = []

        def race(number: int) -> None:
            barrier.wait()
            try:
                with staged(tmp_path / "a") as path:
                    path.write_text(str(number))
            except WriteError:
                return
            won.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert listed(tmp_path) == {"a": str(won[0])}
        assert len(won) == 1

    def test_what_a_killed_writer_left_is_swept_away(self, tmp_path: Path) -> None:
        killed = (
            "import os, sys, pathlib\n"
            "from adapterkit.output import staged\n"
            "with staged(pathlib.Path(sys.argv[1])) as path:\n"
            "    path.write_text('half')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "a")], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(hidden(tmp_path)) == 2
        (tmp_path / ".a.adapterkit-not.ours").mkdir()
        with staged(tmp_path / "a") as path:
            path.write_text("whole")
        assert hidden(tmp_path) == [".a.adapterkit-not.ours"]
        assert listed(tmp_path) == {"a": "whole"}

    def test_a_directory_that_was_moved_aside_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(output, "exchange", lambda *_: False)
        target = tmp_path / "a"
        write(target, thing_json="old", notes_txt="mine")
        moved = Output(target, force=True, directory=KIND)
        moved.__enter__()
        target.rename(moved.folder / ".former")  # and here its process is killed
        assert moved._lock is not None
        moved._lock.release()
        with pytest.raises(DestinationExistsError), staged(target, directory=KIND):
            pass
        assert listed(target) == {"notes.txt": "mine", "thing.json": "old"}
        assert hidden(tmp_path) == []


class TestInterrupts:
    @pytest.mark.parametrize("number", [signal.SIGINT])
    def test_what_must_not_be_cut_ends_before_the_interrupt(self, number: signal.Signals) -> None:
        steps: list[str] = []

        def work() -> None:
            steps.append("begun")
            os.kill(os.getpid(), number)
            time.sleep(0.2)
            steps.append("ended")

        with pytest.raises(KeyboardInterrupt):
            uninterrupted(work)
        assert steps == ["begun", "ended"]

    def test_its_own_error_is_raised(self) -> None:
        with pytest.raises(ZeroDivisionError):
            uninterrupted(lambda: 1 / 0)
        assert uninterrupted(lambda: 7) == 7

    def test_an_interrupt_at_the_very_end_says_that_the_output_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename_new = output.rename_new

        def interrupted(source: Path, target: Path) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            rename_new(source, target)

        monkeypatch.setattr(output, "rename_new", interrupted)
        with pytest.raises(KeyboardInterrupt) as stopped, staged(tmp_path / "a") as path:
            path.write_text("whole")
        assert stopped.value.__notes__ == [f"{tmp_path / 'a'} is complete"]
        assert listed(tmp_path) == {"a": "whole"}
        assert hidden(tmp_path) == []

    def test_a_full_disk_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with (
            pytest.raises(WriteError, match=r"No space left on device.*nothing was left behind"),
            staged(tmp_path / "a") as path,
        ):
            path.write_text("whole")
        assert list(tmp_path.iterdir()) == []
