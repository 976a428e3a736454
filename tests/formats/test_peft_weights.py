"""PEFT's tensors without their config mean what the live model means, whatever lies beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from conformance.making import quiet
from safetensors.torch import load_file, save_file
from terminal import PEFT, invoke

from adapterkit import convert, inspect
from adapterkit.errors import FormatError, NotFoundError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

ALPHA = 6
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model with LoRA, DoRA, an adapted embedding and a saved head, all of them random."""
    config = transformers.AutoConfig.from_pretrained(PEFT / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=ALPHA,
        use_dora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    with quiet():
        tuned: Any = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_config(config), lora
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.fixture(scope="module")
def wanted(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    folder = tmp_path_factory.mktemp("peft")
    with quiet():
        trained.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def saved(kind: str, model: Any, path: Path) -> Path:
    """Save a live model as training scripts do."""
    whole = model.state_dict()
    with quiet():
        alone = peft.get_peft_model_state_dict(model)
    match kind:
        case "whole":
            torch.save(whole, path / "model.pth")
        case "compiled":
            torch.save({f"_orig_mod.{n}": t for n, t in whole.items()}, path / "model.bin")
        case "wrapped":
            torch.save({f"module.{n}": t for n, t in whole.items()}, path / "model.pt")
        case "alone":
            torch.save(alone, path / "lora.bin")
        case "beside":
            optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
            state = {"model_state_dict": whole, "optimizer": optimizer, "loss": torch.ones(())}
            torch.save({**state, "epoch": 3}, path / "last.ckpt")
        case "fsdp":
            torch.save(whole, path / "pytorch_model_fsdp.bin")
            return path
        case _:
            save_file(
                {n: t.contiguous() for n, t in alone.items()}, path / "adapter_model.safetensors"
            )
            return path
    return next(path.iterdir())


@pytest.mark.parametrize(
    "kind", ["whole", "compiled", "wrapped", "alone", "beside", "fsdp", "directory"]
)
def test_what_scripts_save_is_the_adapter_that_peft_saves(
    kind: str, trained: Any, wanted: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    source = saved(kind, trained, tmp_path / "in")
    convert(source, tmp_path / "out", to="peft", alpha=ALPHA)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # The frozen copy of the adapted embedding is PEFT's own addition.
    assert wanted.keys() - {n for n in wanted if ".base_layer." in n} <= found.keys()
    assert found.keys() <= wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, ALPHA, True)


def test_a_config_beside_a_checkpoint_of_a_script_scales_it(trained: Any, tmp_path: Path) -> None:
    path = saved("beside", trained, tmp_path)
    trained.peft_config["default"].save_pretrained(tmp_path)
    report = inspect(path)
    assert set(map(float, report.scales)) == {1.5}
    assert any("state of the training run (optimizer, loss)" in note for note in report.notes)
    with pytest.raises(NotFoundError, match=r"no file called .* pass its weights: .*last\.ckpt"):
        inspect(tmp_path)


def test_alpha_is_asked_for_once_and_is_enough(trained: Any, tmp_path: Path) -> None:
    path = saved("whole", trained, tmp_path)
    first = invoke("inspect", str(path))
    assert first.exit_code == 2
    assert "with a LoRA of rank 4" in first.output
    assert "--alpha" in first.output
    assert invoke("inspect", str(path), "--alpha", "6").exit_code == 0


def test_several_adapters_and_strangers_beside_one_are_refused_by_name(tmp_path: Path) -> None:
    factors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    for name, state, said in (
        ("two", {"policy": factors, "critic": factors}, r"2 dictionaries \(policy, critic\)"),
        ("head", {"model": factors, "v_head": {"w": torch.ones(2)}}, r"v_head\.w: lies outside"),
    ):
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(UnsupportedError, match=said):
            inspect(tmp_path / f"{name}.pt", alpha=2)
    (tmp_path / "beside").mkdir()
    torch.save({"model": factors, "ema": {"w": torch.ones(2)}}, tmp_path / "beside" / "a.bin")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "beside" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"ema\.w: lies outside of the dictionary"):
        inspect(tmp_path / "beside" / "a.bin")


def test_a_missing_shard_and_one_ranks_rows_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    state = {name.format("A"): torch.ones(1, 8), name.format("B"): torch.ones(4, 2)}
    torch.save(state, tmp_path / "rank0.pt")
    with pytest.raises(FormatError, match="is one rank's slice"):
        inspect(tmp_path / "rank0.pt", alpha=2)
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises((NotFoundError, UsageError), match="is missing, one of 2 shards"):
        inspect(tmp_path, alpha=2)
