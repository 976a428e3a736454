"""Trained files beside an adapter: listed, carried byte for byte, or refused by name."""

from __future__ import annotations

import json
import pickle
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
from adapterkit.serving.members import AdapterIncompatibleError

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
    untrained = [name for name, entry in found.items() if not entry.trained]
    assert untrained == [UNKNOWN, "model.safetensors"]
    assert found[PROJECTOR].bytes == len(b"projector")


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
    for other in {PROJECTOR, HEAD} - {name}:
        (adapter / other).unlink()
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


def test_unknown_weights_are_carried_or_told(adapter: Path, base: Path, tmp_path: Path) -> None:
    for other in (PROJECTOR, HEAD):
        (adapter / other).unlink()
    (adapter / UNKNOWN).write_bytes(b"trained")
    convert(adapter, tmp_path / "peft", base=base)
    assert (tmp_path / "peft" / UNKNOWN).read_bytes() == b"trained"
    for done in (
        convert(adapter, tmp_path / "x.gguf", base=base),
        convert(adapter, tmp_path / "mlx", to="mlx", base=base),
        merge_into([adapter], base, tmp_path / "into"),
    ):
        assert any(UNKNOWN in note for note in done.notes), done.notes


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


def weights(path: Path, name: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones((4, 16), np.float32)}, path)
    return path


def kinds(folder: Path) -> dict[str, BesideKind]:
    return {file.name: file.kind for file in lying_beside(folder, (), None)}


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0, 2.0]}))


