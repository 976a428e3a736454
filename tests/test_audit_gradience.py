"""Where the numbers of gradience (0.7.1 and 0.11.0) are wrong, and what they are in truth.

It is the tool whose names an audit keeps. Each test restates one thing that it does, in a line of
its own, shows that this is not so, by a dense decomposition or by PEFT's rules, and that the audit
has the truth. Where it is right, test_audit_metrics.py holds the audit to its published example.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, orthonormal, planted, written
from terminal import PEFT, invoke

from adapterkit.audit import audit, compress

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.audit import ModuleAudit

EPSILON = 1e-12  # that it adds to, or cuts off at, whatever the size of the numbers is


def only(pair: Any, **settings: Any) -> ModuleAudit:
    (module,) = audit(adapter({"layers.0.x": pair}, **settings)).modules
    return module


def saved(folder: Path, pairs: dict[str, Any], **config: Any) -> Path:
    """Write an adapter whose config says what is given, and nothing of scales."""
    path = written(adapter(pairs), folder)
    known = json.loads((path / "adapter_config.json").read_text())
    for name in ("use_rslora", "alpha_pattern", "rank_pattern"):
        known.pop(name, None)
    (path / "adapter_config.json").write_text(json.dumps(known | config))
    return path


def test_rslora_is_alpha_over_the_root_of_r(tmp_path: Path) -> None:
    pair = gaussian(80, 90, 64)
    its_scale = 16 / 64
    path = saved(tmp_path / "a", {"layers.0.x": pair}, r=64, lora_alpha=16, use_rslora=True)
    (module,) = audit(path).modules
    assert module.scale == 16 / math.sqrt(64) == 8 * its_scale
    dense = module.scale * pair[1].astype(float) @ pair[0].astype(float)
    assert module.spectral_norm == pytest.approx(np.linalg.norm(dense, 2), rel=1e-9)


def test_alpha_pattern_is_a_suffix_and_a_regular_expression(tmp_path: Path) -> None:
    names = ["layers.1.self_attn.q_proj", "layers.11.self_attn.q_proj", "layers.2.mlp.q_proj_x"]
    pairs = {f"model.{name}": gaussian(8, 8, 4) for name in names}
    patterns = {"1.self_attn.q_proj": 64, r"^model\.layers\.2\..*": 12}
    its_alphas = [
        next((alpha for key, alpha in patterns.items() if key in name), 16) for name in pairs
    ]
    path = saved(tmp_path / "a", pairs, r=4, lora_alpha=16, alpha_pattern=patterns)
    alphas = [module.scale * 4 for module in audit(path).modules]
    assert its_alphas == [64, 64, 16]
    assert alphas == [64, 16, 12]


@pytest.mark.parametrize("factor", [1e-8, 1e-9, 1e-20])
def test_a_small_update_has_the_same_ranks_as_a_large_one(factor: float) -> None:
    a, b = gaussian(40, 30, 6, dtype=np.float64)
    values = np.linalg.svd(factor * b @ a, compute_uv=False)
    its_stable_rank = float((values**2).sum() / max(values[0] ** 2, EPSILON))
    large, small = only((a, b)), only((a, b * factor))
    assert its_stable_rank < 0.1
    assert small.stable_rank == pytest.approx(large.stable_rank, rel=1e-10)
    assert small.energy_rank_90 == large.energy_rank_90
    assert small.stable_rank is not None
    assert small.stable_rank > 1


def test_stacked_experts_are_matrices_of_their_own() -> None:
    parts = [gaussian(20, 24, 3, seed=seed, dtype=np.float64) for seed in range(4)]
    a, b = np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts])
    # As PEFT stores them: experts outside in A's rows, inside in B's columns.
    its_a, its_b = a.reshape(12, 24), b.transpose(1, 2, 0).reshape(20, 12)
    its_norm = np.linalg.norm(its_b @ its_a)
    found = audit(adapter({"layers.0.experts": (a, b)})).modules
    norms = [float(np.linalg.norm(b1 @ a1)) for a1, b1 in parts]
    assert [module.rank for module in found] == [3, 3, 3, 3]
    assert [module.frobenius_norm for module in found] == pytest.approx(norms)
    assert its_norm != pytest.approx(math.hypot(*norms), rel=0.01)


def test_what_is_no_adapter_has_no_advice(tmp_path: Path) -> None:
    # It exits 0, and says that rank 1 covers the worst case.
    hostile = PEFT.parent / "hostile" / "peft"
    for path in (tmp_path / "nowhere", tmp_path, hostile / "nan", hostile / "a-without-b"):
        result = invoke("audit", path, "--suggest", "--json")
        assert (result.exit_code, result.stdout) == (3, "")


def test_no_rank_of_zero_is_advised() -> None:
    pairs = {name: (a, b * 0) for name, (a, b) in layered(2).items()}
    report = audit(adapter(pairs), suggest=True)
    assert {module.energy_rank_90 for module in report.modules} == {None}
    assert min(module.rank for module in report.plans[0].modules) >= 1


def test_pattern_keys_have_no_prefix_that_peft_would_not_match() -> None:
    pairs = layered(3, rank=6)
    plan = audit(adapter(pairs), suggest=True, tol=0.3).plans[0]
    assert plan.peft["rank_pattern"]
    assert not any("base_model" in key for key in plan.peft["rank_pattern"])
    assert plan.peft["alpha_pattern"].keys() >= plan.peft["rank_pattern"].keys()


def test_ranks_over_64_are_advised_where_they_are_needed() -> None:
    flat = planted([1.0] * 256, 300, 280)
    module = only(flat)
    its_rank = min(64, 256)
    assert module.energy_rank_90 == 231
    plan = audit(adapter({"layers.0.x": flat}), suggest=True, tol=0.32).plans[0]
    (advised,) = plan.modules
    assert advised.rank > 3 * its_rank
    assert its_rank / 256 == 0.25  # of the energy, where it says 90 %


def test_every_gpt2_layer_has_its_share() -> None:
    pairs = {f"transformer.h.{layer}.attn.c_attn": gaussian(9, 9, 2) for layer in range(6)}
    its_layers = {0 for name in pairs if ".layers." not in name}
    found = audit(adapter(pairs)).adapters[0].layers
    assert its_layers == {0}
    assert [share.layer for share in found] == [0, 1, 2, 3, 4, 5]
    assert [share.energy_share for share in found] == pytest.approx([1 / 6] * 6)


def test_a_wide_module_is_not_important_for_being_wide() -> None:
    pairs = {
        "h.0.c_attn": gaussian(3000, 100, 8, dtype=np.float64),
        "h.1.c_proj": gaussian(1000, 100, 8, dtype=np.float64, seed=1),
    }
    layers = audit(adapter(pairs)).adapters[0].layers
    its_share = layers[0].energy_share
    assert its_share == pytest.approx(0.75, abs=0.05)
    assert layers[0].mean_square_share == pytest.approx(0.5, abs=0.06)


def test_small_singular_values_are_not_lost_in_a_gram_matrix() -> None:
    true = np.array([1.0, 1e-4, 1e-10, 1e-12])
    a, b = planted(true, 60, 50)
    gram_a, gram_b = a @ a.T, b.T @ b
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.maximum(values, 0))
    squares = np.linalg.eigvalsh(root.T @ gram_b @ root)[::-1]
    its_values = np.sqrt(np.maximum(squares, 0))
    found = only((a, b)).singular_values
    assert np.abs(its_values[2:] / true[2:] - 1).max() > 0.5
    assert found == pytest.approx(true, abs=1e-15)
    assert found[2] == pytest.approx(1e-10, rel=1e-4)


def test_ninety_percent_of_the_energy_is_a_third_of_the_update_lost() -> None:
    # It calls the rank for 90 % of the energy a suggestion, and gives no error.
    module = only(planted([1.0] * 10, 40, 40))
    assert module.energy_rank_90 == 9
    assert module.energy_error_90 == pytest.approx(math.sqrt(0.1))


def test_mixed_ranks_are_a_range_and_no_mean() -> None:
    pairs = {"layers.0.x": gaussian(40, 40, 4), "layers.1.x": gaussian(40, 40, 32)}
    summary = audit(adapter(pairs)).summary
    stable, used = summary.stable_rank_mean, summary.utilization_mean
    assert stable is not None
    assert used is not None
    its_rank = round(stable / used)
    assert summary.ranks == (4, 32)
    assert its_rank not in {4, 32}


def test_updates_that_share_outputs_only_do_not_agree() -> None:
    random = np.random.default_rng(0)
    b = orthonormal(random, 200, 8)
    first, second = (random.standard_normal((8, 200)) for _ in range(2))
    one, two = (np.linalg.svd(b @ a, full_matrices=False) for a in (first, second))
    # Left vectors alone, each weighted by its own length.
    its_agreement = np.linalg.norm(one[0][:, :8].T @ two[0][:, :8]) ** 2 / 8
    found = audit(adapter({"layers.0.x": (first, b)}), adapter({"layers.0.x": (second, b)}))
    assert found.interference is not None
    (pair,) = found.interference.pairs
    true = np.vdot(b @ first, b @ second) / np.linalg.norm(b @ first) / np.linalg.norm(b @ second)
    assert its_agreement == pytest.approx(1)
    assert pair.cosine == pytest.approx(true)
    assert abs(true) < 0.1
    assert pair.left_overlap == pytest.approx(1)
    assert pair.right_overlap is not None
    assert pair.right_overlap < 0.2


def test_a_truncated_rslora_keeps_its_scale() -> None:
    pair = planted([3.0, 2.0], 40, 30)
    padded = (
        np.concatenate([pair[0], np.zeros((14, 30))]),
        np.concatenate([pair[1], np.zeros((40, 14))], axis=1),
    )
    scale = 8 / math.sqrt(16)
    its_scale = (8 * 2 / 16) / 2  # alpha · k / r over k, with r instead of its root
    small = compress(adapter({"layers.0.x": padded}, scale=scale), rank=2).adapter
    (kept,) = small.pairs()
    dense = kept.scale * kept.b.numpy().astype(float) @ kept.a.numpy().astype(float)
    assert kept.rank == 2
    assert dense == pytest.approx(scale * pair[1] @ pair[0], abs=1e-6)
    assert its_scale == scale / 4


def test_a_llama_s_ratio_to_its_base_is_found(tmp_path: Path) -> None:
    # It strips base_model.model.model. from one name and nothing from the other: no ratio at all.
    from adapterkit.containers.safetensors import write_safetensors
    from adapterkit.tensor import LazyTensor

    pairs = layered(2)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((PEFT / "base" / "config.json").read_text())
    weights = {
        f"{name}.weight": LazyTensor.of(np.ones((len(b), a.shape[1]), np.float32))
        for name, (a, b) in pairs.items()
    }
    write_safetensors(base / "model.safetensors", weights, {})
    found = audit(written(adapter(pairs), tmp_path / "a"), base=base).adapters[0].base
    assert found is not None
    for row in found.weights:
        norm = math.sqrt(math.prod(row.shape))
        assert row.base_spectral_norm == pytest.approx(norm, rel=1e-6)
        assert row.udr == pytest.approx((row.update_spectral_norm or 0) / norm, rel=1e-6)
