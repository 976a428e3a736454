"""diffusers judges: what its own loaders make of our files, in tiny models of every kind.

Every linear layer and convolution of a model gets factors; the file goes through every spelling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers_factors import dense, factors
from diffusers_loaders import converted, loaded, updates
from diffusion_models import FAMILIES
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.formats.diffusion.table import models

if TYPE_CHECKING:
    from pathlib import Path

# Read by diffusers' own converter of kohya's names at any size, alphas of one rank being one.
KOHYA = ("sd", "sdxl")
TABLES = {"chroma": "flux"}
# Chroma's own module imports what diffusers itself is about to take away.
pytestmark = [pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"), pytest.mark.slow]


def injected(path: Path) -> dict[str, Any]:
    """Return ΔW in PixArt, for which diffusers has no loader: PEFT puts the factors there."""
    network: Any = FAMILIES["pixart"].model()
    state = {key.removeprefix("transformer."): x for key, x in load_file(path).items()}
    ranks = {k.removesuffix(".lora_A.weight"): len(x) for k, x in state.items() if "lora_A" in k}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    inject_adapter_in_model(config, network, state_dict=state)
    set_peft_model_state_dict(network, state)
    return updates(network, "transformer")


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for module, update in want.items():
        found = got[module].reshape(update.shape)
        assert np.linalg.norm(found - update) <= 1e-6 * np.linalg.norm(update), module


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_makes_the_same_update_of_our_files(name: str, tmp_path: Path) -> None:
    tensors, metadata = factors(name, alpha=0.7)
    path = tmp_path / "0.safetensors"
    save_file(tensors, path, metadata)
    for number, spelling in enumerate(("kohya", "comfyui", "diffusers"), 1):
        source, path = path, tmp_path / f"{number}.safetensors"
        adapterkit.convert(source, path, to=spelling)
    want = dense(tensors, 0.35)
    for file in [path, *([tmp_path / "1.safetensors"] if name in KOHYA else [])]:
        assert_same(loaded(name, file) if FAMILIES[name].mixin else injected(file), want)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].converter])
def test_original_names_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """A dense update in original names is a checkpoint, which diffusers converts."""
    tensors, metadata = factors(name, alpha=2.0)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapterkit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui")
    stored = dense(load_file(tmp_path / "b.safetensors"), 1.0)
    names = next(model.names for model in models() if model.name == TABLES.get(name, name))
    checkpoint = {
        site.published: torch.from_numpy(update)
        for key, update in stored.items()
        if (site := names.original(key.removeprefix("diffusion_model.")))
    }
    got = converted(name, checkpoint)
    want = dense(tensors, 1.0)
    assert_same({module: got[module] for module in want}, want)
