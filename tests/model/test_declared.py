"""Settings that promise tensors, against PEFT: what it leaves out, misses or refuses is said."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from declared_settings import PROMPT, TARGETS, logits, trained
from declared_settings import base as base  # noqa: PLC0414  (a fixture)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapterkit import (
    AdapterStack,
    audit,
    compress_file,
    convert,
    diff,
    inspect,
    merge_files,
    merge_into,
    validate,
)
from adapterkit.errors import AdapterKitError, FormatError, LossyConversionError
from adapterkit.files import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

DORA = {**TARGETS, "use_dora": True}


def changed(source: Path, folder: Path, without: str | None = None, **settings: Any) -> Path:
    """Copy an adapter, with other settings and without tensors whose names hold something."""
    shutil.copytree(source, folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if without:
        weights = folder / "adapter_model.safetensors"
        kept = {name: t for name, t in load_file(weights).items() if without not in name}
        save_file(kept, weights, {"format": "pt"})
    return folder


def merged_logits(folder: Path) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder).eval()(PROMPT).logits.numpy()


def everything(adapter: Path, base: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Return every command that takes an adapter's update for what it is."""
    return {
        "into": lambda: merge_into([adapter], base, out / "into"),
        "peft": lambda: convert(adapter, out / "peft", base=base),
        "gguf": lambda: convert(adapter, out / "x.gguf", base=base),
        "merge": lambda: merge_files([adapter, adapter], out / "merged"),
        "compress": lambda: compress_file(adapter, out / "small", rank=2),
        "audit": lambda: audit(adapter),
        "diff": lambda: diff(adapter, adapter),
        "stack": lambda: AdapterStack().load(adapter),
    }


COMMANDS = ["into", "peft", "gguf", "merge", "compress", "audit", "diff", "stack"]


@pytest.mark.parametrize("without", ["lora_magnitude", "layers.1.self_attn.v_proj.lora_magnitude"])
@pytest.mark.parametrize("command", COMMANDS)
def test_missing_magnitudes_stop_every_command(
    command: str, without: str, base: Path, tmp_path: Path
) -> None:
    whole = trained(base, tmp_path / "whole", **DORA)
    broken = changed(whole, tmp_path / "broken", without)
    assert not np.allclose(logits(base, broken), logits(base, whole), atol=1e-4)
    with pytest.raises(AdapterKitError, match="use_dora promises DoRA magnitudes") as caught:
        everything(broken, base, tmp_path / "out")[command]()
    assert caught.value.exit_code in {3, 4}
    assert "v_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_denied_magnitudes_stop_every_command(command: str, base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **DORA)
    denied = changed(whole, tmp_path / "denied", use_dora=False)
    plain = changed(denied, tmp_path / "plain", "lora_magnitude")
    assert np.array_equal(logits(base, denied), logits(base, plain))  # PEFT leaves them out
    with pytest.raises(AdapterKitError, match="the config says use_dora false") as caught:
        everything(denied, base, tmp_path / "out")[command]()
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_allowed_loss_is_what_peft_makes_of_it(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **DORA)
    denied = changed(whole, tmp_path / "denied", use_dora=False)
    expected = logits(base, denied)
    report = merge_into([denied], base, tmp_path / "into", allow_lossy=True)
    assert any("DoRA magnitudes left out" in note for note in report.notes)
    assert np.allclose(merged_logits(tmp_path / "into"), expected, atol=1e-5)
    done = convert(denied, tmp_path / "peft", base=base, allow_lossy=True)
    assert [loss.code for loss in done.losses] == ["undeclared"]
    assert np.allclose(logits(base, tmp_path / "peft"), expected, atol=1e-6)
    convert(denied, tmp_path / "x.gguf", base=base, allow_lossy=True)
    assert diff(tmp_path / "x.gguf", tmp_path / "peft", base=base).equal
    double = merge_files([denied, denied], tmp_path / "sum", allow_lossy=True)
    assert [loss.code for loss in double.losses] == ["undeclared"] * 2


OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "lora_bias": ({**TARGETS, "lora_bias": True}, "lora_B.bias", "AK115"),
    "bias": ({**TARGETS, "bias": "all"}, ".bias", "AK115"),
    "modules_to_save": ({**TARGETS, "modules_to_save": ["lm_head"]}, "lm_head", "AK112"),
    "trainable_token_indices": (
        {**TARGETS, "trainable_token_indices": [3, 5]},
        "token_adapter",
        "AK115",
    ),
}


