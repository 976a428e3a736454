"""Checkpoints of the ANRGUSC pack against a live model that carries them."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tinylora_pack import by_kind, chunked, inject
from tinylora_pack_models import (
    EXACT,
    SETTINGS,
    injected,
    llama,
    names,
    read,
    state_settings,
    worst,
)
from tinylora_pack_models import base as base  # noqa: PLC0414  (a fixture)

from adapterkit.conversion import convert
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UncheckableError,
    UsageError,
)
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit.tinylora import TinySettings, streams
from adapterkit.tinylora.inference import tie_groups

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


TIES: dict[str, tuple[dict[str, Any], Any]] = {
    "tiled": ({"tie_mode": "tiled", "tie_factor": 4}, lambda every: chunked(every, 4)),
    "tiled-short-last": ({"tie_mode": "tiled", "tie_factor": 5}, lambda every: chunked(every, 5)),
    "structured": ({"tie_mode": "structured", "tie_factor": 2}, lambda every: by_kind(every, 2)),
    "all": ({"tie_mode": "all"}, lambda every: dict.fromkeys(every, 0)),
    "none": ({"tie_mode": "none"}, lambda every: {name: n for n, name in enumerate(every)}),
}


@pytest.mark.parametrize("rank", [1, 2, 4, 32])
@pytest.mark.parametrize("tie", TIES)
def test_updates_are_those_of_the_live_model(
    tie: str, rank: int, base: Path, tmp_path: Path
) -> None:
    settings, grouped = TIES[tie]
    model = injected(grouped(names()), frozen_rank=rank, alpha=3.0)
    folder = state_settings(model.save(tmp_path / "step"), frozen_rank=rank, alpha=3.0, **settings)
    assert worst(read(folder, base), model) < EXACT


def test_logits_in_peft_are_those_of_the_live_model(base: Path, tmp_path: Path) -> None:
    model = injected()
    folder = state_settings(model.save(tmp_path / "step"))
    after = logits(model.model)
    effect = (after - logits(llama())).abs().max()
    assert effect > 1e-2
    for name, form in (("lora", "peft"), ("tiny", "tinylora-peft")):
        report = convert(folder, tmp_path / name, base=base, to=form)
        assert report.max_relative_error < EXACT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        assert (logits(again) - after).abs().max() < 1e-5 * effect, name
    # The very numbers that were trained, in one vector: still as many.
    stored = load_file(tmp_path / "tiny" / "adapter_model.safetensors")
    assert stored["base_model.tinylora_v.0"].numel() == 16


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
@pytest.mark.parametrize("spread", [0.5, 5e-6])
def test_tiny_coefficients_survive_half_precision(
    spread: float, outtype: str, base: Path, tmp_path: Path
) -> None:
    every = chunked(names(), 4)
    model = inject(llama(), every, SETTINGS, spread=spread)
    folder = state_settings(model.save(tmp_path / "step"))
    convert(folder, tmp_path / "lora", base=base, outtype=outtype)
    written = detect(tmp_path / "lora").read(tmp_path / "lora", FormatOptions())
    assert worst(written, model) < {"f16": 5e-4, "bf16": 4e-3}[outtype]


def test_bare_state_file(base: Path, tmp_path: Path) -> None:
    model = injected()
    torch.save(model.state(), tmp_path / "adapter_state.pt")
    state_settings(tmp_path, seed=7)
    adapter = read(tmp_path / "adapter_state.pt", base)
    assert worst(adapter, model) < EXACT
    assert any("no manifest.json" in note for note in adapter.provenance.notes)


def test_run_and_root_lead_to_the_newest_whole_checkpoint(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    model = injected()
    model.save(run / "checkpoints" / "step_000000009")
    broken = injected().save(run / "checkpoints" / "step_000000010")
    (broken / "COMPLETED").unlink()
    older = inject(llama(), chunked(names(), 4), SETTINGS, seed=6)
    older.save(run / "checkpoints" / "step_000000008")
    state_settings(run)
    for path in (tmp_path, run):
        adapter = read(path, base)
        assert worst(adapter, model) < EXACT
        assert any("step_000000010 passed over" in note for note in adapter.provenance.notes)
    # The pointer is an absolute path of another machine: only its name counts.
    (run / "manifests").mkdir()
    pointer = {"checkpoint_dir": "/gone/checkpoints/step_000000008"}
    (run / "manifests" / "latest_checkpoint.json").write_text(json.dumps(pointer))
    assert worst(read(run, base), older) < EXACT


def test_settings_may_be_named(base: Path, tmp_path: Path) -> None:
    model = injected()
    folder = model.save(tmp_path / "step")
    settings = tmp_path / "mine.json"
    settings.write_text(json.dumps({"frozen_rank": 2}))
    adapter = read(folder, base, dialect=str(settings), alpha=2.0)
    assert worst(adapter, model) < EXACT


@pytest.mark.parametrize(
    ("stated", "missing"),
    [({}, "frozen_rank, alpha"), ({"alpha": 2.0}, "frozen_rank"), ({"frozen_rank": 2}, "alpha")],
)
def test_what_the_checkpoint_does_not_hold_must_be_stated(
    stated: dict[str, Any], missing: str, base: Path, tmp_path: Path
) -> None:
    folder = injected().save(tmp_path / "step")
    (folder / "tinylora.json").write_text(json.dumps(stated))
    with pytest.raises(UsageError, match=rf"does not hold {missing}; state"):
        read(folder, base)


def test_base_must_be_given_with_weights(base: Path, tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step"))
    with pytest.raises(BaseRequiredError, match=r"example/tiny.*safetensors weights as --base"):
        read(folder, None)
    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(base / "config.json", config)
    with pytest.raises(BaseRequiredError, match=r"only a config\.json was given"):
        read(folder, config)


def test_unique_ties_are_told_and_noted(base: Path, tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step"))
    notes = read(folder, base).provenance.notes
    assert any("tiled 4 told from the vectors' names" in note for note in notes)


def test_order_of_registration_narrows_the_ties(base: Path, tmp_path: Path) -> None:
    # The last module by name is registered third: as a group of its own it leaves a key that no
    # other tie would, but only to who knows the order.
    model = injected(chunked(names(), 13))
    folder = state_settings(model.save(tmp_path / "step"))
    assert worst(read(folder, base), model) < EXACT
    with pytest.raises(UsageError, match="several ties fit"):
        tie_groups(names(), model.keys, TinySettings(), {}, ordered=False, path=folder)


def test_several_possible_ties_are_never_guessed(base: Path, tmp_path: Path) -> None:
    # One module in the second group, or six: the first of it is the same, so are the keys.
    model = injected(chunked(names(), 10))
    folder = state_settings(model.save(tmp_path / "step"))
    with pytest.raises(UsageError, match=r"several ties fit .*tiled \d+, tiled \d+"):
        read(folder, base)
    assert worst(read(state_settings(folder, tie_mode="tiled", tie_factor=10), base), model) < EXACT


def test_budget_plan_decides_between_ties(base: Path, tmp_path: Path) -> None:
    # Two numbers over 14 modules: 7 to 12 modules in the first group leave the same keys.
    model = injected(chunked(names(), 7), projection_dim=1)
    folder = state_settings(model.save(tmp_path / "step", budget_target=2))
    adapter = read(folder, base)
    assert worst(adapter, model) < EXACT
    assert any("told from the budget plan for 2" in note for note in adapter.provenance.notes)


@pytest.mark.parametrize(
    "stated",
    [
        {"tie_mode": "tiled", "tie_factor": 5},
        {"tie_mode": "structured", "tie_factor": 4},
        {"tie_mode": "all"},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "tie_mode": "tiled", "tie_factor": 4},
    ],
)
def test_wrong_ties_are_noticed(stated: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step", inject_summary={}), **stated)
    with pytest.raises(UsageError, match="do not belong to groups of tie_mode"):
        read(folder, base)


def test_settings_that_contradict_the_run_are_noticed(base: Path, tmp_path: Path) -> None:
    folder = injected().save(tmp_path / "step")
    with pytest.raises(UsageError, match="seed is 8 in one place and 7 in another"):
        read(state_settings(folder, seed=8), base)
    with pytest.raises(UsageError, match="projection_dim is 2 in one place and 4"):
        read(state_settings(folder, projection_dim=2), base)
    with pytest.raises(FormatError, match=r"frozen_rank: expects a whole number .* has 0"):
        read(state_settings(folder, frozen_rank=0), base)
    with pytest.raises(FormatError, match="frozen_ranks: unknown setting"):
        read(state_settings(folder, frozen_ranks=2), base)


def test_base_without_the_injected_modules_is_refused(tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step"))
    llama(layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(IncompatibleBaseError, match=r"layers\.1.*has no such target"):
        read(folder, tmp_path / "short")
    llama(layers=3).save_pretrained(tmp_path / "long")
    with pytest.raises(IncompatibleBaseError, match="injected 14 modules, the base has 21"):
        read(folder, tmp_path / "long")


def test_weights_may_have_been_rounded_in_training(base: Path, tmp_path: Path) -> None:
    model = inject(llama().bfloat16(), chunked(names(), 4), SETTINGS)
    folder = state_settings(model.save(tmp_path / "step"), dtype="bfloat16")
    assert worst(read(folder, base), model) < EXACT
    (folder / "tinylora.json").unlink()
    adapter = read(state_settings(folder), base)
    assert worst(adapter, model) > 1e-3
    assert any("taken as stored (F32)" in note for note in adapter.provenance.notes)


def test_without_torch_the_streams_are_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    folder = state_settings(injected().save(tmp_path / "step"))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(streams, "available", lambda: False)
    with pytest.raises(UncheckableError, match="pip install torch"):
        read(folder, base)
