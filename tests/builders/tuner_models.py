"""Models adapted by PEFT's other tuners."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import get_peft_model
from quiet_peft import quiet_peft
from small_llama import saved_llama
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    # Said of every loaded topk-only VB-LoRA.
    with quiet_peft("Found infinity values"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"))


def tuned(kind: str, base: Path, folder: Path, model_class: Any = None, **settings: Any) -> Path:
    """Save an adapter whose trained tensors are all random, as PEFT saves it."""
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(**{"target_modules": TARGETS, **settings})
    model = get_peft_model((model_class or LlamaForCausalLM).from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


FIXTURES = Path(__file__).parents[2] / "fixtures"
