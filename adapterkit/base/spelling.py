"""What a module of a base is called: in its class, on disk, and in the family's table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.base.classes import model_class
from adapterkit.base.model import BaseModel
from adapterkit.base.peft_names import peft_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.base.classes import ModelClass, Renaming

WEIGHT = ".weight"
SUFFIXES = (WEIGHT, ".bias")


@dataclass(frozen=True)
class Spelling:
    """The names of one base's modules and parameters.

    Attributes:
        base: the model.
    """

    base: BaseModel

    @cached_property
    def cls(self) -> ModelClass | None:
        """What transformers says of the base's class."""
        return next(filter(None, map(model_class, self.base.classes)), None)

    def memory(self, name: str) -> str:
        """Return the path in the base's class of a stored parameter or module.

        Of a class without facts it is the table's own name for what the checkpoint spells by
        another.
        """
        return self._renaming.memory(name) if self._renaming else self._of_alias(name)

    def canonical(self, module: str) -> str:
        """Return a path as the family's table has it; itself if the table has none."""
        match = find_rule(self.base.architecture, module)
        if match is None or match.rule.alias:
            return module
        return match.rule.place(match.layer, match.expert)

    def in_class(self, module: str) -> str:
        """Return a path of the family's table as the base's own class has it.

        Tables are of one class with a head: others of the family have another prefix for their
        trunk (`roberta.` for `bert.`), and those without a head none.
        """
        root, cls = self.base.architecture.root, self.cls
        if not root or cls is None or self.base.text_prefix or not module.startswith(root):
            return module
        # Some classes state a prefix that their own names do not have.
        if any(path.startswith(root) for path in cls.kinds):
            return module
        prefix = "" if cls.headless else f"{cls.prefix}."
        return prefix + module.removeprefix(root)

    def on_disk(self, name: str) -> Iterator[str]:
        """Yield the names that a parameter or module of the class may have on disk."""
        for path in self.prefixed(name):
            yield path
            for renaming in self.cls.renamings if self.cls else ():
                yield renaming.disk(path)

    def prefixed(self, name: str) -> Iterator[str]:
        """Yield a path as it is, as it is in the class with, and without, a head, and for PEFT."""
        yield name
        yield from peft_names(self.base.classes).modules(name)
        if self.cls and self.cls.prefix:
            prefix = self.cls.prefix + "."
            yield name.removeprefix(prefix) if name.startswith(prefix) else prefix + name

    @cached_property
    def _renaming(self) -> Renaming | None:
        """The renaming by which the checkpoint is spelled; None if it has the names in memory.

        It is the one by which most of the tables that the class is known to have are there.
        """
        if self.cls is None or not self.cls.renamings:
            return None
        known = self.cls

        def hits(renaming: Renaming | None) -> int:
            names = map(renaming.memory, self.base.names) if renaming else self.base.names
            return sum(known.kind(name) != "linear" for name in names)

        return max((*known.renamings, None), key=hits)

    def _of_alias(self, name: str) -> str:
        """Return the table's own name of a parameter or module that has an alias; else itself."""
        suffix = next((each for each in SUFFIXES if name.endswith(each)), "")
        match = find_rule(self.base.architecture, name.removesuffix(suffix))
        if match is None or not match.rule.alias:
            return name
        own = self.base.architecture.own(match.rule)
        return name if own.alias else own.place(match.layer, match.expert) + suffix
