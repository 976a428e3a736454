"""What each command does with an adapter whose initialisation changed the base."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers
from dense_updates import dense
from pissa_models import TARGETS, loaded, logits, merged, relative, same, tuned
from pissa_models import base as base  # noqa: PLC0414  (a fixture)
from pissa_models import quiet as quiet  # noqa: PLC0414  (a fixture)
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import UnsupportedError
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.protocol import FormatOptions
from adapterkit.passes.initialisation import undone
from adapterkit.passes.protocol import Context
from adapterkit.projection import project_file
from adapterkit.tinylora import TinySettings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

transformers.utils.logging.disable_progress_bar()


def test_adapters_that_left_the_base_alone_come_back_as_they_are(
    base: Path, tmp_path: Path
) -> None:
    raw = read_peft(tuned(base, tmp_path, "gaussian"), FormatOptions())
    assert undone(raw, Context(base=None)).adapter is raw


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("target", ["x.gguf", "x"])
def test_convert_makes_it_plain_where_the_base_is_given(
    init: str, target: str, base: Path, tmp_path: Path
) -> None:
    source = tuned(base, tmp_path / "a", init)
    report = adapterkit.convert(source, tmp_path / target, base=base)
    assert report.max_relative_error < 1e-6
    written = adapterkit.read(tmp_path / target, base=base)
    assert not written.settings
    expected = merged(base, source)
    for module, update in dense(written).items():
        error = np.linalg.norm(update - expected[f"{module}.weight"])
        assert error < 3e-6 * np.linalg.norm(update)


def test_merging_takes_it_back_where_the_base_is_given(base: Path, tmp_path: Path) -> None:
    first, second = tuned(base, tmp_path / "a", "pissa"), tuned(base, tmp_path / "b", "olora", r=3)
    paths, target = [first, second], tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"changed the base.*--base"):
        adapterkit.merge_files(paths, target)
    report = adapterkit.merge_files(paths, target, base=base, weights=[0.7, -0.2])
    assert sum("taken back" in note for note in report.notes) == 2
    truths = merged(base, first), merged(base, second)
    found = dense(read_peft(target, FormatOptions()))
    assert len(found) == 2 * len(TARGETS)
    for module, update in found.items():
        name = f"{module}.weight"
        want = 0.7 * truths[0][name] - 0.2 * truths[1][name]
        assert relative(update, want) < 3e-6, module


def test_convert_without_the_weights_says_what_is_needed(base: Path, tmp_path: Path) -> None:
    source = tuned(base, tmp_path / "a", "pissa")
    config = tmp_path / "config.json"
    config.write_text((base / "config.json").read_text())
    with pytest.raises(adapterkit.LossyConversionError, match="--base DIRECTORY"):
        adapterkit.convert(source, tmp_path / "x.gguf", base=config)


def test_peft_keeps_it_as_it_is_without_a_base(base: Path, tmp_path: Path) -> None:
    source = tuned(base, tmp_path / "a", "pissa")
    adapterkit.convert(source, tmp_path / "b")
    torch.testing.assert_close(
        logits(loaded(base, tmp_path / "b")), logits(loaded(base, source)), rtol=0, atol=0
    )


@pytest.fixture
def pissa(base: Path, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Return a PiSSA adapter, and the update that it is of the original base."""
    path = tuned(base, tmp_path / "pissa", "pissa")
    weights = {f"{module}.weight" for module in dense(read_peft(path, FormatOptions()))}
    return path, {
        n.removesuffix(".weight"): x for n, x in merged(base, path).items() if n in weights
    }


def test_compress_cuts_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, update = pissa
    for name in ("small", "small.gguf"):
        adapterkit.compress_file(path, tmp_path / name, rank=8, base=base)
        assert same(dense(adapterkit.read(tmp_path / name, base=base)), update, 3e-6)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.compress_file(path, tmp_path / "without", rank=2)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.compress(adapterkit.read(path), rank=2)
    assert not (tmp_path / "without").exists()


def test_diff_holds_the_update_of_the_original_base_against_another(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, _ = pissa
    adapterkit.convert(path, tmp_path / "plain", base=base)
    assert adapterkit.diff(path, tmp_path / "plain", base=base).equal
    assert adapterkit.diff(tmp_path / "plain", path, base=base).equal
    with pytest.raises(adapterkit.UncheckableError, match="--base"):
        adapterkit.diff(path, tmp_path / "plain")
    # What is the same bit for bit is the same on any base.
    shutil.copytree(path, tmp_path / "copy")
    assert adapterkit.diff(path, tmp_path / "copy").equal
    moved = load_file(path / "adapter_model.safetensors")
    save_file(
        {n: x * 1.0001 for n, x in moved.items()}, tmp_path / "copy/adapter_model.safetensors"
    )
    with pytest.raises(adapterkit.UncheckableError, match="--base"):
        adapterkit.diff(path, tmp_path / "copy", tolerance=0.1)


def test_projection_is_of_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, update = pissa
    settings = TinySettings(projection_dim=4, frozen_rank=2, target_modules=tuple(TARGETS))
    made = project_file(path, tmp_path / "tiny", base=base, settings=settings)
    norms = {row.module: row.norm for row in made.modules}
    assert norms == {name: pytest.approx(np.linalg.norm(x), rel=1e-5) for name, x in update.items()}
    assert any("pissa" in note for note in made.notes)


def test_projection_keeps_no_tokens_and_says_so(base: Path, tmp_path: Path) -> None:
    path = tuned(base, tmp_path / "alora", "gaussian", alora_invocation_tokens=[3, 4])
    settings = TinySettings(projection_dim=4, target_modules=tuple(TARGETS))
    with pytest.raises(UnsupportedError, match="alora_invocation_tokens"):
        project_file(path, tmp_path / "tiny", base=base, settings=settings)
    assert not (tmp_path / "tiny").exists()


def test_audit_measures_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path
) -> None:
    path, update = pissa
    (audited,) = adapterkit.audit(path, base=base).adapters
    for row in audited.modules:
        assert row.frobenius_norm == pytest.approx(np.linalg.norm(update[row.module]), rel=1e-5)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.audit(path)


def test_only_peft_carries_it_where_no_base_is_at_hand(
    pissa: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, _ = pissa
    for target in ("x.gguf", "x"):
        with pytest.raises(UnsupportedError, match="--base"):
            adapterkit.convert(path, tmp_path / target, to=None if "." in target else "mlx")
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.merge_files([path, path], tmp_path / "merged")


def test_a_base_that_is_found_makes_it_plain_for_peft_too(
    pissa: tuple[Path, dict[str, np.ndarray]],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, update = pissa
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "1"
    shutil.copytree(base, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = path / "adapter_config.json"
    named = {"base_model_name_or_path": "org/base"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    adapterkit.convert(path, tmp_path / "plain")
    written = adapterkit.read(tmp_path / "plain")
    assert not written.settings
    assert same(dense(written), update, 3e-6)


def test_no_stack_takes_it(pissa: tuple[Path, dict[str, np.ndarray]], base: Path) -> None:
    with pytest.raises(adapterkit.AdapterIncompatibleError, match=r"adapterkit convert .*--base"):
        adapterkit.AdapterStack(base).load(pissa[0])
