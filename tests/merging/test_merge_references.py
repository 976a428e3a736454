"""Methods that carry another program's name do what that program does, on the same updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merge_oracle as oracle
import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from adapterkit import merge, merge_methods
from adapterkit.errors import UsageError
from adapterkit.merging.aliases import ALIASES
from adapterkit.merging.registry import Kind
from adapterkit.merging.registry import method as find

TRUTH = np.load(Path(__file__).parents[2] / "fixtures/mergekit/truth.npz", allow_pickle=False)
CASES = json.loads(str(TRUTH["cases"]))
M = "model.layers.0.self_attn.q_proj"
FACTORS = [(TRUTH[f"b{place}"], TRUTH[f"a{place}"]) for place in range(3)]
DENSE = [b @ a for b, a in FACTORS]


def merged(method: str, count: int, **settings: Any) -> Any:
    """Return ΔW of a merge at the rank that holds anything."""
    spec = find(method)
    if spec.kind is Kind.ELEMENTWISE and settings.get("space", spec.space) == "delta":
        settings["rank"] = min(DENSE[0].shape)
    adapters = [oracle.adapter({M: (b, a, 1.0)}) for b, a in FACTORS[:count]]
    return oracle.deltas(merge(adapters, method=method, **settings).adapter)[M]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
def test_mergekit_gives_the_same(number: int, case: list[Any]) -> None:
    method, weights, given = case
    count = weights if isinstance(weights, int) else len(weights)
    settings: dict[str, Any] = {} if isinstance(weights, int) else {"weights": weights}
    params = {name: value for name, value in given.items() if name == "gamma"}
    density = given.get("density", given.get("select_topk"))
    settings |= {"params": params} if params else {}
    settings |= {} if density is None else {"density": density}
    # mergekit's ties divides by the weights of those that agree, whatever their sum.
    settings["normalize"] = given.get("normalize", method == "ties")
    found = merged(method, count, **settings)
    # Its Karcher mean ends at 1e-5; all else is float64, with magnitudes compared in float32.
    allowed = 1e-4 if method == "karcher" else 1e-7
    assert oracle.relative(found, TRUTH[f"{method}/{number}"]) < allowed


@pytest.mark.parametrize("density", [0.31, 0.6])
def test_peft_gives_the_same(density: float) -> None:
    updates = [torch.tensor(x) for x in DENSE]
    weights = [0.5, 0.3, 0.4]
    kept = merge_utils.magnitude_prune(updates, torch.tensor(weights, dtype=torch.float64), density)
    found = merged("magnitude_prune_svd", 3, weights=weights, density=density)
    assert oracle.relative(found, kept.numpy()) < 1e-12
    equal = torch.tensor([1.0, 1.0, 1.0])
    mean = merge_utils.ties(updates, equal, density)
    assert oracle.relative(merged("ties_svd", 3, density=density), mean.numpy()) < 1e-12


def isotropic(matrix: Any) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return float(s.mean()) * u @ vt


def stored_cores() -> tuple[list[Any], Any, Any]:
    """Return the cores of the factors as they are stored, and the bases."""
    left = np.linalg.svd(np.hstack([b for b, _ in FACTORS]), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack([a for _, a in FACTORS]), full_matrices=False)[2]
    width = np.linalg.matrix_rank(np.hstack([b for b, _ in FACTORS]))
    left, right = left[:, :width], right[:width]
    return [left.T @ x @ right.T for x in DENSE], left, right


def polar(matrix: Any) -> Any:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def iso_cts(cores: list[Any], fraction: float) -> Any:
    """The published loop, on cores: slots of the tasks first, then the common ones."""
    size, count = min(cores[0].shape), len(cores)
    own = round((size - int(size * fraction)) / count)
    common = size - own * count
    u, s, vt = np.linalg.svd(sum(cores), full_matrices=False)
    lefts, values, rights = [], [], []
    for core in cores:
        rest = core - u[:, :common] @ u[:, :common].T @ core
        x, y, z = np.linalg.svd(rest, full_matrices=False)
        lefts.append(x[:, :own])
        values.append(y[:own])
        rights.append(z[:own])
    left = polar(np.hstack([*lefts, u[:, :common]]))
    right = polar(np.vstack([*rights, vt[:common]]))
    level = float(np.concatenate([*values, s[:common]]).mean())
    return level * left @ right


def cart(cores: list[Any], fraction: float, coefficient: float) -> Any:
    mean = sum(cores) / len(cores)
    total = np.zeros_like(mean)
    for core in cores:
        u, s, vt = np.linalg.svd(core - mean, full_matrices=False)
        kept = int(np.ceil(fraction * s.size))
        total += (u[:, :kept] * s[:kept]) @ vt[:kept]
    return mean + coefficient * total


def tsv(cores: list[Any]) -> Any:
    kept = min(cores[0].shape) // len(cores)
    parts = [np.linalg.svd(core, full_matrices=False) for core in cores]
    left = polar(np.hstack([u[:, :kept] for u, _, _ in parts]))
    right = polar(np.vstack([vt[:kept] for _, _, vt in parts]))
    return left * np.concatenate([s[:kept] for _, s, _ in parts]) @ right


def test_core_space_is_that_of_the_published_code() -> None:
    cores, left, right = stored_cores()
    back = lambda core: left @ core @ right  # noqa: E731
    trimmed = [oracle.trimmed(core, 0.6) for core in cores]
    wanted = back(oracle.elected(trimmed, [1 / 3] * 3))
    assert oracle.relative(merged("core", 3, density=0.6), wanted) < 1e-9
    assert oracle.relative(merged("core-balanced", 3, density=0.6), wanted) > 1e-2
    assert oracle.relative(merged("iso_c", 3), back(isotropic(sum(cores)))) < 1e-9
    assert oracle.relative(merged("iso_cts", 3), back(iso_cts(cores, 0.8))) < 1e-9
    few = merged("iso-cts-core", 3, params={"common": 0.4})
    assert oracle.relative(few, back(iso_cts(cores, 0.4))) < 1e-9
    assert oracle.relative(merged("tsv", 3, space="core"), back(tsv(cores))) < 1e-9
    found = merged("cart", 3, density=0.2, params={"coefficient": 0.7})
    assert oracle.relative(found, back(cart(cores, 0.2, 0.7))) < 1e-9


def test_tsv_of_whole_matrices_keeps_what_the_published_code_keeps() -> None:
    # So narrow that a third of the directions is no more than any update has: beyond, the published
    # code makes arbitrary ones orthogonal to the updates' own.
    narrow = [(b, a[:, :10]) for b, a in FACTORS]
    adapters = [oracle.adapter({M: (b, a, 1.0)}) for b, a in narrow]
    found = oracle.deltas(merge(adapters, method="tsv").adapter)[M]
    assert oracle.relative(found, tsv([b @ a for b, a in narrow])) < 1e-9


def test_every_name_of_another_program_is_a_method_here() -> None:
    own = {spec.name for spec in merge_methods()}
    assert {each.method for each in ALIASES} <= own
    assert not {each.name for each in ALIASES} & own
    for name in ("linear_peft", "della-linear", "dare-linear", "core_balanced"):
        assert find(name).name in own


def test_a_name_of_another_meaning_is_told() -> None:
    adapters = [oracle.adapter({M: (b, a, 1.0)}) for b, a in FACTORS]
    assert "dare_linear is dare here" in merge(adapters, method="dare_linear").report.warnings[0]
    assert "iso_c is iso-c-core here" in merge(adapters, method="iso_c").report.warnings[0]
    assert not merge(adapters, method="task_arithmetic").report.warnings


def test_weights_that_sum_to_zero_are_not_normalised() -> None:
    adapters = [oracle.adapter({M: (b, a, 1.0)}) for b, a in FACTORS[:2]]
    with pytest.raises(UsageError, match="sum to 0"):
        merge(adapters, weights=[0.5, -0.5], normalize=True)
