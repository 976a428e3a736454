"""Experts one by one meet llama.cpp's stacks: missing ones, mixed ranks, and the way back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from engine import (
    BaseFixture,
    family_row,
    make_base,
)
from safetensors.numpy import load_file, save_file

from adapterkit import merge_files
from adapterkit.architectures import families, load
from adapterkit.containers.gguf import read_gguf
from adapterkit.conversion import convert
from adapterkit.errors import (
    IncompatibleBaseError,
    UnsupportedError,
)
from adapterkit.keys import is_one_expert

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.engine

# One by one, as transformers 4 spelled them: expert -> rank. Expert 1 is not adapted at all.
RANKS = {0: 2, 2: 4}


def write_one_by_one(folder: Path, experts: Mapping[int, int]) -> dict[tuple[int, str], Array]:
    """Save experts of Mixtral's first layer, and return their updates."""
    random = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    expected: dict[tuple[int, str], Array] = {}
    rank_pattern, alpha_pattern = {}, {}
    for expert, rank in experts.items():
        for name, (rows, columns) in {"w1": (96, 64), "w2": (64, 96)}.items():
            module = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            a = random.normal(size=(rank, columns)).astype(np.float32)
            b = random.normal(size=(rows, rank)).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            rank_pattern[module], alpha_pattern[module] = rank, 3 + expert
            expected[expert, name] = (3 + expert) / rank * (b.astype(float) @ a.astype(float))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "target_modules": ["w1", "w2"],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return expected


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("mixtral"), tmp_path_factory.mktemp("mixtral-by-one"))


def test_missing_experts_are_zero_and_mixed_ranks_are_brought_together(
    mixtral: BaseFixture, tmp_path: Path
) -> None:
    expected = write_one_by_one(tmp_path / "a", RANKS)
    report = convert(tmp_path / "a", tmp_path / "a.gguf", base=mixtral.gguf)
    assert report.max_relative_error < 1e-6
    file = read_gguf(tmp_path / "a.gguf")
    alpha = file.metadata["adapter.lora.alpha"]
    for name, tensor in {"w1": "ffn_gate_exps", "w2": "ffn_down_exps"}.items():
        a = file.tensors[f"blk.0.{tensor}.weight.lora_a"].numpy().astype(float)
        b = file.tensors[f"blk.0.{tensor}.weight.lora_b"].numpy().astype(float)
        assert (a.shape[:2], b.shape[::2]) == ((4, 4), (4, 4))
        for expert in range(4):
            ours = alpha / b.shape[-1] * (b[expert] @ a[expert])
            wanted = expected.get((expert, name), np.zeros_like(ours))
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_experts_in_two_spellings_are_no_adapter(mixtral: BaseFixture, tmp_path: Path) -> None:
    """A merge of two layouts: PEFT loads the stacks, and none of what is said one by one."""
    write_one_by_one(tmp_path / "single", RANKS)
    convert(tmp_path / "single", tmp_path / "a.gguf", base=mixtral.hf)
    convert(tmp_path / "a.gguf", tmp_path / "fused", base=mixtral.hf, moe_layout="fused")
    sources = [tmp_path / "single", tmp_path / "fused"]
    for name in ("merged", "merged.gguf"):
        with pytest.raises(UnsupportedError, match=r"0\.w1: is an expert, and those of .* stacked"):
            merge_files(sources, tmp_path / name, base=mixtral.hf)
        assert not (tmp_path / name).exists()


def test_one_expert_among_others_is_told_in_every_family() -> None:
    named = [
        rule.hf.format(i=1, e=12)
        for name in families()
        for rule in load(name).rules
        if "experts.{e}" in rule.hf
    ]
    assert len(named) > 40
    assert all(map(is_one_expert, named))
    others = ("model.layers.1.mlp.experts.down_proj", "experts.gate", "model.experts", "layers.3.q")
    assert not any(map(is_one_expert, others))


def test_expert_that_the_base_does_not_have_is_refused(
    mixtral: BaseFixture, tmp_path: Path
) -> None:
    write_one_by_one(tmp_path / "a", {4: 2})
    with pytest.raises(IncompatibleBaseError, match="expert 4 is adapted, but the base has 4"):
        convert(tmp_path / "a", tmp_path / "a.gguf", base=mixtral.gguf)


def test_layout_of_experts_is_the_users_choice(mixtral: BaseFixture, tmp_path: Path) -> None:
    write_one_by_one(tmp_path / "a", dict.fromkeys(range(4), 2))
    convert(tmp_path / "a", tmp_path / "a.gguf", base=mixtral.gguf)
    for layout in ("experts", "fused"):
        back = tmp_path / layout
        convert(tmp_path / "a.gguf", back, base=mixtral.hf, moe_layout=layout)
        again = convert(back, tmp_path / f"{layout}.gguf", base=mixtral.gguf)
        assert again.max_relative_error < 1e-6
        names = load_file(back / "adapter_model.safetensors").keys()
        one_by_one = any("block_sparse_moe.experts.3.w1." in name for name in names)
        assert one_by_one == (layout == "experts")
        first = wrapped_updates(tmp_path / "a.gguf")
        for tensor, update in wrapped_updates(tmp_path / f"{layout}.gguf").items():
            np.testing.assert_allclose(update, first[tensor], rtol=1e-5, atol=1e-5)


def wrapped_updates(path: Path) -> dict[str, Array]:
    """Return the nonzero updates of a GGUF adapter by tensor."""
    file = read_gguf(path)
    alpha = file.metadata["adapter.lora.alpha"]
    found: dict[str, Array] = {}
    for name, tensor in file.tensors.items():
        if name.endswith(".lora_a"):
            b = file.tensors[name.removesuffix("_a") + "_b"].numpy()
            update = alpha / b.shape[-1] * (b @ tensor.numpy())
            if np.any(update):
                found[name] = update
    return found
