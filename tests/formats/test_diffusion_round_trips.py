"""No key vanishes and no update changes from spelling to spelling, whatever the file has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from diffusion_files import (
    FLUX,
    FLUX_SAID,
    SDXL,
    SDXL_CONVOLUTIONS,
    close,
    contents,
    dense,
    drawn,
    kohya,
    read,
    saved,
)

import adapterkit
from adapterkit.errors import LossyConversionError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]
pytestmark = pytest.mark.slow
MODELS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str]]] = {
    "sdxl": (
        {**SDXL, **SDXL_CONVOLUTIONS, "lora_te2_text_projection": (24, 24)},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    ),
    "flux": (
        {
            **FLUX,
            "lora_unet_final_layer_adaLN_modulation_1": (32, 16),
            "lora_unet_img_in": (16, 8),
            "lora_unet_guidance_in_in_layer": (16, 8),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (16, 16),
        },
        FLUX_SAID,
    ),
}
ALPHAS = (0.5, 1.0, 2.0, 3.0, 0.0)


def differing(modules: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return alphas that differ, one of them 0 and some with scales that are no power of two."""
    return {f"{m}.alpha": np.array(ALPHAS[i % 5], "float32") for i, m in enumerate(modules)}


def magnitudes(modules: Mapping[str, tuple[int, ...]], *, every: int = 1) -> Tensors:
    return {
        f"{module}.dora_scale": np.abs(drawn(shape[0], *[1] * (len(shape) - 1))) + 1
        for i, (module, shape) in enumerate(modules.items())
        if i % every == 0
    }


def traits(model: str) -> dict[str, Tensors]:
    """Return files of a model with one trait each; alpha is the rank where nothing else is said."""
    modules = MODELS[model][0]
    usual = kohya(modules)
    half = {name: x.astype("float16") for name, x in usual.items()}
    found = {
        "plain": usual,
        "alphas differ": usual | differing(modules),
        "alphas differ, f16": half
        | {name: x.astype("float16") for name, x in differing(modules).items()},
        "dora": usual | magnitudes(modules),
        "dora of some": usual | magnitudes(modules, every=2),
        "dora, alphas differ": usual | magnitudes(modules) | differing(modules),
        "no alpha": {name: x for name, x in usual.items() if not name.endswith(".alpha")},
    }
    for module in modules:
        part = {name: x for name, x in usual.items() if name.startswith(f"{module}.")}
        found[f"{module} alone"] = part
    return found


CASES = [(model, trait) for model in MODELS for trait in traits(model)]
EXACT = ("plain", "dora", "dora of some")


@pytest.mark.parametrize(("model", "trait"), CASES)
def test_there_and_back_is_the_same(model: str, trait: str, tmp_path: Path) -> None:
    tensors = traits(model)[trait]
    first = saved(tmp_path / "0.safetensors", tensors, MODELS[model][1])
    before, stored = read(first), contents(first)
    # Every key stays; alpha, which kohya's scripts write always, joins them.
    expected = stored.keys() | {f"{name.split('.')[0]}.alpha" for name in stored}
    for way in (("comfyui", "kohya"), ("diffusers", "comfyui", "kohya")):
        path = first
        for number, spelling in enumerate(way, 1):
            source, path = path, tmp_path / f"{number}.safetensors"
            adapterkit.convert(source, path, to=spelling, force=True)
        after = read(path)
        assert contents(path).keys() == expected
        assert after.tensors.keys() == before.tensors.keys()
        assert after.metadata == before.metadata
        got, want = dense(after), dense(before)
        for name, update in want.items():
            assert close(got[name], update) if update.any() else not got[name].any(), name
        if way[0] == "comfyui" or trait in EXACT or trait.endswith("alone"):
            again = contents(path)
            assert {name: again[name] for name in stored} == stored


@pytest.mark.parametrize("spelling", ["comfyui", "diffusers"])
def test_biases_are_in_two_spellings_and_refused_by_kohya_s(spelling: str, tmp_path: Path) -> None:
    modules, said = MODELS["flux"]
    tensors = kohya(modules, alpha=1)
    tensors |= {f"{m}.diff_b": drawn(shape[0]) for m, shape in modules.items()}
    source = saved(tmp_path / "a.safetensors", tensors, said)
    written = tmp_path / "b.safetensors"
    assert adapterkit.convert(source, written, to=spelling).max_relative_error < 1e-6
    biases = {key for key in read(source).tensors if "bias" in key.role}
    assert biases
    assert biases <= read(written).tensors.keys()
    with pytest.raises(LossyConversionError, match="read no bias"):
        adapterkit.convert(written, tmp_path / "c.safetensors", to="kohya")
    assert not (tmp_path / "c.safetensors").exists()
