"""Dialects drawn at random read what was written by them; factors that are turned are caught."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_cases import LLAMA, SOUND, delta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterkit
from adapterkit.errors import (
    FormatError,
    IncompatibleBaseError,
)
from adapterkit.formats.handwritten.format import read as read_handwritten
from adapterkit.formats.protocol import FormatOptions

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Written:
    """A dialect, a file of it, and the updates that the file holds."""

    toml: str
    tensors: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]
    container: str
    select: str
    weights: dict[str, np.ndarray]

    def save(self, folder: Path, tensors: dict[str, np.ndarray] | None = None) -> tuple[Path, str]:
        own = folder / "own.toml"
        own.write_text(self.toml)
        path = folder / "lora"
        stored = self.tensors if tensors is None else tensors
        if self.container == "safetensors":
            save_file(stored, path)
        elif self.container == "npz":
            buffer = io.BytesIO()
            np.savez(buffer, **stored)
            path.write_bytes(buffer.getvalue())
        else:
            state = {name: torch.tensor(array) for name, array in stored.items()}
            torch.save({self.select: state} if self.select else state, path)
        return path, str(own)


WORDS = st.sampled_from(["lora_A", "down", "Left", "w1", "a.weight", "x_in"])
SCALE = {
    "alpha/r": lambda r: 3.0 / r,
    "alpha": lambda _: 3.0,
    "alpha/sqrt(r)": lambda r: 3.0 / r**0.5,
    "1": lambda _: 1.0,
}


@st.composite
def written(draw: st.DrawFn, *, weights: bool | None = None) -> Written:
    first = draw(WORDS)
    second = draw(WORDS.filter(lambda word: word != first))
    joint = draw(st.sampled_from([".", "_", "/"]))
    axes = (draw(st.sampled_from(["r in", "in r"])), draw(st.sampled_from(["out r", "r out"])))
    scale = draw(st.sampled_from(sorted(SCALE)))
    container = draw(st.sampled_from(["safetensors", "npz", "torch"]))
    select = draw(st.sampled_from(["", "model"])) if container == "torch" else ""
    prefix = draw(st.sampled_from(["", "wrapped."]))
    frozen = draw(st.booleans()) if weights is None else weights
    lines = [
        'title = "random"',
        f'containers = ["{container}"]',
        f'select = ["{select}"]',
        f'strip = ["{prefix}"]',
        f'scale = "{scale}"',
        *(["alpha = 3"] if scale != "1" else []),
        *(["[weight]", f'name = "{{module}}{joint}frozen"'] if frozen else []),
    ]
    for word, axis in zip((first, second), axes, strict=True):
        escaped = f"{joint}{word}".replace(".", "[.]")
        lines += ["[[tensor]]", f"match = '(?P<module>.+){escaped}'", f'axes = "{axis}"']
    if frozen:
        lines += ["[[ignore]]", "match = '.+frozen'", 'what = "base"', "whole = true"]
    lines += ["[[rename]]", "match = 'layer(?P<n>[0-9]+)'", 'to = "model.layers.{n}.fc"']
    tensors: dict[str, np.ndarray] = {}
    updates: dict[str, np.ndarray] = {}
    copies: dict[str, np.ndarray] = {}
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
    for place, (rows, columns, rank) in enumerate(draw(st.lists(sizes, min_size=1, max_size=3))):
        random = np.random.default_rng(place)
        a, b = random.normal(size=(rank, columns)), random.normal(size=(rows, rank))
        name = f"{prefix}layer{place}{joint}"
        tensors[name + first] = a if axes[0] == "r in" else a.T.copy()
        tensors[name + second] = b if axes[1] == "out r" else b.T.copy()
        updates[f"model.layers.{place}.fc"] = SCALE[scale](rank) * (b @ a)
        copies[f"{name}frozen"] = random.normal(size=(rows, columns))
    stored = {**tensors, **copies} if frozen else tensors
    toml = "\n".join([*lines, ""])
    return Written(toml, stored, updates, container, select, copies if frozen else {})


def read_in(
    folder: str, case: Written, tensors: dict[str, np.ndarray] | None = None
) -> adapterkit.AdapterTensorSet:
    path, own = case.save(Path(folder), tensors)
    return read_handwritten(path, FormatOptions(dialect=own))


PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@given(written())
@PATIENT
def test_random_dialects_read_what_was_written(case: Written) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = delta(read_in(folder, case))
        assert found.keys() == case.updates.keys()
        for module, update in case.updates.items():
            assert np.allclose(found[module], update, rtol=1e-12), module


@given(written(), st.data())
@PATIENT
def test_one_more_tensor_is_never_passed_over(case: Written, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["extra", "layer0.gain", "lora"]))
    with tempfile.TemporaryDirectory() as folder:
        more = {**case.tensors, name: np.zeros((2, 2))}
        with pytest.raises(FormatError, match=f"{name}: dialect .* is not explained"):
            read_in(folder, case, more)


def exchanged(case: Written) -> dict[str, np.ndarray]:
    """Store each module's two factors under each other's names."""
    names = [name for name in case.tensors if name not in case.weights]
    pairs = zip(names[::2], names[1::2], strict=True)
    partner = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    factors = {name: case.tensors[partner[name]] for name in names}
    return {**factors, **case.weights}


def reversed_axes(case: Written) -> dict[str, np.ndarray]:
    """Store every factor turned."""
    factors = {n: t.T.copy() for n, t in case.tensors.items() if n not in case.weights}
    return {**factors, **case.weights}


def both(case: Written) -> dict[str, np.ndarray]:
    """Store the factors turned under each other's names: the update is turned, ranks agree."""
    return {n: t if n in case.weights else t.T.copy() for n, t in exchanged(case).items()}


