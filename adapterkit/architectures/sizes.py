"""The sizes of one base model, looked up by the names that the tables use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from adapterkit.architectures.expressions import evaluate
from adapterkit.architectures.table import Architecture, common_parameters
from adapterkit.errors import BaseRequiredError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Sizes:
    """Parameters of a base model, from its config.json or its GGUF header.

    Attributes:
        architecture: the family, whose own parameters win over the common ones.
        side: `hf` or `gguf`, the kind of `facts`.
        facts: raw keys: of config.json, or of the GGUF header without the architecture's prefix and
            with dots as double underscores. Lists hold one value per layer.
    """

    architecture: Architecture
    side: str
    facts: Mapping[str, Any]
    _known: dict[tuple[str, int | None], Any] = field(
        default_factory=dict[tuple[str, int | None], Any], repr=False, compare=False
    )

    def value(self, expression: str, layer: int | None = None) -> Any:
        """Evaluate an expression over parameters and raw facts, for one layer.

        Raises:
            BaseRequiredError: if the base does not state something that it needs.
        """
        try:
            return evaluate(expression, self._lookup(layer))
        except KeyError as error:
            raise BaseRequiredError(
                f"the base model does not state {error.args[0]!r}, which {expression!r} needs; "
                "give its full config.json or GGUF with --base"
            ) from None

    def get(self, expression: str, layer: int | None = None) -> Any | None:
        """Evaluate an expression, or return None where the base does not state enough."""
        try:
            return evaluate(expression, self._lookup(layer))
        except KeyError:
            return None

    def _lookup(self, layer: int | None) -> Callable[[str], Any]:
        def lookup(name: str) -> Any:
            key = (name, layer)
            if key not in self._known:
                self._known[key] = self._resolve(name, layer)
            return self._known[key]

        return lookup

    def _resolve(self, name: str, layer: int | None) -> Any:
        for expression in self._candidates(name):
            try:
                if expression == name:  # the fact of the same name, not this parameter again
                    return self._fact(name, layer)
                return evaluate(expression, self._lookup(layer))
            except KeyError:
                continue
        return self._fact(name, layer)

    def _candidates(self, name: str) -> tuple[str, ...]:
        own = self.architecture.parameters.get(name, {}).get(self.side)
        return own or common_parameters().get(name, {}).get(self.side, ())

    def _fact(self, name: str, layer: int | None) -> Any:
        value = _at(self.facts.get(name), layer)
        if value is None:
            raise KeyError(name)
        return value


def _at(fact: Any, layer: int | None) -> Any:
    if layer is None or not isinstance(fact, list):
        return fact
    per_layer = cast("list[Any]", fact)
    return per_layer[layer] if layer < len(per_layer) else None
