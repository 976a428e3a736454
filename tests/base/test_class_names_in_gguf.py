"""A class that trains under other names than its checkpoints have: Nomic Embed in transformers 5.

llama.cpp's table is of the checkpoint's names, which hold query, key and value as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from adapterkit import convert, read, validate, write
from adapterkit.errors import LossyConversionError
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# PEFT asks transformers by a name that is leaving.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PARTS = {
    "attn_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn_output": ["self_attn.o_proj"],
    "ffn_up": ["mlp.up_proj"],
    "ffn_gate": ["mlp.gate_proj"],
    "ffn_down": ["mlp.down_proj"],
}


def trained(folder: Path, name: str, **settings: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Save a model and an adapter of it; return the updates that PEFT applies, by path."""
    torch.manual_seed(0)
    model: Any = built(getattr(transformers, name), "cpu")
    model.save_pretrained(str(folder / "base"))
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    live.save_pretrained(str(folder / "adapter"))
    changes = {
        path.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().numpy()
        for path, layer in live.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return model, changes


def stored(path: Path) -> dict[str, NDArray[Any]]:
    """Return the update of every tensor of a GGUF adapter, as llama.cpp adds it."""
    file = gguf.GGUFReader(path)
    field = file.fields["adapter.lora.alpha"]
    alpha = float(field.parts[field.data[0]][0])
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in file.tensors}
    return {
        name.removesuffix(".weight.lora_b"): b @ (a := tensors[f"{name[:-1]}a"]) * alpha / len(a)
        for name, b in tensors.items()
        if name.endswith(".lora_b")
    }


@pytest.mark.parametrize(
    ("targets", "patterns"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"], {}),
        (["v_proj", "down_proj"], {}),
        (["q_proj", "v_proj"], {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    ],
)
def test_split_names_become_the_fused_tensor_and_back(
    targets: list[str], patterns: dict[str, Any], tmp_path: Path
) -> None:
    _, changes = trained(tmp_path, "NomicBertModel", target_modules=targets, **patterns)
    base, adapter, made = tmp_path / "base", tmp_path / "adapter", tmp_path / "made.gguf"
    convert(adapter, made, base=base)
    found = stored(made)
    wanted: dict[str, NDArray[Any]] = {}
    for layer in range(2):
        for tensor, leaves in PARTS.items():
            paths = [f"layers.{layer}.{leaf}" for leaf in leaves]
            if any(path in changes for path in paths):
                shape = next(changes[path].shape for path in paths if path in changes)
                blocks = [changes.get(path, np.zeros(shape)) for path in paths]
                wanted[f"blk.{layer}.{tensor}"] = np.concatenate(blocks)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert np.abs(found[name] - update).max() <= 1e-6 * np.abs(update).max(), name

    back = tmp_path / "back"
    convert(made, back, base=base)
    report = validate(back, base=base, targets=["peft"])
    assert {each.code for each in report.findings} <= {"AK205"}  # parts that were not trained
    assert str(report.targets[0].verdict) == "applied"
    again = {pair.module: pair.delta() for pair in read(back).pairs() if pair.delta().any()}
    assert again.keys() == changes.keys()
    for path, update in changes.items():
        assert np.abs(again[path] - update).max() <= 1e-6 * np.abs(update).max(), path


def test_a_head_that_llama_cpp_lacks_is_named(tmp_path: Path) -> None:
    name = "NomicBertForSequenceClassification"
    _, changes = trained(tmp_path, name, target_modules="all-linear")
    base, adapter, made = tmp_path / "base", tmp_path / "adapter", tmp_path / "made.gguf"
    with pytest.raises(LossyConversionError, match="classifier"):
        convert(adapter, made, base=base)
    report = convert(adapter, made, base=base, allow_lossy=True)
    assert report.losses
    assert set(stored(made)) == {f"blk.{layer}.{tensor}" for layer in range(2) for tensor in PARTS}
    assert {"classifier", "nomic_bert.pooler.dense"} & changes.keys()


def test_the_names_of_its_checkpoints_are_none_of_the_class(tmp_path: Path) -> None:
    trained(tmp_path, "NomicBertModel", target_modules=["q_proj"])
    module = "encoder.layers.0.attn.Wqkv"
    factors = {Role.LORA_A: (2, 64), Role.LORA_B: (192, 2)}
    tensors = {
        TensorKey(module, role): LazyTensor.of(np.ones(shape, np.float32))
        for role, shape in factors.items()
    }
    write(AdapterTensorSet(tensors=tensors, scales={module: 1.0}), tmp_path / "fused")
    report = validate(tmp_path / "fused", base=tmp_path / "base", targets=["peft"])
    assert report.targets[0].coverage["ignored"] == (module,)
