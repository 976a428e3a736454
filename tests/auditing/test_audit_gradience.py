"""gradience 0.11, whose names an audit keeps, run beside it: where both are right, and where not.

Every command of gradience runs in one process. Where it measures plain LoRA, each of its numbers is
that of the audit. Where it is wrong, a test shows what it says, what is so by a dense decomposition
or by PEFT's rules, and that the audit says that. If gradience is corrected, these tests fail.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered
from gradience_cases import (
    BROKEN,
    FALLING,
    GPT2,
    PATTERNED,
    SMALL,
    commands_for,
    experts,
    sharing_outputs,
    sources,
    stacked,
)
from gradience_oracle import gradience
from terminal import PEFT, invoke

from adapterkit import AuditReport, ModuleAudit, audit, compress, read
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.lowrank.differences import norm
from adapterkit.model import Kind
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gradience_oracle import Answer

pytestmark = pytest.mark.slow

# Its name of a value for each matrix, and the audit's.
ROW = {
    "r": "rank",
    "scale": "scale",
    "params": "parameters",
    "stable_rank": "stable_rank",
    "utilization": "utilization",
    "effective_rank": "effective_rank",
    "energy_rank_90": "energy_rank_90",
    "energy_rank_95": "energy_rank_95",
    "energy_rank_99": "energy_rank_99",
    "delta_sigma_max": "spectral_norm",
    "delta_fro_norm": "frobenius_norm",
}
WHOLE = {
    "n_layers": "updates",
    "total_lora_params": "parameters",
    "stable_rank_mean": "stable_rank_mean",
    "stable_rank_median": "stable_rank_median",
    "stable_rank_weighted_mean": "stable_rank_weighted_mean",
    "effective_rank_mean": "effective_rank_mean",
    "utilization_mean": "utilization_mean",
    "energy_rank_90_p50": "energy_rank_90_p50",
    "energy_rank_90_p90": "energy_rank_90_p90",
    "delta_sigma_max_scaled_mean": "spectral_norm_mean",
    "delta_frob_norm_scaled_mean": "frobenius_norm_mean",
}
RIGHT = ("example", "tall-and-wide", "one-direction", "half", "falling", "gpt2", "pirate")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sources(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def theirs(found: dict[str, Path]) -> dict[str, Answer]:
    """Run gradience on everything, once."""
    commands = commands_for(found)
    return dict(zip(commands, gradience(list(commands.values())), strict=True))


def checkpoint(folder: Path, pairs: Mapping[str, Any], config: dict[str, Any]) -> Path:
    """Write a base whose weights have the largest singular value 2 and the norm 5."""
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, (a, b) in pairs.items():
        size = min(len(b), a.shape[1])
        values = np.full(size, math.sqrt(21 / (size - 1)))
        values[0] = 2
        matrix = np.zeros((len(b), a.shape[1]), np.float32)
        matrix[range(size), range(size)] = values
        weights[f"{name}.weight"] = LazyTensor.of(matrix)
    write_safetensors(folder / "model.safetensors", weights, {})
    return folder


def rows(answer: Answer) -> dict[str, dict[str, Any]]:
    listed = answer.json["layer_data"]["layer_rows"]
    return {row["name"].removeprefix("base_model.model."): row for row in listed}


def only(report: AuditReport) -> ModuleAudit:
    (module,) = report.modules
    return module


@pytest.mark.parametrize("name", RIGHT)
def test_plain_lora_measures_the_same(
    name: str, theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    report = audit(found[name])
    known = rows(theirs[name])
    assert known.keys() == {module.module for module in report.modules}
    for module in report.modules:
        row = known[module.module]
        for field, ours in ROW.items():
            assert getattr(module, ours) == pytest.approx(row[field], rel=1e-8), (field, module)
        values = np.array(row["top_singular_values"]) * row["scale"]
        kept = np.array(module.singular_values)[: len(values)]
        # Its Gram matrices hold half of the digits.
        assert values[: len(kept)] == pytest.approx(kept, rel=1e-8, abs=1e-7 * kept[0])
    whole = theirs[name].json
    for field, ours in WHOLE.items():
        assert getattr(report.summary, ours) == pytest.approx(whole[field], rel=1e-8), field


def test_its_published_example_is_what_it_says(theirs: dict[str, Answer]) -> None:
    whole = theirs["example"].json
    assert whole["stable_rank_mean"] == pytest.approx(6.510343331416814, rel=1e-12)
    assert whole["effective_rank_mean"] == pytest.approx(7.980436470004545, rel=1e-12)
    assert whole["utilization_mean"] == pytest.approx(0.8137929164271017, rel=1e-12)
    assert whole["total_lora_params"] == 221_184


def test_layers_hold_the_same_shares(theirs: dict[str, Answer], found: dict[str, Path]) -> None:
    for name in ("example", "falling", "gpt2"):
        report = audit(found[name])
        its = theirs[name].json["composition"]
        shares = {share.layer: share.energy_share for share in report.adapters[0].layers}
        assert shares == pytest.approx({row["layer"]: row["share"] for row in its["layers"]})
        assert report.summary.energy == pytest.approx(its["energy_total_fro2"])
        assert report.summary.concentration_index == pytest.approx(its["concentration_index"])


def test_ratios_to_a_base_are_the_same_where_it_finds_the_base(
    theirs: dict[str, Answer], found: dict[str, Path], tmp_path: Path
) -> None:
    config = {"model_type": "gpt2", "n_embd": 9, "n_layer": 6, "n_head": 3, "vocab_size": 20}
    base = audit(found["gpt2"], base=checkpoint(tmp_path, GPT2, config)).adapters[0].base
    assert base is not None
    known = rows(theirs["gpt2"])
    compared = [row for row in base.weights if row.modules[0] in GPT2]
    assert len(compared) == 6
    for row in compared:
        its = known[row.modules[0]]
        assert (row.base_spectral_norm, row.base_frobenius_norm) == pytest.approx((2, 5), rel=1e-6)
        assert row.udr == pytest.approx(its["udr"], rel=1e-6)
        assert row.udr_f == pytest.approx(its["udr_f"], rel=1e-6)
        assert row.sdi == pytest.approx(its["sdi"], rel=1e-6)
    whole = theirs["gpt2"].json
    for field in ("udr_max", "udr_mean"):
        assert getattr(base.summary, field) == pytest.approx(whole[field], rel=1e-6), field
    for field in ("fraction_udr_gt_0_1", "fraction_udr_gt_0_3"):
        assert getattr(base.summary, field) == whole[field]
    # The median of six is between two of them; it takes the lower one.
    ratios = sorted(its["udr"] for its in known.values() if its["udr"])
    assert base.summary.udr_median == pytest.approx(sum(ratios[2:4]) / 2, rel=1e-6)
    assert whole["udr_median"] == ratios[2]


def test_rslora_is_alpha_over_the_root_of_r(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    (row,) = rows(theirs["rslora"]).values()
    module = only(audit(found["rslora"]))
    assert module.scale == 16 / math.sqrt(64) == 8 * row["scale"]
    (pair,) = read(found["rslora"]).pairs()
    dense = module.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
    assert module.spectral_norm == pytest.approx(np.linalg.norm(dense, 2), rel=1e-9)
    assert row["delta_sigma_max"] == pytest.approx(module.spectral_norm / 8, rel=1e-6)


def test_alpha_pattern_is_a_suffix_and_a_regular_expression(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    its = rows(theirs["patterns"])
    ours = {module.module: module.scale * 4 for module in audit(found["patterns"]).modules}
    # PEFT: re.match(rf"(.*\.)?({key})$", name).
    assert [ours[f"model.{name}"] for name in PATTERNED] == [64, 16, 12]
    assert [its[f"model.{name}"]["scale"] * 4 for name in PATTERNED] == [64, 64, 16]


def test_a_small_update_has_the_same_ranks_as_a_large_one(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    large = only(audit(adapter({"layers.0.x": SMALL})))
    its = rows(theirs["small"])
    for module in audit(found["small"]).modules:
        assert its[module.module]["stable_rank"] < 0.1
        assert module.stable_rank == pytest.approx(large.stable_rank, rel=1e-10)
        assert module.energy_rank_90 == large.energy_rank_90


def test_stacked_experts_are_matrices_of_their_own(
    theirs: dict[str, Answer],
) -> None:
    (row,) = rows(theirs["experts"]).values()
    name = "model.layers.0.mlp.experts.down_proj"
    modules = audit(adapter({name: stacked()}, kinds={name: Kind.EXPERTS})).modules
    norms = [float(np.linalg.norm(b @ a)) for a, b in experts()]
    assert [module.rank for module in modules] == [3, 3, 3, 3]
    assert [module.frobenius_norm for module in modules] == pytest.approx(norms)
    assert (row["r"], row["scale"]) == (12, 0.25)
    its_norm = row["delta_fro_norm"] / row["scale"]
    assert its_norm != pytest.approx(math.hypot(*norms), rel=0.01)


def test_what_it_does_not_measure_is_said(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    assert "issues" not in theirs["dora"].json
    report = audit(found["dora"]).adapters[0]
    assert any("magnitude" in each.reason for each in report.unaudited)
    assert report.health == ("DoRA: 6 of 6 updates are audited without their magnitude",)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_adapter_has_no_advice(
    name: str, theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    assert theirs[name].code == 0
    assert "suggested_r" in theirs[name].out.lower().replace(" rank (p90)", "_r")
    result = invoke("audit", found[name], "--suggest")
    assert (result.exit_code, result.stdout) == (3, "")


def test_no_rank_of_zero_is_advised(theirs: dict[str, Answer], found: dict[str, Path]) -> None:
    assert theirs["zero"].json["rank_suggestions"]["default_r"] == 0
    report = audit(found["zero"], suggest=True)
    assert {module.energy_rank_90 for module in report.modules} == {None}
    assert min(module.rank for module in report.plans[0].modules) >= 1


def test_pattern_keys_have_no_prefix_that_peft_would_not_match(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    # test_audit_plan.py loads the audit's in PEFT.
    its = theirs["falling"].json["rank_suggestions"]
    assert its["rank_pattern"]
    assert all(key.startswith("base_model.model.model.") for key in its["rank_pattern"])
    assert not any("alpha" in key for key in its)
    plan = audit(found["falling"], suggest=True, tol=0.3).plans[0]
    assert plan.peft["rank_pattern"]
    assert not any("base_model" in key for key in plan.peft["rank_pattern"])
    assert plan.peft["alpha_pattern"].keys() >= plan.peft["rank_pattern"].keys()


def test_ranks_over_64_are_advised_where_they_are_needed(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    its = theirs["flat"].json
    assert its["suggested_r_global_90"] == 32
    assert its["rank_suggestions"]["default_r"] == 64  # a quarter of the energy
    report = audit(found["flat"], suggest=True, tol=0.32)
    assert only(report).energy_rank_90 == 231
    (advised,) = report.plans[0].modules
    assert advised.rank == 230


def test_every_gpt2_layer_has_its_share(theirs: dict[str, Answer], found: dict[str, Path]) -> None:
    assert [row["layer"] for row in theirs["gpt2"].json["per_layer_gain"]] == [0]
    layers = audit(found["gpt2"]).adapters[0].layers
    assert [share.layer for share in layers] == [0, 1, 2, 3, 4, 5]


def test_a_gpt2_mlp_is_a_family_of_its_own(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    assert rows(theirs["gpt2"])["transformer.h.0.mlp.c_proj"]["module_type"] == "attn"
    families = [row.family for row in audit(found["gpt2"]).adapters[0].families]
    assert families == ["transformer.h.*.attn.c_attn", "transformer.h.*.mlp.c_proj"]


def test_a_wide_module_is_not_important_for_being_wide(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    listed = theirs["wide"].json["policies"]["per_layer"]
    its = {row["layer_name"]: row["importance_metrics"]["energy_share"] for row in listed}
    layers = audit(found["wide"]).adapters[0].layers
    assert its["base_model.model.h.0.c_attn"] == pytest.approx(0.75, abs=0.05)
    assert layers[0].energy_share == pytest.approx(0.75, abs=0.05)
    assert layers[0].mean_square_share == pytest.approx(0.5, abs=0.06)


def test_small_singular_values_are_not_lost_in_a_gram_matrix(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    (row,) = rows(theirs["lost"]).values()
    values = np.array(row["top_singular_values"]) * row["scale"]
    assert np.abs(values[2:] / FALLING[2:] - 1).max() > 0.5
    ours = only(audit(found["lost"])).singular_values
    assert ours == pytest.approx(FALLING, abs=1e-15)
    assert ours[2] == pytest.approx(1e-10, rel=1e-4)


def test_its_other_policies_advise_one_rank_for_a_flat_spectrum(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    its = theirs["flat-8"].json
    policies = its["policy_global_suggestions"]
    assert policies["knee"]["uniform_max"] == policies["oht"]["uniform_max"] == 1
    # And 95 % of the energy is taken for 90 %.
    assert its["policies"]["metadata"]["default_parameters"]["energy_threshold"] == {
        "threshold": 0.9
    }
    report = audit(found["flat-8"], suggest=True)
    assert only(report).energy_rank_95 == report.plans[0].modules[0].rank == 8


def test_ninety_percent_of_the_energy_is_a_third_of_the_update_lost(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    assert "error" not in theirs["flat"].out
    module = only(audit(found["flat"]))
    assert module.energy_error_90 == pytest.approx(math.sqrt(25 / 256))
    assert "31% relative error" in invoke("audit", found["flat"], "--suggest").stdout


def test_json_of_fifty_modules_parses(theirs: dict[str, Answer], found: dict[str, Path]) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(theirs["many"].out)
    assert (
        len(json.loads(invoke("audit", found["many"], "--json").stdout)["results"][0]["modules"])
        == 50
    )


def test_updates_that_share_outputs_only_do_not_agree(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    its = theirs["pair"].json["aggregate"]
    report = audit(found["one"], found["other"])
    assert report.interference is not None
    (pair,) = report.interference.pairs
    (one, other) = ((b @ a).ravel() for a, b in sharing_outputs())
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert pair.cosine == pytest.approx(cosine, rel=1e-6)
    assert abs(cosine) < 0.05
    assert its["mean_agreement"] > 2 * abs(cosine)
    # Its overlap looks at the outputs alone, and at 90 % of the energy.
    assert its["mean_overlap"] > 0.85
    assert pair.left_overlap == pytest.approx(1)
    assert pair.right_overlap is not None
    assert pair.right_overlap < 0.2


def test_a_truncated_rslora_keeps_its_scale(
    theirs: dict[str, Answer], found: dict[str, Path]
) -> None:
    assert theirs["cut"].code == 0
    true = norm(next(iter(read(found["padded"]).pairs())))
    small = compress(found["padded"], rank=2).adapter
    (kept,) = small.pairs()
    assert kept.rank == 2
    assert norm(kept) == pytest.approx(true, rel=1e-6)
    (its,) = read(found["empty"].parent / "cut").pairs()
    assert its.rank == 2
    assert norm(its) < 0.5 * true


def test_a_llama_s_ratio_to_its_base_is_found(
    theirs: dict[str, Answer], found: dict[str, Path], tmp_path: Path
) -> None:
    # It strips base_model.model.model. from one name and nothing from the other.
    assert {row["udr"] for row in rows(theirs["falling"]).values()} == {None}
    config = json.loads((PEFT / "base" / "config.json").read_text())
    base = checkpoint(tmp_path, layered(3, rank=6), config)
    report = audit(found["falling"], base=base).adapters[0].base
    assert report is not None
    assert len(report.weights) == 6
    for row in report.weights:
        assert row.udr == pytest.approx((row.update_spectral_norm or 0) / 2, rel=1e-6)


def test_mixed_ranks_are_a_range_and_no_mean() -> None:
    # Its rank_suggestion.py takes mean stable rank over mean utilization for the rank.
    pairs = {"layers.0.x": gaussian(40, 40, 4), "layers.1.x": gaussian(40, 40, 32)}
    summary = audit(adapter(pairs)).summary
    stable, used = summary.stable_rank_mean, summary.utilization_mean
    assert stable is not None
    assert used is not None
    assert summary.ranks == (4, 32)
    assert round(stable / used) not in {4, 32}
