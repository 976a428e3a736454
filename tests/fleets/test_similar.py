"""Who is whose copy, among files of every format and among planted sketches."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from adapterkit import (
    AdapterTensorSet,
    SimilarityReport,
    Update,
    convert,
    find_similar,
    merge_files,
    write,
)
from adapterkit.dtype import DType
from adapterkit.fleets import relations
from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.products import stored
from adapterkit.tensor import LazyTensor
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[2] / "fixtures" / "peft" / "base"
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
SHAPES = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 48)}


def adapter(seed: int, scale: float = 0.5, gauge: bool = False) -> AdapterTensorSet:
    random = np.random.default_rng(seed)
    updates: list[Update] = []
    for name in MODULES:
        out, inputs = SHAPES[name.rpartition(".")[2]]
        b, a = random.standard_normal((out, 4)), random.standard_normal((4, inputs))
        if gauge:
            mix = np.random.default_rng(1).standard_normal((4, 4)) + 3 * np.eye(4)
            b, a = b @ np.linalg.inv(mix), mix @ a
        updates.append(Update(name, stored(a, DType.F32), stored(b, DType.F32), scale))
    return AdapterTensorSet.of(updates, {})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve unrelated adapters, and copies of the first ones in other clothes."""
    folder = tmp_path_factory.mktemp("fleet")
    for seed in range(12):
        write(adapter(seed), folder / f"{seed:02}")
    write(adapter(0, gauge=True), folder / "0-gauge")
    write(adapter(1, scale=-0.185), folder / "1-turned")
    convert(folder / "02", folder / "2.gguf", base=BASE, outtype="f16")
    convert(folder / "03", folder / "3-mlx", to="mlx", base=BASE, outtype="bf16")
    merge_files([folder / "04", folder / "05"], folder / "45-merged", weights=[0.7, 0.3])
    return folder


def compared(fleet: Path, /, **more: Any) -> SimilarityReport:
    with ThreadPoolExecutor(2) as pool:
        return find_similar([fleet], base=BASE, executor=pool, **more)


def test_copies_in_other_clothes_are_found_and_no_other(planted: Path) -> None:
    report = compared(planted)
    found = {frozenset({Path(copy.path).name, Path(copy.of).name}): copy for copy in report.copies}
    assert set(found) == {
        frozenset({"00", "0-gauge"}),
        frozenset({"01", "1-turned"}),
        frozenset({"02", "2.gguf"}),
        frozenset({"03", "3-mlx"}),
    }
    assert {copy.exact for copy in report.copies} == {True}
    kinds = {min(names): (copy.kind, copy.distance) for names, copy in found.items()}
    assert kinds["0-gauge"][1] < 1e-6
    assert [kinds[name][0] for name in ("0-gauge", "01", "02", "03")] == [
        *("same", "same", "rounded", "rounded")
    ]
    turned = found[frozenset({"01", "1-turned"})]
    assert turned.ratio == pytest.approx(-1 / 0.37 if turned.path.endswith("01") else -0.37)
    assert [len(cluster) for cluster in report.clusters] == [2, 2, 2, 2]


def test_a_merge_names_its_parents_and_weights(planted: Path) -> None:
    (merge,) = compared(planted).merges
    assert Path(merge.path).name == "45-merged"
    weights = {Path(p).name: w for p, w in zip(merge.parents, merge.weights, strict=True)}
    assert weights == {"04": pytest.approx(0.7, rel=1e-4), "05": pytest.approx(0.3, rel=1e-4)}
    assert merge.exact
    assert compared(planted, merges=False).merges == ()


