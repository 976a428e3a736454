"""A diffusion base settles which model a file is for, and is audited, resumed and extracted from.

Every command on a directory of diffusers and on a single file, where both can be.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers_factors import dense, factors
from diffusion_bases import TOLD, checkpoint, pipeline
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import LossyConversionError, UnsupportedError
from adapterkit.merging.into import journal
from adapterkit.registry import detect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"), pytest.mark.slow]
LAYOUTS = ("directory", "file")
ALPHA = 0.7


def opened(folder: Path, name: str, layout: str) -> Path:
    if layout == "directory":
        return pipeline(folder / "base", name)
    return checkpoint(folder / "base.safetensors", name, "model.diffusion_model.")[0]


def adapter(path: Path, name: str, only: str = "") -> Path:
    tensors, metadata = factors(name, alpha=ALPHA)
    said = {} if only else {"modelspec.architecture": TOLD.get(name, name)}
    save_file({key: x for key, x in tensors.items() if only in key}, path, metadata | said)
    return path


QUERY = ".transformer_blocks.0.attn.to_q."


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "sd3"])
def test_a_base_says_which_model_a_part_is_of(name: str, layout: str, tmp_path: Path) -> None:
    """One query under `transformer.transformer_blocks` is a module of six models."""
    source = adapter(tmp_path / "a.safetensors", name, QUERY)
    with pytest.raises(LossyConversionError, match=r"may be Flux\.1 or Chroma or Flux\.2 or Hun"):
        adapterkit.convert(source, tmp_path / "b.safetensors", to="comfyui")
    base = opened(tmp_path, name, layout)
    codes = {f.code for f in adapterkit.validate(source, targets=["comfyui"]).findings}
    assert "AK121" in codes
    report = adapterkit.validate(source, base=base, targets=["comfyui"])
    assert "AK121" not in {finding.code for finding in report.findings}
    written = tmp_path / "b.safetensors"
    adapterkit.convert(source, written, to="comfyui", base=base)
    place = "joint_blocks.0.x_block.attn.qkv" if name == "sd3" else "double_blocks.0.img_attn.qkv"
    assert set(load_file(written)) >= {f"diffusion_model.{place}.lora_B.weight"}


def test_a_base_of_language_says_nothing_of_a_diffusion_model(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", "flux", QUERY)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    with pytest.raises(LossyConversionError, match="may be"):
        adapterkit.convert(source, tmp_path / "b.safetensors", to="comfyui", base=base)


def norms(weight: torch.Tensor, change: Any) -> float:
    flat = weight.double().numpy().reshape(len(weight), -1)
    largest = np.linalg.svd(change.reshape(flat.shape), compute_uv=False)[0]
    return float(largest / np.linalg.svd(flat, compute_uv=False)[0])


def test_updates_are_audited_against_a_directory(tmp_path: Path) -> None:
    base = opened(tmp_path, "sd", "directory")
    source = adapter(tmp_path / "a.safetensors", "sd")
    found = adapterkit.audit(source, base=base).adapters[0].base
    assert found is not None
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    want = dense(factors("sd", alpha=ALPHA)[0], ALPHA / 2)
    assert {module for row in found.weights for module in row.modules} == want.keys()
    assert found.not_compared == ()
    for row in found.weights:
        (module,) = row.modules
        weight = stored[f"{module.removeprefix('unet.')}.weight"]
        assert row.udr == pytest.approx(norms(weight, want[module]), rel=1e-5), module


def test_updates_are_audited_against_a_file_where_they_are_fused(tmp_path: Path) -> None:
    base = opened(tmp_path, "flux", "file")
    source = adapter(tmp_path / "a.safetensors", "flux")
    found = adapterkit.audit(source, base=base).adapters[0].base
    assert found is not None
    want = dense(factors("flux", alpha=ALPHA)[0], ALPHA / 2)
    rows = {row.tensor: row for row in found.weights}
    assert {module for row in rows.values() for module in row.modules} == want.keys()
    name = "model.diffusion_model.double_blocks.1.img_attn.qkv"
    attention = "transformer.transformer_blocks.1.attn"
    parts = tuple(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v"))
    assert rows[name].modules == parts
    change = np.concatenate([want[part] for part in parts])
    weight = load_file(base)[f"{name}.weight"]
    assert rows[name].udr == pytest.approx(norms(weight, change), rel=1e-5)


# A merge that kills itself as soon as a piece of a file is noted; here they are small.
KILLED = """
import os, signal, sys
from adapterkit import merge_into
from adapterkit.merging.into import journal

