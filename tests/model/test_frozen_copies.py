"""Frozen copies of tables that are not the base's own are replaced, carried, or named as a loss."""

from __future__ import annotations

from shutil import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pissa_models import apart
from pissa_models import tuned as pissa_tuned
from quiet_peft import quiet_peft
from safetensors.torch import load_file, save_file
from tables_oracle import ROWS, WIDTH, assert_same, load_model, reloaded, write_base
from tables_oracle import tuned as plainly_tuned

from adapterkit import compress_file, convert, diff, merge_files, merge_into, validate, verify
from adapterkit.errors import IncompatibleBaseError, LossyConversionError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
EMBED = "base_model.model.model.embed_tokens.base_layer.weight"
HEAD = "base_model.model.lm_head.base_layer.weight"
SPARE = 60


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base", tied=False)
    model = load_model(folder)
    apart(model)
    model.save_pretrained(folder)
    return folder


def with_spare_rows(base: Path, folder: Path) -> Path:
    """Write the base with rows of spare tokens that were set before training."""
    model = load_model(base)
    with torch.no_grad():
        rows = torch.randn(ROWS - SPARE, WIDTH, generator=torch.Generator().manual_seed(8))
        model.get_input_embeddings().weight[SPARE:] = rows
    model.save_pretrained(folder)
    return folder


def tuned_with_spare_rows(base: Path, tmp_path: Path) -> Any:
    return plainly_tuned(
        with_spare_rows(base, tmp_path / "trained-on"),
        tmp_path / "adapter",
        target_modules=["embed_tokens", "q_proj"],
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_output_that_an_initialisation_changed_is_the_original_again(
    init: str, base: Path, tmp_path: Path
) -> None:
    with quiet_peft("Setting `save_embedding_layers`"):
        source = pissa_tuned(base, tmp_path / "adapter", init, target_modules=["lm_head", "q_proj"])
    original = load_file(base / "model.safetensors")["lm_head.weight"]
    assert not torch.allclose(load_file(source / WEIGHTS)[HEAD], original, atol=1e-2)
    live = reloaded(base, source)
    convert(source, tmp_path / "plain", base=base)
    compress_file(source, tmp_path / "cut", base=base, tol=1e-7, to="peft")
    merge_files([source], tmp_path / "merged", base=base, weights=[1.0])
    for name in ("plain", "cut", "merged"):
        assert torch.equal(load_file(tmp_path / name / WEIGHTS)[HEAD], original)
        assert_same(live, reloaded(base, tmp_path / name), ROWS)
    merge_into([source], base, tmp_path / "into")
    assert_same(live, load_model(tmp_path / "into"), ROWS)
    assert diff(source, tmp_path / "plain", base=base).equal
    assert verify(tmp_path / "plain", against=source, base=base).sound
    held = load_file(tmp_path / "plain" / WEIGHTS)
    held[HEAD] = load_file(source / WEIGHTS)[HEAD]
    save_file(held, tmp_path / "plain" / WEIGHTS)
    assert not diff(source, tmp_path / "plain", base=base).equal


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_changed_output_of_another_base_is_refused(init: str, base: Path, tmp_path: Path) -> None:
    with quiet_peft("Setting `save_embedding_layers`"):
        source = pissa_tuned(base, tmp_path / "adapter", init, target_modules=["lm_head", "q_proj"])
    held = load_file(source / WEIGHTS)
    held[HEAD][9] += 0.01
    save_file(held, source / WEIGHTS)
    with pytest.raises(IncompatibleBaseError, match=r"another row 9 than .* leaves of the base"):
        convert(source, tmp_path / "plain", base=base)


def test_targets_without_the_copy_name_it_as_a_loss(base: Path, tmp_path: Path) -> None:
    live = tuned_with_spare_rows(base, tmp_path)
    source = tmp_path / "adapter"
    for to in ("a.gguf", "mlx"):
        with pytest.raises(LossyConversionError, match=r"embed_tokens: .* another row 60 than"):
            convert(source, tmp_path / to, to=to.removeprefix("a."), base=base)
    lossy = convert(source, tmp_path / "a.gguf", base=base, allow_lossy=True)
    assert [loss.code for loss in lossy.losses] == ["other-table"]
    report = diff(source, tmp_path / "a.gguf", base=base)
    assert (report.equal, report.only_in_a) == (False, ("model.embed_tokens.base_copy",))
    with pytest.raises(LossyConversionError, match="another row 60"):
        merge_into([source], base, tmp_path / "into")
    # The way out that the message names.
    reloaded(base, source).unload().save_pretrained(tmp_path / "own")
    convert(source, tmp_path / "b.gguf", base=tmp_path / "own")
    convert(tmp_path / "b.gguf", tmp_path / "back", to="peft", base=tmp_path / "own")
    assert_same(live, reloaded(tmp_path / "own", tmp_path / "back"), ROWS)
    merge_into([source], tmp_path / "own", tmp_path / "into")
    assert_same(live, load_model(tmp_path / "into"), ROWS)


def test_peft_carries_the_copy_and_says_so(base: Path, tmp_path: Path) -> None:
    live = tuned_with_spare_rows(base, tmp_path)
    source = tmp_path / "adapter"
    report = convert(source, tmp_path / "with", base=base)
    assert any("not the base's own, stays with it" in note for note in report.notes)
    convert(source, tmp_path / "without")
    merge_files([source, source], tmp_path / "merged", base=base, weights=[0.5, 0.5])
    for name in ("with", "without", "merged"):
        assert_same(live, reloaded(base, tmp_path / name), ROWS)


def test_without_a_base_the_copy_is_said_not_to_be_compared(base: Path, tmp_path: Path) -> None:
    tuned_with_spare_rows(base, tmp_path)
    (tmp_path / "config").mkdir()
    copy(base / "config.json", tmp_path / "config")
    report = convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "config")
    assert any("not compared with the base's own" in note for note in report.notes)
    report = convert(tmp_path / "adapter", tmp_path / "b.gguf", base=tmp_path / "trained-on")
    assert not any("not compared" in note for note in report.notes)


def test_two_copies_of_one_table_are_not_merged(base: Path, tmp_path: Path) -> None:
    tuned_with_spare_rows(base, tmp_path)
    plainly_tuned(base, tmp_path / "other", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedError, match="frozen copy with another row 60"):
        merge_files([tmp_path / "adapter", tmp_path / "other"], tmp_path / "merged", any_base=True)


@pytest.mark.parametrize(("target", "sound"), [("peft", True), ("vllm", False)])
def test_validate_names_it_and_knows_who_takes_it(
    target: str, sound: bool, base: Path, tmp_path: Path
) -> None:
    tuned_with_spare_rows(base, tmp_path)
    report = validate(tmp_path / "adapter", base=base, targets=[target])
    assert [each.code for each in report.findings if each.code == "AK314"]
    verdict = report.targets[0].verdict
    assert (verdict == "applied") is sound
