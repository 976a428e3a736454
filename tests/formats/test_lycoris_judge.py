"""What LyCORIS's own modules add to a layer is what is read of their files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusion_bases import pipeline
from diffusion_files import dense, read
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": torch.nn.Linear(
        8, 64, bias=False
    ),
    "down_blocks.0.attentions.0.proj_in": torch.nn.Conv2d(8, 8, 1, bias=False),
    "down_blocks.1.resnets.0.conv1": torch.nn.Conv2d(8, 16, 3, padding=1, bias=False),
    "down_blocks.0.downsamplers.0.conv": torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
}
NORM = "down_blocks.1.resnets.0.norm2"
TRAINED: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}),
    "LoCon, rsLoRA": (LoConModule, {"rs_lora": True}),
    "LoCon, scalar": (LoConModule, {"use_scalar": True}),
    "LoHa": (LohaModule, {}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoHa, rsLoRA, scalar": (LohaModule, {"rs_lora": True, "use_scalar": True}),
    "LoKr": (LokrModule, {"factor": 2}),
    "LoKr, both decomposed": (LokrModule, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "LoKr, whole": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoKr, Tucker": (LokrModule, {"factor": 2, "use_tucker": True, "lora_dim": 1}),
    "LoKr, scalar": (LokrModule, {"factor": 2, "use_scalar": True}),
    "full": (FullModule, {}),
}
DORA = {
    f"{name}, DoRA by {'row' if by_row else 'column'}": (
        TRAINED[name][0],
        TRAINED[name][1] | {"weight_decompose": True, "wd_on_out": by_row},
    )
    for name in ("LoCon", "LoHa", "LoKr", "LoCon, Tucker")
    for by_row in (True, False)
}


def module(trained: tuple[Any, dict[str, Any]], name: str, before: Any) -> tuple[Any, Any]:
    """Return LyCORIS's module, every number drawn, and the layer of which it is a part now."""
    cls, settings = trained
    torch.manual_seed(len(name))
    layer = copy.deepcopy(before)
    settings = {"lora_dim": 2, "alpha": 1} | settings
    made = cls(f"lora_unet_{name.replace('.', '_')}", layer, 1.0, **settings)
    made.apply_to()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            drawn = torch.randn_like(parameter) * 0.3
            parameter.copy_(drawn.abs() + 1 if key == "dora_scale" else drawn)
    return made, layer


def stored(made: Any) -> dict[str, torch.Tensor]:
    """Return what its trainer saves."""
    return {
        f"{made.lora_name}.{key}": x.detach().clone().contiguous()
        for key, x in made.state_dict().items()
    }


def drawn(layer: Any) -> Any:
    axes = [6] * (layer.weight.dim() - 2)
    return torch.randn(40, 8, *axes, dtype=torch.float64)


def added(made: Any, layer: Any, before: Any, inputs: Any) -> Any:
    """Return what LyCORIS's forward adds to a layer's, in float64."""
    made.double()
    layer.double()
    with torch.no_grad():
        return layer(inputs) - copy.deepcopy(before).double()(inputs)


def applied(layer: Any, change: Any, inputs: Any) -> Any:
    weight = torch.as_tensor(change).reshape(
        layer.weight.shape
    )  # (r, in) is a kernel of size 1 too
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(inputs, weight)
    return torch.nn.functional.conv2d(inputs, weight, None, layer.stride, layer.padding)


def error(got: Any, want: Any) -> float:
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


@pytest.mark.parametrize("name", TRAINED)
def test_what_lycoris_adds_in_its_forward_is_read(name: str, tmp_path: Path) -> None:
    trained = {key: module(TRAINED[name], key, layer) for key, layer in LAYERS.items()}
    tensors = {key: x for made, _ in trained.values() for key, x in stored(made).items()}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_module": "lycoris.kohya"})
    got = dense(read(tmp_path / "a.safetensors"))
    assert len(got) == len(LAYERS)
    for key, (made, layer) in trained.items():
        inputs = drawn(LAYERS[key])
        want = added(made, layer, LAYERS[key], inputs)
        assert error(applied(LAYERS[key], got[f"unet.{key}"], inputs), want) < 1e-6, key


@pytest.mark.parametrize("name", DORA)
def test_dora_is_merged_as_lycoris_applies_it(name: str, tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd")
    stored_in = "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(base / stored_in)
    layers = copy.deepcopy(LAYERS)
    for key, layer in layers.items():
        layer.weight.data = weights[f"{key}.weight"]
    trained = {key: module(DORA[name], key, layer) for key, layer in layers.items()}
    tensors = {key: x for made, _ in trained.values() for key, x in stored(made).items()}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_module": "lycoris.kohya"})
    adapterkit.merge_into([tmp_path / "a.safetensors"], base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / stored_in)
    for key, (made, layer) in trained.items():
        inputs = drawn(layers[key])
        want = added(made, layer, layers[key], inputs)
        change = merged[f"{key}.weight"].double() - weights[f"{key}.weight"].double()
        # W' is stored in float32, and LyCORIS adds 1e-7 to the norms.
        assert error(applied(layers[key], change, inputs), want) < 1e-6, key


def test_lycoris_norms_are_refused_by_name(tmp_path: Path) -> None:
    made = NormModule("lora_unet_" + NORM.replace(".", "_"), torch.nn.GroupNorm(4, 16))
    save_file(stored(made), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"[wb]_norm: is of an update of a norm"):
        read(tmp_path / "a.safetensors")