journal.SEGMENT = 5_000

def noted(*arguments, finish=journal.Journal.finish):
    finish(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

journal.Journal.finish = noted
merge_into([sys.argv[1]], sys.argv[2], sys.argv[3], resume=True, jobs=2)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_resumed_a_merge_gives_the_same_bytes(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT", 5_000)
    name = "sd" if layout == "directory" else "flux"
    base = opened(tmp_path, name, layout)
    source = adapter(tmp_path / "a.safetensors", name)
    ends = ["whole", "again"]
    whole, again = (tmp_path / (e if base.is_dir() else f"{e}.safetensors") for e in ends)
    adapterkit.merge_into([source], base, whole)
    killed = [sys.executable, "-c", KILLED, str(source), str(base), str(again)]
    assert subprocess.run(killed, check=False).returncode == -9
    assert not again.exists()
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir() and ".again" in path.name)
    lines = (left / "journal.jsonl").read_text().splitlines()
    assert len(lines) > 1, "nothing was finished that could be resumed"
    report = adapterkit.merge_into([source], base, again, resume=True)
    assert any("resumed" in note for note in report.notes), report.notes
    files = [p for p in whole.rglob("*") if p.is_file()] if whole.is_dir() else [whole]
    for path in files:
        other = again / path.relative_to(whole) if whole.is_dir() else again
        assert path.read_bytes() == other.read_bytes(), path
    assert not [p for p in tmp_path.iterdir() if "again" in p.name and p != again]


def test_what_is_in_no_factors_is_saved_from_directories_and_merged_again(tmp_path: Path) -> None:
    base = opened(tmp_path, "sd", "directory")
    adapterkit.merge_into([adapter(tmp_path / "a.safetensors", "sd")], base, tmp_path / "tuned")
    stored = "unet/diffusion_pytorch_model.safetensors"
    tuned = load_file(tmp_path / "tuned" / stored)
    tuned["conv_norm_out.bias"] += 1
    save_file(tuned, tmp_path / "tuned" / stored)
    report = adapterkit.extract(base, tmp_path / "tuned", tmp_path / "rest", save_rest=True)
    assert [(left.tensor, left.saved) for left in report.left_over] == [
        ("unet.conv_norm_out.bias", True)
    ]
    adapterkit.merge_into([tmp_path / "rest"], base, tmp_path / "again")
    again = load_file(tmp_path / "again" / stored)
    assert again.keys() == tuned.keys()
    assert torch.equal(again["conv_norm_out.bias"], tuned["conv_norm_out.bias"])
    assert all(torch.allclose(again[key], x, atol=2e-6) for key, x in tuned.items())
    with pytest.raises(LossyConversionError, match=r"conv_norm_out\.bias: a whole trained param"):
        adapterkit.extract(
            base, tmp_path / "tuned", tmp_path / "b.safetensors", to="kohya", save_rest=True
        )


def test_what_is_in_no_factors_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    """It was said to be saved, and was not: no table says what diffusers calls it."""
    base = opened(tmp_path, "flux", "file")
    name = "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale"
    save_file(load_file(base) | {name: torch.zeros(8)}, base)
    source = adapter(tmp_path / "a.safetensors", "flux")
    tuned = tmp_path / "tuned.safetensors"
    adapterkit.merge_into([source], base, tuned)
    save_file(load_file(tuned) | {name: torch.ones(8)}, tuned)
    with pytest.raises(UnsupportedError, match=r"query_norm\.scale.*in no table"):
        adapterkit.extract(base, tuned, tmp_path / "rest", to="peft", save_rest=True)
    report = adapterkit.extract(base, tuned, tmp_path / "b.safetensors", to="kohya")
    assert [left.tensor for left in report.left_over] == [name]
    assert detect(tmp_path / "b.safetensors").name == "kohya"
