"""Models of which MLX adapters are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quiet_peft import quiet_peft
from small_llama import saved_llama
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_peft("Setting `save_embedding_layers`", ".*tie_word_embeddings"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"), tied=False)


def llama(folder: Path, *, tied: bool) -> Path:
    return saved_llama(folder, num_hidden_layers=3, tie_word_embeddings=tied)


def tuned(base: Path, folder: Path, model_class: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """Save an adapter with random values everywhere, and return the model that carries it."""
    torch.manual_seed(1)
    config = LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model_class.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def without_base(folder: Path) -> None:
    """Take out the path by which the base would be found."""
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text()) | {"base_model_name_or_path": "nobody/base"}
    path.write_text(json.dumps(known))
