"""Random PEFT adapters of a base, and their way into llama.cpp."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from adapterkit.architectures.mapping import in_tower
from adapterkit.conversion import ConversionReport, convert
from engine.bases import BaseFixture
from engine.distributions import kl, logprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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

    Every factor is drawn so that, with the row's own settings, its update is about as large as the
    weight it updates. The file holds the factors as `dtype`, and the live model their very values.
    """
    model = type(base.model).from_pretrained(
        base.hf, attn_implementation="eager", dtype=torch.float32
    )
    settings = {"r": 4, "lora_alpha": 8, **base.row.lora, **lora}
    settings.setdefault("target_modules", linear_layers(base))
    config = LoraConfig(
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION" if base.row.encoder else "CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **settings,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                spread = 0.3 if "lora_B" in name else parameter.shape[-1] ** -0.5
                noise = spread * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.to(dtype))
    # Left to itself PEFT copies the base's output weights into the file; here only factors count.
    tuned.save_pretrained(
        folder, safe_serialization=safe_serialization, save_embedding_layers=False
    )
    if dtype is not torch.float32:
        weights = folder / "adapter_model.safetensors"
        save_file({name: x.to(dtype) for name, x in load_file(weights).items()}, weights)
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
            and not in_tower(name)
        }
    )


def convert_adapter(
    adapter: Path, base: BaseFixture, destination: Path, *, given: str = "gguf", **options: Any
) -> ConversionReport:
    """Convert an adapter for llama.cpp.

    Args:
        adapter: what `make_adapter` saved.
        base: the base model.
        destination: `.gguf` file to write.
        given: which form of the base the conversion sees, `gguf` or `hf`.
        options: further arguments of `adapterkit.convert`.
    """
    # Families are called verified because they pass here, so none needs to be yet.
    known = {"gguf": base.gguf, "hf": base.hf}[given]
    return convert(adapter, destination, base=known, unverified=True, **options)


def idle_modules(
    tuned: AdapterFixture,
    prompts: Sequence[Sequence[int]],
    floor: float,
    answers: Callable[..., Any] = logprobs,
    distances: Callable[..., Any] = kl,
) -> list[str]:
    """Return adapted modules whose update moves no answer by `floor`, nats of a distribution.

    An engine that left one of them out would go unnoticed.
    """
    reference = answers(tuned.model, prompts)
    idle: list[str] = []
    for name, module in tuned.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scaling = module.scaling["default"]
            module.scaling["default"] = 0.0
            if distances(reference, answers(tuned.model, prompts)).max() < floor:
                idle.append(name)
            module.scaling["default"] = scaling
    return idle
