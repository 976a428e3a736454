"""PEFT's other tuners: what is no low-rank update, or broken, is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tuner_models import FIXTURES, tuned
from tuner_models import base as base  # noqa: PLC0414  (a fixture)
from tuner_models import quiet as quiet  # noqa: PLC0414  (a fixture)

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.peft.tuners import read_tuner
from adapterkit.formats.peft.tuners_refused import REFUSED
from adapterkit.formats.peft.tuners_rules import RULES
from adapterkit.formats.peft.tuners_whole import WHOLE
from adapterkit.formats.protocol import FormatOptions

transformers.utils.logging.disable_progress_bar()


def rewrite(path: Path, **fields: Any) -> None:
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def test_vera_without_its_projections_is_refused(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*save_projection.*", UserWarning)
        path = tuned("Vera", base, tmp_path, r=4, save_projection=False)
    with pytest.raises(adapterkit.UnsupportedError, match="save_projection"):
        read_tuner(path, FormatOptions(base=open_base(base)))


def test_bat_is_refused_because_it_multiplies_the_base(base: Path, tmp_path: Path) -> None:
    path = tuned("Miss", base, tmp_path, r=4, init_weights="bat")
    with pytest.raises(adapterkit.UnsupportedError, match="bat"):
        read_tuner(path, FormatOptions(base=open_base(base)))


@pytest.mark.parametrize(("kind", "leaf"), [("LoHa", "hada_t1"), ("LoKr", "lokr_t2")])
def test_convolutions_are_refused_by_name(kind: str, leaf: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3))
    settings = {"r": 2, "use_effective_conv2d": True, "target_modules": ["0"]}
    model = get_peft_model(plain, getattr(peft, f"{kind}Config")(**settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(adapterkit.UnsupportedError, match=f"convolution \\({leaf}"):
        read_tuner(tmp_path, FormatOptions())


def test_every_other_peft_type_is_refused_with_its_reason(tmp_path: Path) -> None:
    known = {kind.value for kind in peft.PeftType} - {"LORA", "TINYLORA"}
    assert known == (RULES.keys() | WHOLE.keys() | REFUSED.keys()) - {"BONE"}
    assert not (RULES.keys() | WHOLE.keys()) & REFUSED.keys()
    save_file({"base_model.model.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    for kind, reason in REFUSED.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(adapterkit.UnsupportedError) as caught:
            adapterkit.inspect(tmp_path)
        assert kind in str(caught.value)
        assert reason in str(caught.value)


def test_an_unknown_peft_type_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"base_model.model.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NEXTLORA"}')
    with pytest.raises(adapterkit.UnsupportedError, match="NEXTLORA is not read"):
        adapterkit.inspect(tmp_path)


def test_hostile_fixtures_are_refused_by_name() -> None:
    folders = sorted((FIXTURES / "hostile" / "tuners").iterdir())
    assert folders
    for folder in folders:
        with pytest.raises(adapterkit.UnsupportedError, match=folder.name.upper()):
            adapterkit.inspect(folder)


DEFECTS: dict[str, tuple[str, str, tuple[int, ...] | None, str]] = {
    "missing-half": ("LoHa", "hada_w2_b", None, "has no hada_w2_b"),
    "ranks": ("LoHa", "hada_w1_a", (32, 4), "ranks of w1 disagree: 4, 3"),
    "outputs": ("LoHa", "hada_w2_a", (31, 3), "output sizes disagree"),
    "no-matrix": ("Delora", "delora_A", (3,), "not that of a matrix"),
    "singular-values": ("AdaLora", "lora_E", (2, 1), "ranks disagree"),
}


@pytest.mark.parametrize(("kind", "leaf", "shape", "message"), DEFECTS.values(), ids=DEFECTS)
def test_broken_files_are_refused_by_module(
    kind: str, leaf: str, shape: tuple[int, ...] | None, message: str, base: Path, tmp_path: Path
) -> None:
    settings = {"init_r": 3, "total_step": 10} if kind == "AdaLora" else {"r": 3}
    path = tuned(kind, base, tmp_path, **settings)
    stored = load_file(path / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.1.self_attn.q_proj.{leaf}"
    del stored[name]
    if shape:
        stored[name] = torch.ones(shape)
    save_file(stored, path / "adapter_model.safetensors")
    with pytest.raises(adapterkit.FormatError, match=message) as caught:
        read_tuner(path, FormatOptions())
    assert "model.layers.1.self_attn.q_proj" in str(caught.value)


def test_a_rank_that_the_config_contradicts_is_no_scale(base: Path, tmp_path: Path) -> None:
    path = tuned("LoHa", base, tmp_path, r=3)
    rewrite(path, r=4)
    with pytest.raises(adapterkit.FormatError, match="has rank 3, the config declares 4"):
        read_tuner(path, FormatOptions())


def test_the_format_writes_nothing(base: Path, tmp_path: Path) -> None:
    path = tuned("LoHa", base, tmp_path / "tuner", r=3)
    with pytest.raises(adapterkit.UsageError, match="can be read but not written"):
        adapterkit.convert(path, tmp_path / "out", to="peft-tuners")
