"""Projection of an adapter onto the coefficients of a pack, and what is lost by it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tinylora_pack_models import base as base  # noqa: PLC0414  (a fixture)
from tinylora_pack_models import injected, read, state_settings, worst

from adapterkit.conversion import convert
from adapterkit.errors import (
    LossyConversionError,
)
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit_cli.main import cli

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


# Projection of other adapters.


def test_projection_finds_the_coefficients_again(base: Path, tmp_path: Path) -> None:
    model = injected()
    source = state_settings(model.save(tmp_path / "step"))
    convert(source, tmp_path / "lora", base=base)
    with pytest.raises(LossyConversionError, match="adapterkit tinylora project"):
        convert(tmp_path / "lora", tmp_path / "pack", to="tinylora-pack", base=base)
    report = project("lora", "pack", base, tmp_path)
    assert report["residual"] < 1e-4
    assert report["parameters"] == 16
    state = torch.load(tmp_path / "pack" / "adapter_state.pt", weights_only=True)
    assert list(state) == list(model.state())
    for name, vector in model.state().items():
        assert torch.linalg.norm(state[name] - vector) < 1e-4 * torch.linalg.norm(vector)
    # In float64 every machine finds the same factors: what is read is what was fitted.
    assert worst(read(tmp_path / "pack", base), model) < 1e-4


def project(source: str, destination: str, base: Path, folder: Path, *more: str) -> dict[str, Any]:
    arguments = [folder / source, "-o", folder / destination, "--base", base, "--json"]
    ties = ["--size", "4", "--tie", "tiled", "--tie-factor", "4", "--numerator", "2", "--seed", "7"]
    options = [str(each) for each in (*arguments, *ties, *more)]
    done = CliRunner().invoke(cli, ["tinylora", "project", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_projection_of_a_foreign_adapter_reports_what_is_lost(base: Path, tmp_path: Path) -> None:
    convert(state_settings(injected().save(tmp_path / "step")), tmp_path / "lora", base=base)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    noise = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
    }
    save_file(noise, path)
    report = project("lora", "pack", base, tmp_path)
    source = detect(tmp_path / "lora").read(tmp_path / "lora", FormatOptions())
    result = read(tmp_path / "pack", base)
    dense = [
        {p.module: p.b.numpy().astype(float) @ p.a.numpy().astype(float) for p in adapter.pairs()}
        for adapter in (source, result)
    ]
    for row in report["modules"]:
        before, after = (each[row["module"]] for each in dense)
        lost = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert row["residual"] == pytest.approx(lost, rel=1e-4)
        assert row["norm"] == pytest.approx(np.linalg.norm(before), rel=1e-5)
        weight = load_file(base / "model.safetensors")[f"{row['module']}.weight"].double().numpy()
        u, _, vt = np.linalg.svd(weight)
        inside = u[:, :2].T @ before @ vt[:2].T
        rest = np.sqrt(1 - np.linalg.norm(inside) ** 2 / np.linalg.norm(before) ** 2)
        assert row["out_of_reach"] == pytest.approx(rest, rel=1e-4)
        assert row["residual"] >= 0.9 * row["out_of_reach"]


def test_projection_refuses_what_is_not_finite(base: Path, tmp_path: Path) -> None:
    convert(state_settings(injected().save(tmp_path / "step")), tmp_path / "lora", base=base)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = float("inf")
    save_file(tensors, path)
    arguments = [tmp_path / "lora", "-o", tmp_path / "x", "--base", base, "--size", 4]
    done = CliRunner().invoke(cli, ["tinylora", "project", *map(str, arguments)])
    assert done.exit_code == 3
    assert "holds NaN or infinity" in done.stderr


def test_projection_refuses_what_is_no_target(base: Path, tmp_path: Path) -> None:
    convert(state_settings(injected().save(tmp_path / "step")), tmp_path / "lora", base=base)
    arguments = [tmp_path / "lora", "-o", tmp_path / "x", "--base", base, "--size", 4]
    done = CliRunner().invoke(
        cli, ["tinylora", "project", *map(str, arguments), "--targets", "q_proj"]
    )
    assert done.exit_code == 4
    assert "is no target module; name its last component among --targets" in done.stderr
    assert not (tmp_path / "x").exists()
    rest = ("--targets", "q_proj", "--tie", "none")
    report = project("lora", "x", base, tmp_path, *rest, "--allow-lossy")
    assert [loss["code"] for loss in report["losses"]] == ["no-target"]
    assert all(row["module"].endswith("q_proj") for row in report["modules"])


def test_a_saved_head_is_left_out_where_that_is_allowed(base: Path, tmp_path: Path) -> None:
    convert(state_settings(injected().save(tmp_path / "step")), tmp_path / "lora", base=base)
    plain = project("lora", "plain", base, tmp_path)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    head = load_file(base / "model.safetensors")["lm_head.weight"] + 1
    save_file({**load_file(weights), "base_model.model.lm_head.weight": head}, weights)
    arguments = [tmp_path / "lora", "-o", tmp_path / "x", "--base", base, "--size", 4]
    done = CliRunner().invoke(cli, ["tinylora", "project", *map(str, arguments)])
    assert done.exit_code == 4
    assert "lm_head.weight.full: TinyLoRA has no place for it" in done.stderr
    report = project("lora", "x", base, tmp_path, "--allow-lossy")
    assert [loss["code"] for loss in report["losses"]] == ["not-an-update"]
    assert report["modules"] == plain["modules"]


def test_names_of_the_model_without_its_head_are_the_same_targets(
    base: Path, tmp_path: Path
) -> None:
    convert(state_settings(injected().save(tmp_path / "step")), tmp_path / "lora", base=base)
    whole = project("lora", "whole", base, tmp_path)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace(".model.model.", ".model."): t for name, t in tensors.items()}, weights)
    assert project("lora", "x", base, tmp_path)["modules"] == whole["modules"]
