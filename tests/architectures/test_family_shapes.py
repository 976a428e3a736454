"""The sizes that a family's table states are those of the class, whatever an engine would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from engine import family_row, family_rows
from engine.bases import configured

from adapterkit.architectures import families, load
from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base import open_base

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
KINDS = {kind for name in families() for kind in load(name).model_types}


@pytest.mark.parametrize("name", [*family_rows(), *family_rows(encoder=True)])
def test_shapes_over_the_bare_config_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    row = family_row(name)
    with torch.device("meta"):
        model = getattr(transformers, row.model_class)(configured(row))
    model.config.architectures = [row.model_class]
    model.config.save_pretrained(tmp_path)
    base = open_base(tmp_path / "config.json")
    assert model.config.model_type in KINDS
    stated = 0
    for parameter, tensor in model.named_parameters():
        match = find_rule(base.architecture, parameter.removesuffix(".weight"))
        if in_tower(parameter) or match is None or not match.rule.shape:
            continue
        stated += 1
        sizes = tuple(base.sizes.value(size, match.layer) for size in match.rule.shape)
        turned = match.rule.conv1d or match.rule.stored_turned
        held = tuple(tensor.shape)[-2:]
        assert sizes == (held[::-1] if turned else held), parameter
    assert stated, "no rule of the family states a size"
