"""A class is the model that llama.cpp's converter takes it for, or one that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapterkit.architectures.table import families, load
from adapterkit.base import open_base
from adapterkit.base.classes import model_class

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow

REGISTRY = Path(__file__).parents[2] / "fixtures" / "classes" / "llama.cpp.json"
CLASSES: Mapping[str, list[str]] = json.loads(REGISTRY.read_text(encoding="utf-8"))["classes"]


def architectures(folder: Path, **config: Any) -> set[str]:
    """Return `general.architecture` of every family that a config may mean; none if unknown."""
    (folder / "config.json").write_text(json.dumps(config))
    return {family.gguf for family in open_base(folder).candidates if family.known}


def test_the_registry_is_whole() -> None:
    assert len(CLASSES) == 267
    assert all(CLASSES.values())


@pytest.mark.parametrize("model_type", ["", "bert", "llama"], ids=["own", "bert", "llama"])
def test_classes_are_what_the_converter_takes_them_for(model_type: str, tmp_path: Path) -> None:
    wrong: dict[str, set[str]] = {}
    for name, known in CLASSES.items():
        own = found.model_type if (found := model_class(name)) else ""
        told = architectures(tmp_path, architectures=[name], model_type=model_type or own)
        if not told <= set(known):
            wrong[name] = told
    assert wrong == {}


def test_other_classes_of_families_are_those_of_transformers() -> None:
    listed = [name for family in map(load, families()) for name in family.classes]
    assert [name for name in listed if name not in CLASSES and not model_class(name)] == []


@pytest.mark.parametrize(
    ("name", "model_type", "told"),
    [
        ("JinaBertModel", "bert", {"jina-bert-v2"}),
        ("JinaBertForMaskedLM", "bert", {"jina-bert-v2"}),
        ("BitNetForCausalLM", "llama", {"bitnet"}),
        ("Gemma3TextModel", "gemma3_text", {"gemma-embedding"}),
        ("T5EncoderModel", "t5", {"t5encoder"}),
        ("NoSuchModel", "llama", set()),
    ],
)
def test_the_class_decides(name: str, model_type: str, told: set[str], tmp_path: Path) -> None:
    assert architectures(tmp_path, architectures=[name], model_type=model_type) <= told


@pytest.mark.parametrize(
    ("name", "model_type", "told"),
    [
        ("LlamaForCausalLM", "exaone", {"exaone"}),
        ("Glm4MoeForCausalLM", "sarvam_moe", {"bailingmoe2"}),
        ("Glm4MoeForCausalLM", "exaone", {"glm4moe"}),
    ],
)
def test_a_class_that_stands_in_is_told_by_the_model_type(
    name: str, model_type: str, told: set[str], tmp_path: Path
) -> None:
    assert architectures(tmp_path, architectures=[name], model_type=model_type) == told
