"""XLabs' and USO's names of Flux: read, judged by diffusers' own converter, written by all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from diffusers_loaders import loaded
from diffusion_files import contents, dense, drawn, read, saved

import adapterkit
from adapterkit import Outcome
from adapterkit.registry import detect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated")
WIDTH, RANK = 16, 3
PAIRS = {
    "double_blocks.{}.processor.qkv_lora1": (3 * WIDTH, WIDTH),
    "double_blocks.{}.processor.qkv_lora2": (3 * WIDTH, WIDTH),
    "double_blocks.{}.processor.proj_lora1": (WIDTH, WIDTH),
    "double_blocks.{}.processor.proj_lora2": (WIDTH, WIDTH),
    "single_blocks.{}.processor.qkv_lora": (3 * WIDTH, WIDTH),
    "single_blocks.{}.processor.proj_lora": (WIDTH, 5 * WIDTH),
}
Tensors = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


def streams(prefix: str = "", blocks: tuple[int, ...] = (0, 1)) -> Tensors:
    found: Tensors = {}
    for number in blocks:
        for pattern, (rows, columns) in PAIRS.items():
            stem = prefix + pattern.format(number)
            generator = np.random.default_rng(sum(map(ord, stem)))
            down, up = (generator.standard_normal(s) for s in ((RANK, columns), (rows, RANK)))
            found[f"{stem}.down.weight"] = down.astype("float32")
            found[f"{stem}.up.weight"] = up.astype("float32")
    return found


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for module, update in want.items():
        assert np.linalg.norm(got[module] - update) <= 1e-6 * np.linalg.norm(update), module


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_streams_are_the_modules_that_diffusers_makes_of_them(prefix: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", streams(prefix))
    assert detect(path).name == "comfyui"
    assert adapterkit.inspect(path).architecture == "Flux.1 or Chroma"
    want = loaded("flux", path)
    assert len(want) == 2 * (3 + 3 + 1 + 1 + 3 + 1)
    assert_same(dense(read(path)), want)


def test_streams_go_exactly_into_every_spelling(tmp_path: Path) -> None:
    tensors = streams()
    first = saved(
        tmp_path / "a.safetensors", tensors, {"modelspec.architecture": "flux-1-dev/lora"}
    )
    want, path = loaded("flux", first), first
    for number, spelling in enumerate(("kohya", "comfyui", "diffusers", "kohya")):
        source, path = path, tmp_path / f"{number}.safetensors"
        assert adapterkit.convert(source, path, to=spelling).max_relative_error == 0
        got = {module: update for module, update in dense(read(path)).items() if update.any()}
        assert_same(got, want)
    assert_same({m: x for m, x in loaded("flux", path).items() if x.any()}, want)
    stem = "lora_unet_single_blocks_1_linear1"
    written = contents(path)
    assert written[f"{stem}.lora_up.weight"][1] == (7 * WIDTH, RANK)
    up = tensors["single_blocks.1.processor.qkv_lora.up.weight"].tobytes()
    assert written[f"{stem}.lora_up.weight"][2] == up + bytes(4 * WIDTH * RANK * 4)


@pytest.mark.parametrize(
    ("prefix", "blocks", "comfyui"),
    [("", (0, 1), False), ("", tuple(range(38)), True), ("diffusion_model.", (0, 1), False)],
)
def test_loaders_are_said_to_do_what_they_do(
    prefix: str, blocks: tuple[int, ...], *, comfyui: bool, tmp_path: Path
) -> None:
    """diffusers takes every such file; ComfyUI, by its source, those with Flux's last blocks."""
    tensors = {
        name: x
        for name, x in streams(prefix, blocks).items()
        if "single" in name or int(name.removeprefix(prefix).split(".")[1]) < 19
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    report = adapterkit.validate(path, targets=["diffusers", "comfyui"])
    outcomes = [{module.outcome for module in each.modules} for each in report.targets]
    assert outcomes == [{Outcome.APPLIED}, {Outcome.APPLIED if comfyui else Outcome.IGNORED}]


def test_a_vector_beside_streams_is_no_part_of_them(tmp_path: Path) -> None:
    tensors = streams() | {"double_blocks.0.processor.qkv_lora3.down.weight": drawn(3, 16)}
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(adapterkit.errors.UnsupportedError, match="qkv_lora3"):
        read(path)
