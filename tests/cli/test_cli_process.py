"""The program as the operating system sees it: signals, pipes, encodings, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import BASE, TINY, start

from adapterkit_cli.boundary import told
from adapterkit_cli.signals import Terminated, stopping_cleanly

pytestmark = pytest.mark.slow

# Stops in the middle of a conversion, when the temporary file is written and the proof begins.
SLOW = """
import sys, time
from importlib import import_module
module = import_module("adapterkit.saving")
def prove(*args, **kwargs):
    print("proving", flush=True)
    time.sleep(60)
module.prove = prove
from adapterkit_cli.main import main
main()
"""
PATIENCE = 60  # seconds


def test_runs_as_a_module() -> None:
    process = start("inspect", TINY)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("source ")


def test_one_request_that_comes_twice_ends_cleanly(tmp_path: Path) -> None:
    arguments = ["convert", str(TINY), "-o", str(tmp_path / "x.gguf"), "--base", str(BASE)]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "proving\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert err.count("nothing was written") == 1
    assert process.returncode in {128 + signal.SIGTERM, 128 + signal.SIGINT}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "terminated"),
    ],
)
def test_a_signal_in_the_middle_leaves_nothing(
    number: signal.Signals, word: str, tmp_path: Path
) -> None:
    arguments = ["convert", str(TINY), "-o", str(tmp_path / "x.gguf"), "--base", str(BASE)]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "proving\n"
        assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
        assert list(tmp_path.iterdir()) != []
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert err == f"Error: {word}; nothing was written\n"
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


# Stops where a conversion cleans up, as a slow disk would.
STUCK = """
import sys, time
from adapterkit_cli.signals import stopping_cleanly
with stopping_cleanly():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_the_process_at_once(
    first: signal.Signals, second: signal.Signals
) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "working\n"
        run.send_signal(first)
        assert run.stdout.readline() == "cleaning\n"
        run.send_signal(second)
        assert run.wait(PATIENCE) == -second


def test_a_signal_that_nohup_ignores_is_ignored_twice() -> None:
    program = f"trap '' HUP; exec {sys.executable} -c \"$0\""
    shell = ["/bin/sh", "-c", program, STUCK]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "working\n"
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGTERM)
        assert run.stdout.readline() == "cleaning\n"
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_what_is_kept_is_said(
    number: int, code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as stopped:
            stopped.add_note("what is finished is kept in x; repeat with --resume")
            stopped.add_note("a second note")
            raise

    with stopping_cleanly(), pytest.raises(SystemExit) as ended, told():
        work()
    assert ended.value.code == code
    wanted = f"Error: {word}; what is finished is kept in x; repeat with --resume\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b"), 3, "a/b: Permission denied"),
        (OSError(28, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
        (MemoryError(), 5, "not enough memory; nothing was written"),
        (MemoryError("9 GB"), 5, "not enough memory (9 GB); nothing was written"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, told():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == f"Error: {line}\n"


@pytest.mark.parametrize("bug", [RecursionError(), OSError(5, "Input/output error"), KeyError("x")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)) as caught, told():
        raise bug
    assert caught.value is bug


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_cleanly():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with stopping_cleanly():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "formats"),
        ("inspect", str(TINY), "--json"),
        ("--help",),
        ("convert", "-h"),
        ("--version",),
    ],
)
def test_a_closed_pipe_is_quiet(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(*arguments, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        "list formats",
        "list engines --json",
        "--help",
        "-h",
        "convert --help",
        "tinylora --help",
        "--version",
    ],
)
@pytest.mark.parametrize("settings", [{}, {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}])
def test_a_full_disk_behind_stdout_is_one_line(arguments: str, settings: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(*arguments.split(), stdout=full, env=os.environ | settings)
        _, err = process.communicate(timeout=PATIENCE)
    assert err == "Error: standard output: could not be written (No space left on device)\n"
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("instruction", ["bash_source", "bash_complete"])
def test_a_full_disk_behind_completion_is_one_line(instruction: str) -> None:
    # The word is what click looks for: the name of the program, as the shell knows it.
    asked = {"_ADAPTERKIT_COMPLETE": instruction, "COMP_WORDS": "adapterkit c", "COMP_CWORD": "1"}
    with Path("/dev/full").open("w") as full:
        process = start(stdout=full, env=os.environ | asked)
        _, err = process.communicate(timeout=PATIENCE)
    assert err == "Error: standard output: could not be written (No space left on device)\n"
    assert process.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_cut_is_an_error(unbuffered: str, tmp_path: Path) -> None:
    # The limit lets the first bytes through, as a disk does that fills up.
    limited = f"ulimit -f 1; exec {sys.executable} -m adapterkit list families --json"
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            ["/bin/sh", "-c", limited],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "Error: standard output: could not be written (File too large)\n"


def test_an_encoding_without_delta_is_no_error(tmp_path: Path) -> None:
    process = start(
        *("convert", TINY, "-o", tmp_path / "x.gguf", "--base", BASE),
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "proof: \\u0394W equal" in out


@pytest.mark.parametrize(
    ("raised", "status", "word"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(15), 143, "terminated")],
)
def test_an_interrupt_that_became_an_error_on_its_way_is_one(
    raised: BaseException, status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped:
        def __set_name__(self, owner: type, name: str) -> None:
            raise raised

    def made() -> None:
        with told():
            type("Made", (), {"field": Stopped()})  # Python 3.11 makes a RuntimeError of it

    with pytest.raises(SystemExit) as ended:
        made()
    assert ended.value.code == status
    assert capsys.readouterr().err == f"Error: {word}; nothing was written\n"
