"""Broken PEFT directories: one line that names file and tensor, the exit code, and nothing written.

Each row: what `inspect` does (`fails` like convert, or `shows` a problem, or is `blind` to it), the
exit code of `convert`, and what its message says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from moments import a_moment
from terminal import BASE, PEFT, invoke

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

FOLDER = PEFT.parent / "hostile" / "peft"
MODULE = "model.layers.0.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json: ", "adapter_model.safetensors: "

HOSTILE: dict[str, tuple[str, int, str]] = {
    "a-without-b": ("shows", 3, f"{MODULE}.lora_A: has no lora_B"),
    "alpha-not-finite": ("fails", 3, f"{CONFIG}lora_alpha: expects a finite number, has inf"),
    "b-without-a": ("shows", 3, f"{MODULE}.lora_B: has no lora_A"),
    "config-a-list": ("fails", 3, f"{CONFIG}is not a JSON object"),
    "config-empty": ("fails", 3, f"{CONFIG}is empty"),
    "config-not-json": ("fails", 3, f"{CONFIG}is not readable JSON"),
    "config-too-deep": ("fails", 3, f"{CONFIG}is not readable JSON"),
    "empty-tensor": ("shows", 3, f"{MODULE}.lora_A: is empty, shape [0]"),
    "half-a-surrogate-pair": ("fails", 3, f"{CONFIG}is not readable JSON"),
    "infinity": ("blind", 3, f"{MODULE}.lora_A: holds NaN or infinity"),
    "integers": ("shows", 3, f"{MODULE}.lora_A: holds I8 values"),
    "nan": ("blind", 3, f"{MODULE}.lora_A: holds NaN or infinity"),
    "no-axis": ("shows", 3, f"{MODULE}.lora_B: has shape []"),
    "no-config": ("fails", 3, "no adapter_config.json"),
    "no-tensors": ("fails", 3, f"{WEIGHTS}holds no tensors"),
    "no-weights": ("fails", 3, "neither adapter_model.safetensors nor adapter_model.bin"),
    "not-lora": ("fails", 4, f"{CONFIG}peft_type OFT is not read"),
    "one-axis": ("shows", 3, f"{MODULE}.lora_A: has shape [32]"),
    "pattern-a-list": ("fails", 3, f"{CONFIG}alpha_pattern: expects a mapping of names"),
    "pattern-never-ends": ("fails", 3, f"{CONFIG}"),
    "pattern-no-regex": ("fails", 3, f"{CONFIG}rank_pattern: pattern '(q_proj' is no regular"),
    "rank-not-a-number": (
        "fails",
        3,
        f"{CONFIG}r: expects a whole number from 1 to 1048576, has 'eight'",
    ),
    "rank-not-of-the-config": ("shows", 3, "layers.0.mlp.down_proj: the config declares rank 8"),
    "rank-zero": ("fails", 3, f"{CONFIG}r: expects a whole number from 1 to 1048576, has 0"),
    "ranks-disagree": ("shows", 3, f"{MODULE}: ranks disagree, A is [4, 32], B is [32, 5]"),
    "several": ("fails", 3, "holds several adapters (a, b)"),
    "shape-not-of-the-base": ("blind", 4, f"{MODULE}: the base has 32 x 32 here"),
    "steers-the-terminal": ("shows", 3, "model.\\x1b[2J\\x1b]0;owned\\x07.lora_A: has no lora_B"),
    "two-of-one-meaning": ("fails", 3, f"{WEIGHTS}{MODULE}.lora_A: two tensors"),
    "unknown-lora-tensor": ("fails", 4, f"{MODULE}.lora_C.weight: is a LoRA tensor of an unknown"),
    "weights-cut": ("fails", 3, f"{WEIGHTS}100 of 6144 bytes of data are missing"),
    "weights-garbage": ("fails", 3, f"{WEIGHTS}is a web page"),
    "weights-run-a-command": ("fails", 3, "adapter_model.bin: its pickle asks for os.system"),
}


def test_every_fixture_has_a_row() -> None:
    assert {path.name for path in FOLDER.iterdir()} == HOSTILE.keys()


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_convert_says_what_is_wrong_and_writes_nothing(name: str, tmp_path: Path) -> None:
    _, code, words = HOSTILE[name]
    with a_moment():
        result = invoke("convert", FOLDER / name, "-o", tmp_path / "x.gguf", "--base", BASE)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {FOLDER / name}")
    assert words in line
    assert line.isprintable()
    assert (result.exit_code, result.stdout) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_inspect_shows_a_broken_adapter_if_it_can_be_read(name: str) -> None:
    manner, code, words = HOSTILE[name]
    with a_moment():
        result = invoke("inspect", FOLDER / name)
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    if manner == "fails":
        assert (result.exit_code, result.stdout) == (code, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: {FOLDER / name}")
        assert words in line
    else:
        assert result.exit_code == 0
        assert result.stderr == ""
        assert any(words in line for line in problems) == (manner == "shows")
