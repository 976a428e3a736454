"""`validate --target diffusers` says which keys of text encoders its loaders apply."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_loaders import loaded
from diffusion_models import ENCODERS
from safetensors.torch import save_file

import adapterkit
from adapterkit import Outcome

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
pytestmark = [pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"), pytest.mark.slow]
TOLD = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base", "sd3": "sd3"}
TOLD["flux"] = "flux-1-dev/lora"
# A denoiser's module as kohya's trainers, diffusers and ComfyUI call it: (out, in) of each family.
DENOISERS = {
    "sd": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        8,
    ),
    "sdxl": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        16,
    ),
    "sd3": (
        "lora_unet_joint_blocks_0_x_block_attn_proj",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "diffusion_model.joint_blocks.0.x_block.attn.proj",
        16,
    ),
    "flux": (
        "lora_unet_double_blocks_0_img_attn_proj",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "diffusion_model.double_blocks.0.img_attn.proj",
        16,
    ),
}
CLIP = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 16),
    "self_attn.v_proj": (16, 16),
    "self_attn.out_proj": (16, 16),
    "mlp.fc1": (32, 16),
    "mlp.fc2": (16, 32),
}
LAYERS = {f"text_model.encoder.layers.{i}.{m}": s for i in (0, 1) for m, s in CLIP.items()}
WHOLE = LAYERS | {"text_projection": (16, 16)}
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q": (16, 16),
    "encoder.block.1.layer.1.DenseReluDense.wi_0": (32, 16),
}
CONTENTS = {
    "layers": LAYERS,
    "projection too": WHOLE,
    "attention": {m: s for m, s in LAYERS.items() if "attn" in m},
    "queries": {m: s for m, s in LAYERS.items() if "q_proj" in m},
    "mlp": {m: s for m, s in LAYERS.items() if "mlp" in m},
    "without out": {m: s for m, s in LAYERS.items() if "out_proj" not in m},
}
DOWN_UP, AB = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
# Alphas beside the first three pairs, and on from there.
ALPHAS: dict[str, tuple[float | None, ...]] = {
    "none": (None, None, None),
    "usual": (0.7, 0.7, 0.7),
    "some": (0.7, 0.7, None),
    "different": (0.7, 1.4, 0.7),
}


def pair(stem: str, shape: tuple[int, int], ends: tuple[str, str], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, shape[1], generator=generator)
    return {stem + ends[0]: down, stem + ends[1]: torch.randn(shape[0], 2, generator=generator)}


OLDEST = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# form -> (how it spells a module of a text encoder, ends of its pairs)
FORMS: dict[str, tuple[str, tuple[str, str]]] = {
    "kohya": ("lora_te{number}_{flat}", DOWN_UP),
    "diffusers": ("{component}.{module}", AB),
    "diffusers, oldest": ("{component}.{old}", LINEAR),
    "diffusers, old": ("{component}.{module}", OLD),
    "diffusers, linear": ("{component}.{module}", LINEAR),
    "diffusers, down": ("{component}.{module}", DOWN_UP),
    "diffusers, level left out": ("{component}.{short}", AB),
    "peft": ("base_model.model.{component}.{module}", AB),
    "peft inside": ("{component}.base_model.model.{module}", AB),
    "comfyui": ("text_encoders.{comfyui}.transformer.{module}", AB),
    "comfyui, down": ("text_encoders.{comfyui}.transformer.{module}", DOWN_UP),
}


def is_t5(name: str, component: str) -> bool:
    return component == "text_encoder_3" or (name, component) == ("flux", "text_encoder_2")


def stem(pattern: str, component: str, module: str) -> str:
    number = {"text_encoder": "1", "text_encoder_2": "2", "text_encoder_3": "3"}[component]
    comfyui = {"1": "clip_l", "2": "clip_g"}.get(number) if module not in T5 else "t5xxl"
    parent, _, last = module.rpartition(".")
    old = f"{parent}.{OLDEST[last]}_lora" if last in OLDEST else f"{module}.lora_linear_layer"
    return pattern.format(
        component=component,
        module=module,
        number=number,
        comfyui=comfyui,
        flat=module.replace(".", "_"),
        short=module.removeprefix("text_model."),
        old=old,
    )


def file(
    name: str, component: str, form: str, content: str, denoiser: str, alphas: str
) -> tuple[Tensors, dict[str, Any]]:
    """Return a file with one text encoder in a spelling, and what it is an update of."""
    modules = T5 if is_t5(name, component) else CONTENTS[content]
    pattern, ends = FORMS[form]
    if "{old}" in pattern:
        ends = (".down.weight", ".up.weight")
    tensors: Tensors = {}
    want: dict[str, Any] = {}

    def add(stem: str, module: str, shape: tuple[int, int], ends: tuple[str, str]) -> None:
        alpha = ALPHAS[alphas][len(want) % 3]
        made = pair(stem, shape, ends, len(tensors))
        tensors.update(made)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        a, b = (made[stem + end].double().numpy() for end in ends)
        want[module] = (2.0 if alpha is None else alpha) / 2 * (b @ a)

    for module, shape in modules.items():
        add(stem(pattern, component, module), f"{component}.{module}", shape, ends)
    if denoiser:
        spelled = dict(zip(("kohya", "diffusers", "comfyui"), DENOISERS[name], strict=False))
        ends = AB if denoiser == "diffusers" else DOWN_UP
        add(spelled[denoiser], spelled["diffusers"], (DENOISERS[name][3],) * 2, ends)
    return tensors, want


def plain(module: str) -> str:
    """Return a module's name without the level that transformers 5 took away."""
    return module.replace(".text_model.", ".")


