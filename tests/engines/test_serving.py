"""`convert --for ENGINE` makes exact changes, and the engine's findings are gone."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine import BaseFixture, family_row, logprobs, make_adapter, make_base, max_kl
from peft import PeftModel
from terminal import PEFT, ROOT, invoke

import adapterkit
from adapterkit import LazyTensor, Role, TensorKey, load_target, target_names, validate
from adapterkit.dtype import DType
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import PASSES
from adapterkit.passes.uniform import uniform
from adapterkit.registry import formats

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 300], [7]]
MIXED: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
    "alpha_pattern": {"v_proj": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": MIXED,
    "both": MIXED | {"use_rslora": True},
    "expression": {"target_modules": r".*\.(q_proj|up_proj)"},
    "pickle": {"safe_serialization": False},
}
ENGINES = ["vllm", "vllm@0.32", "sglang", "lorax", "mlx", "llama.cpp", "peft"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


def loaded(base: BaseFixture, folder: Path) -> Any:
    model = type(base.model).from_pretrained(base.hf, attn_implementation="eager")
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_findings_are_gone_and_the_update_is_the_same(
    settings: dict[str, Any], base: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(base, tmp_path / "adapter", **settings)
    wanted = logprobs(tuned.model, PROMPTS)
    for engine in ENGINES:
        suffix = ".gguf" if engine == "llama.cpp" else ""
        made = tmp_path / f"for-{engine}{suffix}"
        done = invoke(
            "convert", tuned.path, "-o", made, "--for", engine, "--base", base.hf, "--json"
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["results"][0]["max_relative_error"] < 1e-6
        report = validate(made, base=base.hf, targets=[engine])
        # SGLang wants factors of zero where a stacked module has none, and validate names them.
        zero = {"AK205"} if engine == "sglang" else set[str]()
        assert {finding.code for finding in report.findings} <= zero, engine
        assert {str(module.outcome) for module in report.targets[0].modules} == {"applied"}
        if (made / "adapter_config.json").is_file() and engine != "mlx":
            assert max_kl(wanted, logprobs(loaded(base, made), PROMPTS)) < 1e-9
    for engine in ("vllm@0.32", "sglang", "lorax"):
        config = json.loads((tmp_path / f"for-{engine}" / "adapter_config.json").read_text())
        assert not any(config.get(n) for n in ("use_rslora", "rank_pattern", "alpha_pattern"))
        pairs = list(adapterkit.read(tmp_path / f"for-{engine}").pairs())
        assert len({(pair.rank, pair.scale) for pair in pairs}) == 1


def test_before_the_changes_the_engines_would_be_wrong(base: BaseFixture, tmp_path: Path) -> None:
    tuned = make_adapter(base, tmp_path / "adapter", **SETTINGS["both"])
    targets = ["sglang", "lorax", "vllm@0.32"]
    report = validate(tuned.path, base=base.hf, targets=targets)
    assert {f.code for f in report.findings} == {"SGL001", "SGL002", "LRX004", "VLLM013"}
    assert all(finding.fix == "uniform" for finding in report.findings)


def test_a_bias_on_b_is_scaled_with_it() -> None:
    adapter = adapterkit.read(PEFT / "patterns")
    pairs = {pair.module: pair for pair in adapter.pairs()}
    odd = "model.layers.1.mlp.down_proj"
    key = TensorKey(odd, Role.LORA_BIAS)
    bias = LazyTensor.of(torch.arange(32, dtype=torch.float32).numpy())
    ready = uniform(adapter.replace(tensors={**adapter.tensors, key: bias}), Context()).adapter
    ratio = pairs[odd].scale / ready.scales[odd]
    assert ratio != 1
    assert ready.tensors[key].dtype is DType.F32
    assert (ready.tensors[key].numpy() == bias.numpy() * ratio).all()


def test_every_fix_that_a_finding_names_exists() -> None:
    names = {rule.fix for name in target_names() for rule in load_target(name).rules} - {""}
    names |= {fix for name in target_names() for fix in load_target(name).prepare}
    assert names <= {each.name for each in PASSES} | {f"to-{f.name}" for f in formats() if f.writes}
    source = "".join(p.read_text() for p in (ROOT / "adapterkit" / "checks").glob("*.py"))
    assert 'fix="to-' in source


def test_unknown_engine_is_a_usage_error(tmp_path: Path) -> None:
    result = invoke("convert", PEFT / "tiny", "-o", tmp_path / "x", "--for", "hal")
    assert result.exit_code == 2
    assert "known: " in result.stderr
