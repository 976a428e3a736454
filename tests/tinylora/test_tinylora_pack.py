"""Checkpoints of the ANRGUSC pack against a live model that carries them."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tinylora_pack import TARGETS, Injected, by_kind, chunked, inject, linear_names

from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    LossyConversionError,
    UncheckableError,
    UsageError,
)
from adapterkit.formats.protocol import Options
from adapterkit.formats.tinylora.pack import read as read_pack
from adapterkit.registry import detect
from adapterkit.tinylora import TinySettings, streams
from adapterkit.tinylora.inference import tie_groups
from adapterkit.tinylora.targets import target_modules
from adapterkit_cli.main import cli

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.model import AdapterTensorSet

torch.set_num_threads(1)

SETTINGS = {"frozen_rank": 2, "projection_dim": 4, "alpha": 2.0, "seed": 7}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
EXACT = 1e-6


def llama(seed: int = 0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def names() -> list[str]:
    return linear_names(llama(), TARGETS)


def injected(groups: dict[str, int] | None = None, **changes: Any) -> Injected:
    every = names()
    groups = chunked(every, 4) if groups is None else groups
    return inject(llama(), groups, {**SETTINGS, **changes})


def state_settings(folder: Path, **settings: Any) -> Path:
    stated = {"frozen_rank": 2, "alpha": 2.0, **settings}
    (folder / "tinylora.json").write_text(json.dumps(stated))
    return folder


def read(path: Path, base: Path | None, **options: Any) -> AdapterTensorSet:
    assert detect(path).name == "tinylora-pack"
    return read_pack(path, Options(base=open_base(base) if base else None, **options))


def worst(adapter: AdapterTensorSet, model: Injected) -> float:
    """Return the largest relative error of an update against the live model's."""
    found: list[float] = []
    pairs = {pair.module: pair for pair in adapter.pairs()}
    assert pairs.keys() == model.layers.keys()
    for name, layer in model.layers.items():
        pair, truth = pairs[name], layer.delta().numpy()
        mine = pair.scale * (pair.b.numpy().astype(float) @ pair.a.numpy().astype(float))
        found.append(float(np.linalg.norm(mine - truth) / np.linalg.norm(truth)))
    return max(found)


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
    written = detect(tmp_path / "lora").read(tmp_path / "lora", Options())
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


# What adapterkit writes.


def written(base: Path, tmp_path: Path) -> tuple[Path, Injected]:
    model = injected()
    source = state_settings(model.save(tmp_path / "step"))
    convert(source, tmp_path / "pack", to="tinylora-pack", base=base)
    return tmp_path / "pack", model


