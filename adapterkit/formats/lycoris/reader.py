"""LyCORIS LoHa, LoKr and LoCon files, as its trainers save them: one safetensors file, no config.

Names are `<prefix>_<module with _ for .>.<leaf>`; the underscores are undone with the module list
of the base. The scale of a module is its `alpha` over its rank, 1 where alpha is absent or 0, or
where LoKr holds both matrices whole (lycoris/modules/lokr.py); rsLoRA is in the stored alpha
already.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.base.places import Places
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import (
    AdapterKitError,
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnsupportedError,
)
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import Provenance
from adapterkit.stamps import OURS
from adapterkit.tuners import Factors, hadamard, kronecker
from adapterkit.tuners.factored import equal, matrices

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.tensor import LazyTensor
    from adapterkit.tuners.products import Matrix

    Parts = Mapping[str, LazyTensor]

_NAME = re.compile(
    r"^(?P<stem>.+)\.(?P<leaf>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12]"
    r"|lora_(?:up|down|mid)\.weight|alpha|dora_scale)$"
)
_OURS = re.compile(r"\.(?:hada|lokr)_w[12](?:_[ab])?$|^lycoris_.+\.lora_down\.weight$")
# What stands before the module: LyCORIS's own wrapper, and kohya's for whatever the model is.
_PREFIX = re.compile(r"^(?:lycoris|lora(?:_unet|_te\d?|_transformer)?)[_.]")
_CONVOLUTION = ("hada_t1", "hada_t2", "lokr_t1", "lokr_t2", "lora_mid.weight")


def is_lycoris(path: Path) -> bool:
    """Tell whether a file holds LoHa or LoKr tensors, or others under LyCORIS's own prefix."""
    try:
        return any(_OURS.search(name) for name in read_safetensors(path).tensors)
    except AdapterKitError:
        return False


def read_lycoris(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a LyCORIS file as factors, which are computed when they are asked for.

    Args:
        path: the file.
        options: `base`, the model, whose modules tell dots from underscores.

    Raises:
        FormatError: if the file is malformed.
        UnsupportedError: if a tensor is of a kind that is no low-rank update of a linear layer.
        BaseRequiredError: if names need a base that is not known.
        IncompatibleBaseError: if the base has no such module.
    """
    file = read_safetensors(path)
    groups: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for name, tensor in file.tensors.items():
        match = _NAME.match(name)
        if match is None:
            raise UnsupportedError(
                "is of a LyCORIS kind that is no low-rank update of a weight; merge it into the "
                "options.base with LyCORIS and serve that",
                path=path,
                where=name,
            )
        groups[match["stem"]][match["leaf"]] = tensor
    modules = _modules(list(groups), options.base, path)
    tensors: dict[TensorKey, LazyTensor] = {}
    scales: dict[str, float] = {}
    for stem, parts in groups.items():
        factors, scale = _factors(stem, parts, path)
        tensors[TensorKey(modules[stem], Role.LORA_A)] = factors.a
        tensors[TensorKey(modules[stem], Role.LORA_B)] = factors.b
        scales[modules[stem]] = scale
    return AdapterTensorSet(
        tensors=tensors,
        scales=scales,
        metadata={
            name: value
            for name, value in file.metadata.items()
            if name != "format" and not name.startswith(OURS)
        },
        provenance=Provenance(path, "lycoris", ("LyCORIS products written out as LoRA",)),
    )


def _factors(stem: str, parts: Parts, path: Path) -> tuple[Factors, float]:
    if convolved := [name for name in _CONVOLUTION if name in parts]:
        raise UnsupportedError(
            f"is the update of a convolution ({convolved[0]}), which is not read",
            path=path,
            where=stem,
        )
    if "dora_scale" in parts:
        raise UnsupportedError(
            "has a dora_scale: its update depends on the base weight and is not low-rank; merge it "
            "into the base with LyCORIS and serve that",
            path=path,
            where=stem,
        )
    try:
        factors, rank = _product(parts)
        return factors, _scale(parts, rank)
    except KeyError as error:
        raise FormatError(f"has no {error.args[0]}", path=path, where=stem) from None
    except ValueError as error:
        raise FormatError(str(error), path=path, where=stem) from None


def _product(parts: Parts) -> tuple[Factors, int | None]:
    """Return the factors, and the rank that alpha is divided by; None for scale 1."""
    if any(name.startswith("hada") for name in parts):
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        w1_a, w1_b, w2_a, w2_b = (parts[name] for name in names)
        return hadamard(w1_a, w1_b, w2_a, w2_b), w1_b.shape[0]
    if any(name.startswith("lokr") for name in parts):
        w1, w2 = _matrix(parts, "lokr_w1"), _matrix(parts, "lokr_w2")
        ranks = [side[1].shape[0] for side in (w1, w2) if len(side) > 1]
        return kronecker(w1, w2), ranks[0] if ranks else None
    a, b = parts["lora_down.weight"], parts["lora_up.weight"]
    matrices(lora_down=a, lora_up=b)
    equal("ranks", a.shape[0], b.shape[1])
    return Factors(a, b), a.shape[0]


def _matrix(parts: Parts, name: str) -> Matrix:
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _scale(parts: Parts, rank: int | None) -> float:
    stored = parts.get("alpha")
    if stored is None or not rank:
        return 1.0
    if stored.size != 1:
        raise ValueError(f"alpha has shape {list(stored.shape)}, not that of a number")
    alpha = float(stored.numpy().reshape(()))
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, not a finite number")
    return (alpha or rank) / rank


def _modules(stems: list[str], base: BaseModel | None, path: Path) -> dict[str, str]:
    """Return the module of each stem; names with underscores are looked up in the base.

    Raises:
        BaseRequiredError: if that is needed and there is no base.
        IncompatibleBaseError: if no module has the name, or several do.
    """
    plain = {stem: _PREFIX.sub("", stem) for stem in stems}
    if all("." in name for name in plain.values()):
        return plain
    if base is None:
        raise BaseRequiredError(
            "LyCORIS writes dots as underscores, which only the model's own names undo; give the "
            "base model with --base",
            path=path,
            where=stems[0],
        )
    known: dict[str, list[str]] = defaultdict(list)
    for module in Places(base).modules():
        known[module.replace(".", "_")].append(module)
    found: dict[str, str] = {}
    for stem, name in plain.items():
        candidates = known.get(name.replace(".", "_"), [])
        if len(candidates) != 1:
            problem = f"could be {' or '.join(candidates)}" if candidates else "has no such module"
            raise IncompatibleBaseError(f"{base.path} {problem}", path=path, where=stem)
        found[stem] = candidates[0]
    return found
