"""How PEFT's other tuners store an update, and the B · A that it is.

Leaves, scales and formulas are those of PEFT 0.21.2 (`get_delta_weight` of each tuner's layer).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.base import BaseModel
from adapterkit.base.places import Places
from adapterkit.errors import BaseRequiredError, FormatError, UnsupportedError
from adapterkit.formats.peft.tuners_refused import MERGE
from adapterkit.lora_config.config import LARGEST_RANK, LoraConfig
from adapterkit.tables import FLAG, Table, number, whole
from adapterkit.tensor import LazyTensor
from adapterkit.tuners import (
    Factors,
    adalora,
    delora,
    granular,
    hadamard,
    householder,
    kronecker,
    miss,
    vector_bank,
    vera,
)
from adapterkit.tuners.shared import Selection

if TYPE_CHECKING:
    from adapterkit.tuners.products import Matrix

Parts = Mapping[str, LazyTensor]

LEAF = re.compile(
    r"^(?P<module>.+)\.(?P<leaf>adalora_[ABE]|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?"
    r"|lokr_t[12]|delora_(?:A|B|lambda|w_norm)|miss_block|vera_lambda_[bd]"
    r"|vblora_logits_[AB](?:_topk_(?:indices|weights))?|gralora_[AB](?:_general)?|hra_u|ia3_l"
    r"|beft_bias|trainable_tokens_delta|ln_tuning_(?:weight|bias))(?:\.[^.]+)?$"
)
# Tensors that all modules share, by their name in the file.
SHARED = re.compile(r"^base_model\.(?P<name>vera_[AB]|vblora_vector_bank)(?:\.[^.]+)?$")


@dataclass(frozen=True)
class Context:
    """What a rule may ask beside the tensors of one module.

    Attributes:
        config: adapter_config.json.
        path: that file.
        shared: tensors of the whole adapter, by name.
        base: the base model, if known.
    """

    config: Mapping[str, Any]
    path: Path
    shared: Parts
    base: BaseModel | None

    @cached_property
    def scaling(self) -> LoraConfig:
        """LoHa's and LoKr's `r`, `alpha` and their patterns, which mean what LoRA's do."""
        fields = {name: self.config.get(name) for name in ("rank_pattern", "alpha_pattern")}
        fields |= {"r": self.config.get("r", 8), "lora_alpha": self.config.get("alpha", 8)}
        return LoraConfig(fields, self.path)

    @cached_property
    def weights(self) -> Places | None:
        """Sizes of the base's modules."""
        return Places(self.base) if self.base else None

    def parameter(self, name: str) -> LazyTensor:
        """Return a parameter of the base as it is stored.

        Raises:
            BaseRequiredError: if there is no base, or it has no such weights.
        """
        found = self.optional(name)
        if found is None or not found.dtype.floating or found.dtype.quantised:
            kind = self.config.get("peft_type")
            lacking = f"; {self.base.path} has none for it" if self.base else ""
            way = "give the Hugging Face model with --base"
            if self.base and self.base.kind == "gguf":
                way = (
                    "with the Hugging Face model, adapterkit convert SRC -o DIR --base MODEL makes "
                    "an adapter of it that goes into a GGUF, too"
                )
            raise BaseRequiredError(
                f"what {kind} does follows from the base's own weights: {way}{lacking}",
                path=self.path,
                where=name,
            )
        return found

    def optional(self, name: str) -> LazyTensor | None:
        """Return a parameter of the base, or None if it has none of that name."""
        stored = self.weights.find(name) if self.weights else None
        return self.weights.base.tensors[stored] if self.weights and stored else None

    def turned(self, module: str) -> bool:
        """Whether the base stores a module's weight as (in, out)."""
        return self.weights is not None and self.weights.conv1d(module)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (out, in) of a module, which some files do not state.

        Raises:
            BaseRequiredError: if there is no base, or it does not know the module.
        """
        found = self.weights.shape(module) if self.weights else None
        if found is None:
            kind = self.config.get("peft_type")
            raise BaseRequiredError(
                f"{kind} files do not hold the sizes of the modules; give the base model with "
                "--base",
                path=self.path,
                where=module,
            )
        return found

    @cached_property
    def fields(self) -> Table:
        """The config, to be asked field by field."""
        return Table(self.config, self.path)


Rule = Callable[[str, Parts, Context], tuple[Factors, float]]


def _adalora(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    del module
    factors = adalora(parts["adalora_A"], parts["adalora_B"], parts["adalora_E"])
    # PEFT divides by the rank that training began with, whatever pruning left, plus 1e-5.
    alpha = context.fields.get("lora_alpha", number(), 8.0)
    rank = context.fields.get("init_r", whole(1, LARGEST_RANK), 12)
    return factors, (alpha if alpha > 0 else factors.b.shape[1]) / (rank + 1e-5)


def _loha(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    _no_convolution(module, parts, context, "hada_t1", "hada_t2")
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _same_rank(module, parts["hada_w1_b"].shape[0], context)
    return hadamard(*(parts[name] for name in names)), context.scaling.scale_of(module)


def _lokr(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    _no_convolution(module, parts, context, "lokr_t1", "lokr_t2")
    for side in ("lokr_w1", "lokr_w2"):
        if side not in parts:
            _same_rank(module, parts[f"{side}_b"].shape[0], context)
    factors = kronecker(halves(parts, "lokr_w1"), halves(parts, "lokr_w2"))
    return factors, context.scaling.scale_of(module)


def halves(parts: Parts, name: str) -> Matrix:
    """Return a matrix of LoKr, whole or as its two factors."""
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _delora(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    del module, context
    names = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    return delora(*(parts[name] for name in names)), 1.0


def _miss(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    if context.config.get("init_weights") == "bat":
        raise UnsupportedError(
            f'init_weights "bat" multiplies the base weight, and its update has full rank; {MERGE}',
            path=context.path,
        )
    outputs, inputs = context.shape(module)
    return miss(parts["miss_block"], inputs, outputs), 1.0


def _vera(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    if not {"vera_A", "vera_B"} <= set(context.shared):
        raise UnsupportedError(
            "the shared projections are not in the file (save_projection was false); load it in "
            "PEFT on the machine that trained it and save it with save_projection=True",
            path=context.path,
        )
    rows, directions = parts["vera_lambda_b"], parts["vera_lambda_d"]
    inputs = context.shape(module)[1]
    shared = context.shared
    return vera(shared["vera_A"], shared["vera_B"], rows, directions, inputs), 1.0


def _vblora(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    del module
    vectors = max(context.shared["vblora_vector_bank"].shape, default=1)
    count = context.fields.get("topk", whole(1, vectors, integral=True), 2)
    sides = (_selection(parts, f"vblora_logits_{side}", count) for side in "AB")
    return vector_bank(context.shared["vblora_vector_bank"], *sides), 1.0


def _gralora(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    del module
    sides = "gralora_A_general", "gralora_B_general"
    a, b = (parts.get(side) for side in sides)
    general = (a, b) if a is not None and b is not None else None
    if (a is None) != (b is None):
        raise KeyError(sides[b is None])
    rank = parts["gralora_A"].shape[-1] + (general[0].shape[0] if general else 0)
    alpha = context.fields.get("alpha", number(), 64.0)
    return granular(parts["gralora_A"], parts["gralora_B"], general), alpha / rank


def _hra(module: str, parts: Parts, context: Context) -> tuple[Factors, float]:
    weight = context.parameter(f"{module}.weight")
    orthogonal = context.fields.optional("apply_GS", FLAG) or False
    return householder(parts["hra_u"], weight, orthogonal=orthogonal), 1.0


def _selection(parts: Parts, name: str, count: int) -> Selection:
    if name in parts:
        return Selection(parts[name], count)
    return Selection(None, count, parts[f"{name}_topk_indices"], parts[f"{name}_topk_weights"])


def _no_convolution(module: str, parts: Parts, context: Context, *cores: str) -> None:
    convolved = [name for name in cores if name in parts]
    convolved += [name for name, tensor in parts.items() if len(tensor.shape) > 2]  # noqa: PLR2004  (no matrix)
    if convolved:
        raise UnsupportedError(
            f"is the update of a convolution ({convolved[0]}), which is not read",
            path=context.path,
            where=module,
        )


def _same_rank(module: str, stored: int, context: Context) -> None:
    declared = context.scaling.rank_of(module)
    if declared != stored:
        raise FormatError(
            f"has rank {stored}, the config declares {declared}; its scale is unknown",
            path=context.path,
            where=module,
        )


RULES: Mapping[str, Rule] = {
    "ADALORA": _adalora,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "HRA": _hra,
    "LOHA": _loha,
    "LOKR": _lokr,
    "MISS": _miss,
    "VBLORA": _vblora,
    "VERA": _vera,
}
