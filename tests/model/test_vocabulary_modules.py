"""A pass on a vocabulary resizes whole modules, or leaves them as they are and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tables_oracle import ROWS, WIDTH, assert_same, load_model, reloaded, tuned, write_base

from adapterkit import compress_file, convert, merge_into
from adapterkit.errors import LossyConversionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
MORE = 68
HEAD = {"target_modules": ["lm_head", "q_proj"]}
EMBED = {"target_modules": ["embed_tokens", "q_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def without_copies(tensors: dict[str, torch.Tensor]) -> None:
    for name in [each for each in tensors if "base_layer" in each]:
        del tensors[name]


def without_new_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "embedding_A" in name:
            tensor[:, ROWS:] = 0
        elif "lm_head.lora_B" in name:
            tensor[ROWS:] = 0


def longer(base: Path, folder: Path, *, zeros: bool = False) -> Path:
    """Write the base with rows that no adapter of it has."""
    model = load_model(base)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            more = torch.randn(MORE - ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
            table.weight[ROWS:] = more * (not zeros)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", tied=False)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_padded_as_a_whole(kind: str, copies: bool, base: Path, tmp_path: Path) -> None:
    live = tuned(base, tmp_path / "adapter", **HEAD, **KINDS[kind])
    padded = longer(base, tmp_path / "padded")
    if not copies:
        changed(tmp_path / "adapter", without_copies)
    convert(tmp_path / "adapter", tmp_path / "fitted", base=padded)
    if kind != "bias":  # which has no place in this base
        merge_into([tmp_path / "adapter"], padded, tmp_path / "merged")
    found = load_file(tmp_path / "fitted" / WEIGHTS)
    assert {each.shape[0] for n, each in found.items() if "lm_head" in n and "_A" not in n} == {
        MORE
    }
    on_padded = reloaded(padded, tmp_path / "fitted")
    assert_same(live, on_padded, ROWS)
    if kind != "bias":
        assert_same(on_padded, load_model(tmp_path / "merged"), MORE)
    # What is the base's stays the base's.
    with torch.no_grad():
        hidden = torch.randn(5, WIDTH)
        head: Any = on_padded.base_model.model.lm_head
        new, old = (layer(hidden)[:, ROWS:] for layer in (head, load_model(padded).lm_head))
    assert torch.allclose(new, old, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_a_module_is_cut_as_a_whole(kind: str, base: Path, tmp_path: Path) -> None:
    """The rows that go hold nothing: the table that was trained on was padded with zeros."""
    trained = longer(base, tmp_path / "trained", zeros=True)
    tuned(trained, tmp_path / "adapter", rows=MORE, **HEAD, **KINDS[kind])
    changed(tmp_path / "adapter", without_new_rows)
    live = reloaded(trained, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "cut", base=base)
    found = reloaded(base, tmp_path / "cut")
    prompt = torch.arange(ROWS).reshape(-1, 2)
    with torch.no_grad():
        wanted = live(input_ids=prompt).logits[..., :ROWS]
        assert torch.allclose(found(input_ids=prompt).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_what_a_row_has_beside_its_factors_is_no_padding(
    kind: str, base: Path, tmp_path: Path
) -> None:
    live = tuned(base, tmp_path / "adapter", rows=MORE, **HEAD, **KINDS[kind])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        without_copies(tensors)
        tensors["base_model.model.lm_head.lora_B.weight"][ROWS:] = 0

    changed(tmp_path / "adapter", change)
    with pytest.raises(LossyConversionError, match="68 rows are more than the base's 64"):
        convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=base)
    with pytest.raises(LossyConversionError, match="68 rows are more than the base's 64"):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    # PEFT's users resize: the whole stays.
    convert(tmp_path / "adapter", tmp_path / "kept", base=base)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "kept"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert live.config.vocab_size == MORE


def test_copies_with_new_rows_stay_with_their_factors(base: Path, tmp_path: Path) -> None:
    trained = longer(base, tmp_path / "trained")
    tuned(trained, tmp_path / "adapter", rows=MORE, target_modules=["embed_tokens", "lm_head"])
    changed(tmp_path / "adapter", without_new_rows)
    live = reloaded(trained, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "same", base=base)
    compress_file(tmp_path / "adapter", tmp_path / "cut", base=base, tol=0, to="peft")
    for name in ("same", "cut"):
        assert_same(live, reloaded(trained, tmp_path / name), MORE)
    with pytest.raises(LossyConversionError, match="numbers in its frozen copy"):
        convert(tmp_path / "adapter", tmp_path / "a.gguf", base=base)
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged")
    assert_same(live, load_model(tmp_path / "merged"), MORE)


@pytest.mark.parametrize("more", [True, False])
def test_norms_over_all_rows_are_never_resized(more: bool, base: Path, tmp_path: Path) -> None:
    other = longer(base, tmp_path / "other")
    on, off = (base, other) if more else (other, base)
    live = tuned(on, tmp_path / "adapter", rows=ROWS if more else MORE, **EMBED, use_dora=True)
    changed(tmp_path / "adapter", without_copies)
    with pytest.raises(LossyConversionError, match="norms over all rows"):
        merge_into([tmp_path / "adapter"], off, tmp_path / "merged")
    convert(tmp_path / "adapter", tmp_path / "kept", base=off)
    assert_same(live, reloaded(on, tmp_path / "kept"), ROWS)
    report = merge_into([tmp_path / "adapter"], off, tmp_path / "merged", allow_lossy=True)
    assert [loss.code for loss in report.losses] == ["vocabulary"]
    before, after = (load_file(f / "model.safetensors") for f in (off, tmp_path / "merged"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
