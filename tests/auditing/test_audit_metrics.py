"""Every metric against a dense SVD of ΔW, against planted spectra and a published example."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, planted
from example_adapter import example

from adapterkit import (
    AdapterTensorSet,
    FormatError,
    Role,
    TensorKey,
    UncheckableError,
    UsageError,
    audit,
)
from adapterkit.auditing.metrics import hoyer, quantile, top_share, truncation_errors
from adapterkit.auditing.null_model import null_model
from adapterkit.auditing.outliers import notable, robust_z
from adapterkit.lowrank.spectrum import energy_ranks
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor


def test_the_published_example() -> None:
    report = audit(example(), suggest=True)
    found = report.summary
    expected: dict[str, Any] = {
        "modules": 12,
        "parameters": 221_184,
        "stable_rank_mean": 6.510343331416814,
        "stable_rank_median": 6.576941928927733,
        "stable_rank_weighted_mean": 6.551892578844193,
        "effective_rank_mean": 7.980436470004545,
        "utilization_mean": 0.8137929164271017,
        "energy_rank_90_p50": 7.5,
        "energy_rank_90_p90": 8.0,
        "energy_rank_99_p50": 8.0,
        "frobenius_norm_mean": 59.21659911270828,
        "spectral_norm_mean": 23.163040586321856,
        "energy": 45032.66190821027,
        "concentration_index": 0.16671935934583185,
        "participation_ratio_mean": 7.847254,
        "effective_rank_energy_mean": 7.922528,
        "entropy_mean": 0.998822,
        "top1_energy_mean": 0.153832,
    }
    for name, value in expected.items():
        digits = 1e-10 if len(repr(value)) > 12 else 1e-5
        assert getattr(found, name) == pytest.approx(value, rel=digits), name
    layers = report.adapters[0].layers
    assert [layer.layer for layer in layers] == [0, 1, 2, 3, 4, 5]
    assert layers[2].energy_share == pytest.approx(0.1718135472668219, rel=1e-10)
    assert report.adapters[0].health == ()


def dense(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    return scale * b.astype(np.float64) @ a.astype(np.float64)


@pytest.mark.parametrize(
    ("out", "inputs", "rank"), [(40, 24, 6), (7, 50, 4), (64, 64, 1), (5, 6, 5)]
)
@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_every_metric_against_a_dense_decomposition(
    out: int, inputs: int, rank: int, scale: float
) -> None:
    a, b = gaussian(out, inputs, rank, seed=out)
    b[:, -1] *= np.float32(0.01)
    update = dense(a, b, scale)
    s = np.linalg.svd(update, compute_uv=False)[:rank]
    e = s**2
    p, q = s / s.sum(), e / e.sum()
    found = audit(adapter({"layers.0.x": (a, b)}, scale=scale)).modules[0]

    def close(value: float | None, wanted: float) -> bool:
        return value == pytest.approx(wanted, rel=1e-9)

    assert found.singular_values == pytest.approx(s, rel=1e-9)
    assert close(found.spectral_norm, np.linalg.norm(update, 2))
    assert close(found.frobenius_norm, np.linalg.norm(update))
    assert close(found.nuclear_norm, s.sum())
    assert close(found.rms, math.sqrt(np.mean(update**2)))
    assert close(found.stable_rank, e.sum() / e[0])
    assert close(found.utilization, e.sum() / e[0] / rank)
    assert close(found.effective_rank, math.exp(-(p * np.log(p)).sum()))
    assert close(found.effective_rank_energy, math.exp(-(q * np.log(q)).sum()))
    assert close(found.participation_ratio, e.sum() ** 2 / (e**2).sum())
    for level in (90, 95, 99):
        k = 1 + int(np.argmax(np.cumsum(q) >= level / 100 - 1e-12))
        assert getattr(found, f"energy_rank_{level}") == k
        u, v, vt = np.linalg.svd(update)
        cut = (u[:, :k] * v[:k]) @ vt[:k]
        wanted = np.linalg.norm(update - cut) / np.linalg.norm(update)
        error = getattr(found, f"energy_error_{level}")
        assert error == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert found.numerical_rank == np.linalg.matrix_rank(update) == rank
    assert close(found.condition, s[0] / s[-1])
    if rank > 1:
        assert close(found.entropy, -(p * np.log(p)).sum() / math.log(rank))
    else:
        assert found.entropy is None
    assert close(found.top1_energy, q[0])
    for axis, (concentration, share) in enumerate(
        ((found.row_hoyer, found.row_top8), (found.column_hoyer, found.column_top8))
    ):
        x = np.linalg.norm(update, axis=1 - axis)
        n = len(x)
        wanted = (math.sqrt(n) - x.sum() / np.linalg.norm(x)) / (math.sqrt(n) - 1)
        assert concentration == pytest.approx(wanted, rel=1e-6)
        assert close(share, np.sort(x**2)[::-1][:8].sum() / (x**2).sum())
    wide = [np.linalg.norm(x.astype(np.float64)) for x in (a, b)]
    assert close(found.balance, wide[0] / wide[1])


@pytest.mark.parametrize("lopsided", [0.0, 5.0])
def test_planted_singular_values_are_found(lopsided: float) -> None:
    values = 10.0 ** -np.arange(0, 12, 1.5)
    a, b = planted(values, 60, 40, lopsided=lopsided)
    found = audit(adapter({"x": (a, b)})).modules[0]
    assert np.abs(np.array(found.singular_values) - values).max() < 1e-12 * np.exp(lopsided)


def test_flat_and_rank_one_spectra_are_the_ends_of_every_scale() -> None:
    flat, single = audit(
        adapter({"flat": planted([2.0] * 6, 50, 30), "one": planted([3.0], 50, 30)})
    ).modules
    for name in ("stable_rank", "effective_rank", "effective_rank_energy", "participation_ratio"):
        assert getattr(flat, name) == pytest.approx(6)
        assert getattr(single, name) == pytest.approx(1)
    assert flat.energy_rank_99 == flat.energy_rank_90 == flat.numerical_rank == 6
    assert flat.entropy == pytest.approx(1)
    assert single.energy_rank_99 == single.numerical_rank == 1
    assert single.condition == 1


def test_a_share_that_is_reached_exactly_counts() -> None:
    assert energy_ranks(np.sqrt(np.array([0.5, 0.4, 0.05, 0.05])), (0.9, 0.95, 1)) == [2, 3, 4]
    assert energy_ranks(np.sqrt(np.array([0.9, 0.1])), (0.9,)) == [1]
    errors = truncation_errors(np.sqrt(np.array([0.9, 0.1])))
    assert errors == pytest.approx([1, math.sqrt(0.1), 0])


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quantiles_are_those_of_numpy(count: int, part: float) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    assert quantile(values.tolist(), part) == pytest.approx(np.quantile(values, part), rel=1e-14)


def test_90_percent_of_the_energy_is_up_to_32_percent_error() -> None:
    found = audit(adapter({"x": planted([3.0, 1.0], 20, 20)})).modules[0]
    assert found.energy_rank_90 == 1
    assert found.energy_error_90 == pytest.approx(0.1**0.5)


def test_a_rank_that_is_not_used_is_found() -> None:
    a, b = planted([1.0] * 8, 64, 48)
    a, b = np.concatenate([a, a]), np.concatenate([b / 3, b * 2 / 3], axis=1)
    report = audit(adapter({"x": (a, b)}))
    found = report.modules[0]
    assert (found.rank, found.numerical_rank, found.condition) == (16, 8, None)
    assert "rank 8 in factors of 16" in report.adapters[0].health[0]


def test_the_rounding_of_the_stored_type_has_its_own_count() -> None:
    a, b = planted([1.0, 0.1, 0.004, 1e-4], 64, 48)
    stored = {
        dtype: audit(adapter({"x": (a.astype(dtype), b.astype(dtype))})).modules[0]
        for dtype in (np.float64, np.float16, ml_dtypes.bfloat16)
    }
    assert [m.numerical_rank_stored for m in stored.values()] == [4, 3, 2]
    assert stored[ml_dtypes.bfloat16].dtype == "BF16"


def test_a_zero_update_is_untrained_and_has_no_shape() -> None:
    a, b = gaussian(32, 24, 4)
    cancelled = (np.concatenate([a, a]), np.concatenate([b, -b], axis=1))
    whole = adapter(
        {"zero": (a, b * 0), "off": (a, b), "cancelled": cancelled, "fine": (a, b)},
        scale={"zero": 1.0, "off": 0.0, "cancelled": 1.0, "fine": 1.0},
    )
    report = audit(whole, suggest=True)
    shape = "stable_rank utilization effective_rank participation_ratio energy_rank_90 entropy"
    more = "energy_error_99 numerical_rank condition top1_energy null_ratio row_hoyer column_top8"
    for found in report.modules[:3]:
        assert found.state == "untrained"
        assert found.frobenius_norm == found.spectral_norm == 0
        assert {getattr(found, name) for name in f"{shape} {more}".split()} == {None}
    fine = report.modules[3]
    assert fine.state == "trained"
    assert report.summary.untrained == 3
    assert report.summary.stable_rank_mean == fine.stable_rank
    assert report.adapters[0].health[0].startswith("untrained: 3 of 4")
    assert report.plans[0].ranks["zero"] == 1


def test_an_adapter_that_was_never_trained_has_null_for_every_mean() -> None:
    a, b = gaussian(32, 24, 4)
    report = audit(adapter({"layers.0.x": (a, b * 0)}), suggest=True)
    assert report.summary.stable_rank_mean is None
    assert report.summary.concentration_index is None
    assert report.adapters[0].layers[0].energy_share is None
    assert report.plans[0].relative_error == 0


@pytest.mark.parametrize("power", [-300, -30, -20, 20, 120])
def test_no_scale_changes_a_shape(power: int) -> None:
    a, b = gaussian(48, 32, 6, dtype=np.float64)
    one = audit(adapter({"x": (a, b)})).modules[0]
    other = audit(adapter({"x": (a, b * 10.0**power)})).modules[0]
    for name in one.__slots__:
        if name in {"singular_values", "spectral_norm", "frobenius_norm", "nuclear_norm", "rms"}:
            wanted = np.array(getattr(one, name)) * 10.0**power
            assert np.array(getattr(other, name)) == pytest.approx(wanted, rel=1e-10)
        elif name != "balance" and isinstance(getattr(one, name), float):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9), name
        elif name != "balance":
            assert getattr(other, name) == getattr(one, name), name


def test_experts_are_measured_one_by_one() -> None:
    pairs = [gaussian(20, 12, 3, seed=expert) for expert in range(4)]
    stacked = np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])
    name = "model.layers.0.mlp.experts.down_proj"
    report = audit(adapter({name: stacked}, scale=0.5, kinds={name: Kind.EXPERTS}))
    assert [module.expert for module in report.modules] == [0, 1, 2, 3]
    assert (report.summary.modules, report.summary.updates) == (1, 4)
    assert report.summary.parameters == stacked[0].size + stacked[1].size
    for module, (a, b) in zip(report.modules, pairs, strict=True):
        wanted = np.linalg.svd(dense(a, b, 0.5), compute_uv=False)[:3]
        assert module.singular_values == pytest.approx(wanted, rel=1e-9)


def test_a_convolution_counts_its_kernel_as_inputs() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((4, 6, 3, 3)), random.standard_normal((10, 4, 1, 1))
    found = audit(adapter({"conv": (a, b)}, kinds={"conv": Kind.CONVOLUTION})).modules[0]
    wanted = np.linalg.norm(dense(a.reshape(4, -1), b.reshape(10, 4), 1.0))
    assert (found.shape, found.rank) == ((10, 54), 4)
    assert found.frobenius_norm == pytest.approx(wanted, rel=1e-9)


def test_an_embedding_is_measured_as_its_factors_multiply() -> None:
    a, b = gaussian(16, 100, 4)
    found = audit(adapter({"model.embed_tokens": (a, b)}, embeddings=("model.embed_tokens",)))
    assert found.modules[0].shape == (16, 100)
    wanted = np.linalg.norm(dense(a, b, 1.0))
    assert found.modules[0].frobenius_norm == pytest.approx(wanted, rel=1e-9)
    assert found.adapters[0].layers[0].name == "(no layer)"


def test_what_is_not_measured_is_listed() -> None:
    more = {
        TensorKey("model.layers.0.self_attn.q_proj", Role.MAGNITUDE): LazyTensor.of(np.ones(32)),
        TensorKey("lm_head.weight", Role.FULL): LazyTensor.of(np.ones((4, 4))),
    }
    found = audit(adapter(layered(1), more=more)).adapters[0]
    assert [each.tensor for each in found.unaudited] == [str(key) for key in more]
    assert found.tensors == 6
    assert [module.low_rank_only for module in found.modules] == [True, False]
    assert any("DoRA: 1 of 2" in sentence for sentence in found.health)


@pytest.mark.parametrize("broken", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_factor_that_is_not_finite_is_refused_by_name(broken: str, value: float) -> None:
    pairs = layered(2)
    target = pairs["model.layers.1.mlp.down_proj"][0 if broken == "A" else 1]
    target[1, 2] = value
    with pytest.raises(FormatError, match=rf"layers\.1\.mlp\.down_proj: factor {broken} holds NaN"):
        audit(adapter(pairs))


def test_a_factor_without_its_partner_is_refused() -> None:
    whole = adapter(layered(1))
    key = TensorKey("model.layers.0.mlp.down_proj", Role.LORA_B)
    half = whole.replace(tensors={k: t for k, t in whole.tensors.items() if k != key})
    with pytest.raises(FormatError, match=r"down_proj.*has no lora_B"):
        audit(half)


def test_an_adapter_without_factors_cannot_be_measured() -> None:
    key = TensorKey("lm_head.weight", Role.FULL)
    with pytest.raises(UncheckableError, match="no low-rank factors"):
        audit(AdapterTensorSet(tensors={key: LazyTensor.of(np.ones((4, 4)))}, scales={}))


def test_no_adapter_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match="no adapter"):
        audit()


def test_the_null_model_is_what_random_factors_give() -> None:
    drawn = []
    for seed in range(4000):
        a, b = gaussian(30, 20, 5, seed=seed, dtype=np.float64)
        s = np.linalg.svd(b @ a, compute_uv=False)[:5]
        drawn.append((s**2).sum() / s[0] ** 2)
    null = null_model(30, 20, 5)
    assert null.stable_rank == pytest.approx(np.mean(drawn), rel=1e-2)
    low, high = null.band()
    assert (low <= high).all()
    assert null_model(3, 2, 8).band()[0].shape == (2,)
    assert null_model.__wrapped__(30, 20, 5).stable_rank == null.stable_rank


def test_concentration_of_norms() -> None:
    assert hoyer(np.ones(10)) == pytest.approx(0)
    assert hoyer(np.eye(10)[0]) == pytest.approx(1)
    assert hoyer(np.ones(1)) is None
    assert hoyer(np.zeros(4)) is None
    assert top_share(np.arange(1.0, 11.0)) == pytest.approx(52 / 55)
    assert top_share(np.ones(3)) == 1
    assert top_share(np.zeros(9)) is None


def test_a_module_that_stands_out_of_its_family_is_named() -> None:
    pairs = {
        f"model.layers.{layer}.mlp.up_proj": gaussian(64, 48, 4, seed=layer) for layer in range(20)
    }
    for layer, (name, (a, b)) in enumerate(pairs.items()):
        pairs[name] = (a, b * np.float32(1.2**layer * (8 if layer == 13 else 1)))
    modules = audit(adapter(pairs)).modules
    first, metric, z = notable(modules)[0]
    assert (first.layer, metric) == (13, "rms")
    assert z > 10
    # The trend over depth is no outlier.
    assert all(abs(m.rms_z or 0) < 4 for m in modules if m.layer != 13)


def test_robust_z_is_the_definition_on_flat_depth() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    mad = 1.4826 * 1.0
    assert robust_z(values, np.zeros(5)) == pytest.approx((values - 3) / mad)
    assert robust_z(np.ones(5), np.arange(5.0)) == [None] * 5


def test_small_families_have_no_z() -> None:
    modules = audit(adapter(layered(15))).modules
    assert {m.rms_z for m in modules} == {None}
    assert None not in {m.rms_z for m in audit(adapter(layered(16))).modules}
