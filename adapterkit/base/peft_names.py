"""Names that PEFT loses when it loads what it saved itself, and the names that it loads instead.

PEFT sends the names of a file through the renamings of the class's checkpoints; one that adds a
part adds it once more to a name that has it. The facts are data that fixtures/classes/peft_names.py
generates with PEFT's own function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adapterkit.base.classes import renamed

_DATA = Path(__file__).parent / "peft_names.json"
# Stands before a name that is lost.
_LOST = "\0"


@dataclass(frozen=True, slots=True)
class PeftNames:
    """What PEFT makes of the names of one class.

    Attributes:
        spelled: prefix in memory that is lost -> as a file must spell it; None if none helps.
    """

    spelled: Mapping[str, str | None]

    def loses(self, name: str) -> bool:
        """Tell whether PEFT loads nothing under the name that a module has in memory."""
        lost: Mapping[str, str] = dict.fromkeys(self.spelled, _LOST)
        return renamed(name, lost).startswith(_LOST)

    def written(self, name: str) -> str:
        """Return the name under which a file's factors get to a module; its own if none does."""
        return renamed(name, {old: new for old, new in self.spelled.items() if new is not None})

    def modules(self, name: str) -> Iterator[str]:
        """Yield the modules to which a name of a file may lead."""
        for old, new in self.spelled.items():
            if new is not None and (found := renamed(name, {new: old})) != name:
                yield found


@cache
def peft_names(names: tuple[str, ...]) -> PeftNames:
    """Return what PEFT makes of the names of the first class that it loses any of."""
    data = _data()
    place = next((data["classes"][name] for name in names if name in data["classes"]), None)
    return PeftNames({} if place is None else data["names"][place])


@cache
def _data() -> Mapping[str, Any]:
    return json.loads(_DATA.read_text(encoding="utf-8"))
