"""The tables hold together: names, transforms and sizes of every family, in both directions.

Whether a table is right is for the engine to say (test_engine_families) or, where no class of
transformers has the family, for formulas on full weights (test_family_formulas).
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from converter_formulas import RECORDED
from engine import (
    convert_adapter,
    engine_logprobs,
    family_row,
    kl,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)

from adapterkit.architectures import Architecture, Sizes, WeightRule, families, load
from adapterkit.architectures.mapping import find_rule, from_engine, to_engine
from adapterkit.architectures.table import common_parameters
from adapterkit.architectures.transforms import TRANSFORMS
from adapterkit.base import open_base
from adapterkit.containers.gguf import read_gguf
from adapterkit.errors import LossyConversionError
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.engine

NAME_LIMIT = 63
# Sizes of a made-up base, the same for every family.
VALUES = {
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 96,
    "vocab": 512,
    "experts": 3,
    "expert_ffn": 32,
    "altup_inputs": 4,
}
SOME = 8  # any other size


def rules_of(family: Architecture) -> Iterator[WeightRule]:
    for rule in family.rules:
        yield rule
        if rule.alternative:
            yield rule.alternative


def names_in(expression: str) -> set[str]:
    nodes = ast.walk(ast.parse(expression, mode="eval"))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def made_up(family: Architecture) -> tuple[Architecture, Sizes]:
    names = {*common_parameters(), *family.parameters}
    facts = {name: VALUES.get(name, SOME) for name in names}
    plain = replace(family, parameters={name: {"hf": (name,)} for name in names})
    return plain, Sizes(plain, "hf", facts)


def named(rule: WeightRule, expert: int = 0) -> str:
    return rule.hf.replace("{i}", "1").replace("{e}", str(expert))


@pytest.mark.parametrize("name", families())
def test_family_is_one_that_llama_cpp_knows(name: str) -> None:
    family = load(name)
    # The engine test, or the record of the converter, has what is newer than the package.
    known = {*gguf.MODEL_ARCH_NAMES.values(), *RECORDED}
    assert family.gguf in known or family.verified == "engine"
    assert family.verified in {"engine", "dense", "no"}
    assert family.classes
    # A class of remote code may go by another family's model type.
    assert family.model_types or family.verified == "dense"


@pytest.mark.parametrize("name", families())
def test_tensor_names_fit_into_llama_cpp(name: str) -> None:
    for rule in rules_of(load(name)):
        for target in rule.targets:
            longest = target.name.replace("{i}", "9999") + ".weight.lora_a"
            assert len(longest) <= NAME_LIMIT


@pytest.mark.parametrize("name", families())
def test_transforms_named_in_tables_exist(name: str) -> None:
    for rule in rules_of(load(name)):
        calls = [rule.rows, rule.cols, *(target.rows for target in rule.targets)]
        assert {call.name for call in calls if call} <= TRANSFORMS.keys()


@pytest.mark.parametrize("name", families())
def test_sizes_named_in_tables_are_parameters(name: str) -> None:
    family = load(name)
    known = {*common_parameters(), *family.parameters}
    assert names_in(family.select or "1") <= known
    for rule in rules_of(family):
        calls = [rule.rows, rule.cols, *(target.rows for target in rule.targets)]
        texts = [text for call in calls if call for text in call.arguments]
        texts += [*rule.shape, rule.scale or "1", rule.per_head or "1", rule.count]
        texts += [target.size for target in rule.targets if target.size]
        for text in texts:
            assert names_in(text) <= known


@pytest.mark.parametrize("name", families())
def test_every_name_leads_to_its_rule_and_back(name: str) -> None:
    family = load(name)
    for rule in family.rules:
        match = find_rule(family, named(rule))
        assert match is not None
        assert match.rule == rule
        for place, target in enumerate(rule.targets):
            found = family.match_gguf(target.name.replace("{i}", "1"))
            assert (rule, place) in [(other.rule, other.target) for other in found]
            assert rule.alias or not found[0].rule.alias, "the table's own name must come first"


@pytest.mark.parametrize("name", families())
def test_no_tensor_is_filled_twice(name: str) -> None:
    for layout in ("experts", "fused"):
        filled = [
            target.name
            for rule in load(name).rules
            if not rule.alias and rule.layout in {None, layout}
            for target in rule.targets
        ]
        assert len(filled) == len(set(filled))


def pairs_for(rule: WeightRule, sizes: Sizes, seed: int) -> list[Update]:
    """Return random updates of what a rule covers: one, or one per expert."""
    random = np.random.default_rng(seed)
    out, columns = (
        (int(sizes.value(text, 1)) for text in rule.shape)
        if rule.shape
        else (960, VALUES["hidden"])
    )
    if not rule.shape and all(target.size for target in rule.targets):
        out = sum(int(sizes.value(target.size or "0", 1)) for target in rule.targets)
        out *= int(sizes.value(rule.per_head or "1", 1))
    count = int(sizes.value(rule.count, 1)) if rule.stacked else 1
    lead = (VALUES["experts"],) if rule.kind == "experts" else ()
    if rule.kind == "embedding":
        out, columns = columns, out
    return [
        Update(
            named(rule, expert),
            LazyTensor.of(random.normal(size=(*lead, 2, columns)).astype(np.float32)),
            LazyTensor.of(random.normal(size=(*lead, out, 2)).astype(np.float32)),
            0.5,
            {"embedding": Kind.EMBEDDING, "experts": Kind.EXPERTS}.get(rule.kind, Kind.LINEAR),
        )
        for expert in range(count)
    ]


def dense(pair: Update) -> Array:
    return pair.scale * (pair.b.numpy().astype(float) @ pair.a.numpy().astype(float))


@pytest.mark.parametrize("name", families())
def test_updates_go_there_and_come_back_exactly(name: str) -> None:
    family, sizes = made_up(load(name))
    rules = [rule for rule in family.rules if rule.adaptable]
    for layout in ("experts", "fused"):
        plain = [rule for rule in rules if not rule.alias and rule.layout in {None, layout}]
        for chosen in (plain, *([rule] for rule in rules if rule.alias)):
            pairs = [p for seed, rule in enumerate(chosen) for p in pairs_for(rule, sizes, seed)]
            moved = to_engine(family, sizes, pairs)
            assert not moved.unmatched
            assert len(moved.pairs) == len({pair.module for pair in moved.pairs})
            modules = {pair.module for pair in pairs}
            like = modules if chosen is not plain else ()
            back = from_engine(family, sizes, moved.pairs, layout=layout, like=like)
            # Parts of a fused tensor that the adapter does not have are zero.
            assert {pair.module for pair in back.pairs if pair.delta().any()} == modules
            found = {pair.module: pair for pair in back.pairs}
            for pair in pairs:
                np.testing.assert_allclose(dense(found[pair.module]), dense(pair), rtol=1e-12)


INERT = [name for name in families() if load(name).inert and load(name).verified == "engine"]
EFFECT = 1e-2


def inert_modules(family: Architecture, names: Iterable[str]) -> list[str]:
    found = [(name, find_rule(family, name)) for name in names]
    return [
        name
        for name, match in found
        if match and any(target.name in family.inert for target in match.rule.targets)
    ]


def in_table(match: re.Match[str]) -> str:
    return "blk.{i}." if match[0].startswith("blk.") else ""


@pytest.mark.parametrize("name", INERT)
def test_inert_tensors_are_loaded_and_change_nothing(name: str, tmp_path: Path) -> None:
    row = family_row(name)
    base = make_base(replace(row, lora={}), tmp_path)
    modules = inert_modules(load(row.family), dict(base.model.named_modules()))
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=modules)
    prompts = prompts_for(base)[-2:]
    assert kl(logprobs(base.model, prompts), logprobs(tuned.model, prompts)).min() > EFFECT
    report = convert_adapter(tuned.path, base, tmp_path / "adapter.gguf")
    assert any("never applies it" in note for note in report.notes)
    stored = read_gguf(tmp_path / "adapter.gguf").tensors
    patterns = {re.sub(r"^blk\.\d+\.|\.weight\.lora_.$", in_table, name) for name in stored}
    assert patterns
    assert patterns <= set(load(row.family).inert)
    plain = engine_logprobs(base.gguf, prompts)
    adapted = engine_logprobs(base.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)])
    assert max_kl(plain, adapted) == 0


def test_pairs_of_a_vision_tower_are_listed_and_refused(tmp_path: Path) -> None:
    base = make_base(replace(family_row("qwen2.5vl"), lora={}), tmp_path)
    tuned = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "qkv", "gate_proj"])
    with pytest.raises(LossyConversionError, match="vision or audio tower") as caught:
        convert_adapter(tuned.path, base, tmp_path / "a.gguf")
    (loss,) = caught.value.losses
    assert {key.module for key in loss.drops} == {
        f"model.visual.blocks.0.{module}" for module in ("attn.qkv", "mlp.gate_proj")
    }
    report = convert_adapter(tuned.path, base, tmp_path / "a.gguf", allow_lossy=True)
    assert report.modules == 4
    assert [loss.code for loss in report.losses] == ["tower"]


def test_a_gguf_base_is_of_the_family_that_the_adapter_names(tmp_path: Path) -> None:
    base = make_base(family_row("glm"), tmp_path)
    known = open_base(base.gguf)
    assert {family.name for family in known.candidates} >= {"chatglm", "glm"}
    assert known.suited(["model.layers.0.self_attn.q_proj"]).architecture.name == "glm"
    remote = "transformer.encoder.layers.0.self_attention.query_key_value"
    assert known.suited([remote]).architecture.name == "chatglm"
