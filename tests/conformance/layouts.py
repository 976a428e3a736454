"""Recipes of adapters in the files of training programs, with the same live model."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from sharded_checkpoints import zero

from conformance.making import CONFIG, WEIGHTS, Bench, Tensors, quiet, trait


@trait("sharded-checkpoint")
def _sharded(bench: Bench) -> None:
    """The whole live model, frozen weights and all, as Accelerate saves it of FSDP."""
    model = bench.train()
    (bench.path / WEIGHTS).unlink()
    with quiet():
        dcp.save({"model": model.state_dict()}, checkpoint_id=bench.path / "pytorch_model_fsdp_0")


@trait("sharded-adapter")
def _shards(bench: Bench) -> None:
    """The adapter in two files and an index, as transformers 5 saves it."""
    bench.train()
    tensors = load_file(bench.path / WEIGHTS)
    (bench.path / WEIGHTS).unlink()
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    placed = {name: names[place % 2] for place, name in enumerate(tensors)}
    for file in names:
        held = {name: tensors[name] for name in tensors if placed[name] == file}
        save_file(held, bench.path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (bench.path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@trait("sharded-safetensors")
def _storage_writer(bench: Bench) -> None:
    """The trained tensors as torch's HuggingFaceStorageWriter shards them."""
    model = bench.train()
    (bench.path / WEIGHTS).unlink()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    writer = dcp.HuggingFaceStorageWriter(str(bench.path / "shards"), save_distributed=True)
    with quiet():
        dcp.save(trained, storage_writer=writer)


@trait("zero-checkpoint")
def _zero(bench: Bench) -> None:
    """What two ranks of DeepSpeed's ZeRO 3 keep of the trained parameters."""
    model = bench.train()
    (bench.path / WEIGHTS).unlink()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    zero(bench.path / "global_step9", trained, 3, ranks=2)
    (bench.path / "latest").write_text("global_step9")


@trait("weights-alone")
def _weights(bench: Bench) -> None:
    """PEFT's weights without their config; alpha is given."""
    bench.train()
    (bench.path / CONFIG).unlink()
    bench.alpha = 8


@trait("weights-alone-unscaled")
def _unscaled(bench: Bench) -> None:
    """PEFT's weights without their config, and no alpha."""
    bench.train()
    (bench.path / CONFIG).unlink()
    bench.live = None


@trait("megatron")
def _megatron(bench: Bench) -> None:
    """The names of Megatron-Bridge, in which q, k and v are one layer with one A."""
    model = bench.train(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    with torch.no_grad():
        for layer in model.model.model.layers:
            attention = layer.self_attn
            for other in (attention.k_proj, attention.v_proj):
                other.lora_A.default.weight.copy_(attention.q_proj.lora_A.default.weight)
    stored: Tensors = {}
    for number, layer in enumerate(model.model.model.layers):
        attention, stem = layer.self_attn, f"decoder.layers.{number}"
        halves = {
            "self_attention.linear_qkv": (_a(attention.q_proj), _grouped(attention)),
            "self_attention.linear_proj": (_a(attention.o_proj), _b(attention.o_proj)),
            "mlp.linear_fc2": (_a(layer.mlp.down_proj), _b(layer.mlp.down_proj)),
        }
        for name, (a, b) in halves.items():
            stored[f"{stem}.{name}.adapter.linear_in.weight"] = a.contiguous()
            stored[f"{stem}.{name}.adapter.linear_out.weight"] = b.contiguous()
    shutil.rmtree(bench.path)
    bench.path.mkdir()
    bench.path /= "weights.safetensors"
    save_file(stored, bench.path)
    bench.alpha = 8


def _a(layer: Any) -> torch.Tensor:
    return layer.lora_A.default.weight.detach()


def _b(layer: Any) -> torch.Tensor:
    return layer.lora_B.default.weight.detach()


def _grouped(attention: Any) -> torch.Tensor:
    """Return B of q, k and v by query group: its queries, a key, a value."""
    head = attention.head_dim
    groups = _b(attention.k_proj).shape[0] // head
    parts = [_b(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    cut = [part.reshape(groups, -1, part.shape[1]) for part in parts]
    return torch.cat(cut, dim=1).flatten(0, 1)


@trait("jax-checkpoint")
def _jax(bench: Bench) -> None:
    """What Orbax leaves of a model of Flax."""
    bench.path.mkdir()
    (bench.path / "manifest.ocdbt").write_bytes(b"x")
    (bench.path / "_METADATA").write_text("{}")


@trait("adapterhub")
def _adapterhub(bench: Bench) -> None:
    """A bottleneck adapter of AdapterHub's library."""
    bench.path.mkdir()
    settings = {"config": {"reduction_factor": 16}, "model_class": "LlamaForCausalLM"}
    (bench.path / CONFIG).write_text(json.dumps(settings))
    name = "model.layers.0.output_adapters.adapters.sst.adapter_down.0.weight"
    torch.save({name: torch.ones(4, 64)}, bench.path / "pytorch_adapter.bin")
