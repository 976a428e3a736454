"""Adapters whose initialisation changed the base, trained by PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from quiet_peft import quiet_peft
from small_llama import saved_llama
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_peft():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"), apart)


def apart(model: Any) -> None:
    """Give every matrix singular values that differ clearly: 1, 0.9, 0.81, ..."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            u, s, vh = torch.linalg.svd(parameter.data.double(), full_matrices=False)
            steps = 0.9 ** torch.arange(len(s), dtype=torch.float64)
            parameter.data = (u @ torch.diag(steps) @ vh).float()


def tuned(base: Path, folder: Path, init: str, model_class: Any = None, **settings: Any) -> Path:
    """Save an adapter that has moved away from its initialisation a little."""
    torch.manual_seed(1)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "init_lora_weights": init,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    model = get_peft_model((model_class or LlamaForCausalLM).from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    # Not the path, by which the base would be found.
    known = json.loads((folder / "adapter_config.json").read_text())
    known["base_model_name_or_path"] = "nobody/base"
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


def loaded(base: Path, adapter: Path, model_class: Any = LlamaForCausalLM) -> Any:
    return PeftModel.from_pretrained(model_class.from_pretrained(base), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def merged(base: Path, adapter: Path, model_class: Any = LlamaForCausalLM) -> dict[str, np.ndarray]:
    before = {
        n: x.detach().clone() for n, x in model_class.from_pretrained(base).named_parameters()
    }
    after = loaded(base, adapter, model_class).merge_and_unload().named_parameters()
    return {name: (x.detach().double() - before[name].double()).numpy() for name, x in after}


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> bool:
    return got.keys() == want.keys() and all(relative(got[n], want[n]) < tolerance for n in want)
