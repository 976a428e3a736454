"""Rules on entries into a base: the same update as an adapter of full rank holds, exactly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import merge_oracle as oracle
import numpy as np
import pytest
from audit_adapters import adapter, layered, written
from terminal import PEFT, invoke

from adapterkit import merge, merge_into
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.keys import Role, TensorKey
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

RULES: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare": {"density": 0.4, "seed": 3},
    "dare-ties": {"density": 0.4, "seed": 3},
    "della": {"density": 0.5, "seed": 3},
    "breadcrumbs": {"density": 0.6, "params": {"gamma": 0.05}},
    "magnitude_prune": {"density": 0.3},
    "sce": {"density": 0.5},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A llama of one layer with two projections."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = json.loads((PEFT / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": LazyTensor.of(random.standard_normal((b.shape[0], a.shape[1])))
        for name, (a, b) in layered(1).items()
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Two adapters; the second has one module less."""
    second = layered(1, seed=50)
    second.pop(next(iter(second)))
    wholes = adapter(layered(1), scale=0.5), adapter(second, scale=2.0)
    return [written(whole, tmp_path / name) for whole, name in zip(wholes, "ab", strict=True)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_into_a_base_is_the_rule(
    rule: str, base: Path, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of few rows, in any order.
    monkeypatch.setattr("adapterkit.merging.into.blocks.BLOCK", 160)
    weights = [0.7, 0.45]
    merge_into(sources, base, tmp_path / "out", weights=weights, method=rule, **RULES[rule])
    from adapterkit import read

    alone = merge(
        [read(source) for source in sources], weights=weights, method=rule, rank=96, **RULES[rule]
    )
    before, after = (
        read_safetensors(folder / "model.safetensors").tensors
        for folder in (base, tmp_path / "out")
    )
    wanted = oracle.deltas(alone.adapter)
    for module, update in wanted.items():
        name = f"{module}.weight"
        found = after[name].numpy() - before[name].numpy()
        # The adapter's factors are float32.
        assert oracle.relative(found, update) < 1e-5
        kept = np.abs(found) > 1e-9
        assert (kept == (np.abs(update) > 1e-4 * np.abs(update).max())).mean() > 0.99


def test_default_weights_are_those_of_the_rule(
    base: Path, sources: list[Path], tmp_path: Path
) -> None:
    means = merge_into(sources, base, tmp_path / "mean", method="ties")
    assert means.weights == (0.5, 0.5)
    sums = merge_into(sources, base, tmp_path / "sum", method="magnitude-prune")
    assert sums.weights == (1.0, 1.0)
    shares = merge_into(sources, base, tmp_path / "shares", weights=[3.0, 1.0], normalize=True)
    assert shares.weights == (0.75, 0.25)
    with pytest.raises(UsageError, match="sum to 0"):
        merge_into(sources, base, tmp_path / "none", weights=[1.0, -1.0], normalize=True)


def test_what_a_rule_cannot_take_is_refused(
    base: Path, sources: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="slerp makes an adapter without a loss"):
        merge_into(sources, base, tmp_path / "out", method="slerp")
    with pytest.raises(UsageError, match="one path is given twice"):
        merge_into([sources[0], sources[0]], base, tmp_path / "out", method="ties")
    with pytest.raises(UsageError, match="no parameter 'gamma'"):
        merge_into(sources, base, tmp_path / "out", method="ties", params={"gamma": 1.0})
    name = f"{next(iter(layered(1)))}.weight"
    whole = {TensorKey(name, Role.FULL): LazyTensor.of(np.ones((32, 32), dtype=np.float32))}
    last = dict([list(layered(1).items())[-1]])
    more = written(adapter(last, more=whole), tmp_path / "more")
    with pytest.raises(UnsupportedError, match="holds more than low-rank updates here"):
        merge_into([sources[0], more], base, tmp_path / "out", method="ties")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_rule(base: Path, sources: list[Path], tmp_path: Path) -> None:
    made = ("--into", base, "-o", tmp_path / "out", "--method", "dare_linear", "--density", "0.5")
    done = invoke("merge", *sources, *made)
    assert done.exit_code == 0, done.stderr
    assert "dare_linear is dare here" in done.stderr
    wrong = invoke("merge", *sources, "--into", base, "-o", tmp_path / "o", "--rank", "3")
    assert wrong.exit_code == 2
