"""Settings that choose modules, against PEFT and mlx-lm: what they do not load is not applied."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from declared_settings import PROMPT, TARGETS, logits, trained
from declared_settings import base as base  # noqa: PLC0414  (a fixture)
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from transformers import LlamaForCausalLM

from adapterkit import (
    AdapterStack,
    audit,
    compress_file,
    convert,
    inspect,
    merge_files,
    merge_into,
    validate,
    verify,
)
from adapterkit.errors import AdapterKitError, LossyConversionError
from adapterkit.files import read
from adapterkit.model.declared import SELECTORS
from adapterkit.projection import project_file
from adapterkit.tinylora import TinySettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

DENYING: dict[str, dict[str, Any]] = {
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "layers_to_transform": {"layers_to_transform": 1},
    "target_modules": {"target_modules": r".*layers\.0\..*(q_proj|v_proj)"},
}
CHOOSING = [
    ["q_proj", "self_attn.v_proj"],
    (
        r"(?:.*?(?:vision|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    ),
    r"^(?!.*(lm_head|visual)).*\.(q_proj|v_proj)$",
]


def changed(source: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(source, folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def merged_logits(folder: Path) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder).eval()(PROMPT).logits.numpy()


def everything(adapter: Path, base: Path, out: Path) -> dict[str, Callable[[], object]]:
    tiny = TinySettings(projection_dim=4)
    return {
        "into": lambda: merge_into([adapter], base, out / "into"),
        "gguf": lambda: convert(adapter, out / "x.gguf", base=base),
        "mlx": lambda: convert(adapter, out / "mlx", to="mlx", base=base),
        "merge": lambda: merge_files([adapter, adapter], out / "merged"),
        "compress": lambda: compress_file(adapter, out / "small", rank=2),
        "project": lambda: project_file(adapter, out / "t", base=base, settings=tiny),
        "audit": lambda: audit(adapter),
        "stack": lambda: AdapterStack().load(adapter),
    }


@pytest.mark.parametrize("setting", DENYING)
def test_modules_that_are_not_selected_stop_every_command(
    setting: str, base: Path, tmp_path: Path
) -> None:
    denied = changed(trained(base, tmp_path / "w", **TARGETS), tmp_path / "d", **DENYING[setting])
    for command in everything(denied, base, tmp_path / "out").values():
        with pytest.raises(AdapterKitError, match=f"{setting} in the config does not") as caught:
            command()
        assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    assert any(setting in problem for problem in inspect(denied).problems)
    found = validate(denied, base=base, targets=["peft"]).findings
    assert {each.hint for each in found if each.code == "AK108"} == {SELECTORS[setting].remedy}


@pytest.mark.parametrize("setting", DENYING)
@pytest.mark.parametrize("given", [False, True])
def test_a_copy_for_peft_leaves_out_what_the_adapter_leaves_out(
    setting: str, base: Path, tmp_path: Path, *, given: bool
) -> None:
    denied = changed(trained(base, tmp_path / "w", **TARGETS), tmp_path / "d", **DENYING[setting])
    report = convert(denied, tmp_path / "copy", base=base if given else None)
    assert any(f"{setting} in the config does not" in note for note in report.notes)
    assert np.array_equal(logits(base, tmp_path / "copy"), logits(base, denied))
    assert read(tmp_path / "copy").tensors.keys() == read(denied).tensors.keys()
    assert verify(tmp_path / "copy", against=denied).sound


@pytest.mark.parametrize("setting", DENYING)
def test_allowed_loss_of_modules_is_what_peft_makes_of_it(
    setting: str, base: Path, tmp_path: Path
) -> None:
    whole = trained(base, tmp_path / "whole", **TARGETS)
    denied = changed(whole, tmp_path / "denied", **DENYING[setting])
    expected = logits(base, denied)
    assert not np.allclose(expected, logits(base, whole), atol=1e-4)
    merge_into([denied], base, tmp_path / "into", allow_lossy=True)
    assert np.allclose(merged_logits(tmp_path / "into"), expected, atol=1e-5)
    convert(denied, tmp_path / "peft", base=base, allow_lossy=True)
    assert np.allclose(logits(base, tmp_path / "peft"), expected, atol=1e-6)
    convert(denied, tmp_path / "x.gguf", base=base, allow_lossy=True)
    checked = verify(tmp_path / "x.gguf", against=denied, base=base)
    assert checked.sound
    assert any(setting in note for note in checked.notes)
    convert(tmp_path / "x.gguf", tmp_path / "back", to="peft", base=base)
    assert np.allclose(logits(base, tmp_path / "back"), expected, atol=1e-5)


@pytest.mark.parametrize("targets", CHOOSING)
def test_modules_that_peft_loads_are_not_denied(
    targets: list[str] | str, base: Path, tmp_path: Path
) -> None:
    whole = trained(base, tmp_path / "whole", **TARGETS)
    named = changed(whole, tmp_path / "named", target_modules=targets)
    assert np.array_equal(logits(base, named), logits(base, whole))
    assert not read(named, base=base).undeclared


def test_what_was_not_evaluated_is_not_denied(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole", **TARGETS)
    broken = changed(whole, tmp_path / "broken", exclude_modules="(v_proj")
    loaded = read(broken, base=base)
    assert not loaded.undeclared
    assert any("selects is unchecked" in note for note in inspect(broken).notes)


def load_in_mlx(base: Path, adapter: Path) -> None:
    load_adapters(load_model(base, lazy=True)[0], str(adapter))


@pytest.mark.parametrize(("setting", "value"), [("num_layers", 1), ("keys", ["self_attn.q_proj"])])
def test_mlx_goes_by_its_choice_of_modules_too(
    setting: str, value: object, base: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "mlx"
    convert(trained(base, tmp_path / "a", **TARGETS), adapter, to="mlx", base=base)
    load_in_mlx(base, adapter)
    modules = read(adapter, base=base).modules
    config = json.loads((adapter / "adapter_config.json").read_text())
    (config if setting in config else config["lora_parameters"])[setting] = value
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not an adapter parameter") as refused:
        load_in_mlx(base, adapter)
    missed = {name for name in modules if f"{name}.lora_a:" in str(refused.value)}
    assert set(read(adapter, base=base).undeclared[setting]) == missed
    with pytest.raises(LossyConversionError, match=setting):
        merge_into([adapter], base, tmp_path / "m")
    findings = validate(adapter, base=base, targets=["mlx"]).findings
    assert [set(each.modules) for each in findings if each.code == "AK108"] == [missed]
    convert(adapter, tmp_path / "less", to="mlx", base=base, allow_lossy=True)
    load_in_mlx(base, tmp_path / "less")
    assert set(read(tmp_path / "less", base=base).modules) == set(modules) - missed