def test_what_a_directory_from_the_hub_has_beside_its_adapter_is_not_mentioned(
    tmp_path: Path,
) -> None:
    for name in (
        *("README.md", ".gitattributes", "training_loss.png", "all_results.json", "LICENSE"),
        *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"),
        *("trainer_state.json", "trainer_log.jsonl", "train.log", "config.yaml", "latest"),
        *("runs/a/events.out.tfevents.1", "checkpoint-10/pytorch_model.bin", ".git/x.bin"),
        *("checkpoint-10/adapter_model.safetensors", "checkpoint-10/optimizer.pt"),
        *(".cache/huggingface/download/x.bin", "epoch_1/optimizer.bin", "adapter_model.bin"),
        *("global_step5/mp_rank_00_model_states.pt", "model.safetensors.index.json"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"state")
    assert kinds(tmp_path) == {}


def test_weights_are_found_at_any_depth_and_by_their_bytes(tmp_path: Path) -> None:
    known = {
        "heads/reward/score.safetensors": BesideKind.WEIGHTS,
        "VALUE_HEAD.SAFETENSORS": BesideKind.HEAD,
        "a/b/c/classifier.safetensors": BesideKind.WEIGHTS,
    }
    unknown = {
        *("projector/weights.pt", ".extra/ema.safetensors", "soft_prompt.npy", "head.h5"),
        *(
            "flax.msgpack",
            "head.onnx",
            "learned_embeds.bin",
            "head.npz",
            "reward/model.safetensors",
        ),
        *("model_head.pkl", "head.pth.tar", "classifier", "table", "notes.txt", "vector"),
    }
    for name in (*known, *unknown):
        weights(tmp_path / name)
    pickled(tmp_path / "table")
    with (tmp_path / "classifier").open("wb") as file:
        np.savez(file, w=np.ones(3))
    np.save(tmp_path / "soft_prompt.npy", np.ones(3))
    (tmp_path / "score.json").write_text("{}")
    (tmp_path / "requirements.txt").write_text("torch")
    expected = known | dict.fromkeys(unknown, BesideKind.UNKNOWN)
    assert kinds(tmp_path) == expected | {"score.json": BesideKind.OTHER}


def test_other_adapters_and_whole_models_are_no_part_of_it(tmp_path: Path) -> None:
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for name in ("second.safetensors", "deep/third.safetensors"):
        weights(tmp_path / name, factor)
    with (tmp_path / "fourth.bin").open("wb") as file:
        pickle.dump({factor: [1.0]}, file)
    weights(tmp_path / "model.safetensors")
    weights(tmp_path / "merged" / "model.safetensors")
    (tmp_path / "merged" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    weights(tmp_path / "tower" / "model.safetensors")
    (tmp_path / "tower" / "config.json").write_text('{"architectures": ["SiglipVisionModel"]}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    weights(tmp_path / "other" / "adapter_model.safetensors")
    weights(tmp_path / "more" / "deeper" / "adapter_model.safetensors")
    weights(tmp_path / "more" / "deeper" / "value_head.safetensors")
    assert kinds(tmp_path) == {
        **dict.fromkeys(
            ("second.safetensors", "deep/third.safetensors", "fourth.bin", "other", "more/deeper"),
            BesideKind.ADAPTER,
        ),
        **dict.fromkeys(("model.safetensors", "merged"), BesideKind.COPY),
        "tower/config.json": BesideKind.OTHER,
        "tower/model.safetensors": BesideKind.UNKNOWN,
    }


def test_what_is_not_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepest = tmp_path.joinpath(*"abcdefghij")
    weights(deepest / "score.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = kinds(tmp_path)
    assert found == dict.fromkeys(
        ("a/b/c/d/e/f/g/h/i", "gone.safetensors", "loop"), BesideKind.UNSEEN
    )
    monkeypatch.setattr("adapterkit.beside._MOST_ENTRIES", 2)
    assert kinds(tmp_path)["loop"] is BesideKind.UNSEEN
    assert len(kinds(tmp_path)) == 2


def test_sentence_transformers_modules_are_carried_with_their_settings(
    base: Path, tmp_path: Path
) -> None:
    folder = trained(base, tmp_path / "adapter", **TARGETS)
    weights(folder / "2_Dense" / "model.safetensors")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"from": name}))
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    convert(folder, tmp_path / "peft", base=base)
    carried = [name for name in files if not name.name.startswith(("adapter_", "README"))]
    assert len(carried) == 4
    for name in carried:
        assert (tmp_path / "peft" / name).read_bytes() == files[name]
    with pytest.raises(LossyConversionError, match="2_Dense/model"):
        convert(folder, tmp_path / "x.gguf", base=base)
    done = convert(folder, tmp_path / "x.gguf", base=base, allow_lossy=True)
    assert any("1_Pooling/config.json" in note for note in done.notes)


def test_weights_without_a_config_have_files_beside_them_too(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    (adapter / PROJECTOR).unlink()
    (adapter / "adapter_config.json").unlink()
    for source in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(LossyConversionError, match=HEAD):
            convert(source, tmp_path / "x.gguf", base=base, alpha=8)
    convert(adapter, tmp_path / "peft", alpha=8)
    assert (tmp_path / "peft" / HEAD).read_bytes() == (adapter / HEAD).read_bytes()
    shutil.copy(adapter / "adapter_model.safetensors", adapter / "mine.safetensors")
    # A file among others is not the adapter of their folder.
    convert(adapter / "mine.safetensors", tmp_path / "x.gguf", base=base, alpha=8)


def test_what_lies_above_the_adapter_that_was_found_counts(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    shutil.move(adapter, tmp_path / "outer" / "named")
    (tmp_path / "outer" / "named" / PROJECTOR).unlink()
    (tmp_path / "outer" / "named" / HEAD).rename(tmp_path / "outer" / HEAD)
    with pytest.raises(LossyConversionError, match=HEAD):
        convert(tmp_path / "outer", tmp_path / "x.gguf", base=base)
    weights(tmp_path / "outer" / "elsewhere" / "ema.safetensors")
    assert [entry.name for entry in inspect(tmp_path / "outer").beside] == [HEAD]


def test_merged_adapters_keep_the_tokenizer_that_they_share(base: Path, tmp_path: Path) -> None:
    folders = [trained(base, tmp_path / name, **TARGETS) for name in ("a", "b")]
    for folder in folders:
        tokenizer(folder, name="same")
        (folder / "chat_template.jinja").write_text("hi")
    merge_files(folders, tmp_path / "m", base=base)
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "hi"
    assert (tmp_path / "m" / "tokenizer.json").exists()
    told = merge_files(folders, tmp_path / "m.gguf", base=base).notes
    assert any("chat_template.jinja" in note for note in told)
    tokenizer(folders[1], name="another")
    told = merge_files(folders, tmp_path / "n", base=base).notes
    assert any("tokenizer_config.json" in note and "differ" in note for note in told)
    assert not (tmp_path / "n" / "tokenizer_config.json").exists()


def test_an_unrelated_adapter_beside_is_a_note_and_stays(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "adapter", **TARGETS)
    shutil.copy(folder / "adapter_model.safetensors", folder / "mine.safetensors")
    done = convert(folder, tmp_path / "x.gguf", base=base)
    assert [note for note in done.notes if "mine.safetensors" in note]
    convert(folder, tmp_path / "peft", base=base)
    assert not (tmp_path / "peft" / "mine.safetensors").exists()
    merge_files([folder, folder], tmp_path / "merged", base=base)


def test_peft_loads_the_carried_directory(adapter: Path, base: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "peft", base=base)
    assert np.allclose(logits(base, tmp_path / "peft"), logits(base, adapter), atol=1e-6)
