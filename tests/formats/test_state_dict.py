"""Adapters in memory: PEFT state dicts as arrays and as torch tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit
import adapterkit.torch
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType

TINY = Path(__file__).parents[2] / "fixtures" / "pirate" / "adapter"


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes)
    lora = LoraConfig(init_lora_weights=False, r=4, target_modules=["q_proj", "up_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(LlamaForCausalLM(config), lora).eval()


def test_a_live_model_takes_and_gives_its_adapter() -> None:
    trained, other = model(0), model(0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    config = trained.peft_config["default"].to_dict()
    adapter = adapterkit.torch.from_state_dict(get_peft_model_state_dict(trained), config)
    state, _ = adapterkit.torch.to_state_dict(adapter)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    prompt = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(other(prompt).logits, trained(prompt).logits, rtol=0, atol=0)


def test_arrays_and_files_mean_the_same(tmp_path: Path) -> None:
    read = adapterkit.read(TINY)
    state, config = adapterkit.to_state_dict(read)
    again = adapterkit.from_state_dict(state, config)
    assert again.scales == read.scales
    assert {k: bytes(t.tobytes()) for k, t in again.tensors.items()} == {
        k: bytes(t.tobytes()) for k, t in read.tensors.items()
    }
    proven = adapterkit.write(again, tmp_path / "copy")
    assert proven.max_relative_error == 0


PLAIN = [dtype for dtype in DType if not dtype.quantised]


@pytest.mark.parametrize("dtype", PLAIN)
def test_every_stored_type_keeps_its_bits_in_torch(dtype: DType, tmp_path: Path) -> None:
    # The safetensors library says which type of torch it is, and which values the bits are.
    kept = np.arange(24 * dtype.block_bytes, dtype=np.uint8) % (2 if dtype is DType.BOOL else 120)
    lazy = adapterkit.LazyTensor(dtype, (3, 8), kept.tobytes)
    write_safetensors(tmp_path / "x.safetensors", {"x": lazy}, {})
    wanted = load_file(tmp_path / "x.safetensors")["x"]
    found = adapterkit.torch.to_tensor(lazy)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    turned = adapterkit.torch.from_tensor(found.T)
    assert (turned.dtype, turned.shape) == (dtype, (8, 3))
    assert turned.numpy().T.tobytes() == kept.tobytes()


def test_empty_and_scalar_tensors_survive() -> None:
    for tensor in (torch.zeros(0, 4), torch.tensor(3.5)):
        again = adapterkit.torch.to_tensor(adapterkit.torch.from_tensor(tensor))
        assert torch.equal(again, tensor)


def test_quantised_tensors_come_as_float32() -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    packed = adapterkit.LazyTensor.of(values).cast(DType.Q8_0)
    assert adapterkit.torch.to_tensor(packed).dtype is torch.float32
