"""Every way in reads alike, and what is written says by itself what it means."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click import Context, Group
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from terminal import BASE, TINY, invoke

import adapterkit
from adapterkit.loading import Need, load, load_all, recognise
from adapterkit_cli.main import COMMANDS, cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import click

Q = "model.layers.0.self_attn.q_proj"


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def commands(group: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(group, Group):
        yield name, group
        return
    context = Context(group)
    for each in group.list_commands(context):
        found = group.get_command(context, each)
        assert found is not None
        yield from commands(found, f"{name} {each}".strip())


READING = {"inspect", "convert", "validate", "diff", "stack", "audit", "compress", "merge"}
READING |= {"tinylora project"}
WRITING = {"convert", "compress", "merge", "extract", "tinylora project"}


def test_every_command_that_reads_an_adapter_has_what_messages_advise() -> None:
    known = dict(commands(cli))
    assert known.keys() >= READING | WRITING
    assert {name.split()[0] for name in known} == set(COMMANDS)
    for name, command in known.items():
        options = {option for each in command.params for option in each.opts}
        wanted = {"--base", "--dialect", "--alpha", "--from"} if name in READING else set[str]()
        wanted |= {"--force", "--output"} if name in WRITING else set()
        assert options >= wanted, name


@pytest.mark.parametrize("name", ["inspect", "validate", "audit"])
def test_what_a_message_advises_is_taken(name: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    shutil.copy(TINY / "adapter_model.safetensors", bare)
    refused = invoke(name, bare)
    assert refused.exit_code == 2
    assert "--alpha" in refused.stderr
    assert invoke(name, bare, "--alpha", "8").exit_code in {0, 5}
    assert invoke(name, bare, "--alpha", "8", "--dialect", "linear-factors").exit_code in {0, 5}


def test_stack_takes_alpha_and_dialect_for_its_adapters(tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    shutil.copy(TINY / "adapter_model.safetensors", bare)
    stack = adapterkit.AdapterStack(BASE)
    with pytest.raises(adapterkit.UsageError, match="--alpha"):
        stack.load(bare)
    stack.load(bare, alpha=8)
    stack.load(bare, alpha=8, dialect="linear-factors", name="again")
    assert not any(conflict.cancels for conflict in stack.conflicts())


def test_the_user_may_say_the_format() -> None:
    assert recognise(TINY).format.name == "peft"
    assert recognise(TINY, as_format="handwritten").format.name == "handwritten"
    with pytest.raises(adapterkit.UsageError, match="unknown format 'nonsense'"):
        load(TINY, as_format="nonsense")
    # Its content says PEFT; told otherwise, it is not read as PEFT.
    weights = TINY / "adapter_model.safetensors"
    assert invoke("inspect", weights, "--from", "gguf").exit_code == 3
    assert invoke("inspect", weights, "--from", "peft").exit_code == 0


def test_each_level_includes_those_before_it(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, weights)
    assert load(tmp_path / "a", need=Need.STORED).adapter.tensors
    for need in (Need.SOUND, Need.FITTED, Need.PLAIN):
        with pytest.raises(adapterkit.FormatError, match="has no lora_B"):
            load(tmp_path / "a", need=need)
    broken = adapterkit.read(tmp_path / "a")
    with pytest.raises(adapterkit.FormatError, match="has no lora_B"):
        load(broken)


def test_the_base_that_one_names_serves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BASE, tmp_path / "hub" / "models--org--base" / "snapshots" / "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    names: list[Path] = []
    for name, base in (("unknown", None), ("named", "org/base")):
        shutil.copytree(TINY, tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        told = {"base_model_name_or_path": base}
        config.write_text(json.dumps(json.loads(config.read_text()) | told))
        names.append(tmp_path / name)
    for each in load_all(names):
        assert each.base is not None
        assert not each.given
        assert each.base.name == "org/base"
    assert load(names[0]).base is None


def own(tmp_path: Path, prefix: str = "", **beside: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """Save weights of PEFT with their own config in the file, and another one beside it."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    before = {name: p.detach().clone() for name, p in tuned.base_model.named_parameters()}
    tuned.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = tmp_path / "adapter_model.safetensors"
    carried = json.dumps({f"{prefix}{name}": value for name, value in raw.items()})
    save_file(load_file(weights), weights, {"format": "pt", "lora_adapter_metadata": carried})
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | beside))
    tuned.merge_adapter()
    after = dict(tuned.base_model.named_parameters())
    updates = {
        module: (after[name] - before[name]).detach().double().numpy()
        for module in ("0", "1")
        for name in [f"model.{module}.base_layer.weight"]
    }
    return weights, updates


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("beside", [{}, {"lora_alpha": 64}, {"use_rslora": True, "r": 8}])
def test_the_config_in_a_file_comes_before_the_one_beside_it(
    prefix: str, beside: dict[str, Any], tmp_path: Path
) -> None:
    weights, updates = own(tmp_path, prefix, **beside)
    for path in (weights, tmp_path):
        adapter = adapterkit.read(path)
        assert adapter.provenance is not None
        for pair in adapter.pairs():
            update = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy()
            np.testing.assert_allclose(update, updates[pair.module], atol=1e-6)
        said = [note for note in adapter.provenance.notes if "itself counts" in note]
        assert len(said) == bool(beside)
        assert all(field in note for note in said for field in beside)


