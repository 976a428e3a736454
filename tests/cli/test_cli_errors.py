"""The error boundary: what users can act on is one line and an exit code, a bug is a traceback."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from terminal import TINY, invoke

import adapterkit
from adapterkit import errors
from adapterkit_cli.signals import Terminated


def classes() -> list[type[errors.AdapterKitError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.AdapterKitError)
    ]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(adapterkit, "inspect", Mock(side_effect=error))


@pytest.mark.parametrize("kind", [kind for kind in classes() if "Lossy" not in kind.__name__])
def test_an_error_is_one_line_and_its_code(
    kind: type[errors.AdapterKitError], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, kind("is odd", path="file", where="tensor"))
    result = invoke("inspect", "x")
    assert (result.stdout, result.stderr) == ("", "Error: file: tensor: is odd\n")
    assert result.exit_code == kind.exit_code


def test_all_losses_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [adapterkit.Loss("dora", "q_proj", "no place"), adapterkit.Loss("x", "k", "none")]
    failing(monkeypatch, errors.LossyConversionError(losses, path="a"))
    result = invoke("inspect", "x")
    assert result.stderr.splitlines() == [
        "Error: a: cannot be written without loss (2 reasons)",
        "  q_proj: no place",
        "  k: none",
    ]
    assert result.exit_code == 4


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        invoke("inspect", "x")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (KeyboardInterrupt(), "Error: interrupted; nothing was written\n", 130),
        (Terminated(15), "Error: terminated; nothing was written\n", 143),
        (BrokenPipeError(), "", 141),
    ],
)
def test_interruptions_are_quiet(
    error: BaseException, line: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    result = invoke("inspect", "x")
    assert (result.stderr, result.exit_code) == (line, code)


def test_text_from_a_file_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errors.FormatError("bad\x1b[2J\r\ud800", where="a\x07"))
    result = invoke("inspect", "x")
    assert result.stderr == "Error: a\\x07: bad\\x1b[2J\\r\\ud800\n"


@pytest.mark.parametrize("arguments", [("inspect",), ("inspekt", "x"), ("diff", "a"), ("--nope",)])
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = invoke("inspect", TINY, color=True), invoke("inspect", TINY)
    assert "\x1b[1mformat" in coloured.stdout
    assert "\x1b" not in plain.stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert invoke("inspect", TINY, color=True).stdout == plain.stdout


def test_json_is_never_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in invoke("inspect", TINY, "--json", color=True).stdout