def test_only_what_does_nothing_at_all_is_said_to_change_nothing(tmp_path: Path) -> None:
    zero = [replace(pair, scale=0.0) for pair in adapter(0).pairs()]
    idle = AdapterTensorSet.of(zero, {})
    head = LazyTensor.of(np.ones((3, 32), np.float32))
    write(idle, tmp_path / "idle")
    saved = {TensorKey("score.weight", Role.FULL): head, **idle.tensors}
    write(idle.replace(tensors=saved), tmp_path / "head")
    write(idle.replace(layer_replication=((0, 2), (1, 2))), tmp_path / "longer")
    sum_ = AdapterTensorSet.of(list(adapter(4).pairs()), {})
    write(adapter(4), tmp_path / "one")
    write(sum_.replace(invocation_tokens=(1, 2)), tmp_path / "two")
    with ThreadPoolExecutor(2) as pool:
        report = find_similar([tmp_path], executor=pool)
    assert [Path(path).name for path in report.untrained] == ["idle"]
    assert [Path(path).name for path in report.partial] == ["head", "longer", "two"]
    assert [(copy.kind, copy.partial) for copy in report.copies] == [("same", True)]
    assert "idle changes nothing" in report.text()


def test_sketches_are_kept_and_read_again(planted: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    first = compared(planted, folder=tmp_path, progress=lambda *done: counts.append(done))
    assert counts[-1] == (17, 17)
    again = compared(planted, folder=tmp_path, progress=lambda *done: counts.append(done))
    assert counts[-1] == (17, 17)
    assert len(counts) <= 17
    assert again == first


def test_without_a_base_it_is_said_what_cannot_be_compared(planted: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        report = find_similar([planted], executor=pool)
    assert [Path(path).name for path in report.unplaced] == ["2.gguf"]
    assert "2.gguf" not in {Path(copy.path).name for copy in report.copies}


def units(count: int, seed: int = 0) -> Any:
    vectors = np.random.default_rng(seed).standard_normal((count, 1024))
    return vectors / np.linalg.norm(vectors, axis=1)[:, None]


def test_planted_twins_are_found_over_the_edges_of_blocks() -> None:
    vectors = units(1500)
    pairs = [(5, 700, 1), (511, 512, -1), (100, 1499, 1), (1023, 1024, 1)]
    for first, second, sign in pairs:
        vectors[second] = sign * vectors[first] + 1e-4 * units(1, second)[0]
    found = {(twin.of, twin.index, twin.sign) for twin in relations.twins(vectors)}
    assert found == set(pairs)
    assert all(twin.distance == pytest.approx(1e-4, rel=1e-3) for twin in relations.twins(vectors))


def test_planted_sums_are_found_once_and_nothing_else() -> None:
    vectors = units(800)
    vectors[50] = 0.6 * vectors[3] + 0.4 * vectors[7]
    vectors[60] = 0.5 * vectors[10] - 0.5 * vectors[11] + 0.4 * vectors[12]
    vectors[[50, 60]] /= np.linalg.norm(vectors[[50, 60]], axis=1)[:, None]
    first, second = relations.sums(vectors, range(800))
    assert (first.index, set(first.parents)) == (50, {3, 7})
    assert {second.index, *second.parents} == {10, 11, 12, 60}
    assert first.residual < 1e-6
    assert relations.sums(units(800, 1), range(800)) == []


def test_stages_of_one_training_are_no_merges() -> None:
    steps = 0.3 * units(20, 3)
    vectors = units(1, 4) + np.cumsum(steps, axis=0)
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    assert relations.sums(vectors, range(20)) == []


def test_the_program_says_who_is_whose_copy(planted: Path) -> None:
    line = ["fleet", "similar", str(planted), "--base", str(BASE), "--jobs", "1"]
    run = CliRunner().invoke(cli, line)
    assert run.exit_code == 0
    assert "17 adapters: 4 copies in 4 clusters, 1 merge\n" in run.output
    assert f"{planted}/45-merged is 0.7 · {planted}/04 + 0.3 · {planted}/05" in run.output
    document = json.loads(CliRunner().invoke(cli, [*line, "--json"]).stdout)
    assert document["adapters"] == 17
