"""Tables that embedding and output share, or not: what was extracted is the tuned model in PEFT."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tables_oracle import GROWN, ROWS, assert_same, load_model, reloaded, tuned, write_base

from adapterkit import extract, merge_into

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TABLE, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# One table; two that are alike; two that are not.
KINDS = ("shared", "alike", "own")


def parted(source: Path, folder: Path, kind: str) -> Path:
    """Copy a tied model, with a table of its own for the output unless it is to be shared."""
    shutil.copytree(source, folder)
    if kind == "shared":
        return folder
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(size, generator=generator) for size in stored[TABLE].shape)
    change = 0.1 * torch.outer(left, right) if kind == "own" else 0.0
    stored[OUTPUT] = stored[TABLE] + change
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    fields = json.loads(config.read_text()) | {"tie_word_embeddings": False}
    config.write_text(json.dumps(fields))
    return folder


def resized(base: Path, folder: Path, rows: int) -> Path:
    """Save a model with as many rows as an adapter's tables have."""
    model = load_model(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [ROWS, GROWN])
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_both_tables_are_extracted(before: str, after: str, rows: int, tmp_path: Path) -> None:
    start = write_base(tmp_path / "start", tied=True)
    targets = ["embed_tokens", "q_proj"]
    tuned(start, tmp_path / "adapter", rows=rows, target_modules=targets, ensure_weight_tying=True)
    merge_into([tmp_path / "adapter"], start, tmp_path / "end")
    base = parted(start, tmp_path / "base", before)
    model = parted(tmp_path / "end", tmp_path / "tuned", after)
    extract(base, model, tmp_path / "back", save_rest=True)
    live = load_model(model)
    assert_same(live, reloaded(resized(base, tmp_path / "resized", rows), tmp_path / "back"), rows)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    one = rows == GROWN and before == "shared" and after != "own"
    assert bool(config.get("ensure_weight_tying")) is one
    # Where both tables have one update nobody has to choose.
    choice = "untie" if before == "shared" and after == "own" else None
    merge_into([tmp_path / "back"], base, tmp_path / "again", tied=choice)
    assert_same(live, load_model(tmp_path / "again"), rows)
