"""One recipe for every trait of traits.toml; the plain ones lie beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import torch
from engine import family_row, make_base
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from quantised_bases import quantised
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from conformance import layouts
from conformance.bases import INVOCATION, PROMPTS, logits
from conformance.making import (
    LINEAR,
    WEIGHTS,
    Bench,
    Document,
    Tensors,
    loaded,
    settings,
    trait,
    unchanged,
    without,
)
from conformance.plain_traits import RECIPES

Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = ["embed_tokens", "q_proj"]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False}
VOCABULARY, PADDED, GROWN = 512, 576, 520

__all__ = ["RECIPES", "layouts"]


@trait("dora-declared", settings(use_dora=False))
def _dora_declared(bench: Bench) -> None:
    bench.train()
    bench.edit(settings(use_dora=True))
    bench.live = None


@trait("dora-undeclared", without("magnitude"))
def _dora_undeclared(bench: Bench) -> None:
    bench.train(use_dora=True)
    bench.edit(settings(use_dora=False))
    bench.live = bench.reload()


def _resized(model: Any, rows: int) -> Any:
    """Return a model with rows that are small random numbers after those that it had."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            new = layer.weight[before:]
            new.copy_(0.1 * torch.randn(new.shape, generator=generator))
    return model


def _without_new_rows(config: Document, tensors: Tensors) -> None:
    without("base_layer", "lm_head")(config, tensors)
    for name, tensor in tensors.items():
        if "embedding_A" in name:
            tensors[name] = tensor[:, :VOCABULARY].contiguous()


@trait("vocabulary-grown", _without_new_rows)
def _grown(bench: Bench) -> None:
    prompts = (*PROMPTS, (515, 5, 519), (7, 513))
    bench.fresh = lambda: _resized(bench.base.fresh(), GROWN)
    bench.answers = lambda model: logits(model, prompts)
    bench.rest = lambda path: logits(loaded(bench.base.fresh(), path))
    bench.train(target_modules=EMBED, embeddings=True)


def _cut(tensors: Tensors, to: int) -> None:
    for name, tensor in tensors.items():
        if "embed_tokens.lora_embedding_A" in name:
            tensors[name] = tensor[:, :to].contiguous()
        if "lm_head.lora_B" in name:
            tensors[name] = tensor[:to].contiguous()


