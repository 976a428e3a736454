"""The weight of a module in a base model, whatever its checkpoint calls it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.base.model import BaseModel
from adapterkit.errors import BaseRequiredError, FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.tensor import LazyTensor

_WEIGHT = ".weight"
_MATRIX = 2
_MOST_MODULES = 1 << 20


@dataclass(frozen=True)
class BaseWeights:
    """Weights and sizes of a base, by Hugging Face module path.

    A module is found under its own name, or under another spelling of the same place in the family
    (`transformer.h.0` and `h.0`, `model.language_model.` and `language_model.model.`).

    Attributes:
        base: the model.
    """

    base: BaseModel

    def stored(self, module: str) -> LazyTensor | None:
        """Return the weight as it is stored: (out, in), or (in, out) of a Conv1D."""
        if self.base.kind != "hf":
            return None
        if found := self.base.tensors.get(module + _WEIGHT):
            return found
        place = self._place(module)
        return self._by_place.get(place) if place else None

    def names_place(self, module: str) -> bool | None:
        """Tell whether the checkpoint names anything of a module; None if its names are unknown.

        Quantised checkpoints have other tensors than `.weight` under a module's name.
        """
        return module in self._named or self._place(module) in self._places if self._named else None

    def turned(self, module: str) -> bool:
        """Tell whether the base stores this weight as (in, out)."""
        match = find_rule(self.base.architecture, module)
        return match is not None and match.rule.conv1d

    def shape(self, module: str) -> tuple[int, int] | None:
        """Return (out, in) of a linear layer, from the weights or from the configuration."""
        stored = self.stored(module)
        # Quantised checkpoints store packed shapes; their config tells the logical ones.
        if stored is not None and stored.dtype.floating and len(stored.shape) == _MATRIX:
            rows, columns = stored.shape
            return (columns, rows) if self.turned(module) else (rows, columns)
        match = find_rule(self.base.architecture, module)
        if match is None or len(match.rule.shape) != _MATRIX:
            return None
        try:
            rows, columns = (self.base.sizes.value(text, match.layer) for text in match.rule.shape)
        except BaseRequiredError:
            return None
        return rows, columns

    def modules(self) -> Iterator[str]:
        """Yield every module that has a matrix: from the weights, or else from the tables."""
        if self.base.kind == "hf" and self.base.has_tensors:
            for name, tensor in self.base.tensors.items():
                if name.endswith(_WEIGHT) and len(tensor.shape) == _MATRIX:
                    yield name.removesuffix(_WEIGHT)
            return
        for rule in self.base.architecture.rules:
            if rule.kind in {"linear", "embedding"}:
                yield from self._spelled(rule.hf)

    def _spelled(self, pattern: str) -> Iterator[str]:
        layers = range(self.base.sizes.value("layers") if "{i}" in pattern else 1)
        experts = range(self.base.sizes.value("experts") if "{e}" in pattern else 1)
        if len(layers) * len(experts) > _MOST_MODULES:
            message = f"{len(layers)} layers of {len(experts)} experts are no model"
            raise FormatError(message, path=self.base.path)
        for layer in layers:
            for expert in experts:
                yield pattern.replace("{i}", str(layer)).replace("{e}", str(expert))

    @cached_property
    def _by_place(self) -> Mapping[tuple[str, int | None, int | None], LazyTensor]:
        found: dict[tuple[str, int | None, int | None], LazyTensor] = {}
        for name, tensor in self.base.tensors.items():
            if name.endswith(_WEIGHT) and (place := self._place(name.removesuffix(_WEIGHT))):
                found[place] = tensor
        return found

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[0] for name in self.base.names)

    @cached_property
    def _places(self) -> frozenset[tuple[str, int | None, int | None] | None]:
        return frozenset(self._place(module) for module in self._named)

    def _place(self, module: str) -> tuple[str, int | None, int | None] | None:
        match = find_rule(self.base.architecture, module)
        return (match.rule.hf, match.layer, match.expert) if match else None
