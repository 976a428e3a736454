"""Updates that are equal number for number are found so without arithmetic, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from adapterkit.dtype import DType
from adapterkit.errors import UncheckableError
from adapterkit.lowrank.differences import difference
from adapterkit.model import Update
from adapterkit.tensor import LazyTensor


def update(a: LazyTensor, b: LazyTensor, scale: float = 2.0) -> Update:
    return Update("module", a, b, scale)


def pair() -> tuple[Update, Update]:
    """Return an update in bfloat16, and what it is widened to."""
    random = np.random.default_rng(0)
    a, b = (
        LazyTensor.of(random.standard_normal(shape), DType.BF16) for shape in ((4, 40), (30, 4))
    )
    return update(a, b), update(a.cast(DType.F32), b.cast(DType.F32))


def test_what_was_widened_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise AssertionError

    narrow, wide = pair()
    monkeypatch.setattr("adapterkit.lowrank.distances.measured", none)
    for first, second in ((narrow, wide), (wide, narrow), (narrow, narrow)):
        assert difference(first, second).relative_error == 0.0
        louder = update(second.a, second.b, 3.0)
        assert difference(first, louder).relative_error == pytest.approx(0.5)


def test_nothing_at_another_scale_is_nothing() -> None:
    narrow, _ = pair()
    zeros = LazyTensor.of(np.zeros((30, 4), np.float32))
    one, other = update(narrow.a, zeros, 2.0), update(narrow.a, zeros, 1.0)
    assert difference(one, other).relative_error == 0.0


def test_one_number_that_is_another_is_measured() -> None:
    narrow, wide = pair()
    values = wide.b.numpy().copy()
    values[3, 2] = np.nextafter(values[3, 2], np.float32(9))
    other = update(wide.a, LazyTensor.of(values))
    wanted = np.linalg.norm(other.delta() - narrow.delta()) / np.linalg.norm(narrow.delta())
    assert difference(narrow, other).relative_error == pytest.approx(wanted, rel=1e-6)
    assert wanted > 0


def test_nan_is_equal_to_nothing() -> None:
    narrow, _ = pair()
    values = narrow.b.numpy().copy()
    values[0, 0] = np.nan
    broken = update(narrow.a, LazyTensor.of(values, DType.BF16))
    wide = update(broken.a.cast(DType.F32), broken.b.cast(DType.F32))
    assert np.isnan(difference(broken, wide).relative_error)


def test_what_float64_has_no_room_for_is_not_the_same() -> None:
    narrow, _ = pair()
    for scale in (1e308, 9e307):
        first = update(narrow.a, LazyTensor.of(np.full((30, 4), 1e10)), 1e308)
        second = update(narrow.a, LazyTensor.of(np.full((30, 4), 1e9)), scale)
        with pytest.raises(UncheckableError):
            difference(first, second)
