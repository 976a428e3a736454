"""LoRA of diffusion models: names, splits, scales and refusals, against dense algebra."""

from __future__ import annotations

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
    WIDTH,
    close,
    contents,
    dense,
    drawn,
    kohya,
    read,
    saved,
    update,
)

import adapterkit
from adapterkit.keys import Role, TensorKey
from adapterkit.registry import detect

pytestmark = pytest.mark.slow

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize("name", FILES)
def test_round_trips_through_every_spelling_are_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "0.safetensors", FILES[name], {"ss_output_name": "mine"})
    path = first
    for number, spelling in enumerate(("diffusers", "comfyui", "kohya"), 1):
        path, source = tmp_path / f"{number}.safetensors", path
        report = adapterkit.convert(source, path, to=spelling)
        assert report.max_relative_error == 0
        assert detect(path).name == spelling
    assert contents(path) == contents(first)
    assert read(path).metadata == {"ss_output_name": "mine"}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -1.0])
def test_every_spelling_holds_every_scale(alpha: float, spelling: str, tmp_path: Path) -> None:
    tensors = kohya(FLUX, rank=3, alpha=alpha)
    source = saved(tmp_path / "a.safetensors", tensors)
    adapterkit.convert(source, tmp_path / "b.safetensors", to=spelling)
    got, want = dense(read(tmp_path / "b.safetensors")), dense(read(source))
    assert got.keys() == want.keys()
    assert all(close(got[name], want[name]) for name in want)
    alphas = [x for n, x in read_numbers(tmp_path / "b.safetensors") if n.endswith(".alpha")]
    assert bool(alphas) == (spelling != "diffusers")
    assert all(number >= 0 for number in alphas), "diffusers never returns from a negative alpha"


def read_numbers(path: Path) -> list[tuple[str, float]]:
    from safetensors.numpy import load_file

    return [(name, float(x)) for name, x in load_file(path).items() if x.size == 1]


