"""What a family's row says of its classes is what transformers says of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import transformers

from adapterkit.architectures import families, find, load
from adapterkit.base.classes import model_class

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@cache
def classes() -> Mapping[str, str]:
    """Return the model type of every class that a program can import and that is a whole model."""
    facts = json.loads((ROOT / "adapterkit" / "base" / "classes.json").read_text(encoding="utf-8"))
    return {
        name: kind
        for name, (kind, *_) in facts["classes"].items()
        if "PreTrained" not in name and hasattr(transformers, name)
    }


@pytest.mark.parametrize("name", families())
def test_every_class_of_its_model_types_is_named(name: str) -> None:
    kinds = load(name).model_types
    whole = {each for each, kind in classes().items() if kind in kinds}
    # Where the converter takes a class for another family, that one names it.
    assert {each for each in whole if not any(each in found.names for found in find(each))} == set()


@pytest.mark.parametrize("name", families())
def test_no_class_of_another_model_is_named(name: str) -> None:
    family = load(name)
    known = {each: model_class(each) for each in (*family.classes, *family.other_heads)}
    own = {each: facts.model_type for each, facts in known.items() if facts}
    # An encoder alone has the model type of the whole model, which is another family's.
    own = {each: kind for each, kind in own.items() if not each.endswith("EncoderModel")}
    assert {each for each, kind in own.items() if kind not in family.model_types} == set()


@pytest.mark.parametrize("name", families())
def test_the_output_is_tied_where_the_class_ties_it_by_default(name: str) -> None:
    family = load(name)
    written = next((each for each in family.classes if hasattr(transformers, each)), None)
    if written is None and not family.stand_ins:
        assert family.verified != "engine", "no class of transformers for a family that ran"
        return
    if written is None:
        kind = next(each for each in family.model_types if each in transformers.CONFIG_MAPPING)
        config = transformers.AutoConfig.for_model(kind)
    else:
        config = getattr(transformers, written).config_class()
    text = config.get_text_config(decoder=True)
    said = (getattr(each, "tie_word_embeddings", None) for each in (config, text))
    assert family.tied is bool(next((value for value in said if value is not None), False))
