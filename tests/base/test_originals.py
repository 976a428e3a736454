"""An adapter of a quantised base meets the 16-bit original: found, said, and measured."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from engine import BaseFixture, family_row, make_adapter, make_base
from quantised_bases import Q, stored_alone
from safetensors.torch import load_file
from terminal import ROOT

from adapterkit import merge_into, validate
from adapterkit.base.originals import find_original, plain_name

if TYPE_CHECKING:
    from pathlib import Path

FIXTURES = ROOT / "fixtures"
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NAMED = "unsloth/Tiny-Llama-1B-bnb-4bit"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, **config: object) -> Path:
    """Put the small base of the fixtures into a hub cache under a name."""
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "1"
    shutil.copytree(FIXTURES / "peft" / "base", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config))
    return folder


def naming(name: str, folder: Path) -> Path:
    shutil.copytree(FIXTURES / "peft" / "tiny", folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return folder


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/Meta-Llama-3.1-8B-unsloth-bnb-4bit", "metallama318b"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistral7bv01"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen257binstruct"),
        ("org/model-AWQ", "model"),
        ("org/model_4bits_128g", "model"),
        ("org/Llama-3.2-1B", "llama321b"),
        ("google/gemma-3-4b-it", "gemma34bit"),
    ],
)
def test_names_without_what_quantisers_append(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_the_only_original_in_the_cache_is_used_and_said(cache: Path, tmp_path: Path) -> None:
    adapter = naming(NAMED, tmp_path / "adapter")
    assert validate(adapter, targets=["peft"]).base is None
    folder = put(cache, "org/tiny-llama-1b")
    put(cache, "org/tiny-llama-1b-awq", quantization_config={"quant_method": "awq"})
    put(cache, "org/tiny-llama-7b")
    report = validate(adapter, targets=["peft"])
    assert report.base is not None
    assert str(folder) in report.base
    (said,) = [each for each in report.findings if each.code == "AK311"]
    assert NAMED in said.message
    assert "org/tiny-llama-1b" in said.message
    assert report.exit_code == 0


def test_of_two_originals_none_is_meant(cache: Path) -> None:
    put(cache, "org/tiny-llama-1b")
    assert find_original(NAMED) is not None
    put(cache, "other/Tiny-Llama-1B")
    assert find_original(NAMED) is None
    assert find_original("org/tiny-llama-1b") is None


def test_a_base_that_is_at_hand_is_meant_itself(cache: Path, tmp_path: Path) -> None:
    put(cache, "org/tiny-llama-1b")
    folder = put(cache, NAMED)
    report = validate(naming(NAMED, tmp_path / "adapter"), targets=["peft"])
    assert report.base is not None
    assert str(folder) in report.base
    assert "AK311" not in {each.code for each in report.findings}


def test_a_merge_says_how_far_the_weights_are_from_those_trained_on(
    llama: BaseFixture, tmp_path: Path
) -> None:
    weights = load_file(llama.hf / "model.safetensors")
    weight = weights[f"{Q}.weight"]
    codes = torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8)
    absmax, quant_map = torch.rand(weight.numel() // 64), torch.linspace(-1, 1, 16)
    state = {"blocksize": 64, "dtype": "float32", "shape": list(weight.shape), "quant_type": "nf4"}
    parts = {
        f"{Q}.weight": codes,
        f"{Q}.weight.absmax": absmax,
        f"{Q}.weight.quant_map": quant_map,
        f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    four = stored_alone(llama.hf, tmp_path / "four", CONFIG, parts)
    make_adapter(llama, tmp_path / "adapter", target_modules=["v_proj", "q_proj"])
    plain = merge_into([tmp_path / "adapter"], llama.hf, tmp_path / "plain")
    assert {tensor.quantised for tensor in plain.tensors} == {None}
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(four)}))
    report = merge_into([tmp_path / "adapter"], llama.hf, tmp_path / "out")
    tensors = {tensor.tensor: tensor for tensor in report.tensors}
    halves = torch.cat([codes >> 4, codes & 15], dim=1).reshape(-1).long()
    decoded = (quant_map[halves] * absmax.repeat_interleave(64)).reshape(weight.shape)
    wanted = float((weight.double() - decoded.double()).norm() / weight.double().norm())
    assert tensors[f"{Q}.weight"].quantised == pytest.approx(wanted, rel=1e-6)
    # All others are the same weights in both.
    assert {each.quantised for name, each in tensors.items() if name != f"{Q}.weight"} == {0.0}
    (said,) = [note for note in report.notes if "W₄" in note]
    ratio = wanted / (tensors[f"{Q}.weight"].relative_norm or 0.0)
    assert f"at most {ratio:.3g} times, in {Q}.weight" in said
