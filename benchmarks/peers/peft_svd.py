"""PEFT merges two adapters of one 4096 x 4096 module by svd: no files, only the merge."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model

SIZE, RANK = 4096, 16

warnings.filterwarnings("ignore")
torch.manual_seed(0)
model = torch.nn.Module()
model.q_proj = torch.nn.Linear(SIZE, SIZE, bias=False)
config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj"], init_lora_weights=False)
tuned = get_peft_model(model, config, adapter_name="a")
tuned.add_adapter("b", config)
tuned.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", combination_type="svd", svd_rank=RANK)
