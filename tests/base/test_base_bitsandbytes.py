"""Bases of bitsandbytes in 4 bits are what bitsandbytes itself decodes them to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from engine import BaseFixture, family_row, make_adapter, make_base
from quantised_bases import Q, logical, stored_alone, tensors_of
from safetensors.torch import load_file
from terminal import ROOT

from adapterkit import merge_into
from adapterkit.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

FIXTURES = ROOT / "fixtures" / "bitsandbytes"
NAMES = ["nf4", "fp4", "nf4-nested", "fp4-nested"]
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


def stored(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the parts that bitsandbytes stores, and what it decodes them to."""
    held = load_file(FIXTURES / f"{name}.safetensors")
    return held, held.pop("decoded")


def base_of(parts: dict[str, torch.Tensor], llama: BaseFixture, folder: Path) -> Path:
    return stored_alone(llama.hf, folder, CONFIG, {f"{Q}.{n}": t for n, t in parts.items()})


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_decoded_to_the_bit(name: str, llama: BaseFixture, tmp_path: Path) -> None:
    parts, wanted = stored(name)
    tensor = logical(base_of(parts, llama, tmp_path))[f"{Q}.weight"]
    assert tensor.shape == tuple(wanted.shape)
    bits = wanted.view(torch.uint8).numpy()
    whole = np.frombuffer(tensor.read(), np.uint8).reshape(bits.shape)
    assert np.array_equal(whole, bits)
    reader: Any = tensor.read
    generator = np.random.default_rng(0)
    for _ in range(20):
        begin, end = sorted(generator.integers(0, len(bits) + 1, 2).tolist())
        part = np.frombuffer(reader.rows(begin, end), np.uint8)
        assert np.array_equal(part, bits[begin:end].reshape(-1))


def test_a_base_in_four_bits_is_merged_into(llama: BaseFixture, tmp_path: Path) -> None:
    weight = load_file(llama.hf / "model.safetensors")[f"{Q}.weight"]
    codes = torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8)
    absmax, quant_map = torch.rand(weight.numel() // 64), torch.linspace(-1, 1, 16)
    state = {"blocksize": 64, "dtype": "float32", "shape": list(weight.shape), "quant_type": "nf4"}
    parts = {
        "weight": codes,
        "weight.absmax": absmax,
        "weight.quant_map": quant_map,
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    folder = base_of(parts, llama, tmp_path)
    make_adapter(llama, tmp_path / "adapter", target_modules=["v_proj"])
    report = merge_into([tmp_path / "adapter"], folder, tmp_path / "out", dequantize=True)
    merged = tensors_of(tmp_path / "out")
    halves = torch.cat([codes >> 4, codes & 15], dim=1).reshape(-1).long()
    wanted = (quant_map[halves] * absmax.repeat_interleave(64)).reshape(weight.shape)
    assert torch.equal(merged[f"{Q}.weight"], wanted.to(merged[f"{Q}.weight"].dtype))
    assert merged.keys() == tensors_of(llama.hf).keys()
    assert report.decoded == 1
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight.quant_map", None, "needs absmax of 8 F32"),
        ("weight.absmax", torch.ones(3), "needs absmax of 8 F32"),
        (STATE, None, "needs one .*quant_state"),
        (STATE, torch.zeros(4, dtype=torch.uint8), "not readable JSON"),
        ("weight", torch.zeros((7, 1), dtype=torch.uint8), "has 7 bytes for 481 numbers"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    part: str, value: torch.Tensor | None, message: str, llama: BaseFixture, tmp_path: Path
) -> None:
    parts, _ = stored("nf4")
    parts.pop(part)
    if value is not None:
        parts[part] = value
    with pytest.raises(FormatError, match=message):
        logical(base_of(parts, llama, tmp_path))
