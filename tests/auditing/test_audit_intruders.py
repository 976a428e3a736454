"""Intruder dimensions: exact ones are PEFT's, estimates count those that were planted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import decaying, orthonormal
from audit_bases import found_by_name, tuned
from engine import BaseFixture, family_row, make_base
from peft.tuners.lora import intruders as of_peft

from adapterkit import audit
from adapterkit.auditing.intruders import intruders
from adapterkit.lowrank.operators import Operator
from adapterkit.lowrank.sketching import Triplets, leading

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

peft_intruders: Any = of_peft


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "gpt2", "mixtral")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


@pytest.mark.parametrize("scale", [0.5, 8, 64])
def test_exact_intruders_are_those_that_peft_finds(
    bases: dict[str, BaseFixture], tmp_path: Path, scale: float
) -> None:
    live = tuned(
        bases["llama"], tmp_path / "a", target_modules=["q_proj", "o_proj"], lora_alpha=scale
    )
    said: list[str] = []
    peft_intruders.reduce_intruder_dimension(live, logging_sink=said.append)
    counts = {
        line.split(": ")[0].removeprefix("base_model.model."): line.rsplit(" ", 1)[1]
        for line in said
        if "ntruders" in line
    }
    rows = found_by_name(audit(tmp_path / "a", base=bases["llama"].hf, exact=True))
    assert rows.keys() == counts.keys()
    assert any(count.isdigit() for count in counts.values()) == (scale > 1)
    for module, row in rows.items():
        wanted = 0 if counts[module] == "intruders" else int(counts[module])
        assert row.intruder_dimensions == wanted
        assert row.intruder_cosines is not None
        assert sum(value < 0.5 for value in row.intruder_cosines) == wanted


@pytest.mark.parametrize("gain", [0.0, 0.01, 0.5, 2.0, 6.0])
def test_the_estimate_counts_planted_intruders(gain: float) -> None:
    weight = decaying(300, 260, 0.5)
    random = np.random.default_rng(5)
    left, right = orthonormal(random, 300, 3), orthonormal(random, 260, 3)
    changed = Operator(weight, gain * left, np.ascontiguousarray(right.T))
    found = leading(changed, 10, tolerance=1e-3)
    retention = np.linalg.norm(weight.T @ found.left, axis=0) / found.values
    old = np.linalg.svd(weight)[0]
    new = np.linalg.svd(changed.plane.dense())[0][:, :10]
    exact = int((np.abs(new.T @ old).max(axis=1) < 0.5).sum())
    assert exact == (3 if gain >= 0.5 else 0)
    assert int((retention < 0.7).sum()) == exact
    if not gain:
        assert retention == pytest.approx(np.ones(10), abs=1e-5)


@pytest.mark.parametrize("kind", ["falling", "steep", "flat", "bulk"])
@pytest.mark.parametrize("gain", [0.1, 0.3, 0.6, 1.0, 3.0])
def test_the_definition_is_within_the_range(
    gain: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(7)
    rows, columns, rank = 300, 260, 6
    noise = random.standard_normal((rows, columns)) / rows**0.5
    weight = {
        "falling": decaying(rows, columns, 0.5),
        "steep": decaying(rows, columns, 1.0),
        "flat": noise,
        "bulk": noise + 6 * decaying(rows, columns, 1.0),
    }[kind]
    size = gain * np.linalg.norm(weight, 2) * np.linspace(1, 0.3, rank)
    left, right = orthonormal(random, rows, rank), orthonormal(random, columns, rank)
    plain = Operator(weight)
    changed = Operator(weight, left * size, np.ascontiguousarray(right.T))
    old, new = (leading(each, 11, tolerance=1e-3) for each in (plain, changed))
    retention = np.linalg.norm(weight.T @ new.left[:, :10], axis=0) / new.values[:10]
    exact = intruders(plain, changed, old, new, retention, exact=True)
    assert exact.least == exact.count == exact.most
    assert intruders(plain, changed, old, new, retention, exact=False).count == exact.count
    monkeypatch.setattr("adapterkit.auditing.intruders._AFFORDABLE", 0)
    found = intruders(plain, changed, old, new, retention, exact=False)
    assert found.least <= exact.count <= found.most
    assert found.least <= found.count <= found.most
    assert abs(found.count - exact.count) <= (2 if kind == "flat" else 1)
    if kind == "falling":
        assert found.least == exact.count


@pytest.mark.parametrize(("power", "share"), [(0.3, 0.8), (1.0, 0.8), (4.0, 0.0)])
def test_nothing_is_proven_that_is_not_so(
    power: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterkit.auditing.intruders._AFFORDABLE", 0)
    random = np.random.default_rng(3)
    proven = possible = 0
    for planted in np.linspace(0, 0.5, 60):
        plain = Operator(np.diag(np.sort(random.random(200) ** power)[::-1]))
        shares = random.random(200) ** 4
        shares[random.integers(200)] += planted * shares.sum()
        direction = np.sqrt(shares / shares.sum())
        pair = np.stack([direction, np.zeros(200)], axis=1)
        new = Triplets(np.array([2.0, 1.0]), pair, pair, np.zeros(2))
        old = leading(plain, 11, tolerance=1e-3)
        found = intruders(plain, plain, old, new, np.ones(1), exact=False)
        assert not found.least or direction.max() < 0.5
        proven, possible = proven + found.least, possible + int(direction.max() < 0.5)
    assert proven >= share * possible
