"""Updates against their weights: dense float64 decompositions and PEFT's merged weights agree."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, decaying, gaussian, layered, written
from audit_bases import Array, found_by_name, tuned
from engine import BaseFixture, family_row, make_base
from peft.tuners.lora import LoraLayer
from terminal import PEFT, invoke

from adapterkit import WeightAudit, audit, read
from adapterkit.auditing.against_base import against_base
from adapterkit.base import open_base
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError, UncheckableError, UsageError
from adapterkit.keys import Role, TensorKey
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "gpt2", "mixtral")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def weights_of(live: Any) -> dict[str, tuple[Array, Array]]:
    """Return W and PEFT's merged W' of every module as (out, in), float64."""
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer.get_base_layer()
        for name, layer in live.named_modules()
        if isinstance(layer, LoraLayer)
    }
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    live.merge_adapter()
    found: dict[str, tuple[Array, Array]] = {}
    for name, layer in layers.items():
        both = before[name], layer.weight.detach()
        turned = type(layer).__name__ in {"Conv1D", "Embedding"}
        old, new = ((w.T if turned else w).double().numpy().copy() for w in both)
        found[name] = old, new
    live.unmerge_adapter()
    return found


def check(row: WeightAudit, old: Array, new: Array, rank: int) -> None:
    """Compare a row with full decompositions of what PEFT has before and after."""
    update = new - old
    left, values, right = np.linalg.svd(update, full_matrices=False)
    norms = np.linalg.svd(old, compute_uv=False)
    u, after, _ = np.linalg.svd(new, full_matrices=False)
    assert row.base_spectral_norm == pytest.approx(norms[0], rel=1e-6)
    assert row.base_frobenius_norm == pytest.approx(np.linalg.norm(old), rel=1e-6)
    assert row.update_spectral_norm == pytest.approx(values[0], rel=1e-5)
    assert row.update_frobenius_norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
    assert row.udr == pytest.approx(values[0] / norms[0], rel=1e-5)
    assert row.udr_f == pytest.approx(np.linalg.norm(update) / np.linalg.norm(old), rel=1e-5)
    assert row.sdi == pytest.approx(math.log10(values[0] / norms[0]), abs=1e-5)
    seen = np.linalg.norm(left[:, :rank].T @ old @ right[:rank].T)
    assert row.amplification == pytest.approx(np.linalg.norm(update) / seen, rel=1e-3)
    retention = np.linalg.norm(old.T @ u[:, :10], axis=0) / after[:10]
    assert row.retention == pytest.approx(retention, rel=1e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj", "embed_tokens"]),
        ("gpt2", ["c_attn", "c_proj"]),
    ],
)
def test_every_number_is_that_of_peft_s_merged_weights(
    bases: dict[str, BaseFixture], tmp_path: Path, family: str, targets: list[str], *, dora: bool
) -> None:
    live = tuned(bases[family], tmp_path / "a", target_modules=targets, use_dora=dora)
    weights = weights_of(live)
    for base in (bases[family].hf, bases[family].gguf):
        rows = found_by_name(audit(tmp_path / "a", base=base))
        # GGUF stores GPT-2 as (out, in) and llama's query rows in another order.
        assert rows.keys() == weights.keys()
        for module, (old, new) in weights.items():
            assert rows[module].kind == ("dora" if dora else "low-rank")
            check(rows[module], old, new, 4)


def test_experts_are_measured_one_by_one(bases: dict[str, BaseFixture], tmp_path: Path) -> None:
    base = bases["mixtral"]
    parameter = "model.layers.0.mlp.experts.down_proj"
    live = tuned(base, tmp_path / "a", target_modules=[], target_parameters=[parameter])
    before = live.get_base_model().state_dict()
    (name,) = (n for n in before if "layers.0" in n and "down_proj" in n and "lora" not in n)
    old = before[name].detach().double().numpy().copy()
    live.merge_adapter()
    new = live.get_base_model().state_dict()[name].detach().double().numpy()
    for place in (base.hf, base.gguf):
        report = audit(tmp_path / "a", base=place).adapters[0].base
        assert report is not None
        assert len(report.weights) == len(old) > 1
        for number, row in enumerate(report.weights):
            assert row.expert == number
            assert row.update_frobenius_norm is not None
            check(row, old[number], new[number], 4)


def model_of(folder: Path, weights: dict[str, Array], **config: Any) -> Path:
    """Write a llama with these weights, as float32."""
    folder.mkdir()
    known = json.loads((PEFT / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    tensors = {f"{n}.weight": LazyTensor.of(w.astype(np.float32)) for n, w in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def small_weights() -> dict[str, Array]:
    shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in layered(2).items()}
    return {
        name: np.random.default_rng(place).standard_normal(shape)
        for place, (name, shape) in enumerate(shapes.items())
    }


def test_a_quantised_base_is_measured_as_it_decodes(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    tuned(bases["llama"], tmp_path / "a", target_modules=["q_proj", "down_proj"])
    plain = open_base(bases["llama"].gguf)
    found = against_base(read(tmp_path / "a"), plain)
    matrices = {n: t for n, t in plain.tensors.items() if len(t.shape) == 2}
    packed = replace(plain, tensors={n: t.cast(DType.Q8_0) for n, t in matrices.items()})
    rows = against_base(read(tmp_path / "a"), packed).weights
    for row, exact in zip(rows, found.weights, strict=True):
        assert (row.dtype, exact.dtype) == ("Q8_0", "F32")
        decoded = packed.tensors[f"{row.tensor}.weight"].numpy().astype(np.float64)
        assert row.base_frobenius_norm == pytest.approx(np.linalg.norm(decoded), rel=1e-9)
        assert row.base_frobenius_norm != exact.base_frobenius_norm
        assert row.udr == pytest.approx(exact.udr, rel=1e-2)


def test_zero_updates_have_no_numbers_and_do_not_read_the_weight(tmp_path: Path) -> None:
    pairs, weights = layered(2), small_weights()
    first = next(iter(pairs))
    pairs[first] = (pairs[first][0], 0 * pairs[first][1])
    weights[first][0, 0] = np.nan
    base = model_of(tmp_path / "base", weights)
    found = audit(adapter(pairs), base=base).adapters[0].base
    assert found is not None
    assert found.weights[0].udr is None
    assert found.weights[0].base_frobenius_norm is None
    assert found.summary.weights == 4
    assert found.summary.leading_directions == 30
    ratios = [row.udr for row in found.weights[1:]]
    assert found.summary.udr_max == max(r for r in ratios if r is not None)


def test_a_module_that_the_base_lacks_is_listed(tmp_path: Path) -> None:
    weights = small_weights()
    absent = weights.popitem()[0]
    base = model_of(tmp_path / "base", weights)
    found = audit(adapter(layered(2)), base=base).adapters[0].base
    assert found is not None
    assert [each.module for each in found.not_compared] == [absent]
    assert len(found.weights) == 3
    more = {TensorKey("lm_head.weight", Role.FULL): LazyTensor.of(np.ones((3, 3)))}
    found = audit(adapter(layered(2), more=more), base=base).adapters[0].base
    assert found is not None
    assert [each.module for each in found.not_compared] == [absent, "lm_head.weight"]
    assert "trained whole" in found.not_compared[1].reason
    other = model_of(tmp_path / "other", {"model.norm": np.ones((4, 4))})
    with pytest.raises(UncheckableError, match="nothing could be compared"):
        audit(adapter(layered(2)), base=other)


def test_a_base_that_is_not_the_right_one_is_named(tmp_path: Path) -> None:
    weights = small_weights()
    wrong = model_of(tmp_path / "wrong", {n: w[:, :-1] for n, w in weights.items()})
    with pytest.raises(IncompatibleBaseError, match="is it the right base"):
        audit(adapter(layered(2)), base=wrong)
    name = next(iter(weights))
    weights[name][0, 0] = np.inf
    broken = model_of(tmp_path / "broken", weights)
    path = written(adapter(layered(2)), tmp_path / "a")
    result = invoke("audit", path, "--base", broken)
    assert (result.exit_code, result.stdout) == (3, "")
    assert name in result.stderr
    assert "holds NaN or infinity" in result.stderr
    with pytest.raises(UsageError, match="needs the weights of a base"):
        audit(path, base=PEFT / "base", exact=True)
    assert invoke("audit", path, "--exact").exit_code == 2


def test_the_command_shows_it_and_json_has_the_names_that_others_use(tmp_path: Path) -> None:
    base = model_of(tmp_path / "base", small_weights())
    path = written(adapter(layered(2)), tmp_path / "a")
    found = json.loads(invoke("audit", path, "--base", base, "--exact", "--json").stdout)
    found = found["results"][0]["base"]
    names = "udr_median udr_p90 udr_max udr_mean fraction_udr_gt_0_1 fraction_udr_gt_0_3"
    assert {*names.split(), "sdi_median", "intruder_dimensions"} <= found["summary"].keys()
    assert found["method"] == "exact"
    rows = {"udr", "udr_f", "sdi", "amplification", "retention", "intruder_dimensions"}
    assert rows <= found["weights"][0].keys()
    shown = invoke("audit", path, "--base", base).stdout
    assert "of the 40 leading directions" in shown
    assert "not compared" not in shown
    marked = invoke("audit", path, "--base", base, "--markdown").stdout
    assert "leading directions" in marked
    page = tmp_path / "page.html"
    assert invoke("audit", path, "--base", base, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "Against the base" in text
    cells = [json.loads(v.replace("&quot;", '"')) for v in re.findall(r'data-v="(\[.*?\])"', text)]
    metrics = re.findall(r'<option value="(\d+)" data-log="([01])">(.*?)</option>', text)
    assert [int(place) for place, _, _ in metrics] == list(range(len(cells[0])))
    assert metrics[-5:][0][2] == "‖ΔW‖₂ / ‖W‖₂"
    row = json.loads(invoke("audit", path, "--base", base, "--json").stdout)["results"][0]["base"][
        "weights"
    ][0]
    beside = [row[name] for name in ("udr", "udr_f", "amplification")]
    beside += [min(row["retention"]), row["intruder_dimensions"]]
    assert cells[0][-5:] == pytest.approx(beside, rel=1e-4)


def test_a_tiny_lora_is_measured_as_its_factors(tmp_path: Path) -> None:
    path = PEFT.parent / "tinylora" / "self-contained.safetensors"
    pairs = list(read(path).pairs())
    random = np.random.default_rng(0)
    weights = {p.module: random.standard_normal(p.shape) for p in pairs}
    found = audit(path, base=model_of(tmp_path / "base", weights)).adapters[0].base
    assert found is not None
    for row, pair in zip(found.weights, pairs, strict=True):
        dense = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        weight = weights[pair.module].astype(np.float32).astype(np.float64)
        check(row, weight, weight + dense, pair.rank)


def test_what_pissa_took_from_the_base_is_taken_back(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    name, (a, b) = next(iter(layered(1).items()))
    weight = decaying(32, 32, 1.0).astype(np.float32).astype(np.float64)
    whole = adapter({name: (a, b)}, scale=0.5).replace(initialisation="pissa")
    found = audit(whole, base=model_of(tmp_path / "base", {name: weight})).adapters[0].base
    assert found is not None
    u, s, v = np.linalg.svd(weight)
    update = 0.5 * b.astype(float) @ a.astype(float) - (u[:, :4] * s[:4]) @ v[:4]
    (row,) = found.weights
    assert row.update_frobenius_norm == pytest.approx(np.linalg.norm(update), rel=1e-6)
    check(row, weight, weight + update, 8)
    with pytest.raises(BaseRequiredError, match="pissa"):
        audit(whole, base=bases["llama"].gguf)


def test_weights_are_in_memory_two_at_a_time() -> None:
    side, count = 1024, 10
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]
    pairs = {name: gaussian(side, side, 2, seed=i) for i, name in enumerate(names)}
    base = open_base(PEFT / "base")
    weight = LazyTensor(DType.F32, (side, side), lambda: ramp(side))
    base = replace(base, tensors={f"{name}.weight": weight for name in names})
    tracemalloc.start()
    found = against_base(adapter(pairs), base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.summary.weights == count
    # W' has three directions, of which W has one.
    assert found.summary.leading_directions == 3 * count
    assert found.summary.intruder_dimensions == 2 * count
    assert peak < 5 * 8 * side**2 < count * 8 * side**2


def ramp(side: int) -> bytes:
    numbers = np.linspace(0.5, 1, side, dtype=np.float32)
    return np.outer(numbers, numbers).tobytes()