@pytest.mark.parametrize("setting", OTHERS)
def test_what_is_promised_and_missing_is_a_defect(setting: str, base: Path, tmp_path: Path) -> None:
    settings, part, code = OTHERS[setting]
    whole = trained(base, tmp_path / "whole", **settings)
    broken = changed(whole, tmp_path / "broken", part)
    assert not inspect(whole, base=base).problems
    assert any(setting in problem for problem in inspect(broken, base=base).problems)
    assert code in {each.code for each in validate(broken, base=base, targets=["peft"]).findings}
    with pytest.raises(FormatError, match=setting):
        merge_into([broken], base, tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("input_layernorm", "layers.0.input_layernorm.weight"),
        ("mlp", "layers.1.mlp.gate_proj.weight"),
        ("self_attn.o_proj", "layers.0.self_attn.o_proj.bias"),
    ],
)
def test_saved_modules_are_promised_in_every_layer(
    name: str, part: str, base: Path, tmp_path: Path
) -> None:
    whole = trained(base, tmp_path / "whole", **TARGETS, modules_to_save=[name])
    assert not inspect(whole, base=base).problems
    broken = changed(whole, tmp_path / "broken", part)
    with pytest.raises(KeyError, match=part):
        logits(base, broken)
    found = validate(broken, base=base, targets=["peft"]).findings
    assert [each.modules for each in found if each.code == "AK112"] == [(f"model.{part}",)]
    for command in ("into", "peft", "merge", "compress"):
        with pytest.raises(FormatError, match=part):
            everything(broken, base, tmp_path / "out")[command]()
    named = [f"model.layers.1.{name}" if "layers.0" in part else f"model.layers.0.{name}"]
    less = changed(broken, tmp_path / "less", modules_to_save=named)
    assert np.isfinite(logits(base, less)).all()
    assert not inspect(less, base=base).problems


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_every_bias_that_was_trained_is_promised(bias: str, base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **TARGETS, bias=bias)
    part = "layers.1.self_attn.q_proj.base_layer.bias"
    broken = changed(whole, tmp_path / "broken", part)
    # PEFT says nothing, and answers with the base's own.
    assert not np.allclose(logits(base, broken), logits(base, whole), atol=1e-5)
    assert not inspect(whole, base=base).problems
    module = "model.layers.1.self_attn.q_proj.bias"
    for known in (base, None):
        assert any(module in each for each in inspect(broken, base=known).problems)
    for command in ("into", "peft", "merge"):
        with pytest.raises(FormatError, match="bias"):
            everything(broken, base, tmp_path / "out")[command]()
    assert "AK115" in {each.code for each in validate(broken, base=base, targets=["peft"]).findings}


@pytest.mark.parametrize(
    ("setting", "off"), [("lora_bias", False), ("trainable_token_indices", None)]
)
def test_what_is_stored_and_denied_is_named(
    setting: str, off: object, base: Path, tmp_path: Path
) -> None:
    settings, part, _ = OTHERS[setting]
    whole = trained(base, tmp_path / "whole", **settings)
    denied = changed(whole, tmp_path / "denied", **{setting: off})
    plain = changed(denied, tmp_path / "plain", part)
    assert np.array_equal(logits(base, denied), logits(base, plain))
    report = validate(denied, base=base, targets=["peft"])
    assert "AK116" in {each.code for each in report.findings}
    assert report.exit_code == 1
    with pytest.raises(LossyConversionError, match=setting):
        merge_into([denied], base, tmp_path / "m")
    merge_into([denied], base, tmp_path / "m", allow_lossy=True)
    assert np.allclose(merged_logits(tmp_path / "m"), logits(base, plain), atol=1e-5)


@pytest.mark.parametrize("setting", ["bias", "modules_to_save"])
def test_peft_loads_what_is_stored_whole_whatever_is_declared(
    setting: str, base: Path, tmp_path: Path
) -> None:
    whole = trained(base, tmp_path / "whole", **OTHERS[setting][0])
    off = {"bias": "none", "modules_to_save": None}[setting]
    denied = changed(whole, tmp_path / "denied", **{setting: off})
    merge_into([denied], base, tmp_path / "m")
    assert np.allclose(logits(base, denied), logits(base, whole), atol=1e-6)
    assert np.allclose(merged_logits(tmp_path / "m"), logits(base, denied), atol=1e-5)