def right(name: str, path: Path, want: dict[str, Any]) -> set[str]:
    """Return the modules of which diffusers makes the file's own update."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = {plain(module): update for module, update in loaded(name, path).items()}
        except Exception:  # noqa: BLE001  (whatever its converters stumble over: nothing loads)
            return set()
    return {
        module
        for module, update in want.items()
        if plain(module) in got
        and np.linalg.norm(got[plain(module)] - update) <= 1e-5 * np.linalg.norm(update)
    }


def said(path: Path) -> set[str]:
    """Return the modules of which adapterkit says so."""
    report = adapterkit.validate(path, targets=["diffusers"])
    altered = {m for f in report.findings if f.code == "DIF003" for m in f.modules}
    covered = report.targets[0].modules
    return {each.module for each in covered if each.outcome is Outcome.APPLIED} - altered


def cases(form: str, *, t5: bool) -> list[tuple[str, str, str]]:
    """Return (content, denoiser's spelling or empty, alphas) of the files to try."""
    alphas = ["none"] if "oldest" in form else ["none", "usual"] if t5 else [*ALPHAS]
    found = [("layers", "", each) for each in alphas]
    found += [("layers", denoiser, alphas[-1]) for denoiser in ("kohya", "diffusers", "comfyui")]
    if not t5 and form in DEPENDING:
        found += [(content, "", "none") for content in CONTENTS if content != "layers"]
    return found


# Spellings of which diffusers applies one part or another, by what else is there.
DEPENDING = {"kohya", "diffusers", "diffusers, oldest", "diffusers, linear", "comfyui, down"}
NETWORKS = [(name, component) for name, found in ENCODERS.items() for component in found]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "component"), NETWORKS)
def test_of_a_text_encoder_that_is_applied_which_diffusers_applies(
    name: str, component: str, form: str, tmp_path: Path
) -> None:
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    failed: list[str] = []
    for number, case in enumerate(cases(form, t5=is_t5(name, component))):
        tensors, want = file(name, component, form, *case)
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {"modelspec.architecture": TOLD[name]})
        expected, answer = right(name, path, want), said(path) & want.keys()
        if expected != answer:
            many, few = sorted(answer - expected), sorted(expected - answer)
            failed.append(f"{case}: too many {many[:3]}, too few {few[:3]}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("content", ["layers", "queries", "mlp"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_text_encoder_written_for_diffusers_is_loaded_whole(
    name: str, content: str, tmp_path: Path
) -> None:
    tensors, want = file(name, "text_encoder_2", "kohya", content, "kohya", "different")
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": TOLD[name]})
    written = tmp_path / "b.safetensors"
    adapterkit.convert(tmp_path / "a.safetensors", written, to="diffusers")
    assert right(name, written, want) == said(written) == want.keys()
    adapterkit.convert(written, tmp_path / "c.safetensors", to="kohya")
    again = adapterkit.diff(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert again.equal


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize(
    ("name", "component"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_magnitudes_of_a_text_encoder_are_loaded_by_one_name_alone(
    name: str, component: str, end: str, tmp_path: Path
) -> None:
    tensors, want = file(name, component, "diffusers", "layers", "", "none")
    for module in want:
        rows = len(tensors[f"{module}.lora_B.weight"])
        tensors[f"{module}.lora_magnitude_vector{end}"] = torch.rand(rows) + 1
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"modelspec.architecture": TOLD[name]})
    weights = {
        plain(f"{component}.{n}"): x.detach().double().numpy()
        for n, x in ENCODERS[name][component]().named_parameters()
    }
    dora: dict[str, Any] = {}
    for module, update in want.items():
        before = weights[f"{plain(module)}.weight"]
        size = tensors[f"{module}.lora_magnitude_vector{end}"].double().numpy()[:, None]
        moved = before + update
        dora[module] = size * moved / np.linalg.norm(moved, axis=1, keepdims=True) - before
    assert right(name, path, dora) == said(path) == (dora.keys() if end == ".weight" else set())
    written = tmp_path / "b.safetensors"
    adapterkit.convert(path, written, to="diffusers")
    assert right(name, written, dora) == said(written) == dora.keys()
