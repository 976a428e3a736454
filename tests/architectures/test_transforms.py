"""Every row order is a permutation that its inverse undoes, and what its formula says it is.

The same for what is done to factors: splitting, stacking and turning have exact inverses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit import factors
from adapterkit.architectures.transforms import TRANSFORMS, inverse
from adapterkit.model import Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.slow

SMALL = st.integers(1, 4)


@st.composite
def rope(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    heads, half = draw(SMALL), draw(SMALL)
    return heads * 2 * half, (heads,)


@st.composite
def halved(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    heads, half, rest = draw(SMALL), draw(SMALL), draw(st.integers(0, 3))
    return heads * (2 * half + rest), (heads, 2 * half)


@st.composite
def qkv(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    groups, shared, size = draw(SMALL), draw(SMALL), draw(SMALL)
    return groups * (shared + 2) * size, (groups * shared, groups)


@st.composite
def interleaved(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    parts, size = draw(SMALL), draw(SMALL)
    return parts * size, (parts,)


@st.composite
def gathered(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    groups, heights = draw(SMALL), draw(st.lists(SMALL, min_size=1, max_size=4))
    return groups * sum(heights), (groups, *heights)


@st.composite
def tiled(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    groups, members, size, kept = draw(SMALL), draw(SMALL), draw(SMALL), draw(st.integers(0, 5))
    return kept + groups * members * size, (groups, members, kept)


# Rows and arguments that a transform takes.
ARGUMENTS = {
    "rope": rope(),
    "halved": halved(),
    "qkv": qkv(),
    "interleaved": interleaved(),
    "gathered": gathered(),
    "tiled": tiled(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(data=st.data())
def test_row_order_is_undone_by_its_inverse(name: str, data: st.DataObject) -> None:
    rows, arguments = data.draw(ARGUMENTS[name])
    order = TRANSFORMS[name](rows, *arguments)
    assert sorted(order.tolist()) == list(range(rows))
    weight = np.random.default_rng(rows).normal(size=(rows, 3))
    assert np.array_equal(weight[order][inverse(order)], weight)
    assert np.array_equal(weight[inverse(order)][order], weight)


def place_of_rotated_row(row: int, rows: int, heads: int) -> int:
    """Where row 2j + t of a head comes from: j-th of half t."""
    size = rows // heads
    head, inner = divmod(row, size)
    j, half = divmod(inner, 2)
    return head * size + half * (size // 2) + j


@given(rope())
def test_rotary_rows_come_from_both_halves_in_turn(case: tuple[int, tuple[int, ...]]) -> None:
    rows, (heads,) = case
    order = TRANSFORMS["rope"](rows, heads)
    assert order.tolist() == [place_of_rotated_row(row, rows, heads) for row in range(rows)]


@given(rope())
def test_halving_undoes_the_rotary_order(case: tuple[int, tuple[int, ...]]) -> None:
    rows, (heads,) = case
    order = TRANSFORMS["halved"](rows, heads, rows // heads)
    assert order.tolist() == inverse(TRANSFORMS["rope"](rows, heads)).tolist()


@given(qkv())
def test_grouped_rows_become_queries_then_keys_then_values(
    case: tuple[int, tuple[int, ...]],
) -> None:
    rows, (heads, groups) = case
    size = rows // (heads + 2 * groups)
    labels = [
        (kind, group, head, row)
        for group in range(groups)
        for kind, head in [*(("q", h) for h in range(heads // groups)), ("k", 0), ("v", 0)]
        for row in range(size)
    ]
    moved = [labels[place] for place in TRANSFORMS["qkv"](rows, heads, groups)]
    assert moved == sorted(labels, key=lambda label: ("qkv".index(label[0]), *label[1:]))


@given(interleaved())
def test_rows_dealt_out_in_turn_become_blocks(case: tuple[int, tuple[int, ...]]) -> None:
    rows, (parts,) = case
    order = TRANSFORMS["interleaved"](rows, parts)
    assert order.tolist() == sorted(range(rows), key=lambda row: (row % parts, row))


@given(gathered())
def test_parts_of_groups_become_blocks(case: tuple[int, tuple[int, ...]]) -> None:
    rows, (groups, *heights) = case
    labels = [
        (part, group, row)
        for group in range(groups)
        for part, height in enumerate(heights)
        for row in range(height)
    ]
    moved = [labels[place] for place in TRANSFORMS["gathered"](rows, groups, *heights)]
    assert moved == sorted(labels)


@given(tiled())
def test_heads_are_dealt_out_group_by_group(case: tuple[int, tuple[int, ...]]) -> None:
    rows, (groups, members, kept) = case
    size = (rows - kept) // (groups * members)
    labels = [
        (member, group, row)
        for group in range(groups)
        for member in range(members)
        for row in range(size)
    ]
    order = TRANSFORMS["tiled"](rows, groups, members, kept).tolist()
    assert order[:kept] == list(range(kept))
    assert [labels[place - kept] for place in order[kept:]] == sorted(labels)


def test_one_group_of_heads_is_left_as_it_is() -> None:
    # Multi-query attention: all queries, the key, the value.
    assert TRANSFORMS["qkv"](24, 4, 1).tolist() == list(range(24))


def pair(out: int, columns: int, rank: int, seed: int = 0, lead: tuple[int, ...] = ()) -> Update:
    random = np.random.default_rng(seed)
    a = random.normal(size=(*lead, rank, columns)).astype(np.float32)
    b = random.normal(size=(*lead, out, rank)).astype(np.float32)
    return Update("module", LazyTensor.of(a), LazyTensor.of(b), 0.5)


def dense(update: Update) -> Array:
    return update.scale * (update.b.numpy().astype(float) @ update.a.numpy().astype(float))


def bits(update: Update) -> tuple[bytes, bytes, float]:
    return bytes(update.a.tobytes()), bytes(update.b.tobytes()), update.scale


def split(update: Update) -> Update:
    parts = [factors.slice_rows(update, 0, 5), factors.slice_rows(update, 5, 12)]
    return factors.fuse_rows(parts, [5, 7], update.module)


def stacked(update: Update) -> Update:
    parts = factors.unstack_experts(update, ["a", "b", "c"])
    return factors.stack_experts(parts, update.module)


UNDONE: dict[str, tuple[Callable[[Update], Update], tuple[int, ...]]] = {
    "rows": (lambda p: factors.take_rows(factors.take_rows(p, ORDER), inverse(ORDER)), ()),
    "columns": (lambda p: factors.take_columns(factors.take_columns(p, ORDER), inverse(ORDER)), ()),
    "split": (split, ()),
    "heads": (lambda p: factors.join_heads(factors.split_heads(p, 4)), ()),
    "turned": (lambda p: factors.transposed(factors.transposed(p)), ()),
    "turned experts": (lambda p: factors.transposed(factors.transposed(p)), (3,)),
    "experts": (stacked, (3,)),
}
ORDER = np.random.default_rng(1).permutation(12)


@pytest.mark.parametrize("name", UNDONE)
@given(rank=SMALL, seed=st.integers(0, 99))
def test_factors_are_bit_for_bit_those_of_before(name: str, rank: int, seed: int) -> None:
    there_and_back, lead = UNDONE[name]
    update = pair(12, 12, rank, seed, lead)
    assert bits(there_and_back(update)) == bits(update)


@given(ranks=st.tuples(SMALL, SMALL), scales=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 2))
def test_parts_of_their_own_are_fused_into_one_update(
    ranks: tuple[int, int], scales: tuple[float, float]
) -> None:
    upper, lower = (
        replace(pair(rows, 6, rank, rows), scale=scale)
        for rows, rank, scale in zip((5, 7), ranks, scales, strict=True)
    )
    fused = dense(factors.fuse_rows([upper, None, lower], [5, 2, 7], "fused"))
    expected = np.concatenate([dense(upper), np.zeros((2, 6)), dense(lower)])
    np.testing.assert_allclose(fused, expected, rtol=1e-6, atol=1e-7)
