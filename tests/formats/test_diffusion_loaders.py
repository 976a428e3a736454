"""`validate --target diffusers` says what diffusers' own loaders do with every spelling."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_pipeline
from diffusers_factors import dense, factors
from diffusers_loaders import loaded, small
from diffusion_models import FAMILIES
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import Outcome
from adapterkit.errors import AdapterKitError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
pytestmark = [pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"), pytest.mark.slow]
AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
LEAVES = (*AB, *DOWN_UP, *OLD, ".alpha")
TOLD = {"chroma": "flux", "z_image": "zimage", "hunyuan_video": "hunyuan-video"}


def split(name: str) -> tuple[str, str]:
    leaf = next(leaf for leaf in LEAVES if name.endswith(leaf))
    return name.removesuffix(leaf), leaf


def styled(tensors: Tensors, ends: tuple[str, str], *, alpha: bool) -> Tensors:
    """Return the same updates with other ends of names, with an alpha beside each pair or none."""
    alphas = {split(name)[0]: x for name, x in tensors.items() if name.endswith(".alpha")}
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, leaf = split(name)
        if leaf == ".alpha":
            continue
        first = leaf in {AB[0], DOWN_UP[0], OLD[0]}
        found[stem + ends[not first]] = tensor
        if first:
            rank = len(tensor)
            found[f"{stem}.alpha"] = alphas.get(stem, torch.tensor(float(rank)))
    if alpha:
        return found
    for stem in {split(name)[0] for name in found}:
        up = f"{stem}{ends[1]}"
        found[up] = found[up] * (found.pop(f"{stem}.alpha") / len(found[f"{stem}{ends[0]}"]))
    return found


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(stem) + leaf: x for n, x in tensors.items() for stem, leaf in [split(n)]}


def forms(
    name: str, tensors: Tensors, metadata: dict[str, str], folder: Path
) -> dict[str, Tensors]:
    """Return one adapter as many programs spell it."""
    prefix = f"{FAMILIES[name].component}."
    told = {"modelspec.architecture": TOLD.get(name, name)}
    save_file(tensors, folder / "source.safetensors", metadata | told)
    written: dict[str, Tensors] = {}
    for spelling in ("kohya", "comfyui", "diffusers"):
        path = folder / f"{spelling}.safetensors"
        adapterkit.convert(folder / "source.safetensors", path, to=spelling, force=True)
        written[spelling] = load_file(path)
    kohya, comfyui, own = written["kohya"], written["comfyui"], written["diffusers"]

    def bare(new: str) -> Callable[[str], str]:
        return lambda stem: new + stem.removeprefix(prefix)

    def flat(new: str) -> Callable[[str], str]:
        return lambda stem: new + stem.removeprefix(prefix).replace(".", "_")

    plain, scaled = styled(own, DOWN_UP, alpha=False), styled(own, DOWN_UP, alpha=True)
    return {
        "kohya": kohya,
        "kohya without alpha": styled(kohya, DOWN_UP, alpha=False),
        "kohya of diffusers' names": renamed(scaled, flat("lora_unet_")),
        "comfyui": styled(comfyui, AB, alpha=False),
        "comfyui with alpha": styled(comfyui, AB, alpha=True),
        "comfyui down": styled(comfyui, DOWN_UP, alpha=False),
        "comfyui down with alpha": styled(comfyui, DOWN_UP, alpha=True),
        "comfyui of diffusers' names": renamed(own, bare("diffusion_model.")),
        "comfyui of diffusers' names down": renamed(scaled, bare("diffusion_model.")),
        "original bare": renamed(
            styled(comfyui, AB, alpha=False), lambda stem: stem.removeprefix("diffusion_model.")
        ),
        "diffusers": own,
        "diffusers with alpha": styled(own, AB, alpha=True),
        "diffusers down": plain,
        "diffusers down with alpha": styled(
            styled(tensors, DOWN_UP, alpha=True)
            | {f"{split(n)[0]}.alpha": torch.tensor(0.7) for n in tensors},
            DOWN_UP,
            alpha=True,
        ),
        "diffusers old": styled(own, OLD, alpha=False),
        "diffusers old with alpha": styled(own, OLD, alpha=True),
        "bare": renamed(own, bare("")),
        "bare down with alpha": renamed(scaled, bare("")),
        "peft": renamed(own, bare("base_model.model.")),
        "peft inside": renamed(own, bare(f"{prefix}base_model.model.")),
        "onetrainer": renamed(scaled, flat("lora_transformer_")),
        "lycoris": renamed(scaled, flat("lycoris_")),
        "xlabs": streams(styled(comfyui, AB, alpha=False)) if name == "flux" else own,
    }


STREAMS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}


def streams(tensors: Tensors) -> Tensors:
    """Return what XLabs has of Flux: of linear1, the rows of attention."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, leaf = split(name)
        block, _, module = stem.removeprefix("diffusion_model.").partition("s.")
        number, _, module = module.partition(".")
        if new := STREAMS.get(module):
            rows = 3 * len(tensor) // 7 if module == "linear1" and leaf == AB[1] else len(tensor)
            end = "down" if leaf == AB[0] else "up"
            found[f"{block}s.{number}.{new}.{end}.weight"] = tensor[:rows]
    return found


