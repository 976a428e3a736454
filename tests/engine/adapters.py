"""Random PEFT adapters of a base, and their way into llama.cpp."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from engine.bases import BaseFixture
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapterkit.architectures.mapping import to_engine
from adapterkit.base import open_base
from adapterkit.formats.peft_reader import read_peft


@dataclass(frozen=True, kw_only=True)
class AdapterFixture:
    """An adapter as PEFT saved it, and the live model that carries it."""

    base: BaseFixture
    path: Path
    model: Any


def make_adapter(
    base: BaseFixture,
    folder: Path,
    *,
    seed: int = 1,
    safe_serialization: bool = True,
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> AdapterFixture:
    """Save a random adapter in `folder`; `lora` goes to LoraConfig over what the row says.

    Every factor is drawn so that its update is about as large as the weight it updates. With a
    `dtype` that is not float32, the factors are rounded to it before they are used and saved.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base.hf, attn_implementation="eager", dtype=torch.float32
    )
    settings = {"r": 4, "lora_alpha": 8, **base.row.lora, **lora}
    linear = linear_layers(base)
    settings.setdefault("target_modules", linear)
    config = LoraConfig(
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **settings,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                spread = 0.3 if "lora_B" in name else parameter.shape[-1] ** -0.5
                noise = spread * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.to(dtype))
    with warnings.catch_warnings():
        # It saves the base's output weights too, as it does for users.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        tuned.save_pretrained(folder, safe_serialization=safe_serialization)
    return AdapterFixture(base=base, path=folder, model=tuned.eval())


def linear_layers(base: BaseFixture) -> list[str]:
    """Return the last name components of all linear layers; the output only if it has weights."""
    output = base.model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
            and not (module is output and base.tied)
        }
    )


def convert_adapter(adapter: Path, base: BaseFixture, destination: Path) -> None:
    """Write a PEFT adapter as GGUF."""
    known = open_base(base.gguf)
    read = read_peft(adapter)
    mapped = to_engine(known.architecture, known.sizes, read.pairs())
    assert not mapped.unmatched
    writer = gguf.GGUFWriter(destination, known.architecture.gguf)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for pair in mapped.pairs:
        a = pair.a.numpy().astype(np.float32)
        b = (pair.b.numpy().astype(np.float64) * pair.scale).astype(np.float32)
        writer.add_tensor(f"{pair.module}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{pair.module}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
