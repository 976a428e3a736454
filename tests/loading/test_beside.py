"""Trained files beside an adapter: listed, carried byte for byte, or refused by name."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from declared_settings import TARGETS, logits, trained
from declared_settings import base as base  # noqa: PLC0414  (a fixture)
from safetensors.numpy import save_file

from adapterkit import (
    AdapterStack,
    BesideKind,
    audit,
    compress_file,
    convert,
    diff,
    inspect,
    merge_files,
    merge_into,
    validate,
)
from adapterkit.beside import lying_beside
from adapterkit.errors import LossyConversionError, UnsupportedError
from adapterkit.serving.stack import AdapterIncompatibleError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PROJECTOR, HEAD, UNKNOWN = "non_lora_trainables.bin", "value_head.safetensors", "extra.pt"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return an adapter with a projector, a value head, and what a training run leaves behind."""
    folder = trained(base, tmp_path / "adapter", **TARGETS)
    (folder / PROJECTOR).write_bytes(b"projector")
    save_file({"v_head.summary.weight": np.ones((1, 16), np.float32)}, folder / HEAD)
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin"):
        (folder / name).write_bytes(b"state")
    return folder


def test_they_are_listed_and_the_state_of_training_is_not(adapter: Path) -> None:
    (adapter / UNKNOWN).write_bytes(b"?")
    (adapter / "model.safetensors").write_bytes(b"whole")
    (adapter / "2_Dense").mkdir()
    (adapter / "2_Dense" / "model.safetensors").write_bytes(b"dense")
    found = {entry.name: entry for entry in inspect(adapter).beside}
    assert found.keys() == {
        *(PROJECTOR, HEAD, UNKNOWN),
        *("model.safetensors", "2_Dense/model.safetensors"),
    }
    assert {name for name, entry in found.items() if not entry.trained} == {
        UNKNOWN,
        "model.safetensors",
    }
    assert found[PROJECTOR].bytes == len(b"projector")


