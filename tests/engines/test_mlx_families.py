"""Every family that mlx-lm has: what is written loads there, gives PEFT's answers, and comes back.

engine/mlx.toml names the families whose base mlx-lm does not load as transformers writes it, or
runs otherwise: there is nothing to compare with, but an adapter must load where the base does.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine import family_row, make_adapter, make_base
from engine.adapters import linear_layers
from engine.distributions import max_kl, normalised
from engine.rows import family_rows
from mlx_models import ask, for_mlx

from adapterkit import convert, diff
from adapterkit.errors import LossyConversionError
from adapterkit.served import served

pytestmark = pytest.mark.engine

PROMPTS = [[5, 17, 40, 8], [3], [9, 9, 31, 2, 44, 7, 7]]
CLOSE = 1e-9
TARGETS = ("target_modules", "target_parameters")
# In every run; the others where all classes are asked for.
ALWAYS = {"llama", "afmoe", "deepseek3", "falcon-h1"}


@cache
def known() -> dict[str, dict[str, str]]:
    path = Path(__file__).parents[1] / "engine" / "mlx.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_the_table_speaks_of_families_that_mlx_lm_has() -> None:
    names = {str(each.values[0]) for each in FAMILIES}
    assert known()["apart"].keys() | known()["refused"].keys() <= names
    assert names >= ALWAYS


def model_type(name: str) -> str:
    return str(getattr(transformers, family_row(name).config_class).model_type)


FAMILIES = [
    pytest.param(name, marks=() if name in ALWAYS else (pytest.mark.all_classes,))
    for name in family_rows()
    if not served("mlx").lacks_type(model_type(name))
]


def answers(model: Any) -> Any:
    with torch.no_grad():
        rows = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return normalised(torch.stack(rows).double().numpy())


def without(names: list[str] | str, rigid: frozenset[str]) -> list[str] | str:
    """Leave out the layers on which mlx-lm's LoRA cannot stand."""
    if isinstance(names, str):
        return names
    return [n for n in names if n.removesuffix(".weight").rpartition(".")[2] not in rigid]


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_lm_answers_as_peft_does(name: str, tmp_path: Path) -> None:
    base = make_base(family_row(name), tmp_path)
    rigid = served("mlx").rigid.get(model_type(name), frozenset())
    asked = {"target_modules": linear_layers(base), **base.row.lora}
    fitting = {key: without(names, rigid) for key, names in asked.items() if key in TARGETS}
    tuned = make_adapter(base, tmp_path / "adapter", **fitting)
    if said := known()["refused"].get(name):
        with pytest.raises(LossyConversionError, match=said):
            convert(tuned.path, tmp_path / "mlx", to="mlx", base=base.hf)
        return
    convert(tuned.path, tmp_path / "mlx", to="mlx", base=base.hf)
    convert(tmp_path / "mlx", tmp_path / "back", to="peft", base=base.hf)
    assert diff(tuned.path, tmp_path / "back", base=base.hf).equal
    found = ask(for_mlx(base.hf, base.model.config), tmp_path / "mlx", PROMPTS, tmp_path)
    plain = answers(base.model)
    apart = isinstance(found.base, str) or max_kl(plain, found.base) > CLOSE
    assert apart is (name in known()["apart"]), (
        f"mlx-lm's base {'is' if apart else 'is not'} apart, engine/mlx.toml says otherwise: "
        + (found.base if isinstance(found.base, str) else f"{max_kl(plain, found.base):.0e} nats")
    )
    if isinstance(found.base, str):
        return
    assert not isinstance(found.tuned, str), found.tuned
    wanted = answers(tuned.model)
    assert apart or max_kl(wanted, found.tuned) < CLOSE
    assert max_kl(wanted, plain) > 1e-2
