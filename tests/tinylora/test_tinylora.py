"""The mathematics of TinyLoRA against dense float64, brute force and published values."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora import streams
from adapterkit.tinylora.adapter import TinyModule, balanced
from adapterkit.tinylora.fitting import fit
from adapterkit.tinylora.frozen import flip_error, frozen_svd, like
from adapterkit.tinylora.groups import (
    layer_index,
    pack_groups,
    partition,
    peft_group_count,
    peft_groups,
)
from adapterkit.tinylora.planner import MODES, SCRIPT_CANDIDATES, planned

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def decoder(layers: int) -> list[str]:
    """Return the modules of a decoder in registration order."""
    attention = [f"self_attn.{kind}" for kind in KINDS[:4]]
    mlp = [f"mlp.{kind}" for kind in KINDS[4:]]
    return [f"model.layers.{i}.{each}" for i in range(layers) for each in (*attention, *mlp)]


def kinds(names: list[str]) -> Counter[str]:
    return Counter(name.rpartition(".")[2] for name in names)


# Plans: values of the pack's own planner, and the groups that each plan really makes.


@pytest.mark.parametrize(
    ("modules", "budget", "size", "factor", "parameters"),
    [
        (168, 13, 1, 13, 13),
        (196, 13, 1, 16, 13),
        (224, 13, 1, 18, 13),
        (252, 13, 1, 20, 13),
        (560, 13, 1, 44, 13),
        (14, 13, 4, 5, 12),
        (196, 120, 4, 7, 112),
    ],
)
def test_plan_of_the_pack(
    modules: int, budget: int, size: int, factor: int, parameters: int
) -> None:
    plan = planned("tiled", Counter({"q_proj": modules}), budget, SCRIPT_CANDIDATES)
    assert (plan.projection_dim, plan.tie_factor, plan.parameters) == (size, factor, parameters)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 2, 5, 13, 64, 1000])
@pytest.mark.parametrize("layers", [1, 2, 3, 24])
def test_plan_is_the_best_there_is(mode: str, budget: int, layers: int) -> None:
    names = decoder(layers)
    plan = planned(mode, kinds(names), budget)
    if mode == "peft":
        assert plan.weight_tying is not None
        groups = len(set(peft_groups(len(names), plan.weight_tying)))
        every = {peft_group_count(len(names), 1 - g / len(names)) for g in range(1, len(names) + 1)}
    else:
        made = pack_groups(names, mode, plan.tie_factor or 1)
        groups = len(set(made.values()))
        factors = range(1, len(names) + 1)
        every = {len(set(pack_groups(names, mode, factor).values())) for factor in factors}
    assert plan.groups == groups
    assert plan.parameters == groups * plan.projection_dim
    reachable = {size * count for size, count in product((1, 2, 4, 8), every)}
    assert abs(plan.parameters - budget) == min(abs(each - budget) for each in reachable)


def test_plan_without_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="no projection sizes"):
        planned("tiled", Counter({"q_proj": 4}), 13, [])


# Groups.


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj", 12),
        ("transformer.h.3.mlp.11.c_fc", 3),
        ("encoder.block4b.fc1", 4),
        ("lm_head", -1),
    ],
)
def test_layer_of_a_name(name: str, layer: int) -> None:
    assert layer_index(name) == layer


def test_tiles_follow_the_alphabet_inside_a_layer() -> None:
    groups = pack_groups(decoder(2), "tiled", 4)
    first = {name.rpartition(".")[2] for name, group in groups.items() if group == 0}
    assert first == {"down_proj", "gate_proj", "up_proj", "k_proj"}
    assert [list(groups.values()).count(group) for group in range(4)] == [4, 4, 4, 2]
    assert list(groups) == decoder(2)


def test_layers_are_sorted_as_numbers() -> None:
    groups = pack_groups(decoder(12), "tiled", 7)
    assert all(group == layer_index(name) for name, group in groups.items())


def test_structured_ties_stay_inside_a_kind() -> None:
    groups = pack_groups(decoder(3), "structured", 2)
    members = [sorted(group) for group in partition(groups)]
    assert all(len({name.rpartition(".")[2] for name in group}) == 1 for group in members)
    assert sorted(len(group) for group in members) == [1] * 7 + [2] * 7
    assert groups["model.layers.0.mlp.down_proj"] == 0
    assert groups["model.layers.2.self_attn.v_proj"] == 13


@pytest.mark.parametrize(
    ("modules", "tying", "sizes"),
    [
        (14, 0.0, [1] * 14),
        (14, 0.3, [1] * 9 + [5]),
        (14, 0.5, [2] * 7),
        (14, 0.9, [14]),
        (14, 1.0, [14]),
        (10, 0.25, [1] * 7 + [3]),
        (5, 0.5, [2, 3]),
    ],
)
def test_groups_of_peft(modules: int, tying: float, sizes: list[int]) -> None:
    groups = peft_groups(modules, tying)
    assert groups == sorted(groups)
    assert list(Counter(groups).values()) == sizes


# Streams.


def test_streams_are_those_of_torch() -> None:
    for size, rank in ((1, 1), (13, 1), (4, 2), (13, 2), (64, 4)):
        name = "model.layers.0.self_attn.q_proj"
        digest = hashlib.sha256(name.encode()).digest()
        seed = 7 + int.from_bytes(digest[:4], "big") % 100000
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, rank, rank, generator=generator) / rank**0.5
        assert np.array_equal(streams.pack_projection(name, 7, size, rank), drawn.numpy())


def test_stream_of_an_absurd_size_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not plausible"):
        streams.pack_projection("q", 0, 1 << 20, 1 << 10)


# The frozen SVD.


def test_error_of_one_turned_pair_is_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    for rank in (2, 3, 5):
        s, core = np.sort(generator.random(rank))[::-1], generator.normal(size=(rank, rank))
        update = s[:, None] * core
        found: list[float] = []
        for pair in range(rank):
            sign = np.ones(rank)
            sign[pair] = -1
            turned = sign[:, None] * update * sign
            found.append(float(np.linalg.norm(turned - update) / np.linalg.norm(update)))
        assert flip_error(s, core) == pytest.approx(max(found), rel=1e-12)
    assert flip_error(np.ones(1), np.ones((1, 1))) == 0
    assert flip_error(np.ones(3), np.diag([1.0, 2.0, 3.0])) == 0


def test_signs_of_another_computation_are_taken() -> None:
    weight = LazyTensor.of(np.random.default_rng(1).normal(size=(9, 6)), DType.F32)
    frozen = frozen_svd(weight, 3, None, "float64")
    sign = np.array([1, -1, -1], dtype=np.float32)
    again = like(frozen, frozen.u * sign)
    assert np.array_equal(again.u, frozen.u * sign)
    assert np.array_equal(again.vt, frozen.vt * sign[:, None])


def test_gap_counts_the_value_that_follows() -> None:
    for values, kept, gap in (([4, 2, 1.9], 2, 0.025), ([4, 2, 0.1], 2, 0.475), ([4, 3], 2, 0.25)):
        weight = LazyTensor.of(np.diag(np.array(values, dtype=float)), DType.F32)
        assert frozen_svd(weight, kept, None, "float64").relative_gap == pytest.approx(gap)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(1e-8, 1e3),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_balanced_split_is_exact_and_balanced(
    rows: int, columns: int, rank: int, scale: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(rows, rank)), generator.normal(size=(rank, columns))
    core = scale * generator.normal(size=(rank, rank))
    a, b = balanced(left, right, core)
    truth = left @ core @ right
    assert a.shape[0] == b.shape[1] == min(rows, columns, rank)
    assert np.linalg.norm(b @ a - truth) <= 1e-10 * scale * 100
    halves = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
    assert halves[0] == pytest.approx(halves[1], rel=1e-9, abs=1e-12 * scale**0.5)


# Least squares.


def module(
    name: str, group: int, generator: np.random.Generator, size: int, **shape: int
) -> TinyModule:
    rows, columns, rank = shape.get("rows", 9), shape.get("columns", 7), shape.get("rank", 2)

    def drawn(*sizes: int) -> LazyTensor:
        return LazyTensor.of(generator.normal(size=sizes), DType.F64)

    return TinyModule(
        name=name,
        left=drawn(rows, rank),
        right=drawn(rank, columns),
        projection=drawn(size, rank, rank),
        group=group,
        scale=0.7,
    )


def lora(modules: list[TinyModule], generator: np.random.Generator, rank: int) -> AdapterTensorSet:
    tensors: dict[TensorKey, LazyTensor] = {}
    for each in modules:
        a = generator.normal(size=(rank, each.right.shape[1]))
        b = generator.normal(size=(each.left.shape[0], rank))
        tensors[TensorKey(each.name, Role.LORA_A)] = LazyTensor.of(a, DType.F64)
        tensors[TensorKey(each.name, Role.LORA_B)] = LazyTensor.of(b, DType.F64)
    return AdapterTensorSet(tensors=tensors, scales={each.name: 1.3 for each in modules})


def columns_of(each: TinyModule) -> np.ndarray[Any, Any]:
    """Return the dense update of every coefficient, one column each."""
    left, right = each.left.numpy(), each.right.numpy()
    updates = [each.scale * left @ p @ right for p in each.projection.numpy()]
    return np.stack([update.reshape(-1) for update in updates], 1)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_fit_is_the_dense_least_squares(size: int) -> None:
    generator = np.random.default_rng(size)
    modules = [
        module("a", 0, generator, size),
        module("b", 0, generator, size, rows=5, columns=11),
        module("c", 1, generator, size),
    ]
    adapter = lora(modules, generator, 3)
    found = fit(adapter, modules)
    pairs = {pair.module: pair for pair in adapter.pairs()}
    energy = lost = 0.0
    for group in (0, 1):
        members = [each for each in modules if each.group == group]
        matrix = np.concatenate([columns_of(each) for each in members])
        wanted = [
            1.3 * (pairs[e.name].b.numpy() @ pairs[e.name].a.numpy()).reshape(-1) for e in members
        ]
        best, *_ = np.linalg.lstsq(matrix, np.concatenate(wanted), rcond=None)
        vector = found.vectors[group].numpy()
        assert np.linalg.norm(matrix @ (vector - best)) <= 1e-6 * np.linalg.norm(matrix @ best)
        for each, target in zip(members, wanted, strict=True):
            row = next(row for row in found.modules if row.module == each.name)
            rest = float(np.linalg.norm(columns_of(each) @ best - target))
            norm = float(np.linalg.norm(target))
            assert row.residual == pytest.approx(rest / norm, rel=1e-5)
            assert row.norm == pytest.approx(norm)
            # The nearest update with any middle: two orthogonal projections.
            onto_left, onto_right = (
                x @ np.linalg.pinv(x) for x in (each.left.numpy(), each.right.numpy().T)
            )
            dense = target.reshape(len(onto_left), -1)
            inside = onto_left @ dense @ onto_right
            assert row.out_of_reach == pytest.approx(np.linalg.norm(dense - inside) / norm)
            energy, lost = energy + norm**2, lost + rest**2
    assert found.residual == pytest.approx((lost / energy) ** 0.5, rel=1e-5)


def test_fit_of_enough_coefficients_leaves_only_what_is_out_of_reach() -> None:
    generator = np.random.default_rng(5)
    modules = [module("a", 0, generator, 4)]
    found = fit(lora(modules, generator, 3), modules)
    assert found.residual == pytest.approx(found.out_of_reach, rel=1e-6)
    few = [module("a", 0, generator, 3)]
    found = fit(lora(few, generator, 3), few)
    assert found.residual > 1.001 * found.out_of_reach


def test_fit_counts_a_module_that_the_adapter_leaves_alone() -> None:
    generator = np.random.default_rng(6)
    modules = [module("a", 0, generator, 2), module("b", 0, generator, 2)]
    adapter = lora(modules[:1], generator, 2)
    found = fit(adapter, modules)
    (pair,) = adapter.pairs()
    wanted = np.zeros((2, 63))
    wanted[0] = 1.3 * (pair.b.numpy() @ pair.a.numpy()).reshape(-1)
    matrix = np.concatenate([columns_of(each) for each in modules])
    best, *_ = np.linalg.lstsq(matrix, wanted.reshape(-1), rcond=None)
    assert np.allclose(found.vectors[0].numpy(), best, rtol=1e-6)
    assert found.modules[1].residual is None


def test_fit_takes_embeddings_as_they_are_stored() -> None:
    generator = np.random.default_rng(7)
    plain = [module("a", 0, generator, 3)]
    adapter = lora(plain, generator, 2)
    roles = {Role.LORA_B: Role.EMBEDDING_A, Role.LORA_A: Role.EMBEDDING_B}
    turned = {
        TensorKey(key.module, roles[key.role]): LazyTensor.of(tensor.numpy().T, DType.F64)
        for key, tensor in reversed(adapter.tensors.items())
    }
    first, second = (
        fit(each, plain).vectors[0].numpy() for each in (adapter, adapter.replace(tensors=turned))
    )
    assert np.allclose(first, second, rtol=1e-6)
