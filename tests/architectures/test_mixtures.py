"""llama.cpp's quantiser gives every tensor the type that the tables say, and the bytes we write.

Its answers are in fixtures/mixtures/types.json; make.py there says how they were made.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from checkpoint_bases import LINEAR, trained
from engine import BaseFixture, engine_logprobs, family_row, make_base, max_kl, prompts_for
from mixture_files import stored_as

from adapterkit import merge_into
from adapterkit.architectures.mixtures import mixtures
from adapterkit.containers.gguf import read_gguf
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.quantisation import ggml
from adapterkit.tensor import LazyTensor

pytestmark = pytest.mark.engine

ANSWERS = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "mixtures" / "types.json").read_text()
)


@pytest.mark.parametrize("model", ANSWERS["models"])
def test_every_tensor_gets_the_quantiser_s_type(model: str) -> None:
    answers = ANSWERS["models"][model]
    architecture = answers["architecture"]
    keys = {
        name.removeprefix(f"{architecture}.").replace(".", "__"): value
        for name, value in answers["facts"].items()
    }
    tensors = {n: LazyTensor(DType.F32, tuple(s), bytes) for n, s in answers["tensors"].items()}
    assert answers["types"].keys() == mixtures().keys()
    for name, letters in answers["types"].items():
        found = mixtures()[name].types(architecture, keys, tensors)
        wanted = [ANSWERS["letters"][letter] for letter in letters]
        assert [found[tensor].value for tensor in answers["tensors"]] == wanted, name


@pytest.mark.parametrize("name", ANSWERS["hashes"])
def test_the_bytes_are_the_quantiser_s(name: str) -> None:
    """The model is the one of make.py: two rows of 256 elements of a seeded stream each."""
    answers = ANSWERS["models"]["llama-wide"]
    names, letters = list(answers["tensors"]), answers["types"][name]
    digest = hashlib.sha256()
    for tensor, letter in zip(names, letters, strict=True):
        stream = np.random.default_rng(crc32(tensor.encode()))
        values = (stream.standard_normal(answers["tensors"][tensor]) * 0.05).astype(np.float32)
        digest.update(LazyTensor.of(values, DType(ANSWERS["letters"][letter])).tobytes())
    assert digest.hexdigest() == ANSWERS["hashes"][name]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama-256"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("base_type", [DType.F32, DType.F16, DType.BF16])
def test_a_mixture_is_what_the_merged_16_bit_file_quantises_to(
    base_type: DType, llama: BaseFixture, tmp_path: Path
) -> None:
    base = stored_as(llama.gguf, tmp_path / "base.gguf", base_type)
    trained(llama, tmp_path / "adapter", target_modules=LINEAR, use_dora=base_type is DType.BF16)
    merged, mixed = tmp_path / "merged.gguf", tmp_path / "mixed.gguf"
    merge_into([tmp_path / "adapter"], base, merged)
    report = merge_into([tmp_path / "adapter"], base, mixed, gguf_type="q4_k_m")
    between, found = read_gguf(merged), read_gguf(mixed)
    assert found.metadata["general.file_type"] == mixtures()["q4_k_m"].file_type
    assert found.metadata["general.quantization_version"] == 2
    types = {tensor.dtype for tensor in found.tensors.values()}
    assert types == {DType.F32, DType.Q4_K, DType.Q6_K}
    for name, tensor in found.tensors.items():
        wanted = between.tensors[name]
        if tensor.dtype is not wanted.dtype:
            wanted = LazyTensor.of(wanted.numpy().astype(np.float32), tensor.dtype)
        assert tensor.tobytes() == wanted.tobytes(), name
    assert report.min_survival is not None
    assert any("the whole model is q4_k_m now" in note for note in report.notes)
    prompts = prompts_for(llama)[-3:]
    # Four bits are not exact, but they are this model and no other.
    coarse = max_kl(engine_logprobs(merged, prompts), engine_logprobs(mixed, prompts))
    assert 0 < coarse < max_kl(engine_logprobs(base, prompts), engine_logprobs(merged, prompts))


@pytest.mark.parametrize("dtype", [DType.Q6_K, DType.Q5_K, DType.Q4_K])
def test_k_types_can_be_kept_where_the_update_survives(
    dtype: DType, llama: BaseFixture, tmp_path: Path
) -> None:
    base = stored_as(llama.gguf, tmp_path / "base.gguf", dtype)
    trained(llama, tmp_path / "adapter", target_modules=["v_proj"])
    merged = tmp_path / "merged.gguf"
    report = merge_into([tmp_path / "adapter"], base, merged, gguf_type="keep")
    assert report.min_survival is not None
    assert report.min_survival > 0.9
    assert {tensor.dtype for tensor in report.tensors} == {dtype.value}
    assert read_gguf(merged).tensors["blk.0.attn_v.weight"].dtype is dtype
    weak: dict[str, Any] = {"weights": [0.001], "gguf_type": "keep", "allow_weak": True}
    with pytest.raises(UnsupportedError, match=rf"as {dtype} rounding errors along the update"):
        merge_into(
            [tmp_path / "adapter"], base, tmp_path / "weak.gguf", **{**weak, "allow_weak": False}
        )
    forced = merge_into([tmp_path / "adapter"], base, tmp_path / "weak.gguf", **weak)
    assert forced.min_survival is not None
    assert forced.min_survival < 0.9
    assert any("less than 95% of the update is left" in warning for warning in forced.warnings)


def test_a_quantised_base_is_not_quantised_again(llama: BaseFixture, tmp_path: Path) -> None:
    base = stored_as(llama.gguf, tmp_path / "base.gguf", DType.Q8_0)
    trained(llama, tmp_path / "adapter", target_modules=["v_proj"])
    merged: dict[str, Any] = {"destination": tmp_path / "merged.gguf", "gguf_type": "q4_k_m"}
    with pytest.raises(UnsupportedError, match=r"is Q8_0 already.* f16 or bf16 GGUF"):
        merge_into([tmp_path / "adapter"], base, **merged)
    report = merge_into([tmp_path / "adapter"], base, **merged, allow_requantise=True)
    assert any("quantised twice" in note for note in report.notes)
    assert {t.dtype for t in read_gguf(tmp_path / "merged.gguf").tensors.values()} == {
        DType.F32,
        DType.Q4_K,
        DType.Q6_K,
    }


def test_what_cannot_be_made_is_refused_with_the_way_out(
    llama: BaseFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter", target_modules=["v_proj"])
    target = tmp_path / "merged.gguf"
    with pytest.raises(
        UsageError, match=r"unknown gguf type 'iq2_xs'; did you mean iq4_xs\? known: keep, .*q4_k_m"
    ):
        merge_into([tmp_path / "adapter"], llama.gguf, target, gguf_type="iq2_xs")
    monkeypatch.setattr(ggml, "_quantiser", lambda: None)
    with pytest.raises(UnsupportedError, match=r"pip install xllamacpp"):
        merge_into([tmp_path / "adapter"], llama.gguf, target, gguf_type="q4_k_m")
    assert not target.exists()
