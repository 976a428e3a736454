"""What of a file's tensors, settings and updates is not what its certificate lists, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from adapterkit.certificates import Certificate, mark
from adapterkit.notes import first_and_more
from adapterkit.text import count

if TYPE_CHECKING:
    from adapterkit.fingerprints import Fingerprint, ModuleFingerprint
    from adapterkit.stamps import Contents

# Sixteen numbers of float16 are right to this; storage in 8 to 16 bits moves them less than that.
_SAME, ROUNDED = 2e-3, 2e-2
# Norms are computed alike from the same bytes.
_EXACT = 1e-9
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


def changed_updates(
    written: Mapping[str, ModuleFingerprint], now: Mapping[str, ModuleFingerprint]
) -> Iterator[Change]:
    """Compare what modules do, by norms and sketches: a name, a scale, a rounding, or another."""
    yield from _moved(written, now)
    yield from _altered(written, now)


def _moved(
    known: Mapping[str, ModuleFingerprint], now: Mapping[str, ModuleFingerprint]
) -> Iterator[Change]:
    added = {name: now[name] for name in now if name not in known}
    for name in [name for name in known if name not in now]:
        twin = next((new for new, each in added.items() if _alike(known[name], each)), None)
        if twin is None:
            yield Change("dropped", name, "has no update any more")
        else:
            del added[twin]
            yield Change("renamed", name, f"is {twin} now")
    for name in added:
        yield Change("added", name, "had no update when the file was written")


def _alike(one: ModuleFingerprint, other: ModuleFingerprint) -> bool:
    ratio, apart = _against(one, other)
    return abs(ratio - 1) < _SAME and apart < _SAME


def _against(one: ModuleFingerprint, other: ModuleFingerprint) -> tuple[float, float]:
    """Return the ratio of the norms, negative for opposite updates, and the sketches' distance."""
    import numpy as np

    first, second = (np.frombuffer(each.sketch, "<f2").astype(float) for each in (one, other))
    sign = -1 if float(first @ second) < 0 else 1
    length = float(np.linalg.norm(first)) or 1.0
    return sign * other.norm / one.norm, float(np.linalg.norm(second * sign - first)) / length


def _altered(
    known: Mapping[str, ModuleFingerprint], now: Mapping[str, ModuleFingerprint]
) -> Iterator[Change]:
    scaled: dict[str, list[str]] = {}
    rounded: list[str] = []
    for name in known:
        if name not in now:
            continue
        ratio, apart = _against(known[name], now[name])
        if apart < _SAME and abs(ratio - 1) > _SAME:
            scaled.setdefault(f"{ratio:.4g}", []).append(name)
        elif apart > ROUNDED or abs(ratio - 1) > ROUNDED:
            message = f"is another update: {apart:.2g} of it differ, ‖ΔW‖ is {ratio:.3g} times"
            yield Change("update", name, message)
        elif apart > _SAME or abs(ratio - 1) > _EXACT:
            rounded.append(name)
    for ratio, names in scaled.items():
        every = f"all {len(names)} modules" if len(names) == len(known) else first_and_more(names)
        yield Change("scale", every, f"{ratio} times the update that was written")
    if rounded:
        yield Change("rounding", first_and_more(rounded), "differs as another dtype would explain")


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """Return about how far the second update is from the first, as a share of the first."""
    import numpy as np

    if not one.norm:
        return 0.0 if not other.norm else float("inf")
    ratio = other.norm / one.norm
    return float(np.linalg.norm(other.vector * ratio - one.vector))
