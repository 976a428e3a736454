"""A LoraConfig in the weights file is the config: PEFT's update by it, whatever lies beside it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from conformance.making import quiet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from terminal import ROOT, invoke

import adapterkit
from adapterkit.lora_config.own import KEY
from adapterkit.serving.stack import AdapterStack

if TYPE_CHECKING:
    from pathlib import Path

INPUT = torch.linspace(-1, 1, 18).reshape(3, 6)
# What a config beside the file may say other, and change with it.
OTHERS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 100},
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["1"], "target_modules": ["0"]},
    "invoked": {"alora_invocation_tokens": [5, 6]},
    "replicated": {"layer_replication": [[0, 2], [0, 2]]},
    "kasa": {"kasa_config": {"beta": 1}},
    "saved": {"modules_to_save": ["1"]},
    "rows": {"trainable_token_indices": [3]},
    "dora": {"use_dora": True},
    "tuner": {"peft_type": "LOHA"},
    "tiny": {"peft_type": "TINYLORA"},
}
# What of it changes nothing.
SAME: dict[str, dict[str, Any]] = {
    "start": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.5},
    "order": {"target_modules": ["1", "0"]},
    "task": {"task_type": "CAUSAL_LM"},
    "base": {"base_model_name_or_path": "org/base", "revision": "r"},
    "absent": {"use_rslora": None, "rank_pattern": None},
}


def model() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of PEFT, its config in its weights file, and the live answer."""
    folder = tmp_path_factory.mktemp("own")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"], init_lora_weights=False)
    tuned: Any = peft.get_peft_model(model(), config)
    tuned.save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"lora_adapter_metadata": json.dumps(raw)})
    with torch.no_grad():
        return folder, tuned(INPUT)


