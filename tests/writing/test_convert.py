"""What convert promises beside the numbers: nothing half written, every reason, one proof."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapterkit.comparison import diff
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.conversion import convert
from adapterkit.errors import (
    BaseRequiredError,
    DestinationExistsError,
    FormatError,
    IncompatibleBaseError,
    LossyConversionError,
    ProofError,
    UnknownArchitectureError,
    WriteError,
)
from adapterkit.files import read
from adapterkit.tensor import LazyTensor

ROOT = Path(__file__).parents[2]
PIRATE = ROOT / "fixtures" / "pirate" / "adapter"
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return config_in(tmp_path, SMOLLM2)


def config_in(folder: Path, config: dict[str, object]) -> Path:
    path = folder / "base.json"
    path.write_text(json.dumps(config))
    return path


def edited(folder: Path, **config: object) -> Path:
    """Copy the pirate with other settings."""
    shutil.copytree(PIRATE, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def with_tensors(folder: Path, **changes: LazyTensor) -> Path:
    """Copy the pirate with more tensors, named after the prefix that all have."""
    shutil.copytree(PIRATE, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = dict(read_safetensors(PIRATE / weights.name).tensors)
    tensors |= {f"base_model.model.{name.replace('__', '.')}": t for name, t in changes.items()}
    write_safetensors(weights, tensors, {})
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_there_and_back_is_bit_exact(base: Path, tmp_path: Path) -> None:
    convert(PIRATE, tmp_path / "a.gguf", base=base)
    convert(tmp_path / "a.gguf", tmp_path / "b", base=base)
    first, second = (
        read_safetensors(p / "adapter_model.safetensors") for p in (PIRATE, tmp_path / "b")
    )
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert bytes(tensor.tobytes()) == bytes(second.tensors[name].tobytes())


def test_the_base_is_recorded(base: Path, tmp_path: Path) -> None:
    convert(PIRATE, tmp_path / "a.gguf", base=base)
    assert read(tmp_path / "a.gguf").base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_invocation_tokens_survive(base: Path, tmp_path: Path) -> None:
    source = edited(tmp_path / "a", alora_invocation_tokens=[1, 2, 3])
    convert(source, tmp_path / "b.gguf", base=base)
    convert(tmp_path / "b.gguf", tmp_path / "c", base=base)
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [1, 2, 3]


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    rows = LazyTensor.of(np.zeros((4, 576), np.float32))
    norms = LazyTensor.of(np.ones(576, np.float32))
    source = with_tensors(
        tmp_path / "a",
        lm_head__weight=rows,
        model__layers__0__self_attn__q_proj__lora_magnitude_vector=norms,
        model__layers__0__self_attn__q_proj__base_layer__bias=rows,
        model__layers__1__self_attn__q_proj__lora_B__bias=norms,
        model__embed_tokens__token_adapter__trainable_tokens_delta=rows,
        model__embed_tokens__lora_embedding_A=rows,
        model__embed_tokens__lora_embedding_B=LazyTensor.of(np.zeros((576, 4), np.float32)),
    )
    config = source / "adapter_config.json"
    changed = json.loads(config.read_text()) | {
        "init_lora_weights": "pissa",
        "layer_replication": [[0, 2]],
        "rank_pattern": {"embed_tokens": 4},
    }
    config.write_text(json.dumps(changed))
    wide = config_in(tmp_path, SMOLLM2 | {"vocab_size": 576})
    with pytest.raises(LossyConversionError) as caught:
        convert(source, tmp_path / "b.gguf", base=wide)
    assert {loss.code for loss in caught.value.losses} == {
        "base-changing-init",
        "dora",
        "layer-replication",
        "lora-bias",
        "resized-vocabulary",
        "saved-bias",
        "tied-embedding",
        "token-rows",
        "undeclared",
    }
    assert caught.value.exit_code == 4
    assert not (tmp_path / "b.gguf").exists()


def test_lossy_drops_exactly_what_it_lists(base: Path, tmp_path: Path) -> None:
    rows = LazyTensor.of(np.zeros((4, 576), np.float32))
    source = with_tensors(tmp_path / "a", lm_head__weight=rows)
    report = convert(source, tmp_path / "b.gguf", base=base, allow_lossy=True)
    assert [loss.subject for loss in report.losses] == ["lm_head.weight"]
    assert diff(PIRATE, tmp_path / "b.gguf", base=base).equal


def test_an_existing_destination_is_kept(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(DestinationExistsError, match="--force"):
        convert(PIRATE, tmp_path / "a.gguf", base=base)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    convert(PIRATE, tmp_path / "a.gguf", base=base, force=True)
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": 512}, IncompatibleBaseError, "60 of 60 modules"),
        ({"num_hidden_layers": 29}, IncompatibleBaseError, "the base has 29 layers"),
        ({"num_key_value_heads": 9}, IncompatibleBaseError, "30 of 60 modules"),
        ({"architectures": ["NobodyForCausalLM"]}, UnknownArchitectureError, "NobodyForCausalLM"),
        ({"num_attention_heads": None}, BaseRequiredError, "'heads'"),
    ],
)
def test_the_wrong_base_is_named(
    change: dict[str, object], error: type[Exception], words: str, tmp_path: Path
) -> None:
    base = config_in(tmp_path, SMOLLM2 | change)
    with pytest.raises(error, match=words):
        convert(PIRATE, tmp_path / "a.gguf", base=base)
    assert not (tmp_path / "a.gguf").exists()


def test_without_a_base_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(BaseRequiredError, match=r"--base.*is not in the local hub cache"):
        convert(PIRATE, tmp_path / "a.gguf")


def test_a_cached_base_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert convert(PIRATE, tmp_path / "a.gguf").max_relative_error == 0


def test_overflow_of_the_stored_type_is_named(base: Path, tmp_path: Path) -> None:
    big = LazyTensor.of(np.full((576, 8), 1e5, np.float32))
    source = with_tensors(tmp_path / "a", model__layers__0__self_attn__q_proj__lora_B__weight=big)
    with pytest.raises(ProofError, match=r"layers\.0\.self_attn\.q_proj: overflows.*--outtype f32"):
        convert(source, tmp_path / "b.gguf", base=base, outtype="f16")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "b.gguf").exists()


def test_nan_in_the_source_is_its_own_fault(base: Path, tmp_path: Path) -> None:
    bad = LazyTensor.of(np.full((576, 8), np.nan, np.float32))
    source = with_tensors(tmp_path / "a", model__layers__0__self_attn__q_proj__lora_B__weight=bad)
    with pytest.raises(FormatError, match="holds NaN"):
        convert(source, tmp_path / "b.gguf", base=base)
    assert leftovers(tmp_path) == []


def test_a_file_that_shrinks_is_no_crash(tmp_path: Path) -> None:
    source = edited(tmp_path / "a")
    adapter = read(source)
    os.truncate(source / "adapter_model.safetensors", 5000)
    with pytest.raises(FormatError, match="ends before byte"):
        next(adapter.pairs()).b.numpy()


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a disk that fills up half-way."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = subprocess.run(
        [sys.executable, "-m", "adapterkit", "convert", PIRATE, "-o", "a.gguf", "--base", base],
        cwd=tmp_path,
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == WriteError.exit_code
    assert (
        result.stderr
        == "Error: a.gguf: could not be written (File too large); nothing was left behind\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json"]


def test_missing_parents_are_made_and_a_file_in_their_place_is_one_line(
    base: Path, tmp_path: Path
) -> None:
    convert(PIRATE, tmp_path / "new" / "er" / "a.gguf", base=base)
    assert (tmp_path / "new" / "er" / "a.gguf").is_file()
    with pytest.raises(WriteError, match=r"a\.gguf is a file, no folder"):
        convert(PIRATE, tmp_path / "new" / "er" / "a.gguf" / "b.gguf", base=base)
