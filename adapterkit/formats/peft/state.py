"""The dictionary of a saved object that is a PEFT model's state, and what lies outside of it.

Programs save that state alone, or under a key beside what else they keep: optimizers, counters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from adapterkit.containers.torch_zip import trails
from adapterkit.errors import UnsupportedError
from adapterkit.notes import Note, first_and_more
from adapterkit.training import is_state

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.tensor import LazyTensor

# Of many, the first are named.
_SHOWN = 3
Trail = tuple[str, ...]
FACTOR = re.compile(
    r"\.(?:lora_[AB](?:\.[^.]+)?\.weight|lora_embedding_[AB](?:\.(?!exp_avg|step)[^.]+)?)$"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The dictionary that holds factors.

    Attributes:
        names: its tensors, by their keys in it.
        notes: what else there is.
    """

    names: Mapping[str, Trail]
    notes: tuple[Note, ...]


def chosen(sizes: Mapping[Trail, int], path: Path) -> Chosen | None:
    """Return the one dictionary with factors of LoRA, None where there is none.

    Args:
        sizes: number of elements of every tensor, by the keys that lead to it.
        path: for messages.

    Raises:
        UnsupportedError: if several hold factors, or something else is no state of a training run.
    """
    groups: defaultdict[Trail, dict[str, Trail]] = defaultdict(dict)
    outside: list[Trail] = []
    for trail, size in sizes.items():
        if not trail:
            continue  # a file of one tensor
        if _is_state(trail, size):
            outside.append(trail)
        else:
            groups[trail[:-1]][trail[-1]] = trail
    found = [key for key, names in groups.items() if any(FACTOR.search(f".{n}") for n in names)]
    if not found:
        return None
    if len(found) > 1:
        shown = ", ".join(".".join(key) or "the root" for key in found)
        raise UnsupportedError(
            f"holds a LoRA in {len(found)} dictionaries ({shown}); save the one that is meant "
            "alone",
            path=path,
        )
    strangers = [t for key, names in groups.items() if key != found[0] for t in names.values()]
    if strangers:
        here = ".".join(found[0]) or "the root"
        raise UnsupportedError(
            f"lies outside of the dictionary with the LoRA ({here}), and is no state of a training "
            "run that is known; save that dictionary alone",
            path=path,
            where=".".join(strangers[0]),
        )
    return Chosen(groups[found[0]], tuple(_notes(outside)))


def _is_state(trail: Trail, size: int) -> bool:
    return any(is_state(key, 0) for key in trail) or is_state(trail[-1], size)


def _notes(outside: list[Trail]) -> Iterator[Note]:
    if outside:
        names = ", ".join(dict.fromkeys(trail[0].partition(".")[0] for trail in outside))
        count = f"{len(outside)} tensor{'s' if len(outside) > 1 else ''}"
        yield Note(f"{count} left out: state of the training run ({names})")


def of_model(root: object, path: Path) -> tuple[dict[str, LazyTensor], tuple[Note, ...]] | None:
    """Return the tensors of a PEFT model's state in a saved object, None where none has factors.

    Raises:
        UnsupportedError: as `chosen` does.
    """
    tensors = trails(root)
    found = chosen({trail: tensor.size for trail, tensor in tensors.items()}, path)
    if found is None:
        return None
    held = {name: tensors[trail] for name, trail in found.names.items()}
    return held, (*found.notes, *_values(root, {trail[0] for trail in tensors if trail}))


def _values(root: object, holding: set[str]) -> Iterator[Note]:
    """Name what a saved object holds that is no tensor: options, counters, histories."""
    fields = cast("Mapping[object, object]", root if isinstance(root, dict) else {})
    if names := [str(name) for name in fields if str(name) not in holding]:
        plural = "s" if len(names) > 1 else ""
        shown = first_and_more(names, _SHOWN)
        yield Note(f"{len(names)} value{plural} left out: state of the training run ({shown})")
