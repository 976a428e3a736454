"""Extraction from GGUF files, and into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoint_bases import trained
from engine import BaseFixture, family_row, make_base
from extraction_settings import SETTINGS, ranks
from gguf_bases import retyped

from adapterkit import diff, extract, merge_into
from adapterkit.containers.gguf import read_gguf
from adapterkit.dtype import DType
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "gpt2", "mixtral")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def test_written_as_gguf_it_is_the_same_update(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules="all-linear")
    merge_into([tmp_path / "adapter"], base.hf, tmp_path / "merged")
    report = extract(base.hf, tmp_path / "merged", tmp_path / "back.gguf")
    assert report.format == "gguf"
    found = diff(tmp_path / "adapter", tmp_path / "back.gguf", base=base.hf)
    assert found.max_relative_error < 1e-6
    for outtype, bound in (("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)):
        made = tmp_path / f"{outtype}.gguf"
        extract(base.hf, tmp_path / "merged", made, outtype=outtype)
        assert 1e-6 < diff(tmp_path / "adapter", made, base=base.hf).max_relative_error < bound


def test_between_two_files_lies_the_adapter(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    for name in ("plain", "conv1d", "experts"):
        family, settings = SETTINGS[name]
        base = bases[family]
        trained(base, tmp_path / name, **settings)
        merged = tmp_path / f"{name}.gguf"
        merge_into([tmp_path / name], base.gguf, merged)
        report = extract(base.gguf, merged, tmp_path / f"{name}-back")
        assert ranks(report) == {4}
        assert all(
            module.module.startswith(("model.", "transformer.")) for module in report.modules
        )
        found = diff(tmp_path / name, tmp_path / f"{name}-back", base=base.hf)
        assert found.max_relative_error < 1e-6


def test_norms_are_left_over_and_cannot_be_saved(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    modules = {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}
    trained(base, tmp_path / "adapter", **modules)
    merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "merged.gguf")
    report = extract(base.gguf, tmp_path / "merged.gguf", tmp_path / "back")
    assert [left.tensor for left in report.left_over] == ["output_norm.weight"]
    with pytest.raises(UsageError, match="from Hugging Face checkpoints only"):
        extract(base.gguf, tmp_path / "merged.gguf", tmp_path / "whole", save_rest=True)


def test_the_rounding_of_q8_0_is_known(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = tmp_path / "merged.gguf"
    plain = tmp_path / "plain.gguf"
    merge_into([tmp_path / "adapter"], base.gguf, merged, gguf_type="q8_0")
    merge_into([tmp_path / "adapter"], base.gguf, plain)
    report = extract(base.gguf, merged, tmp_path / "back")
    assert ranks(report) == {4}
    assert report.notes[0].startswith("the tuned model is quantised (Q8_0)")
    found = diff(tmp_path / "adapter", tmp_path / "back", base=base.hf)
    assert 1e-4 < found.max_relative_error < 0.05
    before, after = read_gguf(base.gguf).tensors, read_gguf(merged).tensors
    update = read_gguf(plain).tensors
    for module in report.modules:
        old, new, exact = (
            each[f"blk.{module.module.split('.')[2]}.attn_q.weight"].numpy().astype(float)
            for each in (before, after, update)
        )
        noise = np.linalg.norm(new - exact) / np.linalg.norm(new - old)
        assert module.rounding == pytest.approx(float(noise), rel=0.1)
        assert module.explained is not None
        assert module.explained > 0.9


def test_other_quantised_types_are_noise_of_unknown_size(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "merged.gguf")
    four = retyped(tmp_path / "merged.gguf", tmp_path / "four.gguf", DType.Q4_0)
    report = extract(base.gguf, four, tmp_path / "back", rank=4)
    assert [module.explained for module in report.modules] == [None] * len(report.modules)
    assert any("quantised (Q4_0)" in note for note in report.notes)
    assert any("raise --rank" in warning for warning in report.warnings)