def _silent_padding(model: Any) -> None:
    """Let the rows that pad the vocabulary have no update."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens.lora_embedding_A" in name:
                parameter[:, VOCABULARY:] = 0
            if "lm_head.lora_B" in name:
                parameter[VOCABULARY:] = 0


@trait("vocabulary-trimmed")
def _trimmed(bench: Bench) -> None:
    bench.fresh = lambda: _resized(bench.base.fresh(), PADDED)
    bench.answers = lambda model: logits(model)[:, :VOCABULARY]
    tuned = bench.train(target_modules=[*EMBED, "lm_head"])
    _silent_padding(tuned)
    tuned.save_pretrained(bench.path, save_embedding_layers=False)
    bench.fresh, bench.mergeable = bench.base.fresh, False


@trait("vocabulary-padded")
def _padded(bench: Bench) -> None:
    tuned = bench.train(target_modules=[*EMBED, "lm_head"])
    _silent_padding(tuned)
    tuned.save_pretrained(bench.path, save_embedding_layers=False)
    bench.edit(lambda _, tensors: _cut(tensors, VOCABULARY))


@trait("irreproducible-initialisation", settings(init_lora_weights=True))
def _irreproducible(bench: Bench) -> None:
    bench.train()
    bench.edit(settings(init_lora_weights="corda"))
    bench.live = None


@trait("alora", settings(alora_invocation_tokens=None))
def _alora(bench: Bench) -> None:
    bench.train(alora_invocation_tokens=list(INVOCATION))
    bench.mergeable = False


@trait("layer-replication")
def _replicated(bench: Bench) -> None:
    bench.train(layer_replication=[[0, 2], [0, 2]])
    bench.mergeable = False


@trait("experts-per-module")
def _experts(bench: Bench) -> None:
    """Write what PEFT saved when every expert was a module: w1 gate, w2 down, w3 up."""
    model, generator = bench.base.fresh(), torch.Generator().manual_seed(3)
    stored: Tensors = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            half = experts.gate_up_proj.shape[1] // 2
            for expert in range(4):
                weights = {
                    "w1": experts.gate_up_proj[expert, :half],
                    "w3": experts.gate_up_proj[expert, half:],
                    "w2": experts.down_proj[expert],
                }
                for leaf, weight in weights.items():
                    layer_path = f"model.layers.{number}.block_sparse_moe"
                    stem = f"base_model.model.{layer_path}.experts.{expert}.{leaf}"
                    a = 0.3 * torch.randn((3, weight.shape[1]), generator=generator)
                    b = 0.3 * torch.randn((weight.shape[0], 3), generator=generator)
                    stored |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                    weight.add_(2.0 * b @ a)
    bench.path.mkdir()
    save_file(stored, bench.path / WEIGHTS)
    (bench.path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}'
    )
    bench.live = model


@trait("trained-file-beside", unchanged)
def _beside(bench: Bench) -> None:
    bench.train()
    head = {"v_head.summary.weight": torch.randn((1, 64)), "v_head.summary.bias": torch.ones(1)}
    save_file(head, bench.path / "value_head.safetensors")


@trait("lora-bias-alone", without("lora_B.bias", lora_bias=False))
def _bias_alone(bench: Bench) -> None:
    bench.train(lora_bias=True)
    bench.mergeable = False


@trait("value-head", without("v_head"))
def _value_head(bench: Bench) -> None:
    bench.train()

    def add(_: Document, tensors: Tensors) -> None:
        tensors["v_head.summary.weight"] = torch.ones((1, 64))
        tensors["v_head.summary.bias"] = torch.ones(1)

    bench.edit(add)


def _clean(config: Document, tensors: Tensors) -> None:
    del config
    for name in list(tensors):
        short = name
        for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
            short = short.replace(wrapper, "")
        tensors[short] = tensors.pop(name)


@trait("wrapper-names", _clean)
def _leaked(bench: Bench) -> None:
    bench.train()

    def leak(_: Document, tensors: Tensors) -> None:
        for name in list(tensors):
            long = name.replace(
                "base_model.model.model.", "module._orig_mod.base_model.model.model."
            )
            long = long.replace("layers.0.", "layers.0._fsdp_wrapped_module.")
            tensors[long] = tensors.pop(name)

    bench.edit(leak)


@trait("nan")
def _nan(bench: Bench) -> None:
    bench.train()

    def spoil(_: Document, tensors: Tensors) -> None:
        tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")

    bench.edit(spoil)
    bench.live = None


@trait("zero-update")
def _zero(bench: Bench) -> None:
    bench.train()

    def still(_: Document, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    bench.edit(still)
    bench.live = bench.reload()


@trait("half-a-pair")
def _half(bench: Bench) -> None:
    bench.train()
    bench.edit(without(f"{Q}.lora_B"))
    bench.live = None


@trait("tower", without(".visual.", target_modules=["q_proj"]))
def _tower(bench: Bench) -> None:
    bench.train(target_modules=["visual.blocks.0.attn.qkv", "q_proj"])
    bench.speak = lambda path: logits(bench.reload(path))


@trait("convolution-2d", without("projection", target_modules=["q_proj"]))
def _image(bench: Bench) -> None:
    bench.train(target_modules=["projection", "q_proj"], task=None)
    bench.given = None


@trait("convolution-1d", without("conv", target_modules=["q_proj"]))
def _line(bench: Bench) -> None:
    bench.train(target_modules=["conv_layers.1.conv", "q_proj"], task=None)
    bench.given = None


@trait("classifier-head", without("score", task_type=None, modules_to_save=None))
def _classifier(bench: Bench) -> None:
    bench.train(task="SEQ_CLS")
    speaker = bench.base.hf.parent / "speaker"
    bench.speak = lambda path: logits(loaded(LlamaForCausalLM.from_pretrained(speaker), path))


@trait("unknown-base", unchanged)
def _unknown(bench: Bench) -> None:
    bench.train()
    bench.edit(settings(base_model_name_or_path="org/unknown"))
    bench.given = None


class Coded(torch.nn.Linear):
    """A layer that stands for one that GPTQ quantised, whose kernels need a GPU: its numbers."""


def _pooling(bench: Bench) -> None:
    """Train factors of pooled inputs, by PEFT's own code for a base that GPTQ quantised."""
    fresh, resolve = bench.fresh, Linear.resolve_lora_variant

    def coded() -> Any:
        model = fresh()
        for name, layer in model.named_modules():
            if name.endswith(tuple(LINEAR)):
                layer.__class__ = Coded
        return model

    def variant(self: Any, **given: Any) -> Any:
        pooled = given["config"].use_qalora and isinstance(self.get_base_layer(), Coded)
        return QALoraLinearVariant() if pooled else resolve(self, **given)

    bench.fresh = coded
    Linear.resolve_lora_variant = variant
    bench.train(use_qalora=True, qalora_group_size=4)
    bench.mergeable = False


@trait("qalora")
def _qalora(bench: Bench) -> None:
    _pooling(bench)
    bench.given = bench.model = quantised(bench.base.hf, bench.folder / "gptq", GPTQ, _packed)


@trait("qalora-without-a-base")
def _qalora_alone(bench: Bench) -> None:
    _pooling(bench)
    bench.edit(settings(base_model_name_or_path="org/unknown"))
    bench.given = None


def _packed(name: str, tensor: torch.Tensor) -> Tensors | None:
    """Return what GPTQ stores for a weight, eight numbers of four bits in one; none is read."""
    if not name.removesuffix(".weight").endswith(tuple(LINEAR)):
        return None
    rows, columns = tensor.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.zeros((columns // 8, rows), dtype=torch.int32),
        f"{stem}qzeros": torch.zeros((1, rows // 8), dtype=torch.int32),
        f"{stem}scales": torch.ones((1, rows), dtype=torch.float16),
        f"{stem}g_idx": torch.zeros(columns, dtype=torch.int32),
    }


@trait("wrong-base", unchanged)
def _wrong(bench: Bench) -> None:
    bench.train()
    row = family_row("llama")
    other = make_base(replace(row, optional={**row.optional, "hidden_size": 32}), bench.folder)
    bench.given, bench.model, bench.model_gguf = other.hf, other.hf, other.gguf
    bench.live = None


@trait("quantised-factors")
def _quantised(bench: Bench) -> None:
    """Write the q8_0 file that llama.cpp's converter writes, and run the values that it holds."""
    targets = ["v_proj", "o_proj", "down_proj"]
    tuned = bench.train(r=32, lora_alpha=48, target_modules=targets)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(bench.folder / "adapter.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 48)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in tuned.named_parameters():
        if ".lora_" not in name:
            continue
        module, leaf = name.removeprefix("base_model.model.").split(".lora_")
        blocks = gguf.quants.quantize(parameter.detach().numpy(), kind)
        exact = gguf.quants.dequantize(blocks, kind)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.asarray(exact)))
        target = f"{names.get_name(module)}.weight.lora_{leaf[0].lower()}"
        writer.add_tensor(target, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bench.path = bench.folder / "adapter.gguf"
