"""Which modules of a model PEFT adapts, by an adapter's own config."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol, cast

from adapterkit.patterns import Allowance, Expression

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ALL = "all-linear"
_SAVED = r"(^|.*\.){}($|\..*)"
_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
# PEFT's own: the first number after any component.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


class _Fitting(Protocol):
    def fits(self, name: str) -> bool: ...


class Selection:
    """PEFT's `check_target_module_exists`, with expressions evaluated in bounded time.

    Where a config leaves the choice of targets to PEFT, what the other fields deny is denied.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        allowance = Allowance()
        targets = config.get("target_modules")
        self._targets = _matcher(targets, allowance) if _told(targets) else None
        self._exact = frozenset(_names(targets))
        excluded = config.get("exclude_modules")
        self._excluded = _matcher(excluded, allowance) if excluded else None
        self._saved = [
            Expression(name, allowance, frame=_SAVED)
            for name in _names(config.get("modules_to_save"))
        ]
        # PEFT refuses the two together where the targets are one expression.
        chosen = None if isinstance(targets, str) else config.get("layers_to_transform")
        self._chosen = frozenset([chosen] if isinstance(chosen, int) else chosen or ())
        patterns = config.get("layers_pattern") or ()
        named = [patterns] if isinstance(patterns, str) else [*patterns]
        self._layers = [Expression(str(name), allowance, frame=_LAYER) for name in named]

    def selects(self, module: str) -> bool:
        """Tell whether PEFT adapts a module of the base.

        Raises:
            UncheckableError: if an expression of the config could not be evaluated.
        """
        return self.denied_by(module) is None

    def denied_by(self, module: str) -> str | None:
        """Return the field for which PEFT does not adapt a module; None if it does.

        Raises:
            UncheckableError: if an expression of the config could not be evaluated.
        """
        if self._excluded is not None and self._excluded.fits(module):
            return "exclude_modules"
        if any(saved.fits(module) for saved in self._saved):
            return "modules_to_save"
        if self._targets is not None and not self._targets.fits(module):
            return "target_modules"
        # A module that is named in full is taken from any layer.
        if module in self._exact or not self._chosen or self._layer(module) in self._chosen:
            return None
        return "layers_to_transform"

    def _layer(self, module: str) -> int | None:
        if not self._layers:
            found = _ANY_LAYER.match(module)
            return int(found["idx"]) if found else None
        for pattern in self._layers:
            if match := pattern.fullmatch(module):
                return int(match.groupdict()["idx"] or 0)
        return None


class _Endings:
    """Names that a module is called, or its path ends with."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def fits(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[place:]) in self._names for place in range(len(parts)))


def selection(config: Mapping[str, Any]) -> Selection | None:
    """Return what a config selects; None if it does not tell: no targets, or all linear layers."""
    return Selection(config) if _told(config.get("target_modules")) else None


def ends_with(module: str, target: str) -> bool:
    """Tell whether a module is called so, or its path ends so."""
    return module == target or module.endswith(f".{target}")


def saved_for(module: str, name: str) -> list[str]:
    """Return the modules that PEFT saves whole for a name: this one and those that hold it.

    PEFT compares letters and not components (`norm` is also `input_layernorm`), and cannot load
    what it saves one inside the other.
    """
    parts = module.split(".")
    paths = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return [path for path in paths if name and path.endswith(name)]


def _told(declared: Any) -> bool:
    return isinstance(declared, list) or (isinstance(declared, str) and declared not in {"", _ALL})


def _matcher(declared: Any, allowance: Allowance) -> _Fitting:
    if isinstance(declared, str):
        return Expression(declared, allowance)
    return _Endings(_names(declared))


def _names(declared: Any) -> list[str]:
    return [*map(str, cast("list[Any]", declared))] if isinstance(declared, list) else []
