"""Compression: exact truncation in every layout, the measured error the predicted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, planted, written

from adapterkit import (
    DestinationExistsError,
    DType,
    FormatError,
    LossyConversionError,
    ProofError,
    Role,
    TensorKey,
    UsageError,
    compress,
    compress_file,
)
from adapterkit.containers.gguf import read_gguf
from adapterkit.conversion import convert
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.protocol import FormatOptions
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit import AdapterTensorSet, Update

Array = np.ndarray[Any, Any]


def update_of(pair: Update) -> Array:
    """Return ΔW, convolutions and experts as they are stored."""
    a, b = (t.numpy().astype(np.float64) for t in (pair.a, pair.b))
    if a.ndim == 4:
        return pair.scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    return pair.scale * (b @ a)


def updates(whole: AdapterTensorSet) -> dict[str, Array]:
    return {pair.module: update_of(pair) for pair in whole.pairs()}


def error_between(first: AdapterTensorSet, second: AdapterTensorSet) -> float:
    one, other = updates(first), updates(second)
    assert one.keys() == other.keys()
    apart = sum(np.linalg.norm(one[name] - other[name]) ** 2 for name in one)
    return float((apart / sum(np.linalg.norm(x) ** 2 for x in one.values())) ** 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "wishes", [{"rank": 2}, {"tol": 0.1}, {"budget": 1500}, {"policy": "sv_fro", "threshold": 0.95}]
)
def test_the_measured_error_is_the_predicted_and_the_true_one(
    wishes: dict[str, Any], dtype: Any
) -> None:
    whole = adapter(layered(3, rank=6, dtype=dtype), scale=1.5)
    result = compress(whole, **wishes)
    true = error_between(whole, result.adapter)
    report = result.report
    assert report.measured_error == pytest.approx(true, abs=1e-7)
    assert report.predicted_error == pytest.approx(true, abs=1e-6)
    assert 0 < true < 0.6
    assert report.parameters == result.adapter.parameters < whole.parameters
    assert {m.module: m.rank for m in report.modules} == {
        pair.module: pair.rank for pair in result.adapter.pairs()
    }


def test_nothing_of_that_rank_is_closer() -> None:
    whole = adapter({"x": gaussian(40, 30, 8, dtype=np.float64)}, scale=-0.7)
    cut = updates(compress(whole, rank=3).adapter)["x"]
    u, s, vt = np.linalg.svd(updates(whole)["x"])
    assert np.abs(cut - (u[:, :3] * s[:3]) @ vt[:3]).max() < 1e-12


def test_scales_settings_and_other_tensors_stay() -> None:
    key = TensorKey("lm_head.weight", Role.FULL)
    whole = adapter(layered(2), scale=0.25, more={key: LazyTensor.of(np.ones((3, 3)))})
    whole = whole.replace(invocation_tokens=(1, 2), metadata={"a": "b"})
    small = compress(whole, rank=1).adapter
    assert (small.scales, small.settings, small.metadata) == (
        whole.scales,
        whole.settings,
        whole.metadata,
    )
    assert small.tensors[key] is whole.tensors[key]
    assert list(small.tensors) == list(whole.tensors)


def test_a_module_that_keeps_its_rank_keeps_its_bits() -> None:
    pairs = layered(2)
    pairs["model.layers.0.mlp.down_proj"] = planted([5.0, 4.0], 32, 96)
    whole = adapter(pairs)
    small = compress(whole, rank=2).adapter
    key = TensorKey("model.layers.0.mlp.down_proj", Role.LORA_A)
    assert small.tensors[key] is whole.tensors[key]
    result = compress(whole, rank=64)
    assert result.adapter.tensors == whole.tensors
    assert (result.report.measured_error, result.report.predicted_error) == (0, 0)


def test_unused_rank_goes_without_a_loss() -> None:
    a, b = planted([1.0, 0.5, 0.25], 30, 20)
    twice = np.concatenate([a, a]), np.concatenate([b, b], axis=1)
    result = compress(adapter({"x": twice}), tol=0)
    assert result.report.modules[0].rank == 3
    assert result.report.measured_error < 1e-14


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_tolerance_holds_for_what_is_stored(dtype: Any) -> None:
    a, b = planted([1.0, 0.5, 0.25, 0.004], 30, 20)
    twice = np.concatenate([a, a]).astype(dtype), np.concatenate([b, b], axis=1).astype(dtype)
    whole = adapter({"x": twice, "y": planted([1.0, 0.5], 30, 20)})
    with pytest.raises(ProofError, match=r"are rounded, a relative error of .*, and the tol is 0"):
        compress(whole, tol=0)
    for tol in (0.0035, 0.01, 0.1):
        if dtype is np.float32 or tol > 0.005:
            result = compress(whole, tol=tol)
            assert error_between(whole, result.adapter) <= tol
            assert result.report.measured_error <= tol
            assert result.report.policy == f"relative error at most {tol:g}"


def test_experts_embeddings_and_convolutions_keep_their_layout() -> None:
    random = np.random.default_rng(0)
    pairs = {
        "experts": (random.standard_normal((3, 4, 12)), random.standard_normal((3, 20, 4))),
        "conv": (random.standard_normal((4, 6, 3, 3)), random.standard_normal((10, 4, 1, 1))),
        "embed": (random.standard_normal((4, 50)), random.standard_normal((16, 4))),
    }
    kinds = {"experts": Kind.EXPERTS, "conv": Kind.CONVOLUTION}
    whole = adapter(pairs, embeddings=("embed",), kinds=kinds)
    result = compress(whole, rank=2)
    shapes = [t.shape for t in result.adapter.tensors.values()]
    assert shapes == [(3, 2, 12), (3, 20, 2), (2, 6, 3, 3), (10, 2, 1, 1), (2, 50), (16, 2)]
    assert TensorKey("embed", Role.EMBEDDING_A) in result.adapter.tensors
    true = error_between(whole, result.adapter)
    assert result.report.measured_error == pytest.approx(true, abs=1e-12)
    assert result.report.predicted_error == pytest.approx(true, abs=1e-12)


def test_a_zero_update_can_still_be_trained() -> None:
    a, b = gaussian(20, 16, 4)
    small = compress(adapter({"x": (a, b * 0), "y": (a, b)}), rank=2).adapter
    pair = next(small.pairs())
    assert not pair.b.numpy().any()
    assert (pair.a.numpy() == a[:2]).all()


@pytest.mark.parametrize(
    ("dtype", "stored", "allowed"),
    [(np.float16, DType.F16, 1e-3), (ml_dtypes.bfloat16, DType.BF16, 1e-2)],
)
def test_stored_types_stay_and_their_rounding_is_measured(
    dtype: Any, stored: DType, allowed: float
) -> None:
    whole = adapter(layered(2, dtype=dtype))
    result = compress(whole, rank=3)
    assert {t.dtype for t in result.adapter.tensors.values()} == {stored}
    gap = result.report.measured_error - result.report.predicted_error
    assert 0 < gap < allowed
    exact = compress(whole, rank=3, dtype=DType.F32)
    assert {t.dtype for t in exact.adapter.tensors.values()} == {DType.F32}
    assert exact.report.measured_error == pytest.approx(exact.report.predicted_error, abs=1e-6)


def test_a_stored_type_that_cannot_hold_the_factors_is_refused() -> None:
    a, b = planted([1e-5, 1e-5], 64, 64)
    tiny = adapter({"x": ((a * 1e-3).astype(np.float16), b.astype(np.float16))})
    with pytest.raises(ProofError, match="try --outtype f32"):
        compress(tiny, rank=1)


def test_a_broken_adapter_is_not_compressed() -> None:
    pairs = layered(1)
    pairs["model.layers.0.mlp.down_proj"][1][0, 0] = np.nan
    with pytest.raises(FormatError, match="holds NaN"):
        compress(adapter(pairs), rank=1)


def test_dora_is_compressed_with_a_note() -> None:
    key = TensorKey("model.layers.0.self_attn.q_proj", Role.MAGNITUDE)
    result = compress(adapter(layered(1), more={key: LazyTensor.of(np.ones(32))}), rank=2)
    assert key in result.adapter.tensors
    assert result.report.notes[0].startswith("DoRA")


@pytest.fixture
def tiny() -> Path:
    from terminal import TINY

    return TINY


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_file_of_any_format(suffix: str, tiny: Path, tmp_path: Path) -> None:
    from terminal import BASE

    destination = tmp_path / f"small{suffix}"
    done = compress_file(tiny, destination, rank=1, base=BASE)
    assert done.format == ("gguf" if suffix else "peft")
    assert done.bytes < 2 * done.bytes_before
    assert done.max_relative_error < 1e-6
    source = read_peft(tiny, FormatOptions())
    if suffix:
        back = tmp_path / "back"
        convert(destination, back, base=BASE)
        destination = back
    found = read_peft(destination, FormatOptions())
    assert {pair.rank for pair in found.pairs()} == {1}
    assert error_between(source, found) == pytest.approx(done.report.predicted_error, abs=1e-6)


def test_a_gguf_source_needs_no_base(tiny: Path, tmp_path: Path) -> None:
    from terminal import BASE

    convert(tiny, tmp_path / "a.gguf", base=BASE, outtype="f16")
    done = compress_file(tmp_path / "a.gguf", tmp_path / "b.gguf", rank=1, outtype="f32")
    assert {t.dtype for t in read_gguf(tmp_path / "b.gguf").tensors.values()} == {DType.F32}
    assert done.report.measured_error == pytest.approx(done.report.predicted_error, abs=1e-6)


def test_what_the_target_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    from terminal import BASE, PEFT

    with pytest.raises(LossyConversionError):
        compress_file(PEFT / "dora", tmp_path / "x.gguf", rank=1, base=BASE)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_unless_forced(tiny: Path, tmp_path: Path) -> None:
    source = written(adapter(layered(1)), tmp_path / "source")
    destination = written(adapter(layered(2)), tmp_path / "there")
    with pytest.raises(DestinationExistsError):
        compress_file(source, destination, rank=1)
    assert len(read_peft(destination, FormatOptions()).scales) == 4
    compress_file(source, destination, rank=1, force=True)
    assert len(read_peft(destination, FormatOptions()).scales) == 2
    with pytest.raises(UsageError, match="contradict"):
        compress_file(tiny, tmp_path / "new", rank=1, tol=0.1)
