"""What of a file's tensors and settings is not what its certificate lists, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from adapterkit.certificates import Certificate, mark
from adapterkit.text import count

if TYPE_CHECKING:
    from adapterkit.stamps import Contents

# A tensor that is gone and one that was added, of the same bytes.
_PAIR = 2
# Names of tensors that stand alone in a model, so that none beside them tells theirs.
_ALONE = (
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *("token_embd.weight", "output_norm.weight", "output.weight"),
)
_PARTS = re.compile(r"([._/])")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not what it was when the file was written.

    Attributes:
        kind: `tensor`, `setting`, `scale`, `rounding`, `update`, `renamed`, `dropped`, `added`,
            `source` or `base`.
        where: the tensor, setting, module or file.
        message: what is wrong with it.
    """

    kind: str
    where: str
    message: str


def altered(proof: Certificate, found: Contents, others: Iterable[str] = ()) -> Iterator[Change]:
    """Compare what is stored, to the bit.

    Args:
        proof: what was written.
        found: what there is.
        others: names that tensors may have had.
    """
    if found.digest == proof.digest:
        return
    if not proof.contents.tensors and not proof.contents.settings:
        yield Change("tensor", "its bytes", "are not those that were written")
        return
    yield from _tensors(proof.contents.tensors, found.tensors, others)
    for key, message in _unlike(proof.contents.settings, found.settings):
        yield Change("setting", key, message)


def _tensors(
    written: Mapping[str, str], now: Mapping[str, str], others: Iterable[str]
) -> Iterator[Change]:
    marks = {name: mark(name) for name in now}
    for name in now:
        if marks[name] in written and written[marks[name]] != now[name]:
            yield Change("tensor", name, "is not what was written")
    present = set(marks.values())
    gone = {key: digest for key, digest in written.items() if key not in present}
    added = {name: digest for name, digest in now.items() if marks[name] not in written}
    called = _recalled(gone, now, others)
    times, lost = Counter([*gone.values(), *added.values()]), set(gone.values())
    twins = {d: name for name, d in added.items() if d in lost and times[d] == _PAIR}
    nameless = 0
    for key, digest in gone.items():
        twin = twins.get(digest)
        if key in called:
            message = f"is {twin} now" if twin else "was written and is not there"
            yield Change("tensor", called[key], message)
        elif twin:
            yield Change("tensor", twin, "had another name when the file was written")
        else:
            nameless += 1
    if nameless:
        message = "not there; the proof holds no names, and none like those here fits"
        yield Change("tensor", count(nameless, "tensor"), f"{_are(nameless)} {message}")
    for name in added:
        if name not in twins.values():
            yield Change("tensor", name, "was not there when the file was written")


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _recalled(gone: Iterable[str], present: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return the names that marks stand for, as far as one part sets them apart from those present.

    A model's names repeat themselves: what another layer's tensor is called is one number away, and
    what belongs to a module ends as what belongs to others does.
    """
    missing, present = set(gone), list(present)
    if not missing:
        return {}
    split = [_PARTS.split(name) for name in present]
    seen: dict[int, set[str]] = {}
    for parts in split:
        for place, part in enumerate(parts):
            seen.setdefault(place, set()).add(part)
    alike = (
        "".join((*parts[:place], part, *parts[place + 1 :]))
        for parts in split
        for place in range(0, len(parts), 2)
        for part in seen[place]
    )
    cuts = [(name.rsplit(".", parts), parts) for name in present for parts in (1, 2)]
    stems = {cut[0] for cut, parts in cuts if len(cut) > parts}
    ends = {".".join(cut[1:]) for cut, parts in cuts if len(cut) > parts}
    joined = (f"{stem}.{end}" for stem in stems for end in ends)
    every = chain(others, _ALONE, alike, joined)
    return {key: name for name in every if (key := mark(name)) in missing}


def _unlike(written: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    # A file that was read by its keys, and cannot be now, is one thing.
    broken = {key for key in now if any(each.startswith(f"{key}: ") for each in written)}
    for key in {**now, **written}:
        if key in broken:
            yield key, "cannot be read any more"
        elif key.partition(": ")[0] in broken:
            continue
        elif key not in written:
            yield key, "was not there when the file was written"
        elif key not in now:
            yield key, "was written and is not there"
        elif written[key] != now[key]:
            yield key, "is not what was written"
