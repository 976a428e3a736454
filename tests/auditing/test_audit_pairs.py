"""Adapters against each other: every number against dense matrices, and the ends of every scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, orthonormal, planted, written
from terminal import BASE, PEFT, TINY, invoke

from adapterkit import UncheckableError, audit, convert
from adapterkit.model import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.auditing.interference import ModuleInterference, PairInterference

Array = np.ndarray[Any, Any]
NAME = "model.layers.0.self_attn.q_proj"


def pair_of(one: Any, other: Any, **more: Any) -> PairInterference:
    """Return the comparison of two adapters of one module."""
    scales = more.pop("scales", (1.0, 1.0))
    kinds = more.pop("kinds", {})
    found = audit(
        *(
            adapter({NAME: factors}, scale=scale, kinds=kinds)
            for factors, scale in zip((one, other), scales, strict=True)
        )
    )
    assert found.interference is not None
    return found.interference.pairs[0]


def module_of(one: Any, other: Any, **more: Any) -> ModuleInterference:
    return pair_of(one, other, **more).modules[0]


def task_interference(updates: list[Array], ranks: list[int]) -> float:
    """Return the published formula on singular vectors side by side."""
    parts = [np.linalg.svd(update) for update in updates]
    u = np.concatenate([p[0][:, :r] for p, r in zip(parts, ranks, strict=True)], axis=1)
    v = np.concatenate([p[2][:r].T for p, r in zip(parts, ranks, strict=True)], axis=1)
    s = np.concatenate([p[1][:r] for p, r in zip(parts, ranks, strict=True)])
    eye = np.eye(len(s))
    return float(np.abs((u.T @ u - eye) @ np.diag(s) @ (v.T @ v - eye)).sum())


@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, -0.5), (1e-12, 3.0)])
def test_every_number_against_dense_matrices(scales: tuple[float, float]) -> None:
    first, second = gaussian(40, 28, 4, seed=1), gaussian(40, 28, 6, seed=2)
    second[1][:, :3] += first[1][:, :3]
    second[0][:2] -= first[0][:2]
    d1, d2 = (
        s * b.astype(np.float64) @ a for s, (a, b) in zip(scales, (first, second), strict=True)
    )
    n1, n2 = np.linalg.norm(d1), np.linalg.norm(d2)
    found = module_of(first, second, scales=scales)
    assert found.cosine == pytest.approx((d1 * d2).sum() / n1 / n2, rel=1e-9)
    ratio = np.linalg.norm(d1 + d2) ** 2 / (n1**2 + n2**2)
    assert found.merge_energy_ratio == pytest.approx(ratio, rel=1e-9)
    lost = n1**2 + n2**2 - np.linalg.norm(d1 + d2) ** 2
    assert found.lost_energy == pytest.approx(lost, rel=1e-6, abs=1e-9 * (n1**2 + n2**2))
    u1, _, v1 = np.linalg.svd(d1)
    u2, _, v2 = np.linalg.svd(d2)
    for overlap, angles, product in (
        (found.left_overlap, found.left_angles, u1[:, :4].T @ u2[:, :6]),
        (found.right_overlap, found.right_angles, v1[:4] @ v2[:6].T),
    ):
        assert overlap == pytest.approx(np.linalg.norm(product) ** 2 / 4, rel=1e-9)
        cosines = np.clip(np.linalg.svd(product, compute_uv=False), 0, 1)
        assert angles == pytest.approx(np.degrees(np.arccos(cosines)), rel=1e-6)
    wanted = task_interference([d1, d2], [4, 6])
    assert found.singular_task_interference == pytest.approx(wanted, rel=1e-6)
    assert found.sign_conflict == np.mean(np.sign(d1) != np.sign(d2))


def test_equal_updates_are_redundant_and_negated_ones_opposed() -> None:
    a, b = gaussian(40, 28, 4)
    same, turned = pair_of((a, b), (a, b)), pair_of((a, b), (a, -b))
    for found, cosine, ratio, verdict, conflict in (
        (same, 1.0, 2.0, "redundant", 0.0),
        (turned, -1.0, 0.0, "opposed", 1.0),
    ):
        assert found.cosine == pytest.approx(cosine)
        assert found.merge_energy_ratio == pytest.approx(ratio, abs=1e-12)
        assert (found.verdict, found.sign_conflict) == (verdict, conflict)
        assert found.left_overlap == pytest.approx(1)
        assert found.interference == pytest.approx(1)
        assert found.modules[0].left_angles == pytest.approx([0] * 4, abs=1e-3)
    assert same.clashes == ()
    assert turned.clashes == (NAME,)


def test_output_directions_alone_are_no_overlap_of_inputs() -> None:
    _, b = gaussian(256, 200, 4)
    first, second = ((gaussian(256, 200, 4, seed=seed)[0], b) for seed in (1, 2))
    found = module_of(first, second)
    assert found.left_overlap == pytest.approx(1)
    assert found.right_overlap == pytest.approx(found.right_chance, abs=0.05)
    assert abs(found.cosine or 0) < 0.2
    assert found.verdict == "independent"


def test_shared_directions_without_a_common_sense_are_entangled() -> None:
    random = np.random.default_rng(0)
    left, right = orthonormal(random, 60, 4), orthonormal(random, 50, 4)
    turn = np.roll(np.eye(4), 1, axis=0)
    found = pair_of((right.T, left), (turn @ right.T, left))
    assert found.cosine == pytest.approx(0, abs=1e-12)
    assert found.modules[0].verdict == found.verdict == "entangled"
    assert found.clashes == (NAME,)


@pytest.mark.parametrize("signs", [(1.0, 1.0, 1.0), (1.0, -1.0, 2.0)])
def test_several_adapters_at_once(signs: tuple[float, float, float]) -> None:
    factors = [gaussian(30, 24, 3, seed=seed, dtype=np.float64) for seed in range(3)]
    factors[1][1][:, 0] = factors[0][1][:, 1]
    report = audit(
        *(adapter({NAME: pair}, scale=s) for s, pair in zip(signs, factors, strict=True))
    )
    updates = [s * b @ a for s, (a, b) in zip(signs, factors, strict=True)]
    assert report.interference is not None
    assert [(p.a, p.b) for p in report.interference.pairs] == [(0, 1), (0, 2), (1, 2)]
    joint = report.interference.joint[0]
    wanted = task_interference(updates, [3, 3, 3])
    assert joint.singular_task_interference == pytest.approx(wanted, rel=1e-9)
    ratio = np.linalg.norm(sum(updates)) ** 2 / sum(np.linalg.norm(u) ** 2 for u in updates)
    assert joint.merge_energy_ratio == pytest.approx(ratio, rel=1e-9)
    assert report.interference.merge_energy_ratio == pytest.approx(ratio, rel=1e-9)


def test_the_order_of_two_adapters_does_not_matter() -> None:
    first, second = adapter(layered(seed=1)), adapter(layered(seed=100, rank=6))
    one, other = (audit(*both).interference for both in ((first, second), (second, first)))
    assert one is not None
    assert other is not None
    for name in ("cosine", "merge_energy_ratio", "left_overlap", "interference", "sign_conflict"):
        wanted = getattr(other.pairs[0], name)
        assert getattr(one.pairs[0], name) == pytest.approx(wanted, rel=1e-9)


def test_the_whole_cosine_counts_what_only_one_has() -> None:
    pairs = layered(2)
    half = dict(list(pairs.items())[:2])
    report = audit(adapter(pairs), adapter(half))
    assert report.interference is not None
    found = report.interference.pairs[0]
    energies = [a.summary.energy for a in report.adapters]
    assert found.shared == 2
    assert found.cosine == pytest.approx(math.sqrt(energies[1] / energies[0]))
    assert [m.cosine for m in found.modules] == pytest.approx([1.0, 1.0])


def test_experts_are_compared_one_by_one() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((3, 2, 12)), random.standard_normal((3, 20, 2))
    turned = b * np.array([1, -1, 1])[:, None, None]
    found = pair_of((a, b), (a, turned), kinds={NAME: Kind.EXPERTS})
    assert [round(m.cosine or 0) for m in found.modules] == [1, -1, 1]
    assert found.clashes == (f"{NAME}[1]",)


def test_zero_updates_have_no_direction() -> None:
    a, b = gaussian(20, 16, 3)
    for other in ((a, b * 0), (a * 0, b)):
        found = pair_of((a, b), other)
        assert found.modules[0].cosine is None
        assert found.verdict is None
        assert found.merge_energy_ratio == pytest.approx(1)
    assert module_of((a, b), (a, b), scales=(1.0, 0.0)).verdict is None


def test_other_shapes_are_named_and_not_compared() -> None:
    found = pair_of(gaussian(20, 16, 3), gaussian(24, 16, 3))
    assert (found.shared, found.mismatched) == (0, (NAME,))
    assert found.cosine is None


def test_a_third_adapter_of_another_shape_leaves_the_others_comparable() -> None:
    odd, even = gaussian(24, 16, 3), gaussian(20, 16, 3)
    report = audit(*(adapter({NAME: pair}) for pair in (odd, even, even)))
    assert report.interference is not None
    assert [p.shared for p in report.interference.pairs] == [0, 0, 1]
    assert report.interference.pairs[2].cosine == pytest.approx(1)


def test_rows_in_another_order_cannot_be_compared() -> None:
    whole = adapter({NAME: gaussian(20, 16, 3)})
    moved = whole.replace(engine_layout={NAME: "blk.0.attn_q.weight"})
    with pytest.raises(UncheckableError, match=r"keeps .* in llama.cpp's row order"):
        audit(whole, moved)
    assert audit(moved, moved).interference is not None


def test_what_cannot_be_compared_is_one_row_and_not_the_end(tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    convert(TINY, gguf, base=BASE)
    report = audit(TINY, gguf, PEFT / "tiny-weak", keep_going=True)
    assert [audited.source for audited in report.adapters] == [str(TINY), str(PEFT / "tiny-weak")]
    assert report.interference is not None
    (apart,) = report.failed
    assert (apart.source, apart.exit_code) == (str(gguf), 5)
    assert f"not compared: {gguf}" in str(report)
    done = invoke("audit", TINY, gguf)
    assert done.exit_code == 5
    assert f"Error: {gguf}: keeps model.layers.0.self_attn.q_proj in llama.cpp's row" in done.stderr
    assert "give the base model with --base" in done.stderr
    assert invoke("audit", TINY, gguf, "--base", BASE).exit_code == 0


def test_large_matrices_are_sampled_for_signs() -> None:
    a, b = planted([3.0, 2.0, 1.0], 700, 600)
    c, d = planted([3.0, 2.0, 1.0], 700, 600, seed=9)
    found = module_of((a, b), (a + 0.5 * c, b + 0.5 * d))
    exact = np.mean(np.sign(b @ a) != np.sign((b + 0.5 * d) @ (a + 0.5 * c)))
    assert found.sign_conflict == pytest.approx(exact, abs=0.03)
    assert 0.1 < exact < 0.5


def test_copies_are_named_and_measured_once(tmp_path: Path) -> None:
    whole = adapter(layered(2))
    for number in range(14):
        written(whole, tmp_path / f"a{number:02}")
    sources = sorted(tmp_path.iterdir())
    report = audit(*sources)
    found = report.interference
    assert found is not None
    assert found.copies == (tuple(range(14)),)
    assert (found.pairs, found.left_out) == ((), 0)
    assert found.merge_energy_ratio == pytest.approx(14)
    assert [each.source for each in report.adapters] == [str(source) for source in sources]
    assert report.adapters[0].modules is report.adapters[13].modules
    shown = invoke("audit", *sources).stdout
    assert (
        f"{sources[0]} (1) is the same, bit for bit, as 2, 3, 4, 5, 6, 7, 8, 9 and 5 more" in shown
    )
    few = audit(*sources[:2]).interference
    assert few is not None
    assert [pair.cosine for pair in few.pairs] == [pytest.approx(1)]
    assert few.copies == ((0, 1),)


def test_of_many_the_pairs_with_most_in_common_are_compared() -> None:
    own = [layered(2, seed=seed) for seed in range(15)]
    near = {name: (a, 1.01 * b) for name, (a, b) in own[3].items()}
    adapters = [adapter(each) for each in (*own, near)]
    report = audit(*adapters)
    found = report.interference
    assert found is not None
    assert len(found.pairs) == 66
    assert found.left_out == 16 * 15 // 2 - 66
    assert (found.pairs[0].a, found.pairs[0].b) == (3, 15)
    assert found.pairs[0].cosine == pytest.approx(1)
    energy = sum(each.summary.energy for each in report.adapters)
    whole = {name: np.zeros((b.shape[0], a.shape[1])) for name, (a, b) in own[0].items()}
    for each in (*own, near):
        for name, (a, b) in each.items():
            whole[name] += b.astype(np.float64) @ a
    ratio = sum(float((x**2).sum()) for x in whole.values()) / energy
    assert found.merge_energy_ratio == pytest.approx(ratio, rel=0.1)