def test_no_bias_can_be_missing_where_the_base_has_none(base: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(base, attention_bias=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "a", **TARGETS, bias="all")
    assert not inspect(adapter, base=tmp_path / "base").problems


def test_rows_and_their_tokens_are_counted(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **OTHERS["trainable_token_indices"][0])
    more = changed(whole, tmp_path / "more", trainable_token_indices=[3, 5, 7])
    with pytest.raises(RuntimeError, match="size mismatch"):
        logits(base, more)
    assert any("names 3 tokens" in problem for problem in inspect(more).problems)


def test_qalora_is_read_where_peft_reads_it(base: Path, tmp_path: Path) -> None:
    plain = trained(base, tmp_path / "plain", **TARGETS)
    flagged = changed(plain, tmp_path / "flagged", use_qalora=True)
    assert np.array_equal(logits(base, flagged), logits(base, plain))
    report = merge_into([flagged], base, tmp_path / "m")
    assert any("use_qalora is left aside" in note for note in report.notes)
    assert np.allclose(merged_logits(tmp_path / "m"), logits(base, plain), atol=1e-5)
    assert any("GPTQ" in note for note in inspect(flagged).notes)


def test_qalora_is_carried_as_it_is_where_no_base_decides(base: Path, tmp_path: Path) -> None:
    plain = trained(base, tmp_path / "plain", **TARGETS)
    fields = {"use_qalora": True, "qalora_group_size": 4, "base_model_name_or_path": "nobody/base"}
    flagged = changed(plain, tmp_path / "flagged", **fields)
    report = convert(flagged, tmp_path / "again")
    assert any("GPTQ" in note for note in report.notes)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, 4)
    assert np.array_equal(logits(base, tmp_path / "again"), logits(base, plain))
    merge_into([tmp_path / "again"], base, tmp_path / "m")
    assert np.allclose(merged_logits(tmp_path / "m"), logits(base, plain), atol=1e-5)


@pytest.mark.parametrize("command", ["merge", "compress", "audit", "stack", "mlx", "kohya"])
def test_qalora_asks_for_the_base_where_that_decides(
    command: str, base: Path, tmp_path: Path
) -> None:
    plain = trained(base, tmp_path / "plain", **TARGETS)
    fields = {"use_qalora": True, "qalora_group_size": 4, "base_model_name_or_path": "nobody/base"}
    flagged = changed(plain, tmp_path / "flagged", **fields)
    commands: dict[str, Callable[[], object]] = {
        **everything(flagged, base, tmp_path),
        "mlx": lambda: convert(flagged, tmp_path / "mlx", to="mlx"),
        "kohya": lambda: convert(flagged, tmp_path / "x.safetensors", to="kohya"),
    }
    with pytest.raises(AdapterKitError, match="qalora"):
        commands[command]()


@pytest.mark.parametrize("command", ["merge", "compress"])
def test_qalora_is_decided_by_the_base_that_is_given(
    command: str, base: Path, tmp_path: Path
) -> None:
    plain = trained(base, tmp_path / "plain", **TARGETS)
    flagged = changed(plain, tmp_path / "flagged", use_qalora=True, qalora_group_size=4)
    if command == "merge":
        halves = [0.5, 0.5]
        merge_files([flagged, flagged], tmp_path / "out", weights=halves, base=base)
    else:
        compress_file(flagged, tmp_path / "out", tol=1e-6, base=base)
    assert np.allclose(logits(base, tmp_path / "out"), logits(base, plain), atol=1e-5)


@pytest.mark.parametrize(("kind", "code"), [("dora", "AK115"), ("lora", "AK116")])
def test_mlx_goes_by_its_type_too(kind: str, code: str, base: Path, tmp_path: Path) -> None:
    settings = DORA if kind == "lora" else TARGETS
    convert(trained(base, tmp_path / "a", **settings), tmp_path / "mlx", to="mlx", base=base)
    config = tmp_path / "mlx" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fine_tune_type": kind}))
    assert code in {each.code for each in validate(tmp_path / "mlx", base=base).findings}
    with pytest.raises(AdapterKitError, match="fine_tune_type"):
        merge_into([tmp_path / "mlx"], base, tmp_path / "m")


def test_a_sound_dora_says_nothing(base: Path, tmp_path: Path) -> None:
    adapter = read(trained(base, tmp_path / "a", **DORA), base=base)
    assert not adapter.unstored
    assert not adapter.undeclared
    assert not adapter.beside
