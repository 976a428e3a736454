"""Laws of the audit: no basis, no scale and no order of rows changes what is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audit_adapters import adapter, layered
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit import audit, compress, suggest
from adapterkit.auditing.report import ModuleAudit

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]
SIZES = {"singular_values", "spectral_norm", "frobenius_norm", "nuclear_norm", "rms"}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Return A and B of any small shape, rank-deficient ones too."""
    out, inputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = random.standard_normal((rank, inputs)), random.standard_normal((out, rank))
    b *= 10.0 ** -(draw(st.floats(0, 3)) * np.arange(rank) / rank)
    if draw(st.booleans()) and rank > 1:
        b[:, -1] = b[:, 0]
    return a, b


def measured(a: Array, b: Array, scale: float = 1.0) -> ModuleAudit:
    return audit(adapter({"layers.3.x": (a, b)}, scale=scale)).modules[0]


# What is about as small as rounding counts or not by chance, and not alike on every processor.
EDGE = 1e-14
COUNTS = {"numerical_rank", "numerical_rank_stored"}


def values(found: ModuleAudit) -> Array:
    return np.array(found.singular_values)


def assert_alike(one: ModuleAudit, other: ModuleAudit, *, factor: float = 1.0) -> None:
    """Compare everything but the balance, which is about the factors; sizes up to `factor`."""
    names = set(ModuleAudit.__slots__) - {"balance", "scale"}
    edges = [np.count_nonzero(s <= EDGE * s.max()) for s in map(values, (one, other))]
    if any(edges):
        names -= {"condition"}
    for name in names:
        left, right = getattr(one, name), getattr(other, name)
        if name in SIZES:
            top = np.max(left) * factor
            assert np.array(right) == pytest.approx(np.array(left) * factor, abs=1e-10 * top), name
        elif name in COUNTS:
            assert abs(left - right) <= max(edges), name
        elif name == "condition" and left and right:
            # Of the smallest singular value: digits are lost in proportion.
            assert right == pytest.approx(left, rel=1e-12 * left), name
        elif isinstance(left, float):
            assert right == pytest.approx(left, rel=1e-8, abs=1e-9), name
        else:
            assert left == right, name


@given(pair=pairs(), power=st.integers(-40, 40), negative=st.booleans())
def test_the_scale_changes_sizes_only(
    pair: tuple[Array, Array], power: int, *, negative: bool
) -> None:
    factor = 10.0**power
    scale = -factor if negative else factor
    assert_alike(measured(*pair), measured(*pair, scale=scale), factor=factor)


@given(pair=pairs(), seed=st.integers(0, 2**32), spread=st.floats(0, 3))
def test_no_basis_of_the_factors_changes_anything(
    pair: tuple[Array, Array], seed: int, spread: float
) -> None:
    a, b = pair
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((len(a), len(a))))[0]
    basis = turn * 10.0 ** (spread * random.uniform(-0.5, 0.5, len(a)))
    assert_alike(measured(a, b), measured(np.linalg.solve(basis, a), b @ basis))


@given(pair=pairs(), seed=st.integers(0, 2**32))
def test_rows_and_columns_may_be_in_any_order(pair: tuple[Array, Array], seed: int) -> None:
    a, b = pair
    random = np.random.default_rng(seed)
    moved = a[:, random.permutation(a.shape[1])], b[random.permutation(len(b))]
    assert_alike(measured(a, b), measured(*moved))


@given(pair=pairs())
def test_every_metric_is_within_its_bounds(pair: tuple[Array, Array]) -> None:
    found = measured(*pair)
    most = min(found.rank, *found.shape) * (1 + 1e-12)
    for name in ("stable_rank", "effective_rank", "effective_rank_energy", "participation_ratio"):
        assert 1 - 1e-12 <= getattr(found, name) <= most, name
    assert found.energy_rank_90 <= found.energy_rank_95 <= found.energy_rank_99 <= most
    assert 0 <= found.energy_error_99 <= 0.1 + 1e-9
    assert 0 <= found.energy_error_90 <= 0.1**0.5 + 1e-9
    assert found.numerical_rank_stored <= found.numerical_rank <= most
    assert list(found.singular_values) == sorted(found.singular_values, reverse=True)


@given(pair=pairs(), rank=st.integers(1, 6))
def test_compression_costs_what_was_predicted(pair: tuple[Array, Array], rank: int) -> None:
    a, b = pair
    whole = adapter({"x": (a, b)}, scale=0.3)
    result = compress(whole, rank=rank)
    cut = next(result.adapter.pairs())
    apart = np.linalg.norm(cut.b.numpy() @ cut.a.numpy() - b @ a) / np.linalg.norm(b @ a)
    assert apart == pytest.approx(result.report.predicted_error, abs=1e-9)
    assert result.report.measured_error == pytest.approx(apart, abs=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), tol=st.floats(0.001, 0.9), rank=st.integers(2, 8))
def test_a_plan_for_its_own_size_is_no_worse(seed: int, tol: float, rank: int) -> None:
    audited = audit(adapter(layered(2, rank=rank, seed=seed))).adapters[0]
    plan = suggest(audited, tol=tol)
    assert plan.relative_error <= tol * (1 + 1e-9)
    again = suggest(audited, budget=plan.parameters)
    assert again.relative_error <= plan.relative_error * (1 + 1e-9) + 1e-12
    assert again.parameters <= plan.parameters
