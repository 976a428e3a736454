"""Ranks, errors and refusals of an extraction, against dense float64."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoint_pairs import Q, checkpoint, pair, spectrum
from terminal import invoke

from adapterkit import ExtractReport, extract, read
from adapterkit.dtype import DType
from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    IncompatibleBaseError,
    NotFoundError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from adapterkit.extraction import difference as differences
from adapterkit.lowrank.operators import Plane

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

NUMBERS = np.arange(1, 301)
SPECTRA = {
    "fast": 0.8**NUMBERS,
    "inverse": 1.0 / NUMBERS,
    "slow": NUMBERS**-0.2,
    "flat": np.ones(300),
}


def product(folder: Path) -> np.ndarray[Any, Any]:
    (found,) = read(folder).pairs()
    return found.scale * found.b.numpy().astype(float) @ found.a.numpy().astype(float)


def apart(base: Path, tuned: Path) -> np.ndarray[Any, Any]:
    from safetensors.numpy import load_file

    name = f"{Q}.weight"
    old, new = (load_file(each / "model.safetensors")[name].astype(float) for each in (base, tuned))
    return new - old


def only(report: ExtractReport) -> Any:
    (module,) = report.modules
    return module


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("held", [0, 1 << 25])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_measured_and_near_the_best(
    name: str, held: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "_HELD", held)
    monkeypatch.setattr(differences, "_BLOCK", 7000)
    base, tuned = pair(tmp_path, spectrum(350, 300, SPECTRA[name]))
    report = extract(base, tuned, tmp_path / "out", rank=rank)
    module = only(report)
    whole = apart(base, tuned)
    norm = float(np.linalg.norm(whole))
    assert (module.rank, report.rank) == (rank, rank)
    assert module.norm == pytest.approx(norm, rel=1e-12)
    error = float(np.linalg.norm(whole - product(tmp_path / "out"))) / norm
    assert module.relative_error == pytest.approx(error, rel=1e-6)
    best = float(np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[rank:])) / norm
    assert best * (1 - 1e-9) <= error <= best * (1 + 1e-3)


@pytest.mark.parametrize("name", ["fast", "inverse"])
@pytest.mark.parametrize(("wish", "tolerance"), [({"tol": 0.1}, 0.1), ({"energy": 0.96}, 0.2)])
def test_a_tolerance_gets_the_smallest_rank_that_honours_it(
    wish: dict[str, float], tolerance: float, name: str, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path, spectrum(350, 300, SPECTRA[name]))
    report = extract(base, tuned, tmp_path / "out", **wish)
    module = only(report)
    values = np.linalg.svd(apart(base, tuned), compute_uv=False)
    lost = [float(np.linalg.norm(values[k:]) / np.linalg.norm(values)) for k in range(301)]
    assert module.relative_error <= tolerance
    assert report.tolerance == pytest.approx(tolerance)
    smallest = next(k for k, error in enumerate(lost) if error <= tolerance)
    # The sketch is within 1e-3 of the best, so one more is possible where it is a close call.
    assert smallest <= module.rank <= smallest + (lost[smallest] > 0.999 * tolerance)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_auto_ends_where_the_rounding_begins(rank: int, dtype: DType, tmp_path: Path) -> None:
    random = np.random.default_rng(rank)
    update = random.standard_normal((400, rank)) @ random.standard_normal((rank, 300))
    update *= 0.03 * 0.02 / rank**0.5
    base, tuned = pair(tmp_path, update, dtype=dtype)
    module = only(extract(base, tuned, tmp_path / "out"))
    assert module.rank == rank
    assert module.explained is not None
    assert module.explained > (0.9 if dtype is not DType.F32 else 0.1)
    # A larger number gets no ranks of noise.
    more = only(extract(base, tuned, tmp_path / "more", rank=60))
    assert more.rank == rank


def test_rows_and_columns_of_unequal_size_are_no_signal(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    lopsided = np.exp(random.standard_normal((400, 1)) + random.standard_normal((1, 300)) / 2)
    weight = 0.02 * lopsided * random.standard_normal((400, 300))
    exact = np.asarray(weight, np.float32)
    base = checkpoint(tmp_path / "base", {f"{Q}.weight": exact}, DType.F32)
    tuned = checkpoint(tmp_path / "tuned", {f"{Q}.weight": exact}, DType.BF16)
    with pytest.raises(UnsupportedError, match=r"in 1 tensors?, by no more than the rounding"):
        extract(base, tuned, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="by no more than the rounding"):
        extract(base, tuned, tmp_path / "out", rank=8)
    assert not (tmp_path / "out").exists()


def test_16_bits_are_used_where_they_cost_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, spectrum(350, 300, SPECTRA["fast"]), dtype=DType.BF16, size=1e-4)
    # At rank 4 the truncation hides the rounding of factors, at a tolerance of 1e-3 nothing does.
    assert only(extract(base, tuned, tmp_path / "rough", rank=4)).dtype == "BF16"
    fine = only(extract(base, tuned, tmp_path / "fine", tol=1e-3))
    assert fine.dtype == "F32"
    assert fine.relative_error <= 1e-3


def test_what_is_not_of_low_rank_is_said_to_be(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, spectrum(350, 300, SPECTRA["inverse"]))
    report = extract(base, tuned, tmp_path / "out", max_rank=5)
    assert only(report).rank == 5
    assert any("would take more than 5 ranks" in warning for warning in report.warnings)
    report = extract(base, tuned, tmp_path / "one", rank=1)
    (warning,) = report.warnings
    assert re.match("1 of 1 modules lose more than 10% .* 39% at rank 1; raise --rank", warning)
    base, tuned = pair(tmp_path / "slow", spectrum(350, 300, SPECTRA["slow"]))
    (warning,) = extract(base, tuned, tmp_path / "slow" / "out").warnings
    assert "what is left has no low rank, as in a full fine-tune" in warning


def test_white_noise_has_no_rank_of_its_own(tmp_path: Path) -> None:
    noise = 1e-3 * np.random.default_rng(1).standard_normal((350, 300))
    base, tuned = pair(tmp_path, noise)
    with pytest.raises(UnsupportedError, match=r"only in what no factors hold: .*q_proj"):
        extract(base, tuned, tmp_path / "out")
    assert only(extract(base, tuned, tmp_path / "out", rank=4)).rank == 4


def test_large_planes_take_few_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passes = 0
    once = Plane.pulled

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return once(*arguments)

    monkeypatch.setattr(Plane, "pulled", counted)
    random = np.random.default_rng(0)
    update = random.standard_normal((400, 8)) @ random.standard_normal((8, 300)) * 1e-4
    base, tuned = pair(tmp_path, update, dtype=DType.BF16)
    extract(base, tuned, tmp_path / "out")
    assert passes <= 3


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, spectrum(40, 32, np.ones(2)))
    for wrong in ({"rank": 4, "tol": 0.1}, {"rank": 0}, {"rank": "four"}, {"tol": 2.0}):
        with pytest.raises(UsageError):
            extract(base, tuned, tmp_path / "out", **wrong)
    with pytest.raises(UsageError, match="leave out max_rank"):
        extract(base, tuned, tmp_path / "out", rank=4, max_rank=8)
    with pytest.raises(UsageError, match="max_rank is 0"):
        extract(base, tuned, tmp_path / "out", max_rank=0)


class TestBadInput:
    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[Path, Path]:
        return pair(tmp_path, spectrum(40, 32, np.ones(2)))

    def refused(self, error: type[Exception], words: str, *arguments: Any, **more: Any) -> None:
        with pytest.raises(error, match=words):
            extract(*arguments, **more)
        folder = arguments[2].parent
        assert not [path for path in folder.iterdir() if path.name.startswith((".", "out"))]

    def test_the_same_model_twice(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        words = "holds the same weights as .*base: there is nothing to extract"
        self.refused(UnsupportedError, words, two[0], two[0], tmp_path / "out")

    @pytest.mark.parametrize("broken", [0, 1])
    def test_nan(self, broken: int, two: tuple[Path, Path], tmp_path: Path) -> None:
        values = np.zeros((40, 32))
        values[3, 4] = np.nan
        shutil.rmtree(two[broken])
        checkpoint(two[broken], {f"{Q}.weight": values}, DType.F32)
        words = rf"{two[broken].name}: .*q_proj\.weight: holds NaN or infinity"
        self.refused(FormatError, words, *two, tmp_path / "out")

    def test_a_missing_shard(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        listed = {f"{Q}.weight": "model.safetensors", "model.norm.weight": "other.safetensors"}
        index = two[1] / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": listed}))
        words = r"model\.norm\.weight: its shard is missing"
        self.refused(NotFoundError, words, *two, tmp_path / "out")

    def test_another_architecture(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        fields = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        other = checkpoint(
            tmp_path / "qwen", {f"{Q}.weight": np.ones((40, 32))}, DType.F32, **fields
        )
        self.refused(IncompatibleBaseError, "is Qwen2.* is Llama", two[0], other, tmp_path / "out")

    def test_other_sizes_and_other_tensors(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        wide = checkpoint(tmp_path / "wide", {f"{Q}.weight": np.ones((40, 33))}, DType.F32)
        words = r"q_proj\.weight: has shape \[40, 32\], and .* of the tuned model \[40, 33\]"
        self.refused(IncompatibleBaseError, words, two[0], wide, tmp_path / "out")
        names = (f"{Q}.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
        more = checkpoint(tmp_path / "more", dict.fromkeys(names, np.ones((40, 32))), DType.F32)
        words = r"more: model\.layers\.1\.mlp\.up_proj\.weight: is not in .*base, as 1 more"
        self.refused(IncompatibleBaseError, words, two[0], more, tmp_path / "out")
        words = r"more: model\.layers\.1\.mlp\.up_proj\.weight: is not in .*tuned, as 1 more"
        self.refused(IncompatibleBaseError, words, more, two[1], tmp_path / "out")

    def test_a_quantised_checkpoint_and_none(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        fields = {"quantization_config": {"quant_method": "gptq"}}
        packed = checkpoint(
            tmp_path / "gptq", {f"{Q}.weight": np.ones((40, 32))}, DType.F32, **fields
        )
        self.refused(UnsupportedError, "gptq: is quantised", two[0], packed, tmp_path / "out")
        (two[1] / "model.safetensors").unlink()
        self.refused(UnsupportedError, "has no safetensors weights", *two, tmp_path / "out")

    def test_destinations(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
        with pytest.raises(DestinationExistsError, match="is never replaced"):
            extract(*two, tmp_path / "mine")
        with pytest.raises(WriteError, match="could not be written"):
            extract(*two, tmp_path / "mine" / "thesis.txt" / "out")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
        extract(*two, tmp_path / "out")
        extract(*two, tmp_path / "out", force=True)

    def test_one_of_each_kind(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        from adapterkit.containers.gguf import write_gguf
        from adapterkit.tensor import LazyTensor

        file = tmp_path / "model.gguf"
        held = {"blk.0.attn_q.weight": LazyTensor.of(np.ones((40, 32), np.float32))}
        write_gguf(file, {"general.architecture": "llama"}, held)
        words = "is a GGUF file, and the base a Hugging Face directory: give both in one format"
        self.refused(UnsupportedError, words, two[0], file, tmp_path / "out")


def test_the_terminal_says_what_json_says(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, spectrum(40, 32, np.array([0.3, 0.2])))
    arguments = ("extract", "--base", base, "--tuned", tuned)
    shown = invoke(*arguments, "-o", tmp_path / "out", "--json")
    assert (shown.exit_code, shown.stderr) == (0, "")
    document = json.loads(shown.stdout)
    assert document["schema"] == 2
    assert document["modules"][0]["rank"] == 2
    assert document["equal"] == 0
    refused = invoke("extract", "--base", base, "--tuned", base, "-o", tmp_path / "none")
    assert refused.exit_code == 4
    assert refused.stderr.count("\n") == 1
    assert invoke("extract", "--tuned", tuned, "-o", tmp_path / "none").exit_code == 2