def put(trained: Path, folder: Path, beside: dict[str, Any] | None) -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        (trained / "adapter_model.safetensors").read_bytes()
    )
    if beside is not None:
        raw = json.loads((trained / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(raw | beside))
    return folder


def answered(folder: Path) -> torch.Tensor:
    """Return what PEFT answers with an adapter."""
    load: Any = peft.PeftModel.from_pretrained
    with quiet(), torch.no_grad():
        return load(model(), folder)(INPUT)


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_beside_decides_nothing_and_is_told(
    name: str, trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    source, live = trained
    folder = put(source, tmp_path / "a", OTHERS[name])
    report = adapterkit.convert(folder, tmp_path / "out")
    torch.testing.assert_close(answered(tmp_path / "out"), live, rtol=0, atol=1e-6)
    said = [note for note in report.notes if "itself counts" in note]
    assert len(said) == 1
    assert all(field in said[0] for field in OTHERS[name])


@pytest.mark.parametrize("name", SAME)
def test_what_changes_nothing_is_no_difference(
    name: str, trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder = put(trained[0], tmp_path / "a", SAME[name])
    adapter = adapterkit.read(folder)
    assert adapter.provenance is not None
    assert not [note for note in adapter.provenance.notes if "itself counts" in note]
    assert adapter.base.name == SAME[name].get("base_model_name_or_path")
    assert "AK122" not in {found.code for found in adapterkit.validate(folder).findings}


def test_who_reads_the_other_config_is_told_with_a_way_out(
    trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    source, live = trained
    folder = put(source, tmp_path / "a", OTHERS["alpha"])
    assert float((answered(folder) - live).abs().max()) > 1
    for target in ("peft", "vllm", "sglang", "lorax", "nim", "tgi"):
        report = adapterkit.validate(folder, targets=[target])
        (found,) = [each for each in report.findings if each.code == "AK122"]
        assert "lora_alpha 12, not 100" in found.message
        assert "adapterkit convert SRC -o DIR" in found.hint
        assert report.exit_code == 1
        assert adapterkit.load_target(target).fate(found) == "altered"
    stack = AdapterStack()
    stack.load(folder)
    with pytest.raises(adapterkit.UnsupportedError, match="lora_alpha 12, not 100"):
        adapterkit.serving_settings(stack, "vllm")
    # Its own advice.
    assert invoke("convert", str(folder), "-o", str(tmp_path / "dir")).exit_code == 0
    torch.testing.assert_close(answered(tmp_path / "dir"), live, rtol=0, atol=1e-6)
    assert not adapterkit.validate(tmp_path / "dir", targets=["peft"]).count("error")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
@pytest.mark.parametrize("stranger", [False, True])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_file_with_its_own_config_needs_none_beside_it(
    name: str,
    prefix: str,
    trained: tuple[Path, torch.Tensor],
    tmp_path: Path,
    *,
    stranger: bool,
) -> None:
    source, live = trained
    raw = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {prefix + key.removeprefix("base_model.model."): x for key, x in tensors.items()}
    file = tmp_path / "in" / name
    file.parent.mkdir()
    save_file(renamed, file, {"lora_adapter_metadata": json.dumps(raw)})
    if stranger:
        (file.parent / "adapter_config.json").write_text('{"who": "knows"}')
    adapterkit.convert(file, tmp_path / "out", to="peft")
    torch.testing.assert_close(answered(tmp_path / "out"), live, rtol=0, atol=1e-6)
    scales = {pair.scale for pair in adapterkit.read(file).pairs()}
    assert scales == {3.0}


def test_settings_of_a_file_are_those_of_every_module(tmp_path: Path) -> None:
    """Patterns, rsLoRA: all of the own config, against the dense update of PEFT."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=True,
        rank_pattern={"1": 2},
        alpha_pattern={"0": 5},
        target_modules=["0", "1"],
        init_lora_weights=False,
    )
    tuned: Any = peft.get_peft_model(model(), config)
    tuned.save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    raw = (tmp_path / "a" / "adapter_config.json").read_text()
    save_file(load_file(weights), weights, {"lora_adapter_metadata": raw})
    (tmp_path / "a" / "adapter_config.json").unlink()
    before = {name: p.detach().clone() for name, p in tuned.base_model.named_parameters()}
    tuned.merge_adapter()
    after = dict(tuned.base_model.named_parameters())
    for pair in adapterkit.read(tmp_path / "a").pairs():
        name = f"model.{pair.module}.base_layer.weight"
        wanted = (after[name] - before[name]).detach().double().numpy()
        update = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy()
        np.testing.assert_allclose(update, wanted, atol=1e-5)


def with_own(weights: Path, **config: Any) -> None:
    """Put a LoraConfig into a safetensors file."""
    with safe_open(weights, "pt") as file:
        metadata = dict(file.metadata() or {})
    save_file(load_file(weights), weights, {**metadata, KEY: json.dumps(config)})


def scales(path: Path, **options: Any) -> set[float]:
    return set(adapterkit.read(path, **options).scales.values())


def test_a_dialect_takes_no_scale_from_a_file(
    trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    source, live = trained
    weights = load_file(source / "adapter_model.safetensors")
    short = {name.removeprefix("base_model.model."): t for name, t in weights.items()}
    file = tmp_path / "factors.safetensors"
    save_file(short, file)
    with pytest.raises(adapterkit.UsageError, match="pass the alpha"):
        adapterkit.convert(file, tmp_path / "out", dialect="linear-factors")
    with_own(file, **json.loads((source / "adapter_config.json").read_text()))
    adapterkit.convert(file, tmp_path / "out", dialect="linear-factors")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None}))
    torch.testing.assert_close(answered(tmp_path / "out"), live, rtol=0, atol=1e-6)
    with pytest.raises(adapterkit.UsageError, match="alpha is 12 in the file"):
        adapterkit.convert(file, tmp_path / "no", dialect="linear-factors", alpha=99)
    # A grammar whose program scales by nothing, and a file that says otherwise.
    renamed = {
        name.replace("lora_A.weight", "lora_module.in_proj").replace(
            "lora_B.weight", "lora_module.out_proj"
        ): tensor.T.contiguous()
        for name, tensor in short.items()
    }
    save_file(renamed, file)
    assert scales(file, dialect="lora-pytorch") == {1}
    with_own(file, r=4, lora_alpha=12)
    assert scales(file, dialect="lora-pytorch") == {3}
    (told,) = [n for n in adapterkit.inspect(file, dialect="lora-pytorch").notes if "itself" in n]
    assert "scales 0 by 3, not by 1" in told


@pytest.mark.parametrize("settled", [True, False])
def test_an_mlx_file_is_scaled_by_its_own_config(settled: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "fixtures" / "mlx" / "lora", tmp_path / "a")
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    if not settled:
        del raw["lora_parameters"]["scale"]
        path.write_text(json.dumps(raw))
    rank = raw["lora_parameters"]["rank"]
    with_own(folder / "adapters.safetensors", r=rank, lora_alpha=7 * rank)
    assert scales(folder) == {7}
    notes = adapterkit.inspect(folder).notes
    assert any("itself counts" in note for note in notes) == settled
    found = adapterkit.validate(folder).findings
    assert ("AK122" in {each.code for each in found}) == settled
    # Once written, the config says it, and nothing in the file says it again.
    adapterkit.convert(folder, tmp_path / "out", to="mlx")
    assert scales(tmp_path / "out") == {7}
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as file:
        assert KEY not in (file.metadata() or {})


def test_shards_are_scaled_by_the_config_in_them(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "fixtures" / "sharded" / "shards", tmp_path / "a")
    for beside in folder.glob("*.json"):
        beside.unlink()
    with pytest.raises(adapterkit.UsageError, match="pass the alpha"):
        adapterkit.read(folder)
    (rank,) = {pair.rank for pair in adapterkit.read(folder, alpha=1).pairs()}
    with_own(next(folder.glob("shard-00002*")), r=rank, lora_alpha=5 * rank)
    assert scales(folder) == {5}
