"""The adapter of one changed module as mergekit finds it: in float32, all singular values."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

RANK = 16

base, tuned = (load_file(f"{folder}/model-00001-of-00001.safetensors") for folder in sys.argv[1:])
(name,) = (name for name in base if not torch.equal(base[name], tuned[name]))
left, values, right = torch.linalg.svd((tuned[name] - base[name]).float(), full_matrices=False)
root = values[:RANK].sqrt()
left, right = left[:, :RANK] * root, root[:, None] * right[:RANK]
