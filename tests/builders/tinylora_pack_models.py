"""Models with the pack's TinyLoRA in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from small_llama import small_llama
from tinylora_pack import TARGETS, Injected, chunked, inject, linear_names

from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.formats.protocol import FormatOptions
from adapterkit.formats.tinylora.pack import read as read_pack
from adapterkit.registry import detect

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.model import AdapterTensorSet


SETTINGS = {"frozen_rank": 2, "projection_dim": 4, "alpha": 2.0, "seed": 7}
EXACT = 1e-6


def llama(seed: int = 0, layers: int = 2) -> Any:
    return small_llama(seed, num_hidden_layers=layers, vocab_size=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def names() -> list[str]:
    return linear_names(llama(), TARGETS)


def injected(groups: dict[str, int] | None = None, **changes: Any) -> Injected:
    every = names()
    groups = chunked(every, 4) if groups is None else groups
    return inject(llama(), groups, {**SETTINGS, **changes})


def state_settings(folder: Path, **settings: Any) -> Path:
    stated = {"frozen_rank": 2, "alpha": 2.0, **settings}
    (folder / "tinylora.json").write_text(json.dumps(stated))
    return folder


def read(path: Path, base: Path | None, **options: Any) -> AdapterTensorSet:
    assert detect(path).name == "tinylora-pack"
    return read_pack(path, FormatOptions(base=open_base(base) if base else None, **options))


def worst(adapter: AdapterTensorSet, model: Injected) -> float:
    """Return the largest relative error of an update against the live model's."""
    found: list[float] = []
    pairs = {pair.module: pair for pair in adapter.pairs()}
    assert pairs.keys() == model.layers.keys()
    for name, layer in model.layers.items():
        pair, truth = pairs[name], layer.delta().numpy()
        mine = pair.scale * (pair.b.numpy().astype(float) @ pair.a.numpy().astype(float))
        found.append(float(np.linalg.norm(mine - truth) / np.linalg.norm(truth)))
    return max(found)


# What adapterkit writes.


def written(base: Path, tmp_path: Path) -> tuple[Path, Injected]:
    model = injected()
    source = state_settings(model.save(tmp_path / "step"))
    convert(source, tmp_path / "pack", to="tinylora-pack", base=base)
    return tmp_path / "pack", model
