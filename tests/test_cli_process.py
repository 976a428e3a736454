"""The program as the operating system sees it: signals, pipes, encodings, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import BASE, TINY, start

from adapterkit_cli.signals import Terminated, stopping_cleanly

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
    assert out.startswith("path ")


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
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert err == f"Error: {word}; nothing was written\n"
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_cut_the_clean_up_short() -> None:
    with stopping_cleanly():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


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


@pytest.mark.parametrize("arguments", [("formats",), ("inspect", str(TINY), "--json")])
def test_a_closed_pipe_is_quiet(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(*arguments, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = start("formats", stdout=full)
        _, err = process.communicate(timeout=PATIENCE)
    assert err == "Error: standard output: could not be written (No space left on device)\n"
    assert process.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_cut_is_an_error(unbuffered: str, tmp_path: Path) -> None:
    # The limit lets the first bytes through, as a disk does that fills up.
    limited = f"ulimit -f 1; exec {sys.executable} -m adapterkit formats --json"
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
