"""Every code of `validate` has a small file that triggers it, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conformance.engines_page import PAGE, page
from safetensors.numpy import load_file, save_file
from terminal import ROOT
from validation_cases import CASES, FOLDER, source_of

from adapterkit import Severity, explanations, load_target, target_names, validate
from adapterkit.architectures.expressions import evaluate
from adapterkit.engines.facts import facts
from adapterkit.engines.names import name_facts
from adapterkit.errors import UsageError
from adapterkit.files import read
from adapterkit.model import AdapterTensorSet, PeftSource

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = ROOT / "adapterkit"


# A header of megabytes and a link are made below, a hub cache in tests/base/test_originals.py;
# names too long for llama.cpp, and families that no engine test covers, take tables that do not
# exist now.
# Engines of which there is something to say of every adapter.
SPEAKS = {"mlx", "openvino", "litert-lm", "onnxruntime-genai"}
ELSEWHERE = {"AK402", "AK403", "AK311"}
WITHOUT = {"LCP012", "LCP014"}


@pytest.mark.parametrize("code", CASES)
def test_fixture_triggers_exactly_its_code(code: str) -> None:
    this = CASES[code]
    base = FOLDER / "bases" / this.base if this.base else None
    targets = [this.target] if this.target else []
    report = validate(source_of(this.source), base=base, targets=targets)
    assert {finding.code for finding in report.findings} == {code} | this.beside
    severities = {finding.severity for finding in report.findings}
    unchecked = 5 if Severity.UNCHECKED in severities else 0
    assert report.exit_code == (1 if Severity.ERROR in severities else unchecked)


# They load files of diffusion models alone, judged in test_diffusion_loaders.py.
BY_NAME = {"diffusers", "comfyui"}


@pytest.mark.parametrize("target", [None, *sorted(set(target_names()) - BY_NAME)])
def test_nothing_is_said_of_a_sound_adapter(target: str | None) -> None:
    gguf = target is not None and load_target(target).coverage == "gguf"
    # SGLang stacks q, k and v, and wants factors of the others beside one.
    source = source_of("gguf" if gguf else "stacked" if target == "sglang" else "sound")
    latest = {"ollama": "ollama@0.34.0"}
    targets = [latest.get(target, target)] if target and target not in SPEAKS else []
    report = validate(source, base=FOLDER / "bases" / "llama", targets=targets)
    assert report.findings == ()


def test_oversized_header_and_link_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(
        (source_of("sound") / "adapter_config.json").read_bytes()
    )
    data = (source_of("sound") / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * (11 << 20)
    whole = len(header).to_bytes(8, "little") + header + data[8 + length :]
    (folder / "adapter_model.safetensors").write_bytes(whole)
    base = FOLDER / "bases" / "llama"
    assert [f.code for f in validate(folder, base=base).findings] == ["AK402"]
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(data)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(outside)
    assert [f.code for f in validate(folder, base=base).findings] == ["AK403"]


def used_codes() -> set[str]:
    texts = [path.read_text() for path in PACKAGE.rglob("*.py")]
    texts += [path.read_text() for path in (PACKAGE / "engines").glob("*.toml")]
    rules = set(re.findall(r'^code = "([A-Z]+)\d{3}"$', "\n".join(texts), re.MULTILINE))
    kinds = "|".join(rules | {code[:-3] for code in explanations()})
    return set(re.findall(rf'"((?:{kinds})\d{{3}})"', "".join(texts)))


def test_every_code_is_explained_and_every_explanation_is_used() -> None:
    known = explanations()
    unexplained, unused = used_codes() - set(known), set(known) - used_codes()
    assert not unexplained, f"no table of checks/codes.toml explains {sorted(unexplained)}"
    assert not unused, f"no check and no rule of an engine has the code {sorted(unused)}"
    for explained in known.values():
        assert explained.title
        assert all(text.endswith(".") for text in (explained.meaning, explained.matters))
        assert explained.action


def test_every_code_has_a_fixture() -> None:
    lacking = set(explanations()) - CASES.keys() - ELSEWHERE - WITHOUT
    assert not lacking, f"no row of CASES shows {sorted(lacking)}"
    assert set(explanations()) >= CASES.keys() | ELSEWHERE | WITHOUT


@pytest.mark.parametrize("name", target_names())
def test_conditions_speak_of_known_facts(name: str) -> None:
    known = facts(read(source_of("sound")), None)
    target = load_target(f"{name}@999")
    words = name_facts()
    for row in target.names:
        evaluate(row.when, words.__getitem__)
        assert row.message.format_map(words) or row.outcome == "applied"
    for rule in (*target.rules, *load_target(name).rules):
        evaluate(rule.when, known.__getitem__)
        assert rule.message.format_map(known | {"title": target.title, "engine": name})
    assert set(target.effects) - {"error"} <= set(explanations())
    assert set(target.losses.values()) <= set(explanations())


@pytest.mark.parametrize(
    ("reference", "code", "held"),
    [
        ("ollama", "OLL000", True),
        ("ollama@0.34.0", "OLL000", False),
        ("ollama@0.34.1", "OLL000", True),
        ("ollama@v0.35.0-rc1", "OLL000", True),
        ("vllm", "VLLM013", False),
        ("vllm@0.32.9", "VLLM013", True),
        ("vllm@0.33", "VLLM013", False),
        ("vllm@0.33.0", "VLLM013", False),
        ("vllm@1", "VLLM013", False),
    ],
)
def test_rules_hold_for_their_versions(reference: str, code: str, *, held: bool) -> None:
    rules = load_target(reference).rules
    assert (code in {rule.code for rule in rules}) is held


@pytest.mark.parametrize("reference", ["hal", "vllm@", "vllm@latest", "llama.cpp@0.1 beta"])
def test_unknown_engine_or_version_is_a_usage_error(reference: str) -> None:
    with pytest.raises(UsageError):
        load_target(reference)


def test_engines_name_their_sources() -> None:
    for name in target_names():
        target = load_target(name)
        assert target.source
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", target.checked)


def test_the_page_of_engines_is_their_data() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run tests/conformance/engines_page.py"


def test_fixture_configs_are_json() -> None:
    assert all(json.loads(path.read_text()) for path in FOLDER.rglob("*.json"))


@pytest.mark.parametrize(
    ("saved", "verdict"), [("lm_head", "applied"), ("model.norm", "partly applied")]
)
def test_openvino_takes_a_saved_output_and_leaves_out_other_modules(
    saved: str, verdict: str, tmp_path: Path
) -> None:
    """Run with openvino-genai 2026.4.1.0: a saved norm changed nothing, lm_head what PEFT does."""
    path = tmp_path / "adapter"
    shutil.copytree(source_of("sound"), path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["modules_to_save"] = [saved.rpartition(".")[2]]
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(path / "adapter_model.safetensors")
    base = FOLDER / "bases" / "llama"
    sizes = json.loads((base / "config.json").read_text())
    width = sizes["hidden_size"]
    shape = (sizes["vocab_size"], width) if saved == "lm_head" else (width,)
    tensors[f"base_model.model.{saved}.weight"] = np.ones(shape, np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    report = validate(path, base=base, targets=["openvino"])
    assert report.targets[0].verdict == verdict


def test_only_expressions_are_expressions() -> None:
    """SGLang 0.5.23 takes a list, `all` and `all-linear`, and no other text."""
    for targets, expression in (("all-linear", False), (["q_proj"], False), (r".*\.q_proj", True)):
        source = PeftSource({"target_modules": targets})
        adapter = AdapterTensorSet(tensors={}, scales={}, source=source)
        assert facts(adapter, None)["regex_targets"] is expression


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        ({"saved_modules": 1, "saved_heads": 1}, set()),
        ({"saved_modules": 2, "saved_heads": 1}, {"VLLM005"}),
        ({"base_changing_init": True, "init": "lora_ga"}, set()),
        ({"base_changing_init": True, "init": "pissa"}, {"VLLM006"}),
        ({"rslora": True, "rank_pattern": True}, set()),
    ],
)
def test_vllm_refuses_what_its_own_checks_refuse(known: dict[str, Any], codes: set[str]) -> None:
    """The cases of vLLM 0.33.0's PEFTHelper."""
    plain = facts(AdapterTensorSet(tensors={}, scales={}), None)
    found = load_target("vllm").findings(plain | {"format": "peft"} | known)
    assert {finding.code for finding in found} == codes
