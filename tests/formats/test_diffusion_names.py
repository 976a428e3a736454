"""Whose names are read, told apart, or refused by name in files of diffusion models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion_files import (
    FILES,
    FLUX,
    FLUX_SAID,
    QKV,
    SD,
    SPELLINGS,
    close,
    contents,
    dense,
    drawn,
    kohya,
    read,
    saved,
)

import adapterkit
from adapterkit.errors import FormatError, LossyConversionError, UnsupportedError, UsageError
from adapterkit.formats.diffusion.table import models
from adapterkit.registry import detect

pytestmark = pytest.mark.slow

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]

SD_ORIGINAL = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


FOREIGN = {
    "on_input": r"\(IA\)³",
    "w_norm": "norm",
    "oft_blocks": "OFT",
    "oft_R.weight": "OFT",
    "a1.weight": "GLoRA",
    "lambda_layer": "T-LoRA",
    "lora_C.weight": "lora_C",
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("leaf", FOREIGN)
def test_what_is_no_low_rank_update_is_refused_by_name(
    leaf: str, *, beside: bool, tmp_path: Path
) -> None:
    tensors = kohya({SD: (8, 8)}) if beside or leaf == "lora_C.weight" else {}
    path = saved(tmp_path / "a.safetensors", {**tensors, f"{SD}.{leaf}": drawn(4, 8)})
    with pytest.raises(UnsupportedError, match=FOREIGN[leaf]):
        adapterkit.convert(path, tmp_path / "b", to="peft")
    assert not (tmp_path / "b").exists()


FLUX_Q = "transformer.transformer_blocks.3.attn.to_q"
SDXL_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# What a trainer writes -> the module that it means, and a module that tells its model.
TRAINERS = {
    "ai-toolkit Flux": (FLUX_Q, AB, False, FLUX_Q),
    "ai-toolkit Wan": (
        "diffusion_model.blocks.3.cross_attn.k_img",
        AB,
        False,
        "transformer.blocks.3.attn2.add_k_proj",
    ),
    "ai-toolkit Qwen": (
        "diffusion_model.transformer_blocks.3.img_mod.1",
        AB,
        False,
        "transformer.transformer_blocks.3.img_mod.1",
    ),
    "musubi-tuner Wan": (
        "lora_unet_blocks_3_self_attn_o",
        DOWN_UP,
        True,
        "transformer.blocks.3.attn1.to_out.0",
    ),
    "musubi-tuner HunyuanVideo": (
        "lora_unet_double_blocks_3_img_mlp_fc1",
        DOWN_UP,
        True,
        "transformer.transformer_blocks.3.ff.net.0.proj",
    ),
    "musubi-tuner Qwen": (
        "lora_unet_transformer_blocks_3_txt_mlp_net_0_proj",
        DOWN_UP,
        True,
        "transformer.transformer_blocks.3.txt_mlp.net.0.proj",
    ),
    "Wan-Fun": (
        "lora_unet__blocks_3_ffn_0",
        DOWN_UP,
        True,
        "transformer.blocks.3.ffn.net.0.proj",
    ),
    "OneTrainer legacy": (
        "lora_transformer_transformer_blocks_3_attn_add_q_proj",
        DOWN_UP,
        True,
        "transformer.transformer_blocks.3.attn.add_q_proj",
    ),
    "OneTrainer T5": (
        "lora_te3_encoder_block_3_layer_0_SelfAttention_q",
        DOWN_UP,
        True,
        "text_encoder_2.encoder.block.3.layer.0.SelfAttention.q",
    ),
    "OneTrainer original": (
        "layers.3.attention.to_q",
        AB,
        True,
        "transformer.layers.3.attention.to_q",
    ),
    "SimpleTuner": (f"transformer.base_model.model.{FLUX_Q[12:]}", AB, False, FLUX_Q),
    "SimpleTuner LyCORIS": (
        f"lycoris_{SDXL_Q[5:].replace('.', '_')}",
        DOWN_UP,
        True,
        SDXL_Q,
    ),
    "SimpleTuner ComfyUI": (
        "diffusion_model.double_blocks.3.img_attn.proj",
        AB,
        True,
        "transformer.transformer_blocks.3.attn.to_out.0",
    ),
    "DiffSynth": (
        "blocks.3.self_attn.q",
        ("lora_A.default.weight", "lora_B.default.weight"),
        False,
        "transformer.blocks.3.attn1.to_q",
    ),
    "ComfyUI LTX-2.3": (
        "diffusion_model.audio_prompt_adaln_single.linear",
        AB,
        False,
        "transformer.audio_prompt_adaln.linear",
    ),
    "PEFT": (f"base_model.model.{SDXL_Q}", AB, False, SDXL_Q),
    "Z-Image": (
        "diffusion_model.layers.3.attention.out",
        DOWN_UP,
        True,
        "transformer.layers.3.attention.to_out.0",
    ),
}
SAID = {
    "OneTrainer T5": "flux-1-dev/lora",
    "OneTrainer legacy": "flux-1-dev/lora",
    "SimpleTuner LyCORIS": "stable-diffusion-xl-v1-base/lora",
    "Z-Image": "zimage",
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_s_names_are_read(trainer: str, tmp_path: Path) -> None:
    stem, ends, with_alpha, module = TRAINERS[trainer]
    tensors: Tensors = {f"{stem}.{ends[0]}": drawn(4, 8), f"{stem}.{ends[1]}": drawn(8, 4)}
    if with_alpha:
        tensors[f"{stem}.alpha"] = np.array(2, "int64" if "musubi" in trainer else "float32")
    metadata = {"modelspec.architecture": SAID[trainer]} if trainer in SAID else None
    path = saved(tmp_path / "a.safetensors", tensors, metadata)
    assert detect(path).name in SPELLINGS
    adapter = read(path)
    assert adapter.modules == (module,)
    want = drawn(8, 4).astype("float64") @ drawn(4, 8).astype("float64")
    assert close(dense(adapter)[module], want * (0.5 if with_alpha else 1))


def test_updates_of_a_bias_or_norm_alone_are_refused_by_name(tmp_path: Path) -> None:
    for leaf in ("diff", "diff_b"):
        path = saved(
            tmp_path / "a.safetensors", {**kohya({SD: (8, 8)}), f"{CONV}.{leaf}": drawn(8)}
        )
        with pytest.raises(UnsupportedError, match="resnets_0_conv1"):
            read(path)


def test_no_module_is_dropped_in_silence(tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_zkv"
    path = saved(tmp_path / "a.safetensors", kohya({**FLUX, stem: (48, 16)}))
    with pytest.raises(UnsupportedError, match=r"img_attn_zkv.*is no module of Flux\.1"):
        adapterkit.convert(path, tmp_path / "p", to="peft")
    tensors = {
        f"transformer.transformer_blocks.0.{m}.lora_{f}.weight": drawn(4, 4)
        for m in ("attn.to_q", "attn.zig")
        for f in "AB"
    }
    path = saved(tmp_path / "b.safetensors", tensors)
    adapterkit.convert(path, tmp_path / "c.safetensors", to="diffusers")
    with pytest.raises(LossyConversionError, match=r"attn\.zig"):
        adapterkit.convert(path, tmp_path / "d.safetensors", to="kohya")


def test_a_model_without_a_table_is_looked_at_and_not_converted(tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_zig_0_zag": (8, 8), "lora_unet_zig_1_zag": (8, 8)}, alpha=1)
    path = saved(tmp_path / "a.safetensors", tensors)
    summary = adapterkit.inspect(path)
    assert (summary.format, summary.modules, summary.scales) == ("kohya", 2, {0.5: 2})
    assert any("lora_unet_zig_0_zag: is no module of" in problem for problem in summary.problems)
    findings = {finding.code: finding for finding in adapterkit.validate(path).findings}
    assert findings["AK120"].severity is adapterkit.Severity.UNCHECKED
    with pytest.raises(UnsupportedError, match=r"lora_unet_zig_0_zag.*is no module of .*Wan"):
        adapterkit.convert(path, tmp_path / "p", to="peft")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("stem", "model"),
    [
        ("lora_prior_unet_down_blocks_0_2_attention_attn_to_q", "Stable Cascade"),
        ("lora_prior_te_text_model_encoder_layers_0_mlp_fc1", "Stable Cascade"),
        ("lora_unet_blocks_0_self_attn_output_proj", "Anima"),
        ("diffusion_model.llm_adapter.blocks.0.self_attn.q_proj", "Anima"),
        ("diffusion_model.lyric_encoder.encoders.0.self_attn.linear_q", "ACE-Step"),
        ("diffusion_model.decoder.layers.23.cross_attn.v_proj", "ACE-Step"),
        ("lora_te_layers_0_self_attn_q_proj", "a language model as the text encoder"),
        ("text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj", "a language model as"),
    ],
)
def test_models_without_a_table_are_refused_by_name(stem: str, model: str, tmp_path: Path) -> None:
    """Also where another model has the other modules of the file."""
    tensors = kohya({stem: (8, 8), "lora_unet_double_blocks_0_img_attn_proj": (8, 8)})
    path = saved(tmp_path / "a.safetensors", tensors)
    assert adapterkit.inspect(path).format in {"kohya", "comfyui"}
    with pytest.raises(UnsupportedError, match=f"is in a file of {model}.*, whose names are in no"):
        adapterkit.convert(path, tmp_path / "p", to="peft")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("rows", "columns", "model"), [(11520, 3840, "Z-Image"), (3840, 2304, "Lumina 2")]
)
def test_sizes_tell_models_whose_names_are_the_same(
    rows: int, columns: int, model: str, tmp_path: Path
) -> None:
    modules = {"lora_unet_layers_0_attention_qkv": (rows, columns)}
    modules |= {"lora_unet_layers_0_attention_out": (columns, columns)}
    path = saved(tmp_path / "a.safetensors", kohya(modules))
    assert adapterkit.inspect(path).architecture == model
    heights = {len(update) for update in dense(read(path)).values()}
    assert heights == ({3840} if model == "Z-Image" else {2304, 768})


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = kohya({SD: (8, 8), SD_ORIGINAL: (8, 8)})
    with pytest.raises(FormatError, match="which another tensor is too"):
        read(saved(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("spelling", ["kohya", "comfyui"])
def test_a_text_encoder_alone_whose_names_are_those_of_others_is_refused(
    spelling: str, tmp_path: Path
) -> None:
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    source = saved(tmp_path / "a.safetensors", kohya({stem: (8, 8)}), FLUX_SAID)
    adapterkit.convert(source, tmp_path / "b.safetensors", to=spelling)
    nameless = saved(tmp_path / "c.safetensors", kohya({stem: (8, 8)}))
    adapterkit.convert(nameless, tmp_path / "d.safetensors", to="diffusers")
    with pytest.raises(LossyConversionError, match=r"could be of .* or .*; write diffusers|may be"):
        adapterkit.convert(nameless, tmp_path / "e.safetensors", to=spelling)


def test_a_model_that_nothing_tells_is_not_guessed(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": drawn(2, 8), f"{name}.lora_B.weight": drawn(8, 2)}
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LossyConversionError, match=r"may be .* or "):
        adapterkit.convert(path, tmp_path / "b.safetensors", to="kohya")
    path = saved(tmp_path / "c.safetensors", tensors, FLUX_SAID)
    adapterkit.convert(path, tmp_path / "b.safetensors", to="kohya")
    assert f"{QKV}.lora_up.weight" in contents(tmp_path / "b.safetensors")


def test_metadata_of_diffusers_say_the_scale(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.{}.attn2.to_q"
    tensors = {
        f"{name.format(i)}.lora_{f}.weight": drawn(*s)
        for i in (0, 1)
        for f, s in (("A", (4, 8)), ("B", (8, 4)))
    }
    config = {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "alpha_pattern": {"1.attn2.to_q": 8},
    }
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    config = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})
    assert dict(read(config).scales) == {name.format(0): 1.0, name.format(1): 4.0}
    broken = saved(tmp_path / "b.safetensors", tensors, {"lora_adapter_metadata": "["})
    with pytest.raises(FormatError, match="lora_adapter_metadata"):
        read(broken)


BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
OLD = {
    f"{BLOCK}.attn1.processor.to_q_lora": "attn1.to_q",
    f"{BLOCK}.attn1.processor.to_out_lora": "attn1.to_out.0",
    f"{BLOCK}.attn2.to_k.lora": "attn2.to_k",
    f"base_model.model.{BLOCK}.ff.net.2.lora": "ff.net.2",
}


@pytest.mark.parametrize("stem", OLD)
def test_older_spellings_are_read(stem: str, tmp_path: Path) -> None:
    tensors = {f"{stem}.down.weight": drawn(2, 8), f"{stem}.up.weight": drawn(8, 2)}
    path = saved(tmp_path / "a.safetensors", tensors)
    assert detect(path).name == "diffusers"
    assert read(path).modules == (f"{BLOCK}.{OLD[stem]}",)


def test_inspect_says_which_model_and_trainer(tmp_path: Path) -> None:
    metadata = {"ss_network_module": "networks.lora_flux"}
    path = saved(tmp_path / "a.safetensors", FILES["flux"], metadata)
    summary = adapterkit.inspect(path)
    assert (summary.format, summary.architecture) == ("kohya", "Flux.1")
    assert any("networks.lora_flux" in note for note in summary.notes)
    path = saved(tmp_path / "b.safetensors", FILES["sdxl"])
    assert adapterkit.inspect(path).architecture == "Stable Diffusion XL"


def test_a_suffix_of_many_formats_is_asked_about(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", FILES["flux"])
    with pytest.raises(UsageError, match="--to"):
        adapterkit.convert(source, tmp_path / "b.safetensors")


def test_names_of_a_model_are_different_ones() -> None:
    for model in models():
        rows = [row for row in model.names.rows if row.written]
        assert len({row.original for row in rows}) == len(rows), model.name
        parts = [part for row in rows for part in row.parts]
        assert len(set(parts)) == len(parts), model.name
        assert len({part.replace(".", "_") for part in parts}) == len(parts), model.name
        assert all(len(row.shares) == len(row.parts) for row in rows)
        assert model.kohya in {"original", "diffusers"}
