"""Values, scales and blocks of every quantised layout, decoded to the bit or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import quantised_bases as quantising
import torch
from engine import BaseFixture, family_row, make_adapter, make_base
from quantised_bases import (
    COMPRESSED,
    EXPERTS,
    FBGEMM,
    FP8,
    MODELOPT,
    Q,
    logical,
    stored_alone,
    tensors_of,
)
from safetensors.torch import load_file
from transformers.integrations import finegrained_fp8, mxfp4

from adapterkit import merge_into
from adapterkit.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


# Sizes that no block divides, one block for all, and more than a matrix.
SHAPES = [
    ((40, 72), (16, 16)),
    ((576, 300), (128, 128)),
    ((16, 16), (128, 128)),
    ((3, 40, 24), (16, 8)),
]


@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e8m0fnu", "bytes"])
def test_blocks_are_decoded_to_the_bit(
    shape: tuple[int, ...],
    size: tuple[int, int],
    kind: str,
    llama: BaseFixture,
    tmp_path: Path,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values, scales = quantising.fp8_blocks(weight, size)
    exponents = torch.randint(100, 140, scales.shape, dtype=torch.uint8)
    kept = {
        "float32": scales,
        "bfloat16": scales.bfloat16(),
        "float8_e8m0fnu": exponents.view(torch.float8_e8m0fnu),
        "bytes": exponents,
    }[kind]
    name = f"{Q}.weight" if len(shape) == 2 else "model.layers.0.mlp.experts.gate_up_proj"
    config = {**FP8, "weight_block_size": list(size)}
    folder = stored_alone(llama.hf, tmp_path, config, {name: values, f"{name}_scale_inv": kept})
    found = logical(folder)[name].numpy()
    wide = kept.view(torch.float8_e8m0fnu) if kind == "bytes" else kept
    wanted = finegrained_fp8._dequantize_fp8_weight(values, wide.float(), list(size), torch.float32)
    assert np.array_equal(found, wanted.numpy())
    assert np.array_equal(found, (values.float() * quantising.expanded(wide, size, shape)).numpy())
    if shape[-2] % size[0] == 0 and shape[-1] % size[1] == 0:
        operation = finegrained_fp8.Fp8Dequantize(SimpleNamespace())
        theirs = operation._dequantize_one(values, kept, output_dtype=torch.float32)
        assert np.array_equal(found, theirs.numpy())


ROWWISE: dict[str, tuple[dict[str, Any], str, str, tuple[int, ...]]] = {
    "autofp8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "_scale",
        "input_scale",
        (),
    ),
    "fbgemm": (FBGEMM, "_scale", "input_scale_ub", (64, 1)),
    "compressed-channel": (COMPRESSED, "_scale", "input_scale", (64, 1)),
    "compressed-tensor": (COMPRESSED, "_scale", "input_scale", (1,)),
    "modelopt": (MODELOPT, "_scale", "input_scale", ()),
    "modelopt-channel": (
        {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "_scale",
        "k_scale",
        (64,),
    ),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_scales_of_tensors_and_rows_are_decoded_to_the_bit(
    name: str, llama: BaseFixture, tmp_path: Path
) -> None:
    config, ending, activation, shape = ROWWISE[name]
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(2)) / 64
    values = (load_file(llama.hf / "model.safetensors")[f"{Q}.weight"] / 0.01).to(
        torch.float8_e4m3fn
    )
    extra = {
        f"{Q}.weight": values,
        f"{Q}.weight{ending}": scales,
        f"{Q}.{activation}": torch.tensor(0.5),
    }
    folder = stored_alone(llama.hf, tmp_path, config, extra)
    make_adapter(llama, tmp_path / "adapter", target_modules=["v_proj"])
    report = merge_into([tmp_path / "adapter"], folder, tmp_path / "out", dequantize=True)
    wanted = values.float() * scales.float().reshape(-1, 1)
    merged = tensors_of(tmp_path / "out")
    assert torch.equal(merged[f"{Q}.weight"], wanted.bfloat16())
    assert merged.keys() == tensors_of(llama.hf).keys()
    assert (report.decoded, report.left_out) == (1, (f"{Q}.{activation}",))


@pytest.mark.parametrize("shape", [(3, 40, 64), (1, 8, 32), (4, 24, 160)])
def test_mxfp4_is_decoded_to_the_bit(
    shape: tuple[int, int, int], llama: BaseFixture, tmp_path: Path
) -> None:
    blocks, scales = quantising.random_mxfp4(shape, 3)
    scales[0, 0, 0], scales[0, 1, 0] = 0, 252  # the least, and the largest that float32 holds
    name = f"model.layers.0.{EXPERTS[0]}"
    extra = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    folder = stored_alone(llama.hf, tmp_path, {"quant_method": "mxfp4"}, extra)
    tensor = logical(folder)[name]
    wanted = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert tensor.shape == tuple(wanted.shape)
    assert np.array_equal(tensor.numpy().astype(np.float32), wanted.numpy())
    # Rows in any order and number, across groups and experts.
    whole = tensor.numpy().reshape(-1, shape[1]).view(np.uint16)
    reader: Any = tensor.read
    generator = np.random.default_rng(0)
    for _ in range(20):
        begin, end = sorted(generator.integers(0, len(whole) + 1, 2).tolist())
        part = np.frombuffer(reader.rows(begin, end), np.uint16).reshape(-1, shape[1])
        assert np.array_equal(part, whole[begin:end])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": (FP8, r"quantised \(fp8\).*pass --dequantize.*16-bit original"),
    "mxfp8": ({"quant_method": "mxfp8"}, r"quantised \(fp8\).*pass --dequantize"),
    "mxfp4": ({"quant_method": "mxfp4"}, r"quantised \(mxfp4\).*pass --dequantize"),
    "fbgemm": (FBGEMM, r"quantised \(fbgemm_fp8\).*pass --dequantize"),
    "compressed": (COMPRESSED, r"quantised \(compressed-tensors fp8\).*pass --dequantize"),
    "modelopt": (MODELOPT, r"quantised \(modelopt fp8\).*pass --dequantize"),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        r"quantised \(bitsandbytes 4 bits\).*pass --dequantize",
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        r"quantised \(bitsandbytes, 8 bits\).*16-bit original",
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq, 4 bits\).*16-bit original"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"quantised \(awq, 4 bits\).*16-bit original"),
    "hqq": ({"quant_method": "hqq"}, r"quantised \(hqq\).*16-bit original"),
    "nvfp4": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        r"quantised \(modelopt, NVFP4\).*16-bit original",
    ),
    "packed": (
        {**COMPRESSED, "format": "pack-quantized"},
        r"quantised \(compressed-tensors, pack-quantized\).*16-bit original",
    ),
    "mixed": (
        {
            **COMPRESSED,
            "config_groups": {
                **COMPRESSED["config_groups"],
                "group_1": {"weights": {"type": "int", "num_bits": 4}},
            },
        },
        r"quantised \(compressed-tensors, float-quantized\).*16-bit original",
    ),
    "fp4-experts": ({**FP8, "expert_dtype": "fp4"}, r"quantised \(fp8, fp4\).*16-bit original"),
    "mlx": (
        {"group_size": 64, "bits": 4, "mode": "affine"},
        r"quantised \(MLX, affine, 4 bits\).*16-bit original",
    ),
    "unknown": ({"bits": 2}, r"quantised \(unknown, 2 bits\).*16-bit original"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_quantisation_is_refused_with_the_way_out(
    name: str, llama: BaseFixture, tmp_path: Path
) -> None:
    config, message = REFUSED[name]
    make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    into = quantising.quantised(llama.hf, tmp_path / "base", config, lambda *_: None)
    asked = (False,) if "pass --dequantize" in message else (False, True)
    for dequantize in asked:
        with pytest.raises(UnsupportedError, match=message):
            merge_into([tmp_path / "adapter"], into, tmp_path / "out", dequantize=dequantize)
    assert not (tmp_path / "out").exists()


def fp8(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


EXPERT = f"model.layers.0.{EXPERTS[0]}"
MXFP4 = {"quant_method": "mxfp4"}
NO_BLOCK = {"quant_method": "fp8", "weight_block_size": None}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "no-scales": (FP8, {f"{Q}.weight": fp8((64, 64))}, "F8_E4M3 and has no scales"),
    "no-values": (FP8, {f"{Q}.w.weight_scale_inv": torch.ones(4, 4)}, "which is not there"),
    "not-quantised": (FP8, {f"{Q}.weight_scale_inv": torch.ones(4, 4)}, "stored as F32 beside"),
    "another-grid": (
        FP8,
        {f"{Q}.weight": fp8((64, 64)), f"{Q}.weight_scale_inv": torch.ones(3, 4)},
        r"\[64, 64\] and scales of \[3, 4\], to which no size",
    ),
    "two-grids": (
        {**FP8, "weight_block_size": [16, 16]},
        {
            f"{Q}.weight": fp8((64, 64)),
            f"{Q}.weight_scale_inv": torch.ones(4, 4),
            f"{Q}.weight_scale": torch.ones(4, 4),
        },
        "needs one tensor of scales",
    ),
    "scales-of-integers": (
        FP8,
        {f"{Q}.weight": fp8((64, 64)), f"{Q}.weight_scale_inv": torch.ones(4, 4).to(torch.int32)},
        "scales stored as I32",
    ),
    "infinite": (
        FP8,
        {f"{Q}.weight": fp8((64, 64)), f"{Q}.weight_scale_inv": torch.full((4, 4), torch.inf)},
        "is not finite",
    ),
    "zero-points": (
        COMPRESSED,
        {
            f"{Q}.weight": fp8((64, 64)),
            f"{Q}.weight_scale": torch.ones(64, 1),
            f"{Q}.weight_zero_point": fp8((64, 1)),
        },
        "weight_zero_point: is stored as F8_E4M3 and has no scales",
    ),
    "integers": (COMPRESSED, {f"{Q}.weight": torch.ones(64, 64).to(torch.int8)}, "stored as I8"),
    "other-axes": (
        FBGEMM,
        {EXPERT: fp8((2, 64, 64)), f"{EXPERT}_scale": torch.ones(2, 64, 1)},
        "has 3 axes",
    ),
    "uneven": (
        NO_BLOCK,
        {f"{Q}.weight": fp8((64, 64)), f"{Q}.weight_scale_inv": torch.ones(3, 1)},
        "to which no size",
    ),
    "half-mxfp4": (
        MXFP4,
        {f"{EXPERT}_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8)},
        "U8 and has no scales",
    ),
    "wide-mxfp4": (
        MXFP4,
        {
            f"{EXPERT}_blocks": torch.zeros(2, 8, 1, 8, dtype=torch.uint8),
            f"{EXPERT}_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
        },
        r"blocks of \[2, 8, 1, 8\]",
    ),
    "mxfp4-nan": (
        MXFP4,
        {
            f"{EXPERT}_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
            f"{EXPERT}_scales": torch.full((2, 8, 1), 255, dtype=torch.uint8),
        },
        "is not finite",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_together_is_named_and_leaves_nothing(
    name: str, llama: BaseFixture, tmp_path: Path
) -> None:
    config, extra, message = BROKEN[name]
    into = stored_alone(llama.hf, tmp_path, config, extra)
    make_adapter(llama, tmp_path / "adapter", target_modules=["v_proj"])
    with pytest.raises((FormatError, UnsupportedError), match=message):
        merge_into([tmp_path / "adapter"], into, tmp_path / "out", dequantize=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
