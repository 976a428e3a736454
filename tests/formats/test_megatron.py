"""Megatron's and NeMo's adapters mean on Hugging Face's modules what they mean in Megatron's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conformance.making import quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import ROOT, invoke

import adapterkit
from adapterkit.errors import BaseRequiredError, FormatError, IncompatibleBaseError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

FIXTURE = ROOT / "fixtures" / "handwritten" / "megatron.pt"
LAYERS, RANK, ALPHA = 2, 3, 6
# NeMo 1 keeps the same factors beside the layers that they are added to.
NEMO = {
    "self_attention.linear_qkv.adapter": "self_attention.adapter_layer.lora_kqv_adapter",
    "self_attention.linear_proj.adapter": (
        "self_attention.adapter_layer.lora_dense_attention_adapter"
    ),
    "mlp.linear_fc1.adapter": "mlp.adapter_layer.lora_hto4h_adapter",
    "mlp.linear_fc2.adapter": "mlp.adapter_layer.lora_4htoh_adapter",
}
Tensors = dict[str, torch.Tensor]


def config(**settings: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "vocab_size": 32,
        **settings,
    }


def base_of(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**settings)))
    return folder


def trained(sizes: dict[str, Any], *, gated: bool = True) -> Tensors:
    """Factors as Megatron-Bridge saves them, of a model of these sizes."""
    generator = torch.Generator().manual_seed(1)
    heads, groups, head = (
        sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {
        "self_attention.linear_qkv": ((heads + 2 * groups) * head, hidden),
        "self_attention.linear_proj": (hidden, heads * head),
        "mlp.linear_fc1": (inner * (2 if gated else 1), hidden),
        "mlp.linear_fc2": (hidden, inner),
    }
    return {
        f"decoder.layers.{n}.{module}.adapter.linear_{half}.weight": torch.randn(
            shape, generator=generator
        )
        for n in range(LAYERS)
        for module, (out, width) in shapes.items()
        for half, shape in (("in", (RANK, width)), ("out", (out, RANK)))
    }


def answers(tensors: Tensors, sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What Megatron's layers add for the identity as input, by Hugging Face module.

    As megatron.core's SelfAttention.get_query_key_value_tensors cuts what linear_qkv gives: by
    query group, in each its queries, a key and a value; and its MLP what linear_fc1 gives, in two.
    """
    heads, groups, head = (
        sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    found: dict[str, torch.Tensor] = {}
    for n in range(LAYERS):
        added = {
            module: (ALPHA / RANK)
            * tensors[f"decoder.layers.{n}.{module}.adapter.linear_in.weight"].double().T
            @ tensors[f"decoder.layers.{n}.{module}.adapter.linear_out.weight"].double().T
            for module in (name.removesuffix(".adapter") for name in NEMO)
        }
        mixed = added["self_attention.linear_qkv"]
        mixed = mixed.view(mixed.shape[0], groups, (heads // groups + 2) * head)
        for part, each in zip(
            "qkv", mixed.split([heads // groups * head, head, head], dim=-1), strict=True
        ):
            found[f"model.layers.{n}.self_attn.{part}_proj"] = each.flatten(1)
        found[f"model.layers.{n}.self_attn.o_proj"] = added["self_attention.linear_proj"]
        gate, up = added["mlp.linear_fc1"].chunk(2, dim=-1)
        found[f"model.layers.{n}.mlp.gate_proj"] = gate
        found[f"model.layers.{n}.mlp.up_proj"] = up
        found[f"model.layers.{n}.mlp.down_proj"] = added["mlp.linear_fc2"]
    return found


def agree(adapter: adapterkit.AdapterTensorSet, wanted: dict[str, torch.Tensor]) -> None:
    found = {pair.module: pair.delta() for pair in adapter.pairs()}
    assert found.keys() == wanted.keys()
    for module, added in wanted.items():
        np.testing.assert_allclose(found[module], added.T.numpy(), rtol=1e-12, err_msg=module)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 3), queries=st.integers(1, 3), head=st.integers(1, 4))
def test_every_row_of_the_fused_layers_gets_to_its_module(
    tmp_path_factory: pytest.TempPathFactory, groups: int, queries: int, head: int
) -> None:
    folder = tmp_path_factory.mktemp("megatron")
    sizes = {
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": head,
    }
    base = base_of(folder / "base", **sizes)
    tensors = trained(config(**sizes))
    torch.save(tensors, folder / "adapter.pt")
    adapter = adapterkit.read(folder / "adapter.pt", base=base, alpha=ALPHA)
    agree(adapter, answers(tensors, config(**sizes)))


def stacked(tensors: Tensors) -> Tensors:
    """The layers of each module in one tensor, as Megatron's torch_dist checkpoints have them."""
    modules = [name.partition("layers.0.")[2] for name in tensors if ".layers.0." in name]
    return {
        f"decoder.layers.{each}": torch.stack(
            [tensors[f"decoder.layers.{n}.{each}"] for n in range(LAYERS)]
        )
        for each in modules
    }


def nemo(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        module = next(each for each in NEMO if each in name)
        renamed = name.replace(module, NEMO[module]).removeprefix("decoder.")
        found[f"model.language_model.encoder.{renamed}"] = tensor
    return found


@pytest.mark.parametrize("layout", ["file", "wrapped", "nemo", "dcp", "stacked"])
def test_the_layouts_that_programs_save_mean_the_same(layout: str, tmp_path: Path) -> None:
    tensors, base = trained(config()), base_of(tmp_path / "base")
    path = tmp_path / "adapter"
    with quiet():
        match layout:
            case "file":
                torch.save(tensors, path)
            case "wrapped":
                torch.save({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}, path)
            case "nemo":
                torch.save(nemo(tensors), path)
            case "dcp":
                dcp.save(
                    {"model": tensors, "optimizer": {"step": torch.ones(1)}}, checkpoint_id=path
                )
            case _:
                dcp.save(stacked(tensors), checkpoint_id=path / "iter_0000010")
    adapter = adapterkit.read(path, base=base, alpha=ALPHA, dialect="megatron")
    agree(adapter, answers(tensors, config()))


def test_pairs_for_each_part_need_no_sizes(tmp_path: Path) -> None:
    """Canonical LoRA."""
    tensors: Tensors = {}
    wanted: dict[str, torch.Tensor] = {}
    for place, part in enumerate(("q", "k", "v")):
        a, b = torch.randn(RANK, 12), torch.randn(5 + place, RANK)
        name = f"decoder.layers.0.self_attention.linear_qkv.adapter.adapter_{part}"
        tensors |= {f"{name}.linear_in.weight": a, f"{name}.linear_out.weight": b}
        added = ALPHA / RANK * a.double().T @ b.double().T
        wanted[f"model.layers.0.self_attn.{part}_proj"] = added
    torch.save(tensors, tmp_path / "adapter.pt")
    agree(adapterkit.read(tmp_path / "adapter.pt", alpha=ALPHA), wanted)


def test_an_mlp_without_a_gate_is_one_module(tmp_path: Path) -> None:
    kind = {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"]}
    base = base_of(tmp_path / "base", **kind)
    torch.save(trained(config(), gated=False), tmp_path / "adapter.pt")
    adapter = adapterkit.read(tmp_path / "adapter.pt", base=base, alpha=ALPHA)
    assert "model.layers.1.mlp.up_proj" in adapter.modules
    assert not any("gate" in module for module in adapter.modules)


def test_a_whole_model_around_the_adapter_is_left_out_and_counted(tmp_path: Path) -> None:
    tensors, base = trained(config()), base_of(tmp_path / "base")
    frozen = {
        name.replace("adapter.linear_out", "to_wrap"): torch.zeros(
            tensor.shape[0], tensors[name.replace("_out", "_in")].shape[1]
        )
        for name, tensor in tensors.items()
        if "linear_out" in name
    }
    torch.save({**tensors, **frozen, "embedding.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    adapter = adapterkit.read(tmp_path / "a.pt", base=base, alpha=ALPHA)
    agree(adapter, answers(tensors, config()))
    assert adapter.provenance
    assert any("9 tensors left out: weights" in str(note) for note in adapter.provenance.notes)


def test_without_the_base_it_is_refused_by_name() -> None:
    with pytest.raises(BaseRequiredError, match=r"linear_qkv: holds q and k and v .* --base"):
        adapterkit.read(FIXTURE, alpha=2)
    with pytest.raises(UsageError, match=r"pass the alpha of the training run with --alpha"):
        adapterkit.read(FIXTURE)


def test_another_base_is_refused_by_its_rows(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    with pytest.raises(IncompatibleBaseError, match=r"linear_qkv: has 24 rows.*q and k and v 40"):
        adapterkit.read(FIXTURE, alpha=2, base=base)


def test_a_base_that_keeps_the_layers_fused_is_refused(tmp_path: Path) -> None:
    phi = transformers.Phi3Config(
        hidden_size=12,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        pad_token_id=0,
    )
    phi.architectures = ["Phi3ForCausalLM"]
    phi.save_pretrained(tmp_path)
    with pytest.raises(IncompatibleBaseError, match=r"q_proj in models like Llama, .* no such"):
        adapterkit.read(FIXTURE, alpha=2, base=tmp_path)


def test_experts_are_named_and_not_guessed(tmp_path: Path) -> None:
    name = "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight"
    torch.save({**trained(config()), name: torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"megatron: .*experts\.linear_fc1.* is not explained"):
        adapterkit.read(tmp_path / "a.pt", alpha=2, base=base_of(tmp_path / "base"))


def test_the_advice_for_a_sharded_checkpoint_ends(tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    with quiet():
        dcp.save(stacked(trained(config())), checkpoint_id=tmp_path / "iter_0000010")
    first = invoke("inspect", str(tmp_path))
    assert first.exit_code == 2
    assert "read it with --dialect megatron --alpha ALPHA --base BASE" in first.output
    advised = ("--dialect", "megatron", "--alpha", "6", "--base", str(tmp_path / "base"))
    done = invoke("convert", str(tmp_path), "-o", str(tmp_path / "out"), *advised)
    assert done.exit_code == 0, done.output
