"""Updates under a file's own names, moved to the modules and rows of Hugging Face's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterkit.architectures.expressions import parse_call
from adapterkit.architectures.rows import row_order
from adapterkit.architectures.transforms import inverse
from adapterkit.base.places import Places
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnsupportedError,
    UsageError,
)
from adapterkit.factors import fuse_rows, take_rows
from adapterkit.keys import Role
from adapterkit.model import Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    import re

    from adapterkit.base import BaseModel
    from adapterkit.formats.handwritten.blocks import Slots
    from adapterkit.formats.handwritten.dialects import Dialect, Document
    from adapterkit.formats.handwritten.dialects.grammar import RenameRule
    from adapterkit.patterns import Match

_Vectors = Mapping[Role, LazyTensor]
_SHOWN = 3


@dataclass(slots=True)
class _Target:
    """A Hugging Face module and what was found for each of its slots."""

    heights: list[int | None]
    pairs: dict[int, Update] = field(default_factory=dict[int, Update])
    vectors: _Vectors = field(default_factory=dict[Role, LazyTensor])


class Names:
    """Collects updates by Hugging Face module, then joins those that fill one module's rows."""

    def __init__(self, dialect: Dialect, document: Document, base: BaseModel | None) -> None:
        self._dialect = dialect
        self._document = document
        self._base = base
        self._targets: dict[str, _Target] = {}
        self._kept: list[str] = []

    def add(self, pair: Update, part: str, vectors: _Vectors, slots: Slots | None) -> None:
        """Take one update, or one for each slot of a fused layer.

        Raises:
            FormatError: if two updates fill one place.
        """
        module = self._positioned(pair.module)
        if slots is None:
            name = f"{module}#{part}" if part else module
            rule, match = self._rule(name)
            if rule is None or match is None:
                self._put(self._kept_name(name), 0, [None], pair, vectors)
                return
            pair, vectors = self._reordered(rule, match, pair, vectors)
            heights: list[int | None] = [None] * rule.slots
            self._put(rule.to.format_map(match.groupdict()), rule.slot, heights, pair, vectors)
            return
        for slot, slot_pair in slots.pairs.items():
            self._add_slot(module, slot, slot_pair, slots)

    def _add_slot(self, module: str, slot: str, pair: Update, slots: Slots) -> None:
        place = slots.names.index(slot)
        rule, match = self._rule(f"{module}#{slot}")
        if slots.apart and (rule is None or match is None):
            self._put(self._kept_name(f"{module}.{slot}"), 0, [None], pair, {})
            return
        if rule is None or match is None:
            # The layer stays fused under its own name, if the dialect has no other for it.
            self._put(self.plain(module), place, list(slots.heights), pair, {})
            return
        pair, _ = self._reordered(rule, match, pair, {})
        heights: list[int | None] = [None] * rule.slots
        if rule.slots == len(slots.names):
            heights = list(slots.heights)
        target = rule.to.format_map(match.groupdict())
        if slots.apart:
            self._check_place(target, module, slot)
        self._put(target, rule.slot, heights, pair, {})

    def _check_place(self, target: str, module: str, slot: str) -> None:
        """Hold the module that a part becomes against the base that gave it its rows."""
        if self._base is not None and Places(self._base).has(target) is False:
            raise IncompatibleBaseError(
                f"its part {slot} is {target} in models like Llama, and the base {self._base.path} "
                f'has no such module; say where it is in a dialect file that extends "'
                f'{self._dialect.name}", in [[rename]]',
                path=self._document.path,
                where=module,
            )

    def finished(self) -> Iterator[tuple[Update, _Vectors]]:
        """Yield one update for each module, the slots of fused ones joined exactly."""
        for module, target in self._targets.items():
            if len(target.heights) == 1:
                yield replace(target.pairs[0], module=module), target.vectors
            else:
                yield self._fused(module, target), {}

    def plain(self, name: str) -> str:
        """Return the Hugging Face name of a module, its own where the dialect has none."""
        rule, match = self._rule(name)
        if rule is None or match is None or rule.slots > 1:
            return name if rule else self._kept_name(name)
        return rule.to.format_map(match.groupdict())

    def parameter(self, name: str) -> str:
        """Return the Hugging Face name of a trained parameter.

        Raises:
            UnsupportedError: if it is only some rows of a parameter there, or in another order.
        """
        module, dot, leaf = name.rpartition(".")
        rule, match = self._rule(module)
        if rule is None or match is None:
            return name
        if rule.slots > 1 or rule.rows:
            raise UnsupportedError(
                "is a trained parameter whose rows Hugging Face's model keeps elsewhere; it cannot "
                "be moved alone",
                path=self._document.path,
                where=name,
            )
        return rule.to.format_map(match.groupdict()) + dot + leaf

    def notes(self) -> tuple[str, ...]:
        """Say which modules the dialect has no Hugging Face name for."""
        if not self._kept or not self._dialect.renames:
            return ()
        shown = ", ".join(self._kept[:_SHOWN]) + (", ..." if len(self._kept) > _SHOWN else "")
        return (f"{len(self._kept)} modules keep the file's own names: {shown}",)

    def _kept_name(self, name: str) -> str:
        self._kept.append(name)
        return name

    def _rule(self, name: str) -> tuple[RenameRule | None, re.Match[str] | Match | None]:
        for rule in self._dialect.renames:
            if match := rule.match.fullmatch(name):
                return rule, match
        return None, None

    def _positioned(self, module: str) -> str:
        """Return the name of a module that the file tells by its position only."""
        if not any("position" in rule.match.groupindex for rule in self._dialect.tensors):
            return module
        group, _, place = module.rpartition(":")
        known = (self._dialect.modules or {}).get(group, ())
        if int(place) >= len(known):
            where = f"modules.{group}" if group else "modules"
            raise UsageError(
                f"the file tells its modules by position only, and position {place} has no name; "
                f"list the modules in the order of the training program, in the field {where} of a "
                f'dialect file that extends "{self._dialect.name}", and pass that with --dialect',
                path=self._document.path,
                where=module.strip(":"),
            )
        return known[int(place)]

    def _put(
        self,
        module: str,
        slot: int,
        heights: list[int | None],
        pair: Update,
        vectors: _Vectors,
    ) -> None:
        target = self._targets.setdefault(module, _Target(heights))
        if slot in target.pairs or len(target.heights) != len(heights):
            raise FormatError(
                f"two updates of {module} fill one place",
                path=self._document.path,
                where=pair.module,
            )
        if vectors and len(heights) > 1:
            raise UnsupportedError(
                f"holds a bias or magnitude for some rows of {module} only", where=pair.module
            )
        target.pairs[slot] = pair
        target.vectors = vectors

    def _reordered(
        self, rule: RenameRule, match: re.Match[str] | Match, pair: Update, vectors: _Vectors
    ) -> tuple[Update, _Vectors]:
        """Undo the row order of the training program."""
        if not rule.rows:
            return pair, vectors
        if self._base is None:
            raise BaseRequiredError(
                "the order of its rows depends on the base model; give its directory, config.json "
                "or GGUF with --base",
                path=self._document.path,
                where=pair.module,
            )
        family = self._base.family.name
        call = rule.rows.get(family)
        if call is None:
            raise IncompatibleBaseError(
                f"dialect {self._dialect.name} states no row order for family {family!r}; known: "
                f"{', '.join(rule.rows)}",
                where=pair.module,
            )
        if not call:
            return pair, vectors
        layer = match.groupdict().get("n")
        rows = pair.b.shape[0]
        place = int(layer) if layer else None
        order = row_order(parse_call(call), rows, self._base.sizes, place, pair.module)
        back = inverse(order)
        moved = {role: tensor.map(lambda x: x[back]) for role, tensor in vectors.items()}
        return take_rows(pair, back), moved

    def _fused(self, module: str, target: _Target) -> Update:
        pairs = [target.pairs.get(slot) for slot in range(len(target.heights))]
        present = [pair for pair in pairs if pair is not None]
        first = present[0]
        heights = [
            pair.b.shape[0] if pair is not None else height or first.b.shape[0]
            for pair, height in zip(pairs, target.heights, strict=True)
        ]
        alike = {(pair.a.shape[1], 0 if target.heights[0] else pair.b.shape[0]) for pair in present}
        if len(alike) > 1:
            raise FormatError(
                f"the updates that fill rows of {module} have different shapes",
                path=self._document.path,
                where=first.module,
            )
        return fuse_rows(pairs, heights, module)
