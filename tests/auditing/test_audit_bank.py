"""Statistics against a bank: the numbers are right, and no verdict comes of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, written
from terminal import PEFT, TINY, invoke

from adapterkit import audit, bank
from adapterkit.auditing.reference_bank import STATISTICS, read_bank
from adapterkit.errors import FormatError, UncheckableError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight ordinary adapters, a bank of them, and one whose q projection is a spike."""
    place = tmp_path_factory.mktemp("bank")
    for seed in range(8):
        written(adapter(layered(3, seed=100 * seed)), place / f"a{seed}")
    pairs = layered(3, seed=0)
    for name, (a, b) in pairs.items():
        if "q_proj" in name:
            spike = np.zeros_like(b)
            spike[5, 0] = 30
            pairs[name] = (a, spike)
    written(adapter(pairs), place / "odd")
    bank(*(place / f"a{seed}" for seed in range(8)), destination=place / "bank.json")
    return place


def test_every_statistic_is_compared_with_the_bank_s(folder: Path) -> None:
    found = audit(folder / "odd", reference=folder / "bank.json").adapters[0].reference
    assert found is not None
    assert (found.members, found.other_bases) == (8, 0)
    assert len(found.standings) == 2 * len(STATISTICS)
    members = [audit(folder / f"a{seed}").modules for seed in range(8)]
    for row in found.standings:
        if row.statistic in {"kurtosis", "entropy"}:
            continue
        values = [
            np.mean([getattr(m, row.statistic) for m in modules if m.family == row.family])
            for modules in members
        ]
        assert row.mean == pytest.approx(np.mean(values))
        assert row.deviation == pytest.approx(np.std(values, ddof=1))
        assert row.z == pytest.approx((row.value - np.mean(values)) / np.std(values, ddof=1))
        below = sum(1.0 if v < row.value else 0.5 if v == row.value else 0.0 for v in values)
        assert row.percentile == pytest.approx(100 * below / 8)


def test_a_planted_spike_stands_out_and_the_rest_does_not(folder: Path) -> None:
    found = audit(folder / "odd", reference=folder / "bank.json").adapters[0].reference
    assert found is not None
    scores = {(row.family.rpartition(".")[2], row.statistic): row.z for row in found.standings}
    for statistic in ("spectral_norm", "kurtosis", "top1_energy"):
        score = scores["q_proj", statistic]
        assert score is not None
        assert score > 5
        # The same as a member's: no value of a sample is further out than (n - 1) / √n.
        other = scores["down_proj", statistic]
        assert other is not None
        assert abs(other) <= 7 / 8**0.5 + 1e-9


def test_an_adapter_is_not_compared_with_itself(folder: Path) -> None:
    found = audit(folder / "a3", reference=folder / "bank.json").adapters[0].reference
    assert found is not None
    assert found.members == 7


def test_no_output_says_that_an_adapter_is_good_or_bad(folder: Path) -> None:
    said = ""
    page = folder / "page.html"
    for more in ([], ["--json"], ["--markdown"], ["--csv"], ["--html", page]):
        result = invoke("audit", folder / "odd", "--reference", folder / "bank.json", *more)
        assert result.exit_code == 0
        said += result.output
    # What the page's own security policy is called says nothing of adapters.
    said += page.read_text(encoding="utf-8").replace("'unsafe-inline'", "")
    assert "Beside 8 others" in said
    said += invoke("audit", "--help").output + (folder / "bank.json").read_text()
    for word in ("safe", "clean", "malicious", "suspicious", "infected", "trustworthy"):
        assert word not in said.lower()
    shown = invoke("audit", folder / "odd", "--reference", folder / "bank.json").stdout
    assert "furthest from the 8 adapters of the bank" in shown


def test_the_command_writes_a_bank(folder: Path, tmp_path: Path) -> None:
    sources = [folder / f"a{seed}" for seed in range(3)]
    result = invoke("audit", *sources, "--bank", tmp_path / "b.json")
    assert (result.exit_code, result.stdout) == (
        0,
        f"{tmp_path / 'b.json'}: 3 adapters, 2 families of modules\n",
    )
    assert invoke("audit", *sources, "--bank", tmp_path / "b.json").exit_code == 1
    again = invoke("audit", *sources, "--bank", tmp_path / "b.json", "--force", "--json")
    answer = json.loads(again.stdout)
    assert [each["source"] for each in answer["members"]] == [str(each) for each in sources]
    assert invoke("audit", *sources, "--bank", tmp_path / "c", "--suggest").exit_code == 2
    assert not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match="no adapter"):
        bank(destination=tmp_path / "c")


def test_a_bank_of_one_has_values_and_no_z(folder: Path, tmp_path: Path) -> None:
    bank(folder / "a0", destination=tmp_path / "one.json")
    found = audit(folder / "a1", reference=tmp_path / "one.json").adapters[0].reference
    assert found is not None
    assert {row.z for row in found.standings} == {None}
    assert {row.percentile for row in found.standings} <= {0.0, 100.0}
    shown = invoke("audit", folder / "a1", "--reference", tmp_path / "one.json").stdout
    assert "no z-score" in shown


def test_a_bad_bank_is_exit_3_and_a_foreign_one_is_exit_5(folder: Path, tmp_path: Path) -> None:
    good = json.loads((folder / "bank.json").read_text())
    damaged: list[Any] = [{}, [], good | {"schema": 2}, good | {"members": [{"source": "x"}]}]
    family = next(iter(good["members"][0]["families"]))
    for value in ("x", None, float("nan")):
        member = {"source": "x", "base_model": None, "families": {family: {"entropy": value}}}
        damaged.append(good | {"members": [member]})
    for content in damaged:
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(FormatError):
            read_bank(tmp_path / "bad.json")
        result = invoke("audit", folder / "odd", "--reference", tmp_path / "bad.json")
        assert (result.exit_code, result.stdout) == (3, "")
    other = written(adapter({"h.0.x": gaussian(8, 8, 2)}), tmp_path / "other")
    with pytest.raises(UncheckableError, match="of another base"):
        audit(other, reference=folder / "bank.json")
    missing = invoke("audit", TINY, "--reference", PEFT / "nowhere.json")
    assert missing.exit_code == 3
