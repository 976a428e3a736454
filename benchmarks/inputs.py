"""Inputs of the benchmarks, made once with a fixed seed.

Run as a program: a process that has held the arrays would lend its peak memory to every process
that it starts and measures.
"""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path
from subprocess import run
from sys import executable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

BUILD = Path("build/bench")
PEER_SCRIPT = "*/vendor/llama.cpp/convert_lora_to_gguf.py"
LAYERS, HIDDEN, FFN, KV, RANK = 32, 4096, 14336, 1024, 16
PEER = "llama-cpp-python==0.3.36"
# module -> (out, in)
TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
VOCABULARY = 151936
# ggml's and GGUF's numbers
BF16, UINT32, STRING, ARRAY = 30, 4, 8, 9
ENGINE_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = {
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
}
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def adapter(seed: int = 0, layers: int = LAYERS) -> None:
    """Make an adapter, 84 MB if it has all layers, if it is not there."""
    folder = BUILD / (f"adapter-{seed}" if layers == LAYERS else f"adapter-{layers}-layers")
    if (folder / "adapter_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    names = (f"layers.{layer}.{target}" for layer in range(layers) for target in TARGETS)
    _write(folder, random, names)


def one_module(seed: int) -> None:
    """Make an adapter of one 4096 x 4096 module, if it is not there."""
    folder = BUILD / f"one-module-{seed}"
    if not (folder / "adapter_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, np.random.default_rng(seed), ["layers.0.self_attn.q_proj"])


def _write(folder: Path, random: np.random.Generator, modules: Iterable[str]) -> None:
    tensors: dict[str, LazyTensor] = {}
    targets: set[str] = set()
    for module in modules:
        target = module.split(".", 2)[2]
        rows, columns = TARGETS[target]
        name = f"base_model.model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = _bf16(random, RANK, columns)
        tensors[f"{name}.lora_B.weight"] = _bf16(random, rows, RANK)
        targets.add(target.rpartition(".")[2])
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(targets),
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _bf16(random: np.random.Generator, *shape: int) -> LazyTensor:
    values = random.standard_normal(shape, np.float32) * 0.02
    return LazyTensor.of(values.astype(ml_dtypes.bfloat16))


def base() -> None:
    """Make the base's config.json; no weights are needed."""
    folder = BUILD / "base"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG, indent=2))


def one_layer() -> None:
    """Make a base of one layer, with weights: 436 MB."""
    folder = BUILD / "base-1-layer"
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG | {"num_hidden_layers": 1}))
    random = np.random.default_rng(1)
    tensors = {
        f"model.layers.0.{target}.weight": _bf16(random, *shape)
        for target, shape in TARGETS.items()
    }
    write_safetensors(folder / "model.safetensors", tensors, {})


def large_vocabulary() -> None:
    """Make the base as a GGUF with 150k tokens; its weights are a hole in the file."""
    path = BUILD / "base-150k.gguf"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for target, shape in TARGETS.items():
            shapes[f"blk.{layer}.{ENGINE_NAMES[target]}"] = shape
    rows, offset = b"", 0
    for name, (out, width) in shapes.items():
        rows += _text(f"{name}.weight") + struct.pack("<IQQIQ", 2, width, out, BF16, offset)
        offset += 2 * out * width
    entries = [_text("general.architecture") + struct.pack("<I", STRING) + _text("llama")]
    entries += [
        _text(f"llama.{key}") + struct.pack("<II", UINT32, value) for key, value in SIZES.items()
    ]
    tokens = b"".join(_text(f"token-{number}") for number in range(VOCABULARY))
    merges = b"".join(_text(f"to ken-{number}") for number in range(VOCABULARY))
    for key, words in (("tokens", tokens), ("merges", merges)):
        head = struct.pack("<IIQ", ARRAY, STRING, VOCABULARY)
        entries.append(_text(f"tokenizer.ggml.{key}") + head + words)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries))
    data = header + b"".join(entries) + rows
    with path.open("wb") as file:
        file.write(data + bytes(-len(data) % 32))
        file.truncate(file.tell() + offset)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def llama_cpp() -> None:
    """Unpack llama.cpp's converter from a source distribution, if it is not there."""
    if list(BUILD.glob(PEER_SCRIPT)):
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    run(
        [
            executable,
            *["-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--dest"],
            BUILD,
            PEER,
        ],
        check=True,
    )
    (archive,) = BUILD.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = [m for m in file if "/vendor/llama.cpp/" in m.name and m.name.endswith(".py")]
        file.extractall(BUILD, members=wanted, filter="data")


if __name__ == "__main__":
    adapter()
    for layers in (1, 8, 16):
        adapter(layers=layers)
    base()
    one_layer()
    large_vocabulary()
    llama_cpp()
