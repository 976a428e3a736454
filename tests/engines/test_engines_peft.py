"""`validate --target peft` says what PEFT's own loading does, silent no-ops included."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine import BaseFixture, family_row, make_adapter, make_base
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapterkit import Verdict, validate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[5, 9, 300]])
Q = "base_model.model.model.layers.0.self_attn.q_proj"
State = dict[str, torch.Tensor]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sound(base: BaseFixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    return make_adapter(base, folder, target_modules=["q_proj", "v_proj"]).path


def unchanged(state: State, config: Config) -> None:
    del state, config


def no_prefix(state: State, config: Config) -> None:
    del config
    renamed(state, "base_model.model.model.", "model.")


def one_model_fewer(state: State, config: Config) -> None:
    del config
    renamed(state, "base_model.model.model.", "base_model.model.")


def multimodal_prefix(state: State, config: Config) -> None:
    del config
    renamed(state, "model.model.model.", "model.model.model.language_model.")


def adapter_name(state: State, config: Config) -> None:
    del config
    renamed(state, ".weight", ".default.weight")


def compiled(state: State, config: Config) -> None:
    del config
    renamed(state, "base_model.model.", "base_model.model._orig_mod.")


def renamed(state: State, old: str, new: str) -> None:
    for name in tuple(state):
        state[name.replace(old, new)] = state.pop(name)


def outside_targets(state: State, config: Config) -> None:
    del state
    config["target_modules"] = ["q_proj"]


def other_target(state: State, config: Config) -> None:
    del state
    config["target_modules"] = ["o_proj"]


def other_layers(state: State, config: Config) -> None:
    del state
    config["layers_to_transform"] = [1]


def expression(state: State, config: Config) -> None:
    del state
    config["target_modules"] = r"model\.layers\.\d+\.self_attn\.[qv]_proj"


def expression_that_misses(state: State, config: Config) -> None:
    del state
    config["target_modules"] = r"layers\.\d+\.self_attn\.[qv]_proj"


def declared_rank(state: State, config: Config) -> None:
    del state
    config["r"] = 8


def wrong_width(state: State, config: Config) -> None:
    del config
    state[f"{Q}.lora_A.weight"] = state[f"{Q}.lora_A.weight"][:, :-1].contiguous()


def wrong_height(state: State, config: Config) -> None:
    del config
    state[f"{Q}.lora_B.weight"] = state[f"{Q}.lora_B.weight"].repeat(2, 1)


def zero_b(state: State, config: Config) -> None:
    del config
    state.update({n: torch.zeros_like(x) for n, x in state.items() if "lora_B" in n})


def missing_saved_module(state: State, config: Config) -> None:
    del state
    config["modules_to_save"] = ["lm_head"]


CASES: dict[Callable[[State, Config], None], Verdict] = {
    unchanged: Verdict.APPLIED,
    expression: Verdict.APPLIED,
    # adapterkit reads the names without PEFT's prefix; PEFT itself finds nothing under them.
    no_prefix: Verdict.NOTHING,
    one_model_fewer: Verdict.NOTHING,
    multimodal_prefix: Verdict.NOTHING,
    adapter_name: Verdict.APPLIED,
    compiled: Verdict.NOTHING,
    outside_targets: Verdict.PARTLY,
    other_layers: Verdict.PARTLY,
    other_target: Verdict.NOTHING,
    expression_that_misses: Verdict.REFUSED,
    declared_rank: Verdict.REFUSED,
    wrong_width: Verdict.REFUSED,
    wrong_height: Verdict.REFUSED,
    missing_saved_module: Verdict.REFUSED,
    zero_b: Verdict.NOTHING,
}


def fate(base: BaseFixture, folder: Path, full: torch.Tensor) -> Verdict:
    """Load it in PEFT; the logits tell what was applied."""
    model = type(base.model).from_pretrained(base.hf, attn_implementation="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = model(PROMPT).logits
        try:
            logits = PeftModel.from_pretrained(model, folder).eval()(PROMPT).logits
        except (RuntimeError, KeyError, ValueError):
            return Verdict.REFUSED
    if torch.equal(logits, plain):
        return Verdict.NOTHING
    return Verdict.APPLIED if torch.allclose(logits, full, atol=1e-5) else Verdict.PARTLY


@pytest.fixture(scope="module")
def full(base: BaseFixture, sound: Path) -> torch.Tensor:
    model = type(base.model).from_pretrained(base.hf, attn_implementation="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, sound).eval()(PROMPT).logits


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_peft_does_what_was_predicted(
    change: Callable[[State, Config], None],
    base: BaseFixture,
    sound: Path,
    full: torch.Tensor,
    tmp_path: Path,
) -> None:
    state = load_file(sound / "adapter_model.safetensors")
    config = json.loads((sound / "adapter_config.json").read_text())
    # As users have it: what the file lacks starts without effect, not at random.
    config["init_lora_weights"] = True
    change(state, config)
    save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = validate(tmp_path, base=base.hf, targets=["peft"])
    expected = CASES[change]
    assert fate(base, tmp_path, full) is expected
    assert report.targets[0].verdict is expected, report.findings
    assert report.exit_code == (expected is not Verdict.APPLIED)
