"""A GGUF base in parts is one model: parts that contradict one another are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from number_edges import Edge, write_base, write_gguf_base
from terminal import invoke

from adapterkit.containers.gguf import Typed, ValueType, read_gguf, write_gguf

NAMES = [f"base-{place:05}-of-00002.gguf" for place in (1, 2)]


@dataclass
class Parts:
    """Metadata and tensors of both files."""

    keys: tuple[dict[str, Any], dict[str, Any]]
    tensors: tuple[dict[str, Any], dict[str, Any]]


Change = Callable[[Parts], None]


def numbered(part: int, name: str, value: int) -> Change:
    def change(parts: Parts) -> None:
        parts.keys[part][name] = Typed(ValueType.UINT16, value)

    return change


def of_another(parts: Parts) -> None:
    parts.keys[1]["general.architecture"] = "qwen2"


def twice(parts: Parts) -> None:
    name = next(iter(parts.tensors[0]))
    parts.tensors[1][name] = parts.tensors[0][name]


def short(parts: Parts) -> None:
    parts.tensors[1].popitem()


CHANGES: dict[str, Change] = {
    "the place of another": numbered(1, "split.no", 0),
    "a place past the last": numbered(1, "split.no", 7),
    "another count": numbered(1, "split.count", 3),
    "another number of tensors": numbered(0, "split.tensors.count", 5),
    "another architecture": of_another,
    "a tensor twice": twice,
    "a tensor less": short,
}


def parts(folder: Path, change: Change | None = None) -> Path:
    file = read_gguf(write_gguf_base(folder / "whole.gguf", 32))
    names = list(file.tensors)
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": len(names)}
    keys: dict[str, Any] = {k: Typed(ValueType.UINT16, v) for k, v in split.items()}
    second = {"general.architecture": "llama", **keys, "split.no": Typed(ValueType.UINT16, 1)}
    held = [{n: file.tensors[n] for n in part} for part in (names[:5], names[5:])]
    made = Parts(({**file.typed(), **keys}, second), (held[0], held[1]))
    if change:
        change(made)
    for name, metadata, tensors in zip(NAMES, made.keys, made.tensors, strict=True):
        write_gguf(folder / name, metadata, tensors)
    return folder / NAMES[0]


def asked(base: Path, folder: Path) -> list[list[str | Path]]:
    adapter = Edge().write(folder / "a", 1)
    tuned = write_base(folder / "tuned", 32)
    return [
        ["merge", adapter, "--into", base, "-o", folder / "out.gguf"],
        ["convert", adapter, "--base", base, "-o", folder / "out.gguf"],
        ["validate", adapter, "--base", base],
        ["extract", "--base", base, "--tuned", base, "-o", folder / "out"],
        ["audit", adapter, "--base", base],
        ["tinylora", "plan", "--base", base, "--budget", "100"],
        ["inspect", adapter, "--base", base],
        ["diff", adapter, adapter, "--base", base],
        ["compress", adapter, "--rank", "1", "--base", base, "-o", folder / "out"],
        ["extract", "--base", tuned, "--tuned", base, "-o", folder / "out"],
    ]


def test_sound_parts_are_read(tmp_path: Path) -> None:
    for line in asked(parts(tmp_path), tmp_path)[:2]:
        result = invoke(*line)
        assert result.exit_code == 0, result.stderr
        (tmp_path / "out.gguf").unlink()


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_contradict_one_another_are_refused_by_every_command(
    name: str, tmp_path: Path
) -> None:
    for line in asked(parts(tmp_path, CHANGES[name]), tmp_path):
        result = invoke(*line)
        assert result.exit_code in {3, 4}, line
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.gguf").exists()


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    base = parts(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    result = invoke("validate", Edge().write(tmp_path / "a", 1), "--base", base)
    assert result.exit_code == 3
    assert NAMES[1] in result.stderr
