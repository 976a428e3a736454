"""What MLX cannot hold is listed, and names that it needs come from the base."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from mlx_trained import base as base  # noqa: PLC0414  (a fixture)
from mlx_trained import document, tuned, without_base
from mlx_trained import quiet as quiet  # noqa: PLC0414  (a fixture)
from safetensors.torch import load_file
from small_llama import saved_llama
from transformers import (
    GPT2Config,
)

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.mlx.losses import losses
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.protocol import FormatOptions

if TYPE_CHECKING:
    from pathlib import Path

transformers.utils.logging.disable_progress_bar()


def codes(folder: Path, base: Path | None, **options: Any) -> list[str]:
    known = open_base(base) if base else None
    found = losses(read_peft(folder, FormatOptions()), FormatOptions(base=known, **options))
    return [loss.code for loss in found if loss.blocks]


LOST: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bias": ({"bias": "all"}, ["saved-module"]),
    "lora-bias": ({"lora_bias": True}, ["lora-bias"]),
    "saved": ({"modules_to_save": ["lm_head"]}, ["saved-module"]),
    "rows": ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, ["token-rows"]),
    "pissa": ({"init_lora_weights": "pissa"}, ["base-changing-init"]),
    "alora": ({"alora_invocation_tokens": [1, 2]}, ["alora"]),
    "nothing": ({}, []),
}


@pytest.mark.parametrize(("settings", "lost"), LOST.values(), ids=LOST)
def test_what_mlx_cannot_hold_is_listed(
    settings: dict[str, Any], lost: list[str], tmp_path: Path
) -> None:
    saved_llama(tmp_path / "base", num_hidden_layers=1, attention_bias=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*modules outside of its modules.*", UserWarning)
        # PEFT takes a bias of lora_B for a factor that was not gathered.
        warnings.filterwarnings("ignore", ".*have invalid shape", UserWarning)
        tuned(tmp_path / "base", tmp_path / "peft", r=4, target_modules=["o_proj"], **settings)
    assert codes(tmp_path / "peft", tmp_path / "base") == lost
    without_base(tmp_path / "peft")
    if lost:
        with pytest.raises(adapterkit.LossyConversionError):
            adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
        assert not (tmp_path / "mlx").exists()


def test_q8_0_and_embeddings_without_a_base_are_listed(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "peft", r=4, target_modules=["embed_tokens", "q_proj"])
    assert codes(tmp_path / "peft", None) == ["needs-base"]
    assert codes(tmp_path / "peft", base, dtype=adapterkit.DType.Q8_0) == ["quantised"]


def test_gpt2_names_need_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tuned(
        tmp_path / "base",
        tmp_path / "peft",
        transformers.GPT2LMHeadModel,
        target_modules=["c_attn", "mlp.c_proj"],
        fan_in_fan_out=True,
    )
    assert codes(tmp_path / "peft", None) == ["needs-base"]
    adapterkit.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=tmp_path / "base")
    parameters = document(tmp_path / "mlx")["lora_parameters"]
    assert parameters["keys"] == ["attn.c_attn", "mlp.c_proj"]
    names = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert names["model.h.1.attn.c_attn.lora_b"].shape == (8, 96)
