"""What cannot be merged into a checkpoint is refused, says what to do, and leaves nothing."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint_bases import (
    bf16_base,
    loaded,
    tensors,
    trained,
)
from checkpoint_merges import dense, edited, load_file
from engine import BaseFixture, family_row, make_base

from adapterkit import merge_into
from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    IncompatibleBaseError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "gpt2", "mixtral", "qwen2")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def renamed(stored: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layers.1", "layers.9"): tensor for name, tensor in stored.items()}


def widened(stored: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.ones(4, 65) if "lora_A" in n else t for n, t in stored.items()}


def poisoned(stored: dict[str, Any]) -> dict[str, Any]:
    return {n: t * float("nan") if "layers.1" in n else t for n, t in stored.items()}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (renamed, IncompatibleBaseError, r"layers\.9\.self_attn\.q_proj: is not in the base"),
        (widened, IncompatibleBaseError, r"q_proj: the base has 64 x 64 .* the adapter 64 x 65"),
        (poisoned, FormatError, r"layers\.1\.self_attn\.q_proj: holds NaN or infinity"),
    ],
)
def test_bad_adapters_are_named_and_leave_nothing(
    change: Any, error: type[Exception], words: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    trained(bases["llama"], tmp_path / "good", target_modules=["q_proj"])
    bad = edited(tmp_path / "good", tmp_path / "bad", change)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(error, match=words):
        merge_into([tmp_path / "good", bad], bases["llama"].hf, out / "merged")
    assert list(out.iterdir()) == []


def test_refusals_say_what_to_do(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    adapters = [tmp_path / "adapter"]
    with pytest.raises(UsageError, match="the base itself"):
        merge_into(adapters, bases["llama"].hf, bases["llama"].hf / "inside")
    with pytest.raises(UsageError, match="1 adapter, but 2 weights"):
        merge_into(adapters, bases["llama"].hf, tmp_path / "out", weights=[1, 2])
    with pytest.raises(UsageError, match="gguf_type is for GGUF bases"):
        merge_into(adapters, bases["llama"].hf, tmp_path / "out", gguf_type="q8_0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(DestinationExistsError, match="no model directory"):
        merge_into(adapters, bases["llama"].hf, tmp_path / "mine")
    with pytest.raises(DestinationExistsError, match="no model directory"):
        merge_into(adapters, bases["llama"].hf, tmp_path / "mine", force=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()


def test_an_incomplete_base_is_refused(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bf16_base(bases["llama"], tmp_path / "base", max_shard_size="100KB")
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    first, *_, last = sorted(base.glob("*.safetensors"))
    kept = last.read_bytes()
    tensors.save_file(load_file(last) | load_file(first), last)
    with pytest.raises(FormatError, match="in more than one shard"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    last.unlink()
    with pytest.raises(NotFoundError, match=rf"{last.name} does not hold it or is missing"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    last.write_bytes(kept)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_tied_tables_are_never_chosen_silently(
    module: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama-tied"]
    trained(base, tmp_path / "adapter", target_modules=[module])
    with pytest.raises(UnsupportedError, match=r"--tied shared .* --tied untie"):
        merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged", tied="shared")
    merged = loaded(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not torch.equal(merged.lm_head.weight, base.model.lm_head.weight)


def test_alpha_is_for_adapters_that_do_not_hold_it(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", bare)
    with pytest.raises(UsageError, match="with --alpha"):
        merge_into([bare], base.hf, tmp_path / "out")
    merge_into([bare], base.hf, tmp_path / "out", alpha=8)
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "wanted")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "wanted")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bias_without_a_place_is_refused(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UnsupportedError, match=r"q_proj and 1 more: has a bias on B"):
        merge_into([tmp_path / "adapter"], bases["llama"].hf, tmp_path / "merged")


def test_lost_updates_are_reported(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bf16_base(bases["llama"], tmp_path / "base")
    trained(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    weight = 3e-4
    report = merge_into([tmp_path / "adapter"], base, tmp_path / "merged", weights=[weight])
    old = load_file(base / "model.safetensors")[f"{Q}.weight"].double()
    new = load_file(tmp_path / "merged" / "model.safetensors")[f"{Q}.weight"].double()
    update = dense(base, {tmp_path / "adapter": weight})[f"{Q}.weight"] - old.numpy()
    kept = float(((new - old).numpy() * update).sum() / (update**2).sum())
    found = {tensor.tensor: tensor for tensor in report.tensors}[f"{Q}.weight"]
    assert found.survival == pytest.approx(kept, rel=1e-3)
    assert found.survival is not None
    assert found.survival < 0.95
    norm = float(np.linalg.norm(update) / np.linalg.norm(old.numpy()))
    assert found.relative_norm == pytest.approx(norm, rel=1e-4)
    assert any("less than 95% of the update is left" in warning for warning in report.warnings)
    apart = np.linalg.norm((new - old).numpy() - update) / np.linalg.norm(update)
    assert found.noise == pytest.approx(apart, rel=1e-3)
    assert report.max_noise == max(tensor.noise or 0.0 for tensor in report.tensors)
