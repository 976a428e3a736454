"""What a refusal advises is a command that works: chains of advice end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from checkpoint_bases import trained
from engine import BaseFixture, family_row, make_base
from safetensors.numpy import load_file, save_file

from adapterkit import convert, merge_into, verify
from adapterkit.errors import LossyConversionError

if TYPE_CHECKING:
    from pathlib import Path

GROWN = 520
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


def with_tensors(folder: Path, **tensors: tuple[int, ...]) -> Path:
    """Add tensors to an adapter's file."""
    stored = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    for name, shape in tensors.items():
        stored[name] = torch.randn(shape, generator=generator).numpy()
    save_file(stored, folder / WEIGHTS)
    return folder


def test_tables_of_a_grown_vocabulary_go_into_the_hugging_face_model(
    base: BaseFixture, tmp_path: Path
) -> None:
    trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tables = ("lm_head", "model.embed_tokens")
    rows = {f"base_model.model.{name}.weight": (GROWN, 64) for name in tables}
    adapter = with_tensors(tmp_path / "a", **rows)
    for given in (base.hf, base.gguf):
        with pytest.raises(
            LossyConversionError, match=r"520 rows, the base 512; merge it into the"
        ):
            convert(adapter, tmp_path / "a.gguf", base=given)
    with pytest.raises(LossyConversionError, match=r"lm_head\.weight: holds 520 rows") as refused:
        merge_into([adapter], base.gguf, tmp_path / "m.gguf")
    assert "merge it into the Hugging Face model" in str(refused.value)
    merge_into([adapter], base.hf, tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"].shape == (GROWN, 64)
    left = merge_into([adapter], base.gguf, tmp_path / "m.gguf", allow_lossy=True)
    assert {loss.code for loss in left.losses} == {"vocabulary"}
    assert len(left.tensors) == 2


def test_a_head_for_training_is_left_out_by_every_command(
    base: BaseFixture, tmp_path: Path
) -> None:
    trained(base, tmp_path / "a", target_modules=["q_proj"])
    adapter = with_tensors(tmp_path / "a", **{"v_head.summary.weight": (1, 64)})
    commands = {
        "a.gguf": lambda out, **lossy: convert(adapter, out, base=base.hf, **lossy),
        "b.gguf": lambda out, **lossy: convert(adapter, out, base=base.gguf, **lossy),
        "mlx": lambda out, **lossy: convert(adapter, out, to="mlx", base=base.hf, **lossy),
        "m": lambda out, **lossy: merge_into([adapter], base.hf, out, **lossy),
        "m.gguf": lambda out, **lossy: merge_into([adapter], base.gguf, out, **lossy),
    }
    for name, command in commands.items():
        with pytest.raises(LossyConversionError, match=r"v_head.*leave it out with --allow-lossy"):
            command(tmp_path / name)
        done = command(tmp_path / name, allow_lossy=True)
        assert [loss.code for loss in done.losses if loss.blocks] == ["foreign-module"]
    assert verify(tmp_path / "m").sound
