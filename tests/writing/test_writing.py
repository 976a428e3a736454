"""Every command that writes: what is there is kept, unless it is an output and --force is said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from terminal import BASE, PEFT, TINY, invoke, start

from adapterkit import convert, inspect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds
# Command -> arguments before the destination, and its suffix; a directory without one.
WRITERS = {
    "convert to gguf": (["convert", TINY, "--base", BASE, "-o"], ".gguf"),
    "convert to peft": (["convert", TINY, "-o"], ""),
    "convert to mlx": (["convert", TINY, "--base", BASE, "--to", "mlx", "-o"], ""),
    "merge": (["merge", TINY, TINY, "-o"], ""),
    "compress": (["compress", TINY, "--rank", "1", "-o"], ""),
    "audit --html": (["audit", TINY, "--html"], ".html"),
    "audit --bank": (["audit", TINY, "--bank"], ".json"),
}
EVERY = pytest.mark.parametrize(("arguments", "suffix"), WRITERS.values(), ids=WRITERS.keys())


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@EVERY
def test_what_exists_is_kept_and_an_output_is_replaced_when_asked(
    arguments: list[str | Path], suffix: str, tmp_path: Path
) -> None:
    target = tmp_path / f"out{suffix}"
    assert invoke(*arguments, target).exit_code == 0
    before = contents(tmp_path)
    again = invoke(*arguments, target)
    assert (again.exit_code, "pass --force to replace it" in again.stderr) == (1, True)
    assert contents(tmp_path) == before
    assert invoke(*arguments, target, "--force").exit_code == 0
    assert contents(tmp_path).keys() == before.keys()


@EVERY
def test_what_is_no_output_is_never_replaced(
    arguments: list[str | Path], suffix: str, tmp_path: Path
) -> None:
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    result = invoke(*arguments, pipe, "--force")
    assert (result.exit_code, "name another" in result.stderr) == (1, True)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    foreign = tmp_path / f"work{suffix}"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not lose")
    assert invoke(*arguments, foreign, "--force").exit_code == 1
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@EVERY
def test_of_two_at_once_one_writes(
    arguments: list[str | Path], suffix: str, tmp_path: Path
) -> None:
    target = tmp_path / f"out{suffix}"
    assert invoke(*arguments, tmp_path / f"reference{suffix}").exit_code == 0
    processes = [start(*arguments, target) for _ in range(3)]
    ended = [
        (process.communicate(timeout=PATIENCE)[1], process.returncode) for process in processes
    ]
    assert sorted(code for _, code in ended) == [0, 1, 1]
    for err, code in ended:
        assert code == 0 or "exists already" in err or "is being written by" in err
    written = {name for name in contents(tmp_path) if name.startswith("out")}
    assert len(written) == len({n for n in contents(tmp_path) if n.startswith("reference")})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_former_adapter_goes_and_other_files_stay(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    shutil.copytree(TINY, target)
    (target / "adapter_model.safetensors").rename(target / "adapter_model.bin")
    (target / "adapters.safetensors").write_text("of another format")
    (target / "notes.txt").write_text("mine")
    (target / "log").mkdir()
    (target / "log" / "loss.csv").write_text("mine too")
    assert invoke("convert", PEFT / "dora", "-o", target, "--force").exit_code == 0
    assert contents(target).keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "log/loss.csv",
        "notes.txt",
    }
    assert json.loads((target / "adapter_config.json").read_text())["use_dora"] is True


def test_weights_that_stay_are_named(tmp_path: Path) -> None:
    """They are nobody's by their names, and the next command takes them for this adapter's."""
    target = tmp_path / "adapter"
    source = shutil.copytree(PEFT / "dora", tmp_path / "source")
    for folder, name in ((source, "own.pt"), (target, "extra.pt"), (target, "own.pt")):
        folder.mkdir(exist_ok=True)
        torch.save({"w": torch.ones(2)}, folder / name)
    (target / "2_Dense").mkdir()
    save_file({"linear.weight": np.ones((2, 2))}, target / "2_Dense" / "model.safetensors")
    shutil.copytree(TINY, target, dirs_exist_ok=True)
    (target / "notes.txt").write_text("mine")
    report = convert(source, target, force=True)
    (said,) = [note for note in report.notes if "stay there" in note]
    assert said.startswith("2_Dense/model.safetensors, extra.pt: weights that lie in")
    found = {file.name for file in inspect(target).beside if file.name != "notes.txt"}
    assert found == {"2_Dense/model.safetensors", "extra.pt", "own.pt"}
    assert not [n for n in convert(source, tmp_path / "new").notes if "stay there" in n]


def test_nothing_is_replaced_by_what_is_made_from_it(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(TINY, source)
    before = contents(source)
    for arguments in (
        ("convert", source, "-o", source),
        ("merge", source, TINY, "-o", source),
        ("compress", source, "--rank", "1", "-o", source),
    ):
        result = invoke(*arguments, "--force")
        assert result.exit_code == 2, result.output
        assert "which it is made from" in result.stderr
        assert contents(source) == before


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    source, page, bank = (tmp_path / name for name in ("adapter", "page.html", "bank.json"))
    shutil.copytree(TINY, source)
    assert invoke("audit", source, "--html", page).exit_code == 0
    assert invoke("audit", source, "--bank", bank).exit_code == 0
    (tmp_path / "thesis.txt").write_text("do not lose")
    before = contents(tmp_path)
    others = (source / "adapter_model.safetensors", source / "adapter_config.json", "thesis.txt")
    for arguments, own in (
        (("audit", source, "--html"), page),
        (("audit", source, "--bank"), bank),
        (("diff", source, source, "--html"), page),
        (("validate", source, "--html"), page),
    ):
        for other in {*others, page, bank} - {own}:
            result = invoke(*arguments, tmp_path / other, "--force")
            assert (result.exit_code, "and is never replaced by one" in result.stderr) == (1, True)
            assert contents(tmp_path) == before
    (tmp_path / "empty.html").touch()
    assert invoke("audit", source, "--html", tmp_path / "empty.html", "--force").exit_code == 0


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = invoke("convert", TINY, "-o", tmp_path / "notes" / "deep" / "out")
    assert result.exit_code == 1
    assert f"{tmp_path / 'notes'} is a file, no folder); name another" in result.stderr


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_not_the_current_folder(empty: str) -> None:
    for arguments in (("inspect", empty), ("inspect", TINY, "--base", empty)):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "is empty; is a variable of the shell not set?" in result.stderr
    assert invoke("convert", TINY, "--force", "-o", empty).exit_code == 2


def test_a_suffix_means_its_format_in_any_case(tmp_path: Path) -> None:
    for to in ((), ("--to", "gguf")):
        target = tmp_path / f"A{len(to)}.GGUF"
        assert invoke("convert", TINY, "-o", target, "--base", BASE, *to).exit_code == 0
        assert target.read_bytes().startswith(b"GGUF")


def test_several_adapters_make_no_folder_of_the_name_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "both.gguf"
    result = invoke("convert", TINY, PEFT / "dora", "-o", target, "--base", BASE)
    assert result.exit_code == 2
    assert "is the name of one gguf file" in result.stderr
    assert not target.exists()
