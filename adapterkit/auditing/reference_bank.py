"""Statistics that tell backdoored updates apart, against a bank of adapters; no verdict.

The five statistics are those of arXiv 2602.15195: σ₁, ‖ΔW‖_F, σ₁² / Σσ², the entropy of the
spectrum, and the kurtosis of the entries of ΔW. They were found on the authors' adapters, whose
attackers did not hide from them: what lies far out of a bank is unusual, and no more is known. A
bank is worth as much as its adapters are like the one that is held against it: same base, same
recipe.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapterkit.auditing.places import place_of
from adapterkit.auditing.reference_report import ReferenceAudit, Standing
from adapterkit.base import BaseModel
from adapterkit.destination import check_report
from adapterkit.errors import FormatError, UncheckableError, UsageError
from adapterkit.json_file import read_json_object
from adapterkit.loading import load, open_model
from adapterkit.lowrank.moments import kurtosis
from adapterkit.lowrank.products import unscaled
from adapterkit.lowrank.spectrum import spectra
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.output import staged
from adapterkit.several import said_of_each
from adapterkit.tables import ANY_MAPPING, TEXT, Table, listed, mapped, number
from adapterkit.text import PLAIN, Pen, Shown, count
from adapterkit.work import in_threads, watchable

STATISTICS = ("spectral_norm", "frobenius_norm", "top1_energy", "entropy", "kurtosis")
_KIND, _SCHEMA = "adapterkit audit bank", 1


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a bank.

    Attributes:
        source: where it was read from.
        base_model: what it was trained on, as recorded.
        families: for each family and statistic the mean over the family's updates.
    """

    source: str
    base_model: str | None
    families: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, repr=False)
class Bank(Shown):
    """Adapters to compare with.

    Attributes:
        members: in the order given.
    """

    members: tuple[Member, ...]
    _entries = "members"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return how many adapters there are, and of how many families of modules."""
        del pen
        families = {name for member in self.members for name in member.families}
        return f"{count(len(self.members), 'adapter')}, {len(families)} families of modules"


def _measured(adapter: AdapterTensorSet) -> Member:
    """Measure one adapter for a bank; updates that are zero have no statistics."""
    pairs = list(adapter.pairs())
    values: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair, rows in zip(pairs, in_threads(_statistics, pairs), strict=True):
        for row in rows:
            for name, value in row.items():
                values[place_of(pair.module).family][name].append(value)
    families = {
        family: {name: math.fsum(found) / len(found) for name, found in known.items()}
        for family, known in values.items()
    }
    return Member(_named(adapter), adapter.base.name, families)


def _statistics(pair: Update) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for spectrum, each in zip(spectra(pair), unscaled(pair), strict=True):
        if not spectrum.largest:
            continue
        energy = spectrum.relative**2
        shares = spectrum.relative / spectrum.relative.sum()
        positive = shares[shares > 0]
        row = {
            "spectral_norm": spectrum.largest,
            "frobenius_norm": spectrum.largest * math.sqrt(energy.sum()),
            "top1_energy": 1 / float(energy.sum()),
            "entropy": -float((positive * np.log(positive)).sum()),
        }
        tail = kurtosis(each.a, each.b)
        rows.append(row if tail is None else row | {"kurtosis": tail})
    return rows


@watchable
def bank(
    *sources: AdapterTensorSet | Path | str,
    destination: Path | str,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    force: bool = False,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """Write a bank of adapters for `audit(..., reference=destination)`; they are read one by one.

    Raises:
        FormatError: if one is no adapter, or it is malformed, unpaired or not finite.
        UsageError: if no adapter is given.
        DestinationExistsError: if there is something at `destination` that is no bank, or `force`
            is false.
        WriteError: if it cannot be written.
    """
    del progress  # told by `watchable`
    if not sources:
        raise UsageError("no adapter was given")
    begins = f'{{\n "kind": "{_KIND}"'.encode()
    check_report(Path(destination), what="bank", begins=begins, force=force)
    model = open_model(base)
    said = said_of_each(sources, base=model, dialect=dialect, alpha=alpha, as_format=as_format)
    loaded = (
        load(each, base=model, dialect=own.dialect, alpha=own.alpha, as_format=as_format).adapter
        for each, own in zip(sources, said, strict=True)
    )
    made = Bank(tuple(map(_measured, loaded)))
    content = {
        "kind": _KIND,
        "schema": _SCHEMA,
        "members": [
            {"source": m.source, "base_model": m.base_model, "families": m.families}
            for m in made.members
        ],
    }
    with staged(Path(destination), force=force) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return made


def read_bank(path: Path | str) -> Bank:
    """Read a bank.

    Raises:
        FormatError: if the file is no bank, or holds what is no number.
    """
    content = Table(read_json_object(Path(path)), Path(path))
    if content.fields.get("kind") != _KIND or content.fields.get("schema") != _SCHEMA:
        message = "is no bank of this version; make one with `adapterkit audit A B ... --bank FILE`"
        raise FormatError(message, path=path)
    return Bank(
        tuple(
            _member(content.inner(f"members[{place}]", member))
            for place, member in enumerate(content.get("members", listed(ANY_MAPPING)))
        )
    )


def _member(content: Table) -> Member:
    known = content.get("families", mapped(mapped(number())))
    families = {
        family: {name: values[name] for name in STATISTICS if name in values}
        for family, values in known.items()
    }
    return Member(content.get("source", TEXT), content.optional("base_model", TEXT), families)


def against_bank(adapter: AdapterTensorSet, path: Path | str) -> ReferenceAudit:
    """Hold an adapter against a bank; its own entry, if it is one of them, is left out.

    Raises:
        FormatError: if the file is no bank.
        UncheckableError: if no adapter of the bank has a family of this one.
    """
    bank, own = read_bank(path), _measured(adapter)
    others = [each for each in bank.members if each.families != own.families]
    rows = tuple(
        _standing(family, name, value, others)
        for family, known in own.families.items()
        for name, value in known.items()
    )
    if not any(row.members for row in rows):
        message = "no adapter of the bank has a module of this one's; is it of another base?"
        raise UncheckableError(message, path=path)
    return ReferenceAudit(
        path=str(path),
        members=len(others),
        other_bases=sum(each.base_model != own.base_model for each in others),
        standings=rows,
    )


def _named(adapter: AdapterTensorSet) -> str:
    return str(adapter.provenance.path) if adapter.provenance else "in memory"


def _standing(family: str, name: str, value: float, others: Sequence[Member]) -> Standing:
    found = np.array(
        [m.families[family][name] for m in others if name in m.families.get(family, {})],
        dtype=np.float64,
    )
    mean = float(found.mean()) if len(found) else None
    spread = float(found.std(ddof=1)) if len(found) > 1 else None
    below = float((found < value).sum() + (found == value).sum() / 2)
    return Standing(
        family=family,
        statistic=name,
        value=value,
        members=len(found),
        mean=mean,
        deviation=spread,
        z=(value - mean) / spread if spread and mean is not None else None,
        percentile=100 * below / len(found) if len(found) else None,
    )
