"""PEFT TinyLoRA adapters: peft_type TINYLORA, with the frozen factors in the file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.formats.peft.files import CONFIG, WEIGHTS
from adapterkit.formats.peft.keys import PREFIX, saved_name
from adapterkit.keys import Role
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora import writing
from adapterkit.tinylora.adapter import TinyAdapter, TinyModule, wide

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss

    Array = np.ndarray[Any, np.dtype[Any]]

# Elements of all projections together beyond which coefficients are folded into them.
_ROOM = 1 << 24
# What PEFT stores beside any tuner: saved modules, and its copies of output weights.
_WHOLE = (Role.FULL, Role.BASE_COPY)


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List what PEFT's TinyLoRA cannot hold."""
    del options
    return writing.losses(adapter, holds=_WHOLE)


def write(adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
    """Write an adapter directory, exact: A, B and P are stored and PEFT loads all three.

    Another form's groups are no rows of neighbours, which is all that PEFT can tie. So all
    modules get the one vector that is all groups' coefficients in a row, and every projection
    is zero outside its own group's part: the same numbers are trained, tied the same way.
    """
    tiny = writing.tiny_of(adapter)
    if tiny.form != "peft":
        tiny = _in_one_row(tiny)
    path.mkdir()
    tensors = _tensors(tiny, options.dtype)
    adapted = [module.name for module in tiny.modules]
    for key, tensor in adapter.tensors.items():
        if key.role in _WHOLE:
            tensors[saved_name(key, adapted)] = tensor
    write_safetensors(path / WEIGHTS[0], tensors, {"format": "pt"})
    text = json.dumps(_config(tiny, adapter, options), indent=2, sort_keys=True)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")


def _tensors(tiny: TinyAdapter, dtype: DType | None) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for module in tiny.modules:
        parts = {"A": module.right, "B": module.left, "P": module.projection}
        for part, tensor in parts.items():
            stored = tensor.cast(dtype) if dtype else tensor
            tensors[f"{PREFIX}{module.name}.tinylora_{part}"] = stored
    for group, vector in tiny.vectors.items():
        tensors[f"base_model.tinylora_v.{group}"] = vector
    return tensors


def _in_one_row(tiny: TinyAdapter) -> TinyAdapter:
    """Return the same adapter with one vector for all modules, scale 1 and balanced factors."""
    import numpy as np

    groups = sorted(tiny.vectors)
    starts = dict(
        zip(groups, np.cumsum([0, *(tiny.vectors[g].size for g in groups)]), strict=False)
    )
    width = tiny.coefficients
    folded = width * sum(module.right.shape[0] ** 2 for module in tiny.modules) > _ROOM
    rank = max(module.right.shape[0] for module in tiny.modules)
    modules = tuple(
        _placed(
            _padded(module, rank),
            tiny.vectors[module.group],
            None if folded else (starts[module.group], width),
        )
        for module in tiny.modules
    )
    row = np.ones(1) if folded else np.concatenate([wide(tiny.vectors[group]) for group in groups])
    vectors = {0: LazyTensor.of(row, DType.F32)}
    return TinyAdapter(modules=modules, vectors=vectors, form="peft")


def _padded(module: TinyModule, rank: int) -> TinyModule:
    """Return the module with frozen factors of PEFT's rank: one r, cut to the weight's size.

    Raises:
        UnsupportedError: if the factors have a higher rank than the weight.
    """
    import numpy as np

    own, limit = module.right.shape[0], min(module.left.shape[0], module.right.shape[1])
    if own > limit:
        raise UnsupportedError(
            f"its frozen factors have rank {own}, PEFT keeps {limit} for its size; write peft",
            where=module.name,
        )
    more = min(rank, limit) - own
    if not more:
        return module
    return replace(
        module,
        left=LazyTensor.of(np.pad(wide(module.left), [(0, 0), (0, more)]), module.dtype),
        right=LazyTensor.of(np.pad(wide(module.right), [(0, more), (0, 0)]), module.dtype),
        projection=LazyTensor.of(
            np.pad(wide(module.projection), [(0, 0), (0, more), (0, more)]), module.dtype
        ),
    )


def _placed(module: TinyModule, vector: LazyTensor, place: tuple[int, int] | None) -> TinyModule:
    import numpy as np

    left, right, projection = wide(module.left), wide(module.right), wide(module.projection)
    # d L and R / d with d as in U S^½: neither factor alone carries the singular values.
    norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    share = np.where((norms[0] > 0) & (norms[1] > 0), norms[1] / np.maximum(norms[0], 1e-300), 1.0)
    share = np.sqrt(np.where(share > 0, share, 1.0))
    turned = module.scale * projection / share[:, None] * share[None, :]
    if place is None:
        spread = np.tensordot(wide(vector), turned, 1)[None]
    else:
        start, width = place
        spread = np.zeros((width, *turned.shape[1:]))
        spread[start : start + len(turned)] = turned
    return TinyModule(
        name=module.name,
        left=LazyTensor.of(left * share, module.dtype),
        right=LazyTensor.of(right / share[:, None], module.dtype),
        projection=LazyTensor.of(spread, module.dtype),
        group=0,
        embedding=module.embedding,
        witness=module.witness,
    )


def _config(tiny: TinyAdapter, adapter: AdapterTensorSet, options: FormatOptions) -> dict[str, Any]:
    base = options.base
    names = [module.name for module in tiny.modules]
    conv1d = bool(base) and any(rule.conv1d for rule in base.architecture.rules)
    made: Mapping[str, Any] = {
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_v_bound": 0.02,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "projection_seed": 42,
        "revision": None,
        "target_modules": sorted(names),
        "task_type": "CAUSAL_LM",
        "tinylora_dropout": 0.0,
        "weight_tying": 1.0,
        "base_model_name_or_path": base.name if base else None,
    }
    named = {"base_model_name_or_path": adapter.base.name} if adapter.base.name else {}
    return {
        **made,
        **tiny.config,
        **named,
        "peft_type": "TINYLORA",
        "r": max(module.right.shape[0] for module in tiny.modules),
        "u": next(iter(tiny.vectors.values())).size,
        "save_projection": True,
    }
