"""Names of files and folders may hold anything: no message is split or steered by one."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest
from terminal import BASE, PEFT, invoke

from adapterkit.errors import AdapterKitError, FormatError, LossyConversionError
from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "a\nError: b\x1b[31m\r"
BEGINS = re.compile(r"(Error: |Usage: |Try '|note: |warning: |dropped: |  |$)")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of that name: adapters, a base, and files that are none."""
    folder = tmp_path_factory.mktemp("names") / NAME
    for name in ("tiny", "dora", "leaked-name"):
        shutil.copytree(PEFT / name, folder / f"{name}\n")
    shutil.copytree(BASE, folder / "base\n")
    (folder / "text\n.gguf").write_text("text")
    (folder / "bare\n").mkdir()
    shutil.copy(PEFT / "tiny" / "adapter_model.safetensors", folder / "bare\n")
    return folder


WRONG: dict[str, Callable[[Path], list[str | Path]]] = {
    "nothing there": lambda odd: ["inspect", odd / "nothing"],
    "text": lambda odd: ["inspect", odd / "text\n.gguf"],
    "no config": lambda odd: ["convert", odd / "bare\n", "-o", odd / "o\n.gguf"],
    "lossy": lambda odd: [
        *("convert", odd / "dora\n", "-o", odd / "o\n.gguf", "--base", odd / "base\n")
    ],
    "no suffix": lambda odd: ["convert", odd / "tiny\n", "-o", odd / "o\n.ggf"],
    "no base": lambda odd: ["validate", odd / "tiny\n", "--base", odd / "none\n"],
    "base without weights": lambda odd: [
        *("merge", odd / "tiny\n", "--into", odd / "base\n", "-o", odd / "o\n")
    ],
    "base as adapter": lambda odd: ["inspect", odd / "base\n"],
    "several": lambda odd: ["audit", odd / "tiny\n", odd / "text\n.gguf"],
    "one name": lambda odd: ["convert", odd / "tiny\n", odd / "tiny\n", "-o", odd / "o\n"],
    "scale": lambda odd: ["stack", f"{odd / 'tiny'}@x\n", "--for", "vllm"],
    "stack": lambda odd: ["stack", odd / "tiny\n", "--for", "llama.cpp"],
    "engine": lambda odd: ["validate", odd / "tiny\n", "--target", NAME],
    "format": lambda odd: ["inspect", odd / "tiny\n", "--from", NAME],
    "dialect": lambda odd: ["inspect", odd / "bare\n", "--dialect", odd / "d\n.toml"],
    "recipe": lambda odd: ["merge", "--recipe", odd / "r\n"],
    "fleet": lambda odd: ["fleet", "run", "inspect", odd / "bare\n", "-o", odd / "text\n.gguf"],
    "command": lambda odd: [NAME, odd],
    "option": lambda odd: ["inspect", f"--{NAME}", odd],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_name_does_not_split_a_message(what: str, odd: Path) -> None:
    done = invoke(*WRONG[what](odd))
    assert done.exit_code != 0
    lines = done.stderr.removesuffix("\n").split("\n")
    assert [line for line in lines if not (BEGINS.match(line) and line.isprintable())] == []
    assert sum(line.startswith("Error: ") for line in lines) == 1


@pytest.mark.parametrize(
    "error",
    [
        FormatError(f"holds {NAME}", path=NAME, where=NAME),
        LossyConversionError([Loss("code", NAME, f"is in {NAME}")], path=NAME),
    ],
)
def test_an_error_of_the_library_keeps_its_lines(error: AdapterKitError) -> None:
    assert all(line.isprintable() for line in str(error).split("\n"))
    assert len(str(error).split("\n")) == 1 + isinstance(error, LossyConversionError)
