"""Threads that end together: in order, at the first error, at an interrupt wherever it comes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

import numpy as np
import pytest
import threadpoolctl

from adapterkit.output import uninterrupted
from adapterkit.work import Crew, in_threads

# Runs a way to wait for threads again and again, each time with an interrupt one step later, and
# prints how often it was struck; it must come to its end each time.
STRUCK = """
import sys, threading, time
from adapterkit.output import uninterrupted
from adapterkit.work import Crew, in_threads

sys.setswitchinterval(1e-5)
running = []

def task(number=0):
    running.append(number)
    time.sleep(0.0005)
    running.remove(number)
    return number

def crew():
    with Crew(2) as crew:
        tasks = [crew.submit(task, number) for number in range(6)]
        while not crew.wait(tasks, 0.0002):
            pass

def all_at_once():
    in_threads(task, range(6), 2)

def one():
    uninterrupted(task)

work, struck = {"crew": crew, "in_threads": all_at_once, "uninterrupted": one}[sys.argv[1]], 0
for step in range(1, 4000):
    left = step
    def trace(frame, event, argument):
        global left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return trace
    done = False
    sys.settrace(trace)
    try:
        work()
        done = left > 0
    except KeyboardInterrupt:
        struck += 1
    finally:
        sys.settrace(None)
    if sys.argv[1] != "in_threads":  # what is running there is left to end by itself
        assert not running or sys.argv[1] == "uninterrupted", running
    while running:
        time.sleep(0.001)
    if done:
        break
print(struck)
"""


def test_results_are_in_order_and_computed_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=5)

    def met(number: int) -> int:
        if number < 2:
            meeting.wait()
        return -number

    assert in_threads(met, range(20), 2) == [-number for number in range(20)]
    assert in_threads(met, range(2, 5), 1) == [-2, -3, -4]


def fail() -> NoReturn:
    raise OSError("no more")


def test_one_that_fails_stops_the_others() -> None:
    begun: list[int] = []

    def one(number: int) -> None:
        begun.append(number)
        time.sleep(0.001)

    def crew() -> None:
        with Crew(2) as crew:
            tasks = [crew.submit(fail), *(crew.submit(one, number) for number in range(5000))]
            crew.wait(tasks, 60)

    with pytest.raises(OSError, match="no more"):
        crew()
    assert len(begun) < 5000
    with pytest.raises(OSError, match="no more"):
        in_threads(lambda number: fail() if number == 3 else number, range(9), 2)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_of_several_errors_the_first_items_is_raised(workers: int) -> None:
    """What a broken file is told must not hang on which thread was faster."""

    def failing(number: int) -> None:
        time.sleep(0.03 - number / 100)
        raise OSError(f"item {number}")

    def crew() -> None:
        with Crew(workers) as crew:
            crew.wait([crew.submit(failing, number) for number in range(4)], 60)

    for _ in range(5):
        with pytest.raises(OSError, match="item 0"):
            in_threads(failing, range(4), workers)
        with pytest.raises(OSError, match="item 0"):
            crew()


def test_debuggers_follow_our_threads() -> None:
    """Coverage, too: what they run counted as never run."""
    seen: set[str] = set()

    def traced(number: int) -> int:
        return number

    before = threading.gettrace()
    threading.settrace(lambda frame, *_: seen.add(frame.f_code.co_name))
    try:
        in_threads(traced, range(4), 2)
        uninterrupted(lambda: traced(1))
    finally:
        threading.settrace(before)  # type: ignore[arg-type]
    assert "traced" in seen


def test_a_crew_ends_when_nothing_runs_any_more() -> None:
    ended: list[bool] = []

    def slow() -> None:
        time.sleep(0.05)
        ended.append(True)

    with Crew(2) as crew:
        task = crew.submit(slow)
        assert not crew.wait([task], 0.001)
    assert ended in ([True], [])
    assert task.done == bool(ended)


def test_uninterrupted_returns_and_raises_what_the_work_does() -> None:
    assert uninterrupted(lambda: 5) == 5
    with pytest.raises(OSError, match="no more"):
        uninterrupted(fail)


@pytest.mark.parametrize("way", ["crew", "in_threads", "uninterrupted"])
def test_an_interrupt_at_any_step_hangs_nothing(way: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", STRUCK, way],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > (5 if way == "uninterrupted" else 50)


def blas_threads(_: object = None) -> int:
    """Return the most threads that a BLAS of this process may use."""
    found: list[dict[str, Any]] = threadpoolctl.threadpool_info()
    return max(each["num_threads"] for each in found if each["user_api"] == "blas")


def test_blas_is_called_by_our_threads_or_has_its_own_never_both() -> None:
    np.ones((2, 2)) @ np.ones((2, 2))
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        assert in_threads(blas_threads, range(4), 2) == [1] * 4
        assert blas_threads() == 3
        assert in_threads(blas_threads, range(1), 1) == [3]
        with Crew(2), Crew(2) as inner:
            assert inner.wait([inner.submit(blas_threads)])
            inner.dismiss()
            assert blas_threads() == 1, "the outer crew is still at work"
        assert blas_threads() == 3


def test_blas_has_its_threads_again_after_an_error() -> None:
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda number: 1 // number, range(4), 2)
        assert blas_threads() == 3
