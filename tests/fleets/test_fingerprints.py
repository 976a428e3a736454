"""A fingerprint is that of ΔW: held against dense matrices, and against every way to store them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterkit import AdapterTensorSet, Role, TensorKey, Update, convert, read
from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.fingerprints import Fingerprint, fingerprinted, spelling, unit_distance
from adapterkit.lowrank import fingerprints
from adapterkit.lowrank.products import LowRank, stored
from adapterkit.model import Kind

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = [f"model.layers.{i}.self_attn.{m}" for i in range(8) for m in ("q_proj", "v_proj")]


def tensor(values: Any, dtype: DType = DType.F32) -> Any:
    return stored(np.asarray(values, dtype=np.float64), dtype)


def factors(seed: int, out: int = 96, inputs: int = 80, rank: int = 4) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.standard_normal((out, rank)), random.standard_normal((rank, inputs))


def adapter(
    seed: int, dtype: DType = DType.F32, scale: float = 0.5, change: Any = None
) -> AdapterTensorSet:
    updates: list[Update] = []
    for place, name in enumerate(NAMES):
        b, a = factors(1000 * seed + place)
        b, a = change(b, a) if change else (b, a)
        updates.append(Update(name, tensor(a, dtype), tensor(b, dtype), scale))
    return AdapterTensorSet.of(updates, {})


def apart(one: Fingerprint, other: Fingerprint) -> float:
    return float(np.linalg.norm(one.vector - other.vector))


def test_an_inner_product_is_that_of_the_dense_updates_on_average() -> None:
    """Of one pair of matrices, over many names: the mean is ⟨ΔW₁, ΔW₂⟩, the spread that told."""
    b1, a1 = factors(1)
    b2, a2 = factors(2)
    mixed = LowRank(np.hstack([b1, b2]), np.vstack([a1, 0.5 * a2]))
    dense1, dense2 = b1 @ a1, mixed.b @ mixed.a
    exact = float(np.vdot(dense1, dense2))
    random = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(400):
        # The same matrices on other rows and columns of the signs.
        rows, columns = random.permutation(700)[:96], random.permutation(700)[:80]
        sketches: list[Any] = []
        for update in (LowRank(b1, a1), mixed):
            b, a = np.zeros((700, update.rank)), np.zeros((update.rank, 700))
            b[rows], a[:, columns] = update.b, update.a
            sketches.append(fingerprints.sketch(LowRank(b, a)))
        found.append(float(np.vdot(*sketches)))
    spread = float(np.std(found))
    assert abs(np.mean(found) - exact) < 4 * spread / 20
    assert spread < 0.2 * np.linalg.norm(dense1) * np.linalg.norm(dense2)


def test_norms_are_exact_and_unrelated_adapters_far_apart() -> None:
    one, other = fingerprinted(adapter(1)), fingerprinted(adapter(2))
    dense = [0.5 * np.matmul(*factors(1000 + place)) for place in range(len(NAMES))]
    assert one.norm == pytest.approx(np.sqrt(sum(np.sum(d**2) for d in dense)), rel=1e-6)
    assert one.modules[NAMES[3]].norm == pytest.approx(np.linalg.norm(dense[3]), rel=1e-6)
    assert 1.2 < apart(one, other) < 1.6
    assert abs(float(one.vector @ other.vector)) < 5 * fingerprints.COSINE_ERROR


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        (lambda b, a: (b[:, ::-1], a[::-1]), 1e-6),
        (lambda b, a: (8 * b, a / 8), 1e-6),
        (lambda b, a: (b @ np.linalg.inv(gauge()), gauge() @ a), 1e-6),
        (lambda b, a: (np.hstack([b, 0 * b]), np.vstack([a, a])), 1e-6),
    ],
)
def test_a_basis_is_nothing(change: Any, bound: float) -> None:
    one, other = fingerprinted(adapter(1)), fingerprinted(adapter(1, change=change))
    assert apart(one, other) < bound
    assert other.norm == pytest.approx(one.norm, rel=bound)
    assert unit_distance(adapter(1), adapter(1, change=change)) < bound


def gauge() -> Any:
    return np.random.default_rng(5).standard_normal((4, 4)) + 3 * np.eye(4)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(DType.F16, 1e-5, 1e-3), (DType.BF16, 1e-4, 6e-3)]
)
def test_a_dtype_is_its_rounding(dtype: DType, least: float, most: float) -> None:
    exact = unit_distance(adapter(1), adapter(1, dtype))
    assert least < exact < most
    found = apart(fingerprinted(adapter(1)), fingerprinted(adapter(1, dtype)))
    assert found == pytest.approx(exact, rel=0.15)


def test_a_scale_is_a_ratio_and_its_split_between_alpha_and_factors_nothing() -> None:
    one, other = fingerprinted(adapter(1)), fingerprinted(adapter(1, scale=-0.185))
    assert other.norm / one.norm == pytest.approx(0.37, rel=1e-9)
    assert float(np.linalg.norm(one.vector + other.vector)) < 1e-6
    folded = fingerprinted(adapter(1, scale=1.0, change=lambda b, a: (0.5 * b, a)))
    assert apart(one, folded) < 1e-6
    assert folded.norm == pytest.approx(one.norm)


def test_a_near_copy_is_as_far_as_it_is() -> None:
    random = np.random.default_rng(3)
    for share in (1e-4, 1e-2, 0.1):
        noisy = adapter(
            1, change=lambda b, a, s=share: (b + s * random.standard_normal(b.shape), a)
        )
        exact = unit_distance(adapter(1), noisy)
        found = apart(fingerprinted(adapter(1)), fingerprinted(noisy))
        assert exact == pytest.approx(share, rel=0.15)
        assert found == pytest.approx(exact, rel=0.15)


def test_the_fingerprint_of_a_sum_is_the_sum() -> None:
    one, other = (fingerprinted(adapter(seed)) for seed in (1, 2))
    updates = [
        Update(
            name,
            tensor(np.vstack([factors(1000 + i)[1], factors(2000 + i)[1]])),
            tensor(np.hstack([0.3 * factors(1000 + i)[0], 0.7 * factors(2000 + i)[0]])),
            0.5,
        )
        for i, name in enumerate(NAMES)
    ]
    merged = fingerprinted(AdapterTensorSet.of(updates, {}))
    expected = 0.3 * one.norm * one.vector + 0.7 * other.norm * other.vector
    assert np.linalg.norm(merged.norm * merged.vector - expected) < 1e-5 * merged.norm


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_every_format_has_the_same(target: str, tmp_path: Path) -> None:
    base = FIXTURES / "peft" / "base"
    source = FIXTURES / "peft" / "tiny"
    convert(source, tmp_path / "out", to=target, base=base)
    one = fingerprinted(read(source, base=base))
    assert apart(one, fingerprinted(read(tmp_path / "out", base=base))) == 0
    alone = fingerprinted(read(tmp_path / "out"))
    # Without its base a GGUF file's q and k rows cannot be put in order, and that is said.
    assert bool(alone.unplaced) == (apart(one, alone) > 0.1) == (target == "gguf")


def test_experts_are_the_same_one_by_one_and_stacked() -> None:
    random = np.random.default_rng(8)
    gate_up = random.standard_normal((3, 20, 2)), random.standard_normal((3, 2, 12))
    down = random.standard_normal((3, 12, 2)), random.standard_normal((3, 2, 10))
    stem = "model.layers.0.mlp.experts"
    stacks = [
        Update(f"{stem}.gate_up_proj", tensor(gate_up[1]), tensor(gate_up[0]), 2.0, Kind.EXPERTS),
        Update(f"{stem}.down_proj", tensor(down[1]), tensor(down[0]), 2.0, Kind.EXPERTS),
    ]
    other = "model.layers.0.block_sparse_moe.experts"
    singles = [
        Update(f"{other}.{e}.{name}", tensor(a[e]), tensor(b[e][rows]), 2.0)
        for e in range(3)
        for name, (b, a), rows in (
            ("w1", gate_up, slice(0, 10)),
            ("w3", gate_up, slice(10, 20)),
            ("w2", down, slice(None)),
        )
    ]
    one, two = (AdapterTensorSet.of(each, {}) for each in (stacks, singles))
    assert apart(fingerprinted(one), fingerprinted(two)) < 1e-6
    assert fingerprinted(one).norm == pytest.approx(fingerprinted(two).norm)
    assert unit_distance(one, two) < 1e-6
    swapped = AdapterTensorSet.of([*stacks[1:], singles[0]], {})
    assert apart(fingerprinted(one), fingerprinted(swapped)) > 0.1


def test_an_embedding_is_its_table_and_rows_of_zeros_are_nothing() -> None:
    b, a = factors(3, out=32, inputs=50)
    grown = np.hstack([a, np.zeros((4, 14))])
    small, large = (
        fingerprinted(
            AdapterTensorSet.of(
                [Update("model.embed_tokens", tensor(x), tensor(b), 1.0, Kind.EMBEDDING)], {}
            )
        )
        for x in (a, grown)
    )
    table = fingerprinted(
        AdapterTensorSet.of([Update("embed_tokens", tensor(b.T), tensor(a.T), 1.0)], {})
    )
    assert apart(small, large) < 1e-7
    assert apart(small, table) < 1e-7


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj", True),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn", True),
        ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", False),
        ("model.layers.0.mlp.up_proj", "vision_tower.layers.0.mlp.up_proj", False),
        ("model.layers.0.mlp.w1", "model.layers.0.mlp.gate_proj", False),
    ],
)
def test_spellings(first: str, second: str, same: bool) -> None:
    assert (spelling(first) == spelling(second)) is same


def test_a_modules_own_sketch_does_not_know_its_name() -> None:
    whole = adapter(1)
    moved = {k: TensorKey(k.module.replace("layers.0", "layers.9"), k.role) for k in whole.tensors}
    renamed = whole.replace(
        tensors={moved[key]: value for key, value in whole.tensors.items()},
        scales={key.module: 0.5 for key in moved.values()},
    )
    one, other = fingerprinted(whole), fingerprinted(renamed)
    assert one.modules[NAMES[0]] == other.modules[NAMES[0].replace("layers.0", "layers.9")]
    assert apart(one, other) > 0.1


def test_what_it_does_not_cover_is_said_and_what_is_no_number_refused() -> None:
    saved = adapter(1)
    key = TensorKey("lm_head.weight", Role.FULL)
    more = saved.replace(tensors={**saved.tensors, key: tensor(np.ones((4, 4)))})
    assert fingerprinted(more).beside == (str(key),)
    assert apart(fingerprinted(more), fingerprinted(saved)) == 0
    nothing = fingerprinted(adapter(1, scale=0.0))
    assert (nothing.norm, dict(nothing.modules), float(nothing.vector.any())) == (0.0, {}, 0.0)
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj: holds NaN"):
        fingerprinted(adapter(1, change=lambda b, a: (b * np.nan, a)))


def test_the_signs_are_those_of_every_other_machine() -> None:
    """They are in files: another numpy must draw the same."""
    signs = fingerprints._drawn(("out",), 1000, 32)
    digest = hashlib.sha256(signs.astype("<i1").tobytes()).hexdigest()
    assert digest[:16] == "1ebb740c1c0531b7"
    assert abs(signs.mean()) < 0.02