def test_what_nobody_knows_is_mentioned_and_carried(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    for name in (PROJECTOR, HEAD):
        (adapter / name).unlink()
    (adapter / UNKNOWN).write_bytes(b"?")
    outputs = (
        convert(adapter, tmp_path / "x.gguf", base=base).notes,
        convert(adapter, tmp_path / "peft", base=base).notes,
        merge_into([adapter], base, tmp_path / "into").notes,
        merge_files([adapter, adapter], tmp_path / "merged").notes,
    )
    assert all(any(UNKNOWN in note for note in notes) for notes in outputs)
    assert (tmp_path / "peft" / UNKNOWN).read_bytes() == b"?"


@pytest.mark.parametrize("name", [PROJECTOR, HEAD])
def test_a_peft_directory_carries_them(
    name: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    for other in {PROJECTOR, HEAD, UNKNOWN} - {name}:
        (adapter / other).unlink(missing_ok=True)
    (adapter / name).write_bytes(b"trained")
    done = convert(adapter, tmp_path / "peft", base=base)
    assert any(name in note for note in done.notes)
    assert (tmp_path / "peft" / name).read_bytes() == b"trained"
    assert diff(adapter, tmp_path / "peft").equal
    small = compress_file(adapter, tmp_path / "small", rank=2)
    assert any(name in note for note in small.notes)
    assert (tmp_path / "small" / name).read_bytes() == b"trained"
    (tmp_path / "peft" / name).write_bytes(b"another")
    assert not diff(adapter, tmp_path / "peft").equal
    (tmp_path / "peft" / name).unlink()
    assert diff(adapter, tmp_path / "peft").only_in_a == (name,)


@pytest.mark.parametrize("name", [PROJECTOR, HEAD])
def test_nothing_else_holds_them(name: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    (adapter / name).write_bytes(b"trained")
    into, merged = tmp_path / "into", tmp_path / "merged"
    for act in (
        lambda: convert(adapter, tmp_path / "x.gguf", base=base),
        lambda: convert(adapter, tmp_path / "mlx", to="mlx", base=base),
        lambda: compress_file(adapter, tmp_path / "x.gguf", rank=2, base=base),
        lambda: merge_into([adapter], base, into),
        lambda: merge_files([adapter, adapter], merged),
    ):
        with pytest.raises(UnsupportedError, match=name):
            act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    done = convert(adapter, tmp_path / "x.gguf", base=base, allow_lossy=True)
    assert name in {loss.subject for loss in done.losses}
    double = merge_files([adapter, adapter], merged, allow_lossy=True)
    assert name in {loss.subject for loss in double.losses}
    assert not (merged / name).exists()
    report = merge_into([adapter], base, into, allow_lossy=True)
    assert name in {loss.subject for loss in report.losses}


def test_a_replaced_directory_keeps_none_of_the_former(adapter: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain, ignore=shutil.ignore_patterns(PROJECTOR, HEAD))
    convert(adapter, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(plain, tmp_path / "out", force=True)
    assert not inspect(tmp_path / "out").beside
    assert (tmp_path / "out" / "notes.txt").exists()


def test_engines_load_the_adapter_alone(adapter: Path, base: Path) -> None:
    codes = [
        each.severity for each in validate(adapter, base=base).findings if each.code == "AK117"
    ]
    assert codes == ["warning", "warning"]
    assert validate(adapter, base=base, targets=["vllm"]).exit_code == 1
    with pytest.raises(AdapterIncompatibleError, match=PROJECTOR):
        AdapterStack().load(adapter)
    assert any(PROJECTOR in note for note in audit(adapter).adapters[0].notes)
    (adapter / PROJECTOR).unlink()
    assert validate(adapter, base=base, targets=["vllm"]).exit_code == 0
    AdapterStack().load(adapter)


def tokenizer(folder: Path, **settings: str) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_of_its_own_goes_into_the_model(
    base: Path,
    tmp_path: Path,
) -> None:
    model = tmp_path / "base"
    shutil.copytree(base, model)
    tokenizer(model, tokenizer_class="Base")
    (model / "chat_template.jinja").write_text("base")
    folder = trained(base, tmp_path / "adapter", **TARGETS)
    tokenizer(folder, tokenizer_class="Base")
    assert not {e.name for e in inspect(folder, base=model).beside}
    assert len(inspect(folder).beside) == 2  # without the base nobody knows
    tokenizer(folder, tokenizer_class="Trained", chat_template="trained")
    assert [e.name for e in inspect(folder, base=model).beside] == ["tokenizer_config.json"]
    report = merge_into([folder], model, tmp_path / "m")
    assert any("tokenizer_config.json" in note for note in report.notes)
    assert "Trained" in (tmp_path / "m" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "m" / "chat_template.jinja").exists()
    assert (tmp_path / "m" / "tokenizer.json").exists()
    done = convert(folder, tmp_path / "x.gguf", base=model)
    assert any("tokenizer_config.json" in note for note in done.notes)


def test_adapters_with_different_tokenizers_leave_the_base_its_own(
    base: Path,
    tmp_path: Path,
) -> None:
    folders = [trained(base, tmp_path / name, **TARGETS) for name in ("a", "b")]
    for folder in folders:
        tokenizer(folder, name=folder.name)
    report = merge_into(folders, base, tmp_path / "m")
    assert any("differ" in note for note in report.notes)
    assert not (tmp_path / "m" / "tokenizer_config.json").exists()


def test_an_mlx_directory_is_looked_at_too(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "a", **TARGETS)
    convert(folder, tmp_path / "mlx", to="mlx", base=base)
    shutil.copy(
        tmp_path / "mlx" / "adapters.safetensors", tmp_path / "mlx" / "0000100_adapters.safetensors"
    )
    (tmp_path / "mlx" / HEAD).write_bytes(b"head")
    assert [entry.name for entry in inspect(tmp_path / "mlx", base=base).beside] == [HEAD]
    with pytest.raises(LossyConversionError, match=HEAD):
        convert(tmp_path / "mlx", tmp_path / "x.gguf", base=base)


def test_other_folders_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"base")
    (tmp_path / ".cache.bin").write_bytes(b"hidden")
    assert lying_beside(tmp_path, (), None) == ()
    (tmp_path / "v_head.pt").write_bytes(b"head")
    (found,) = lying_beside(tmp_path, (), None)
    assert found.kind is BesideKind.HEAD


def test_peft_loads_the_carried_directory(adapter: Path, base: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "peft", base=base)
    assert np.allclose(logits(base, tmp_path / "peft"), logits(base, adapter), atol=1e-6)