def test_fused_layers_are_their_parts_row_by_row(tmp_path: Path) -> None:
    tensors = FILES["flux"]
    got = dense(read(saved(tmp_path / "a.safetensors", tensors)))
    block = "transformer.single_transformer_blocks.0"
    parts = [got[f"{block}.{name}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert [len(part) for part in parts] == [WIDTH, WIDTH, WIDTH, 4 * WIDTH]
    assert close(np.concatenate(parts), update(tensors, "lora_unet_single_blocks_0_linear1"))
    attention = "transformer.transformer_blocks.0.attn"
    for fused, names in (
        (QKV, "to_q to_k to_v"),
        (QKV.replace("img", "txt"), "add_q_proj add_k_proj add_v_proj"),
    ):
        parts = [got[f"{attention}.{name}"] for name in names.split()]
        assert close(np.concatenate(parts), update(tensors, fused))


def test_parts_with_factors_of_their_own_are_joined_exactly(tmp_path: Path) -> None:
    block = "transformer.single_transformer_blocks.0"
    tensors: Tensors = {
        "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": drawn(2, 16),
        "transformer.transformer_blocks.0.norm1.linear.lora_B.weight": drawn(96, 2),
    }
    for rank, (name, rows) in enumerate(
        (("attn.to_q", 16), ("attn.to_v", 16), ("proj_mlp", 64)), 2
    ):
        tensors[f"{block}.{name}.lora_A.weight"] = drawn(rank, 16)
        tensors[f"{block}.{name}.lora_B.weight"] = drawn(rows, rank)
    source = saved(tmp_path / "a.safetensors", tensors, FLUX_SAID)
    for spelling in ("kohya", "comfyui"):
        path = tmp_path / f"{spelling}.safetensors"
        assert adapterkit.convert(source, path, to=spelling).max_relative_error < 1e-6
    stored = contents(tmp_path / "kohya.safetensors")
    assert stored["lora_unet_single_blocks_0_linear1.lora_up.weight"][1] == (112, 2 + 3 + 4)
    got = dense(read(tmp_path / "kohya.safetensors"))
    assert not got[f"{block}.attn.to_k"].any()


def test_shift_and_scale_of_the_last_layer_change_places(tmp_path: Path) -> None:
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = kohya({stem: (32, 16), "lora_unet_single_blocks_0_linear2": (16, 80)})
    source = saved(tmp_path / "a.safetensors", tensors)
    want = update(tensors, stem)
    got = dense(read(source))["transformer.norm_out.linear"]
    assert close(got, np.concatenate([want[16:], want[:16]]))
    for spelling in ("comfyui", "kohya"):
        adapterkit.convert(source, tmp_path / f"{spelling}.safetensors", to=spelling)
    assert contents(tmp_path / "kohya.safetensors") == contents(source)


def test_alpha_is_the_rank_where_there_is_none_and_may_be_an_integer(tmp_path: Path) -> None:
    tensors = kohya({SD: (8, 8), SD.replace("to_q", "to_k"): (8, 8)}, rank=4)
    del tensors[f"{SD}.alpha"]
    tensors[f"{SD.replace('to_q', 'to_k')}.alpha"] = np.array(1, "int64")
    adapter = read(saved(tmp_path / "a.safetensors", tensors))
    assert sorted(adapter.scales.values()) == [0.25, 1.0]


def test_dora_is_split_and_joined_with_its_rows(tmp_path: Path) -> None:
    tensors = kohya({QKV: (48, 16), "lora_unet_single_blocks_0_modulation_lin": (48, 16)})
    tensors[f"{QKV}.dora_scale"] = drawn(48, 1)
    source = saved(tmp_path / "a.safetensors", tensors, FLUX_SAID)
    adapter = read(source)
    rows = [
        adapter.tensors[TensorKey(f"transformer.transformer_blocks.0.attn.{name}", Role.MAGNITUDE)]
        for name in ("to_q", "to_k", "to_v")
    ]
    assert np.array_equal(np.concatenate([x.numpy() for x in rows]), drawn(48, 1)[:, 0])
    adapterkit.convert(source, tmp_path / "b.safetensors", to="diffusers")
    adapterkit.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    assert contents(tmp_path / "c.safetensors") == contents(source)


def product(core: Any, left: Any, right: Any) -> Any:
    """ΔW of a core (r, s, k, k) with left (r, out) and right (s, in), as LyCORIS defines it."""
    return np.einsum("ijkl,jr,ip->prkl", core, right, left)


def tucker_lora() -> tuple[Tensors, Any]:
    down, mid, up = drawn(3, 8, 1, 1), drawn(3, 3, 3, 3), drawn(16, 3, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return parts, product(mid, up[:, :, 0, 0].T, down[:, :, 0, 0]) / 3


def tucker_loha() -> tuple[Tensors, Any]:
    parts = {"hada_t1": drawn(2, 2, 3, 3), "hada_w1_a": drawn(2, 16), "hada_w1_b": drawn(2, 8)}
    parts |= {"hada_t2": drawn(2, 2, 3, 3) + 1, "hada_w2_a": drawn(2, 16) + 1}
    parts["hada_w2_b"] = drawn(2, 8) + 1
    first = product(parts["hada_t1"], parts["hada_w1_a"], parts["hada_w1_b"])
    second = product(parts["hada_t2"], parts["hada_w2_a"], parts["hada_w2_b"])
    return parts, first * second / 2


def flat_loha() -> tuple[Tensors, Any]:
    parts = {"hada_w1_a": drawn(16, 2), "hada_w1_b": drawn(2, 72)}
    parts |= {"hada_w2_a": drawn(16, 2) + 1, "hada_w2_b": drawn(2, 72) + 1}
    first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
    return parts, (first * second / 2).reshape(16, 8, 3, 3)


def tucker_lokr() -> tuple[Tensors, Any]:
    parts = {"lokr_w1": drawn(2, 2), "lokr_t2": drawn(2, 2, 3, 3)}
    parts |= {"lokr_w2_a": drawn(2, 8), "lokr_w2_b": drawn(2, 4)}
    second = product(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return parts, np.kron(parts["lokr_w1"][:, :, None, None], second) / 2


def whole_lokr() -> tuple[Tensors, Any]:
    parts = {"lokr_w1": drawn(2, 2), "lokr_w2": drawn(8, 4, 3, 3)}
    return parts, np.kron(parts["lokr_w1"][:, :, None, None], parts["lokr_w2"])


def whole() -> tuple[Tensors, Any]:
    return {"diff": drawn(16, 8, 3, 3)}, drawn(16, 8, 3, 3)


@pytest.mark.parametrize(
    "case", [tucker_lora, tucker_loha, flat_loha, tucker_lokr, whole_lokr, whole]
)
def test_products_are_written_out_as_two_factors(case: Any, tmp_path: Path) -> None:
    parts, want = case()
    tensors = {f"{CONV}.{name}": x for name, x in parts.items()}
    tensors[f"{CONV}.alpha"] = np.array(1, "float32")
    source = saved(tmp_path / "a.safetensors", tensors)
    assert detect(source).name == "kohya"
    adapter = read(source)
    assert close(dense(adapter)["unet.down_blocks.0.resnets.0.conv1"], want)
    assert adapterkit.convert(source, tmp_path / "p", to="peft").max_relative_error < 1e-6


# end of a name -> what the message calls it