def square(case: Written) -> bool:
    return all(update.shape[0] == update.shape[1] for update in case.updates.values())


def aligned(case: Written) -> bool:
    """Whether both factors have their rank on the same side, as in B · A."""
    return ('"r in"' in case.toml) == ('"out r"' in case.toml)


@given(written(weights=False).filter(lambda case: not square(case)))
@PATIENT
def test_turned_factors_are_caught_if_one_module_is_not_square(case: Written) -> None:
    swaps = [reversed_axes(case)] + ([exchanged(case)] if aligned(case) else [])
    for tensors in swaps:
        with tempfile.TemporaryDirectory() as folder, pytest.raises(FormatError):
            read_in(folder, case, tensors)


@given(written(weights=True).filter(lambda case: not square(case)))
@PATIENT
def test_a_turned_update_is_caught_by_the_weights_if_one_module_is_not_square(
    case: Written,
) -> None:
    for tensors in (both(case), exchanged(case), reversed_axes(case)):
        with tempfile.TemporaryDirectory() as folder, pytest.raises(FormatError):
            read_in(folder, case, tensors)


def test_a_turned_update_is_caught_by_the_base(tmp_path: Path) -> None:
    base = tmp_path / "config.json"
    base.write_text(json.dumps(LLAMA))
    name = "model.layers.0.mlp.down_proj"
    a, b = np.ones((24, 2)), np.ones((2, 16))
    source = tmp_path / "lora.npz"
    np.savez(source, **{f"{name}_lora_A": b.T, f"{name}_lora_B": a.T})
    assert adapterkit.convert(source, tmp_path / "right", alpha=2, base=base).modules == 1
    np.savez(source, **{f"{name}_lora_A": a, f"{name}_lora_B": b})
    with pytest.raises(IncompatibleBaseError, match="the base has 16 x 24 here"):
        adapterkit.convert(source, tmp_path / "wrong", alpha=2, base=base)


def test_converted_to_gguf_and_back_the_update_is_the_same(tmp_path: Path) -> None:
    base = tmp_path / "config.json"
    base.write_text(json.dumps({**LLAMA, "hidden_size": 32}))
    source = SOUND / "loralib.safetensors"
    report = adapterkit.convert(source, tmp_path / "a.gguf", alpha=8, base=base)
    assert report.max_relative_error <= 1e-6
    wanted = delta(adapterkit.read(source, alpha=8))
    found = delta(adapterkit.read(tmp_path / "a.gguf", base=base))
    assert found.keys() == wanted.keys()
    for module, update in wanted.items():
        assert np.allclose(found[module], update, atol=1e-6)