def test_configs_in_a_file_that_are_none_or_several_are_refused(tmp_path: Path) -> None:
    weights, _ = own(tmp_path)
    tensors = load_file(weights)
    several = {"unet.r": 4, "unet.lora_alpha": 4, "text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    cases = {
        json.dumps(several): (adapterkit.UnsupportedError, "unet and text_encoder"),
        json.dumps({"a": 1}): (adapterkit.FormatError, "no field"),
        "[" * 100_000: (adapterkit.FormatError, "no JSON object"),
    }
    for text, (kind, message) in cases.items():
        save_file(tensors, weights, {"lora_adapter_metadata": text})
        with pytest.raises(kind, match=message):
            adapterkit.read(weights)


def test_an_alpha_that_was_given_is_not_given_to_the_output(tmp_path: Path) -> None:
    """Two ranks have two scales, an MLX directory has one: its factors hold the rest."""
    other = Q.replace("q_proj", "v_proj")
    source = {f"{Q}.lora_a": drawn(12, 2), f"{Q}.lora_b": drawn(2, 10)}
    source |= {f"{other}.lora_a": drawn(12, 4), f"{other}.lora_b": drawn(4, 10)}
    save_arrays(source, tmp_path / "adapters.safetensors")
    adapterkit.convert(tmp_path / "adapters.safetensors", tmp_path / "out", to="mlx", alpha=8)
    written = {pair.module: pair for pair in adapterkit.read(tmp_path / "out").pairs()}
    for module, rank in ((Q, 2), (other, 4)):
        a, b = (source[f"{module}.lora_{half}"].astype(float) for half in "ab")
        pair = written[module]
        found = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy()
        np.testing.assert_allclose(found, 8 / rank * (a @ b).T, rtol=1e-5, atol=1e-5)


def test_an_update_of_zero_is_converted_and_told(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "zero")
    weights = tmp_path / "zero" / "adapter_model.safetensors"
    save_file({name: x * 0 for name, x in load_file(weights).items()}, weights)
    report = adapterkit.convert(tmp_path / "zero", tmp_path / "zero.gguf", base=BASE)
    assert any("every update is zero" in note for note in report.notes)
    report = adapterkit.convert(TINY, tmp_path / "tiny.gguf", base=BASE)
    assert not any("every update is zero" in note for note in report.notes)


def test_nothing_left_is_no_adapter(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    # Norms have no place in an adapter of llama.cpp, and are all that there is.
    save_file({"base_model.model.model.norm.weight": torch.ones(32)}, weights)
    with pytest.raises(adapterkit.LossyConversionError, match="cannot be written") as caught:
        adapterkit.convert(tmp_path / "a", tmp_path / "x.gguf", base=BASE)
    assert caught.value.losses[0].droppable
    with pytest.raises(adapterkit.LossyConversionError, match="nothing that was trained"):
        adapterkit.convert(tmp_path / "a", tmp_path / "x.gguf", base=BASE, allow_lossy=True)
    assert not (tmp_path / "x.gguf").exists()
