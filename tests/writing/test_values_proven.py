"""What acts beside the factors fits them, or is refused, and the proof looks at every number."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import transformers
from conformance.making import quiet
from safetensors.torch import load_file, save_file
from small_llama import saved_llama

from adapterkit import convert, validate
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, IncompatibleBaseError, ProofError
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.proof import compare, prove
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

MODULE = "model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "biased": {"lora_bias": True},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("trained")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            settings = {"target_modules": ["q_proj"], **SETTINGS[name]}
            settings["init_lora_weights"] = False
            with quiet():
                model = transformers.AutoModelForCausalLM.from_pretrained(base)
                config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
                peft.get_peft_model(model, config).save_pretrained(folder / name)
        return folder / name

    return make


def changed(
    source: Path, out: Path, word: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Path:
    """Copy an adapter with one tensor changed."""
    shutil.copytree(source, out)
    weights = out / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if word in name)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    return out


def loads(adapter: Path, base: Path) -> bool:
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        try:
            peft.PeftModel.from_pretrained(model, adapter)
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize(
    ("kind", "word", "change"),
    [
        ("dora", "q_proj.lora_magnitude", lambda x: x[:7]),
        ("dora", "q_proj.lora_magnitude", lambda x: x[:1]),
        ("dora", "q_proj.lora_magnitude", lambda x: x[None]),
        ("dora", "embed_tokens.lora_magnitude", lambda x: x[:7]),
        ("biased", "lora_B.bias", lambda x: x[:7]),
        ("biased", "lora_B.bias", lambda x: x[None]),
    ],
)
def test_what_does_not_fit_the_factors_is_refused(
    kind: str,
    word: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    base: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = changed(trained(kind), tmp_path / "a", word, change)
    # PEFT broadcasts an embedding's magnitudes until the first token, and refuses all else.
    assert loads(trained(kind), base)
    assert not loads(source, base) or "embed" in word
    with pytest.raises(FormatError, match=r"has shape \[.*\], and A is"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert {f.code for f in validate(source, base=base).findings} == {"AK123"}


@pytest.mark.parametrize(("kind", "word"), [("saved", "lm_head"), ("tokens", "token_adapter")])
def test_what_does_not_fit_the_base_is_refused(
    kind: str, word: str, base: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    source = changed(trained(kind), tmp_path / "a", word, lambda x: x[:, :20])
    assert not loads(source, base)
    with pytest.raises(IncompatibleBaseError, match=r"x 20, and the base has 64 x 32 here"):
        convert(source, tmp_path / "b", base=base)
    assert not (tmp_path / "b").exists()
    assert "AK313" in {f.code for f in validate(source, base=base).findings}


@pytest.mark.parametrize(("kind", "word"), [("dora", "magnitude"), ("biased", "lora_B.bias")])
def test_what_has_lost_its_factors_is_half_a_module(
    kind: str, word: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(trained(kind), tmp_path / "a")
    weights = source / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if "layers.0" not in n or word in n}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(FormatError, match="has no factors beside it"):
        convert(source, tmp_path / "b")


def adapter(role: Role, values: np.ndarray[Any, Any], dtype: DType) -> AdapterTensorSet:
    """Return factors in bfloat16, and a tensor beside them."""
    random = np.random.default_rng(0)
    a, b = (LazyTensor.of(random.normal(size=s)).cast(DType.BF16) for s in ((4, 64), (32, 4)))
    module = f"{MODULE}.weight" if role is Role.FULL else MODULE
    beside = {TensorKey(module, role): LazyTensor.of(values).cast(dtype)}
    return AdapterTensorSet.of([Update(MODULE, a, b, 2.0)], beside)


ROLES = {
    Role.MAGNITUDE: (32,),
    Role.COLUMN_MAGNITUDE: (64,),
    Role.LORA_BIAS: (32,),
    Role.FULL: (32, 64),
    Role.TOKEN_ROWS: (8, 64),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_one_wrong_number_is_no_rounding(role: Role, dtype: DType, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=ROLES[role]) * 3e-5
    source, path = adapter(role, values, DType.F32), tmp_path / "out"
    rounded = adapter(role, values, dtype)
    prove(source, rounded, path=path)
    # The factors are bfloat16, whose rounding explains less of a float32 beside them.
    share = {DType.F32: 1e-5, DType.F16: 5e-3, DType.BF16: 3e-2}[dtype]
    values.flat[0] = 1e-4 * (1 + share)
    right = values.copy()
    right.flat[0] = 1e-4
    wrong = adapter(role, values, dtype)
    source = adapter(role, right, DType.F32)
    assert compare(source, wrong).worst[1] < share
    with pytest.raises(ProofError, match="of one of its numbers"):
        prove(source, wrong, path=path)


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    values = np.ones(32)
    values[3] = np.nan
    broken = adapter(Role.MAGNITUDE, values, DType.F32)
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        prove(broken, broken, path=tmp_path / "out")
