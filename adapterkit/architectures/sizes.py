"""The sizes of one base model, looked up by the names that the tables use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.architectures.expressions import LARGEST, evaluate
from adapterkit.architectures.table import Architecture, common_parameters
from adapterkit.errors import BaseRequiredError
from adapterkit.tables import Kind, Table, UnfitError, number, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.errors import FormatError

_FACTS = "a number, a word or a list of them"
_LONGEST = 1 << 10
_SIZE = number(0, LARGEST)
# What is gone through one by one; ten times what any model has.
_COUNTED = {"layers", "experts"}
_COUNT = whole(0, 10_000, integral=True)


class _PerLayerError(LookupError):
    """A fact holds one value per layer, and no layer is asked for."""


def _fact(value: object) -> Any:
    """Return what a base may state of itself: truth, a number, a text, or a list, one per layer."""
    number_or_truth = isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST
    if (
        number_or_truth
        or isinstance(value, list)
        or (isinstance(value, str) and len(value) < _LONGEST)
    ):
        return cast("Any", value)
    raise UnfitError(_FACTS, value)


_FACT: Kind[Any] = Kind(_FACTS, _fact)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a base model, from its config.json or its GGUF header.

    Attributes:
        architecture: the family, whose own parameters win over the common ones.
        side: `hf` or `gguf`, the kind of `facts`.
        facts: raw keys: of config.json, or of the GGUF header without the architecture's prefix and
            with dots as double underscores. Lists hold one value per layer; what a nested config
            or list holds is named outer__inner, outer__0, and outer__inner of a list of configs is
            the list of theirs.
        path: what states them, for messages.
    """

    architecture: Architecture
    side: str
    facts: Mapping[str, Any]
    path: Path | None = None
    _known: dict[tuple[str, int | None], Any] = field(
        default_factory=dict[tuple[str, int | None], Any], repr=False, compare=False
    )

    def value(self, expression: str, layer: int | None = None) -> int:
        """Evaluate an expression over parameters and raw facts, for one layer: a whole number.

        Raises:
            BaseRequiredError: if the base does not state something that it needs.
            FormatError: if the base states something that is no size.
        """
        return int(self.number(expression, layer))

    def number(self, expression: str, layer: int | None = None) -> float:
        """Evaluate an expression to a number, which need not be whole; raises as `value` does."""
        try:
            return self._table.checked(expression, self._evaluated(expression, layer), _SIZE)
        except KeyError as error:
            raise self._unstated(expression, f"does not state {error.args[0]!r}") from None
        except _PerLayerError as error:
            raise self._unstated(expression, f"has one {error} for each layer") from None

    def get(self, expression: str, layer: int | None = None) -> int | None:
        """Evaluate an expression as `value` does; None where the base does not state enough.

        Raises:
            FormatError: if the base states something that is no size.
        """
        found = self.fact(expression, layer)
        return None if found is None else int(self._table.checked(expression, found, _SIZE))

    def fact(self, expression: str, layer: int | None = None) -> Any | None:
        """Evaluate an expression to a number, truth, text or list; None where not enough is stated.

        Raises:
            FormatError: if the base states something that the expression cannot compute with.
        """
        try:
            return self._evaluated(expression, layer)
        except (KeyError, _PerLayerError):
            return None

    @property
    def _table(self) -> Table:
        return Table(self.facts, self.path)

    def _unstated(self, expression: str, what: str) -> BaseRequiredError:
        return BaseRequiredError(
            f"the base model {what}, which {expression!r} needs; give its full config.json or GGUF "
            "with --base"
        )

    def _evaluated(self, expression: str, layer: int | None) -> Any:
        try:
            return evaluate(expression, self._lookup(layer))
        except ValueError as error:
            raise self._senseless(expression, error) from None

    def _senseless(self, expression: str, error: ValueError) -> FormatError:
        return self._table.error(expression, f"the sizes of the base make no sense: {error}")

    def _lookup(self, layer: int | None) -> Callable[[str], Any]:
        def lookup(name: str) -> Any:
            key = (name, layer)
            if key not in self._known:
                self._known[key] = self._resolve(name, layer)
            return self._known[key]

        return lookup

    def _resolve(self, name: str, layer: int | None) -> Any:
        for expression in (candidates := self._candidates(name)):
            try:
                # The fact of the same name is meant, not this parameter again.
                own = expression == name
                found = self._fact(name, layer) if own else self._evaluated(expression, layer)
            except KeyError:
                continue
            return self._sized(name, found)
        found = self._fact(name, layer)
        return self._sized(name, found) if candidates else found

    def _sized(self, name: str, found: Any) -> Any:
        """Return a parameter that, if it is a number, can be the size of something."""
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return found
        return self._table.checked(name, found, _COUNT if name in _COUNTED else _SIZE)

    def _candidates(self, name: str) -> tuple[str, ...]:
        own = self.architecture.parameters.get(name, {}).get(self.side)
        return own or common_parameters().get(name, {}).get(self.side, ())

    def _fact(self, name: str, layer: int | None) -> Any:
        value = _at(name, _stated(self.facts, name), layer)
        # A mapping is no fact itself: Lxmert counts the layers of each of its parts.
        if value is None or isinstance(value, dict):
            raise KeyError(name)
        return self._table.checked(name, value, _FACT)


def _stated(facts: Mapping[str, Any], name: str) -> Any:
    """Return a fact, or one of a nested config or list, spelled outer__inner or outer__0.

    Of a list of configs, one for each layer, outer__inner is the list of theirs.
    """
    if name in facts or "__" not in name:
        return facts.get(name)
    outer, inner = name.split("__", 1)
    nested = facts.get(outer)
    if isinstance(nested, list):
        entries = cast("list[Any]", nested)
        if inner.isdecimal():
            return dict(enumerate(entries)).get(int(inner))
        layers = [cast("dict[str, Any]", each) for each in entries if isinstance(each, dict)]
        whole = layers and len(layers) == len(entries)
        return [_stated(each, inner) for each in layers] if whole else None
    return _stated(cast("Mapping[str, Any]", nested), inner) if isinstance(nested, dict) else None


def _at(name: str, fact: Any, layer: int | None) -> Any:
    if not isinstance(fact, list):
        return fact
    per_layer = cast("list[Any]", fact)
    if layer is not None:
        return per_layer[layer] if layer < len(per_layer) else None
    if any(type(value) in {int, float} for value in per_layer[:1]):
        raise _PerLayerError(name)
    return per_layer