def some(tensors: Tensors) -> Tensors:
    """Return queries, keys and values of the first two blocks alone."""
    return {
        name: x
        for name, x in tensors.items()
        if (".0." in name or ".1." in name) and any(f"to_{p}." in name for p in "qkv")
    }


def blocks(tensors: Tensors) -> Tensors:
    """Return what is in a block."""
    return {name: x for name, x in tensors.items() if name.split(".")[2].isdecimal()}


PARTS: dict[str, Callable[[Tensors], Tensors]] = {"all": dict, "some": some, "blocks": blocks}


# UNets have hundreds of modules, which differ by their kind alone.
CASES = [
    *((name, "some") for name in ("sd", "sdxl", "flux", "chroma", "flux2")),
    *((name, "blocks") for name in ("wan", "lumina2", "flux2", "z_image")),
    *((name, "all") for name in FAMILIES if FAMILIES[name].component == "transformer"),
]
CASES.remove(("pixart", "all"))  # no loader


def right(name: str, path: Path, want: dict[str, Any]) -> set[str]:
    """Return the modules of which diffusers makes the file's own update."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = loaded(name, path)
        except Exception:  # noqa: BLE001  (whatever its converters stumble over: nothing loads)
            return set()
    return {
        module
        for module, update in want.items()
        if module in got
        and np.linalg.norm(got[module].reshape(update.shape) - update)
        <= 1e-5 * np.linalg.norm(update)
    }


def said(path: Path) -> set[str]:
    """Return the modules of which adapterkit says so."""
    try:
        report = adapterkit.validate(path, targets=["diffusers"])
    except AdapterKitError:  # CogVideoX's original names without a prefix are nobody's
        return set()
    altered = {m for f in report.findings if f.code == "DIF003" for m in f.modules}
    covered = report.targets[0].modules
    return {each.module for each in covered if each.outcome is Outcome.APPLIED} - altered


@pytest.mark.parametrize(("name", "part"), CASES)
def test_what_is_applied_is_what_diffusers_applies(name: str, part: str, tmp_path: Path) -> None:
    diffusers.utils.logging.set_verbosity_error()
    tensors, metadata = factors(name, alpha=0.7)
    tensors = PARTS[part](tensors)
    told = {"modelspec.architecture": TOLD.get(name, name)}
    failed: list[str] = []
    for form, file in forms(name, tensors, metadata, tmp_path).items():
        path = tmp_path / "form.safetensors"
        save_file({key: x.contiguous() for key, x in file.items()}, path, told)
        want = dense(tensors, 0.35)
        expected, answer = right(name, path, want), said(path) & want.keys()
        if expected != answer:
            failed.append(
                f"{form}: too many {sorted(answer - expected)[:4]}, "
                f"too few {sorted(expected - answer)[:4]}"
            )
    assert not failed, "\n".join(failed)


PAIR = {f".{end}.weight": (3, 8) if end == "lora_A" else (8, 3) for end in ("lora_A", "lora_B")}
SDXL_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
SD3_ATTENTION = "transformer_blocks.1.attn2.to_q"
FLUX_ATTENTION = "single_transformer_blocks.1.attn.to_q"
# stem -> whether ComfyUI's map has it, by its source; the metadata say which model it is of
COMFYUI = [
    ("sdxl", f"unet.{SDXL_ATTENTION}", False),
    ("sdxl", "unet.down_blocks.1.resnets.0.time_emb_proj", True),
    ("sdxl", f"lora_unet_{SDXL_ATTENTION.replace('.', '_')}", True),
    ("sdxl", f"lycoris_{SDXL_ATTENTION.replace('.', '_')}", True),
    ("sdxl", f"lora_transformer_{SDXL_ATTENTION.replace('.', '_')}", False),
    ("sdxl", "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k", True),
    ("sdxl", f"diffusion_model.{SDXL_ATTENTION}", False),
    ("sdxl", "text_encoder_2.text_model.encoder.layers.1.mlp.fc1", True),
    ("sdxl", "text_encoder_2.encoder.layers.1.mlp.fc1", False),
    ("sdxl", "lora_te2_text_model_encoder_layers_1_mlp_fc1", True),
    ("sd3", f"transformer.{SD3_ATTENTION}", True),
    ("sd3", f"base_model.model.{SD3_ATTENTION}", True),
    ("sd3", f"diffusion_model.{SD3_ATTENTION}", False),
    ("sd3", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", False),
    ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", True),
    ("flux", f"transformer.{FLUX_ATTENTION}", True),
    ("flux", f"base_model.model.{FLUX_ATTENTION}", False),
    ("flux", f"lora_unet_{FLUX_ATTENTION.replace('.', '_')}", False),
    ("wan", "transformer.blocks.0.attn1.to_q", False),
    ("wan", "diffusion_model.blocks.0.self_attn.q", True),
    ("wan", "lora_unet_blocks_0_self_attn_q", True),
    ("hunyuan-video", "transformer.double_blocks.0.img_mlp.fc1", True),
    ("hunyuan-video", "transformer.transformer_blocks.0.ff.net.0.proj", False),
    ("hunyuan-video", "lora_unet_double_blocks_0_img_mlp_fc1", False),
    ("zimage", "transformer.layers.0.attention.to_q", True),
    ("zimage", "lora_unet_layers_0_attention_to_q", False),
    ("lumina", "transformer.layers.0.attn.to_q", False),
    ("qwen", "transformer.transformer_blocks.0.img_mod.1", True),
    ("ltx", "transformer.transformer_blocks.0.attn1.to_q", False),
    ("auraflow", "transformer.joint_transformer_blocks.0.attn.to_q", True),
    ("sana", "transformer.transformer_blocks.0.ff.conv_point", False),
]


@pytest.mark.parametrize(("model", "stem", "there"), COMFYUI)
def test_what_comfyui_does_not_look_for_is_ignored(
    model: str, stem: str, *, there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{stem}{end}": torch.ones(shape) for end, shape in PAIR.items()}
    save_file(tensors, path, {"modelspec.architecture": model})
    report = adapterkit.validate(path, targets=["comfyui"])
    outcomes = {module.outcome for module in report.targets[0].modules}
    assert outcomes == {Outcome.APPLIED if there else Outcome.IGNORED}
    assert (report.targets[0].verdict is adapterkit.Verdict.APPLIED) is there


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_for_a_loader_is_loaded_whole(name: str, tmp_path: Path) -> None:
    tensors, metadata = factors(name, alpha=0.7)
    told = {"modelspec.architecture": TOLD.get(name, name)}
    save_file(tensors, tmp_path / "a.safetensors", metadata | told)
    for loader in ("diffusers", "comfyui"):
        path = tmp_path / f"{loader}.safetensors"
        adapterkit.convert(tmp_path / "a.safetensors", path, to=loader)
        (coverage,) = adapterkit.validate(path, targets=[loader]).targets
        whole = {module.outcome for module in coverage.modules} == {Outcome.APPLIED}
        assert whole is ((name, loader) not in {("pixart", "diffusers"), ("sana", "comfyui")})


# diffusers' converters -> the case above that goes through each, or why none does
CONVERTERS = {
    "_maybe_map_sgm_blocks_to_diffusers": "sdxl",
    "_convert_non_diffusers_lora_to_diffusers": "sd",
    "_convert_kohya_flux_lora_to_diffusers": "flux",
    "_convert_xlabs_flux_lora_to_diffusers": "flux",
    "_convert_kohya_flux2_lora_to_diffusers": "flux2",
    "_convert_non_diffusers_flux2_lora_to_diffusers": "flux2",
    "_convert_hunyuan_video_lora_to_diffusers": "hunyuan_video",
    "_convert_musubi_wan_lora_to_diffusers": "wan",
    "_convert_non_diffusers_wan_lora_to_diffusers": "wan",
    "_convert_non_diffusers_hidream_lora_to_diffusers": "hidream",
    "_convert_non_diffusers_ltxv_lora_to_diffusers": "ltx",
    "_convert_non_diffusers_ltx2_lora_to_diffusers": "ltx2",
    "_convert_non_diffusers_lumina2_lora_to_diffusers": "lumina2",
    "_convert_non_diffusers_qwen_lora_to_diffusers": "qwen",
    "_convert_non_diffusers_z_image_lora_to_diffusers": "z_image",
}
NO_CASE = {
    "_convert_fal_kontext_lora_to_diffusers": "base_model. in a Flux file, which it raises on",
    "_convert_bfl_flux_control_lora_to_diffusers": "replaces norms, which no LoRA file here holds",
    "_convert_non_diffusers_lokr_to_diffusers": "LoKr, judged by its formula",
    "_convert_non_diffusers_flux2_lokr_to_diffusers": "LoKr, judged by its formula",
    "_convert_lycoris_flux2_lokr_to_diffusers": "LoKr, judged by its formula",
    "_convert_non_diffusers_anima_lora_to_diffusers": "a model without a table: Anima",
    "_convert_non_diffusers_ace_step_lora_to_diffusers": "a model without a table: ACE-Step",
    "_convert_non_diffusers_flux3_lora_to_diffusers": "a model without a table: Flux.3",
    "_convert_non_diffusers_krea2_lora_to_diffusers": "a model without a table: Krea 2",
    "_convert_non_diffusers_ideogram4_lora_to_diffusers": "a model without a table: Ideogram 4",
    "_convert_non_diffusers_minimax_h3_lora_to_diffusers": "a model without a table: MiniMax H3",
}


def test_every_converter_has_a_case_or_a_reason() -> None:
    source = inspect.getsource(lora_pipeline)
    called = set(re.findall(r"\b_(?:convert|maybe_map_sgm)_\w+(?=\()", source))
    assert called == CONVERTERS.keys() | NO_CASE.keys()
    assert set(CONVERTERS.values()) <= {name for name, _ in CASES}


@pytest.mark.parametrize("name", sorted(set(CONVERTERS.values())))
def test_a_case_goes_through_its_converters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small()
    called: set[str] = set()
    wanted = {converter for converter, family in CONVERTERS.items() if family == name}
    for converter in wanted:
        original = getattr(lora_pipeline, converter)

        def noted(*args: Any, known: Any = original, key: str = converter, **more: Any) -> Any:
            called.add(key)
            return known(*args, **more)

        monkeypatch.setattr(lora_pipeline, converter, noted)
    tensors, metadata = factors(name, alpha=0.7)
    want = dense(tensors, 0.35)
    for file in forms(
        name, PARTS["some" if name == "sd" else "all"](tensors), metadata, tmp_path
    ).values():
        save_file({key: x.contiguous() for key, x in file.items()}, tmp_path / "form.safetensors")
        right(name, tmp_path / "form.safetensors", want)
        if called == wanted:
            return
    assert called == wanted