def test_checkpoint_is_written_as_the_pack_does(base: Path, tmp_path: Path) -> None:
    pack, model = written(base, tmp_path)
    state = torch.load(pack / "adapter_state.pt", weights_only=True)
    assert list(state) == list(model.state())
    assert all(torch.equal(state[name], vector) for name, vector in model.state().items())
    manifest = json.loads((pack / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == {"adapter_state.pt", "tinylora.json"}
    for entry in manifest["files"]:
        data = (pack / entry["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert manifest["metadata"]["seed"] == 7
    assert (pack / "COMPLETED").is_file()


def test_self_contained_form_goes_back_to_the_pack(base: Path, tmp_path: Path) -> None:
    model = injected()
    source = state_settings(model.save(tmp_path / "step"))
    convert(source, tmp_path / "self.safetensors", to="tinylora", base=base)
    adapter = detect(tmp_path / "self.safetensors").read(tmp_path / "self.safetensors", Options())
    assert worst(adapter, model) < EXACT
    report = convert(
        tmp_path / "self.safetensors", tmp_path / "pack", to="tinylora-pack", base=base
    )
    assert report.max_relative_error == 0
    state = torch.load(tmp_path / "pack" / "adapter_state.pt", weights_only=True)
    assert all(torch.equal(state[name], vector) for name, vector in model.state().items())


def test_witness_restores_the_signs_on_any_machine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, model = written(base, tmp_path)
    true_svd = torch.linalg.svd

    def flipped(matrix: torch.Tensor, **options: Any) -> Any:
        u, s, vh = true_svd(matrix, **options)
        sign = torch.ones(len(s))
        sign[1] = -1
        return u * sign, s, vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert worst(read(pack, base), model) < EXACT
    assert not any("recomputed" in note for note in read(pack, base).provenance.notes)
    # The same file without its witness is off by what the note says it may be.
    shutil.copytree(pack, tmp_path / "bare")
    for name in ("manifest.json", "tinylora.json"):
        (tmp_path / "bare" / name).unlink()
    state_settings(tmp_path / "bare", seed=7)
    adapter = read(tmp_path / "bare", base)
    (note,) = (note for note in adapter.provenance.notes if "recomputed with torch" in note)
    assert note.endswith(f"off by {worst(adapter, model):.0%}")


def test_witness_refuses_other_weights(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleBaseError, match=r"q_proj.*sha256 differs"):
        read(pack, tmp_path / "other")
    llama().bfloat16().save_pretrained(tmp_path / "rounded")
    with pytest.raises(IncompatibleBaseError, match=r"was made on F32 weights, .* has BF16"):
        read(pack, tmp_path / "rounded")


def tampered(pack: Path, **fields: Any) -> None:
    """Change the witness of one module, and vouch for it in the manifest."""
    path = pack / "tinylora.json"
    document = json.loads(path.read_text())
    document["witness"]["model.layers.0.self_attn.q_proj"].update(fields)
    path.write_text(json.dumps(document))
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["files"] = [e for e in manifest["files"] if e["path"] != "tinylora.json"]
    (pack / "manifest.json").write_text(json.dumps(manifest))


def test_witness_refuses_other_singular_values(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    tampered(pack, singular_values=[0.9, 0.8, 0.7])
    with pytest.raises(IncompatibleBaseError, match="singular values are not those"):
        read(pack, base)


def test_witness_of_another_rank_is_malformed(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    tampered(pack, anchors=[1], signs=[1])
    with pytest.raises(FormatError, match="does not fit the weight"):
        read(pack, base)


def with_close_values(gap: float, folder: Path) -> Any:
    """Return a model whose first q_proj has two leading singular values `gap` apart."""
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    s[0], s[1] = 1.0, 1.0 - gap
    s[2:] = torch.linspace(0.5, 0.1, len(s) - 2)
    with torch.no_grad():
        weight.copy_(u @ torch.diag(s) @ vh)
    model.save_pretrained(folder)
    return model


def test_close_singular_values_are_warned_of(tmp_path: Path) -> None:
    model = inject(with_close_values(1e-4, tmp_path / "base"), chunked(names(), 4), SETTINGS)
    folder = state_settings(model.save(tmp_path / "step"))
    notes = read(folder, tmp_path / "base").provenance.notes
    (note,) = (note for note in notes if "so close" in note)
    assert "layers.0.self_attn.q_proj" in note
    predicted = float(note.split("up to ")[1].split()[0])
    assert predicted == pytest.approx(6e-3, rel=0.05)


def test_equal_singular_values_cannot_be_witnessed(tmp_path: Path) -> None:
    model = inject(with_close_values(1e-6, tmp_path / "base"), chunked(names(), 4), SETTINGS)
    folder = state_settings(model.save(tmp_path / "step"))
    with pytest.raises(UncheckableError, match=r"q_proj.*cannot be found again"):
        convert(folder, tmp_path / "pack", to="tinylora-pack", base=tmp_path / "base")
    assert not (tmp_path / "pack").exists()
    convert(folder, tmp_path / "self.safetensors", to="tinylora", base=tmp_path / "base")


def test_conv1d_and_embeddings_are_no_targets_of_the_pack(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = open_base(tmp_path)
    wanted = ("c_attn", "c_fc", "wte", "wpe")
    assert target_modules(model, wanted, conv1d=False) == ()
    assert target_modules(model, wanted) == tuple(
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    )


def test_base_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step"))
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        FormatError, match=r"layers\.1\.mlp\.up_proj: its weight in the base holds NaN"
    ):
        read(folder, tmp_path / "base")


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
    source = detect(tmp_path / "lora").read(tmp_path / "lora", Options())
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
    assert "is no low-rank update of a target module" in done.stderr
    assert not (tmp_path / "x").exists()
