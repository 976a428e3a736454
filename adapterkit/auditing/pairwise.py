"""What clashes when adapters are merged: their updates held against each other, module by module.

Everything comes from r x r products of the factors (`overlaps`). The one exception is the conflict
of signs, which is a matter of entries: it is counted on a grid of them.

No number here sees data: orthogonal updates may still disturb each other on real activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.auditing.interference import (
    Interference,
    JointInterference,
    ModuleInterference,
    PairInterference,
)
from adapterkit.auditing.overlaps import (
    Products,
    SpectralUpdate,
    overlap,
    products_of,
    spectral,
    task_interference,
)
from adapterkit.auditing.sketches import copies, sketched_gram
from adapterkit.errors import UncheckableError
from adapterkit.lowrank.products import Array, expert, unscaled
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.auditing.report import AdapterAudit
    from adapterkit.model import AdapterTensorSet, Update

_GRID = 192
# Adapters up to which every two are compared in detail; of more, as many pairs.
_CLOSELY = 12
OPPOSED = -0.1
REDUNDANT = 0.5
ENTANGLED = 0.25


@dataclass(frozen=True, slots=True)
class _Compared:
    """Everything of one matrix: its pairs by adapter numbers, and all together."""

    pairs: dict[tuple[int, int], ModuleInterference]
    inner: dict[tuple[int, int], float]
    joint: JointInterference


def interference(
    adapters: Sequence[AdapterTensorSet], audits: Sequence[AdapterAudit]
) -> Interference:
    """Hold adapters against each other; one module of all of them is in memory at a time.

    Of many, copies are compared once, and only those pairs in detail whose sketches say that they
    have most in common.

    Args:
        adapters: at least two.
        audits: what the audit found of each, in the same order.

    Raises:
        UncheckableError: if a module has llama.cpp's row order in only some of them.
    """
    for error in unlike(adapters).values():
        raise error
    groups = copies(adapters)
    energies = [audited.summary.energy for audited in audits]
    same = tuple(group for group in groups if len(group) > 1)
    numbers = list(range(len(adapters)))
    if len(adapters) <= _CLOSELY:
        compared, mismatched = _compared(adapters, list(combinations(numbers, 2)))
        total = sum(sum(each.inner.values()) for each in compared)
        ratio = _ratio(sum(energies), total)
    else:
        numbers = [group[0] for group in groups]
        gram = sketched_gram([adapters[number] for number in numbers])
        compared, mismatched = _compared(adapters, _nearest(numbers, gram))
        ratio = _estimated_ratio(groups, gram, sum(energies))
    return Interference(
        tuple(
            _pair(i, j, compared, (energies[i], energies[j]), others)
            for (i, j), others in mismatched.items()
        ),
        tuple(each.joint for each in compared),
        ratio,
        same,
        len(numbers) * (len(numbers) - 1) // 2 - len(mismatched),
    )


def _nearest(numbers: Sequence[int], gram: Array) -> list[tuple[int, int]]:
    """Return as many pairs as few adapters have, the largest cosines of sketches first."""
    lengths = np.sqrt(np.diag(gram))
    lengths = np.where(lengths > 0, lengths, 1.0)
    first, second = np.triu_indices(len(numbers), 1)
    cosines = np.abs((gram / np.outer(lengths, lengths))[first, second])
    chosen: list[int] = np.argsort(-cosines, kind="stable").tolist()
    most = _CLOSELY * (_CLOSELY - 1) // 2
    return [(numbers[int(first[n])], numbers[int(second[n])]) for n in chosen[:most]]


def _estimated_ratio(groups: Sequence[tuple[int, ...]], gram: Array, energy: float) -> float | None:
    counts = np.array([len(group) for group in groups], dtype=np.float64)
    own = float(counts @ np.diag(gram))
    return float(counts @ gram @ counts) / own if energy and own else None


def _compared(
    adapters: Sequence[AdapterTensorSet], wanted: Sequence[tuple[int, int]]
) -> tuple[list[_Compared], dict[tuple[int, int], tuple[str, ...]]]:
    """Return every matrix of the wanted pairs, and what modules of a pair have other shapes."""
    numbers = sorted({number for pair in wanted for number in pair})
    tables = {n: {pair.module: pair for pair in adapters[n].pairs()} for n in numbers}
    names = dict.fromkeys(name for table in tables.values() for name in table)
    shared = [name for name in names if sum(name in table for table in tables.values()) > 1]
    mismatched = {
        (i, j): tuple(
            name
            for name in shared
            if name in tables[i]
            and name in tables[j]
            and not _alike(tables[i][name], tables[j][name])
        )
        for i, j in wanted
    }
    groups = [
        {number: table[name] for number, table in tables.items() if name in table}
        for name in shared
    ]
    close = set(wanted)
    found = in_threads(lambda group: _compare(group, close), groups)
    return [each for group in found for each in group], mismatched


def unlike(adapters: Sequence[AdapterTensorSet]) -> dict[int, UncheckableError]:
    """Return the adapters that keep llama.cpp's row order where another does not, and why not."""
    kept = [set(adapter.engine_layout) for adapter in adapters]
    plain = set[str]().union(*(set(a.scales) - set(a.engine_layout) for a in adapters))
    return {
        number: UncheckableError(
            f"keeps {min(names & plain)} in llama.cpp's row order, and other adapters do not; to "
            "compare them give the base model with --base",
            path=adapter.provenance.path if adapter.provenance else None,
        )
        for number, (adapter, names) in enumerate(zip(adapters, kept, strict=True))
        if names & plain
    }


def _alike(first: Update, second: Update) -> bool:
    return (
        first.matrix_shape == second.matrix_shape
        and first.experts == second.experts
        and first.kind is second.kind
    )


def _compare(group: dict[int, Update], wanted: set[tuple[int, int]]) -> list[_Compared]:
    """Compare one module, its experts one by one; adapters of other shapes apart."""
    found: list[_Compared] = []
    left: dict[int, Update] = dict(group)
    while left:
        first = next(iter(left.values()))
        alike = {number: pair for number, pair in left.items() if _alike(first, pair)}
        left = {number: pair for number, pair in left.items() if number not in alike}
        if len(alike) > 1:
            found += _compare_alike(alike, wanted)
    return found


def _compare_alike(alike: dict[int, Update], wanted: set[tuple[int, int]]) -> list[_Compared]:
    found: list[_Compared] = []
    for place, experts in enumerate(zip(*(unscaled(p) for p in alike.values()), strict=True)):
        updates = {
            number: spectral(each, pair.scale)
            for (number, pair), each in zip(alike.items(), experts, strict=True)
        }
        first = next(iter(alike.values()))
        number = expert(first, place)
        name = first.module if number is None else f"{first.module}[{number}]"
        found.append(_matrix(name, updates, wanted))
    return found


def _matrix(
    name: str, updates: dict[int, SpectralUpdate], wanted: set[tuple[int, int]]
) -> _Compared:
    here = [pair for pair in combinations(updates, 2) if pair in wanted]
    products = products_of(updates, here)
    signs = _signs(updates)
    inner = {(i, j): products.inner(updates, i, j) for i, j in here}
    pairs = {(i, j): _module(name, updates, products, (i, j), inner[i, j], signs) for i, j in here}
    task, relative, ratio = None, None, None
    if len(here) == len(updates) * (len(updates) - 1) // 2:
        task, relative = task_interference(updates, products, list(updates))
        energy = sum(update.energy for update in updates.values())
        ratio = _ratio(energy, sum(inner.values()))
    return _Compared(pairs, inner, JointInterference(name, len(updates), ratio, task, relative))


def _signs(updates: dict[int, SpectralUpdate]) -> dict[int, Array]:
    """Return the signs of ΔW on one grid of rows and columns, all of them where they are few."""
    first = next(iter(updates.values()))
    out, inputs = first.b.shape[0], first.a.shape[1]
    random = np.random.default_rng((out, inputs))
    rows = np.sort(random.permutation(out)[:_GRID])
    columns = np.sort(random.permutation(inputs)[:_GRID])
    return {
        number: np.sign(update.b[rows] @ update.a[:, columns]) * update.sign
        for number, update in updates.items()
    }


def _module(
    name: str,
    updates: dict[int, SpectralUpdate],
    products: Products,
    numbers: tuple[int, int],
    inner: float,
    signs: dict[int, Array],
) -> ModuleInterference:
    i, j = numbers
    first, second = updates[i], updates[j]
    if not first.values.size or not second.values.size:
        return ModuleInterference(**_UNKNOWN, module=name, lost_energy=0.0)
    ranks = first.values.size, second.values.size
    left, left_angles = overlap(products.left[i, j])
    right, right_angles = overlap(products.right[i, j])
    chance = [max(ranks) / size for size in (first.b.shape[0], first.a.shape[1])]
    cosine = _clipped(inner / math.sqrt(first.energy) / math.sqrt(second.energy))
    task, relative = task_interference(updates, products, [i, j])
    meeting = signs[i] * signs[j]
    decided = np.count_nonzero(meeting)
    return ModuleInterference(
        module=name,
        cosine=cosine,
        merge_energy_ratio=_ratio(first.energy + second.energy, inner),
        left_overlap=left,
        right_overlap=right,
        left_chance=min(chance[0], 1.0),
        right_chance=min(chance[1], 1.0),
        left_angles=left_angles,
        right_angles=right_angles,
        singular_task_interference=task,
        interference=relative,
        sign_conflict=float(np.count_nonzero(meeting < 0) / decided) if decided else None,
        lost_energy=-2 * inner,
        verdict=_verdict(cosine, (left, chance[0]), (right, chance[1])),
    )


_UNKNOWN: dict[str, Any] = {
    **dict.fromkeys(
        (
            "cosine",
            "merge_energy_ratio",
            "left_overlap",
            "right_overlap",
            "left_chance",
            "right_chance",
            "singular_task_interference",
            "interference",
            "sign_conflict",
            "verdict",
        )
    ),
    "left_angles": (),
    "right_angles": (),
}


def _verdict(cosine: float, left: tuple[float, float], right: tuple[float, float]) -> str:
    if cosine < OPPOSED:
        return "opposed"
    if cosine > REDUNDANT:
        return "redundant"
    beyond = [
        (found - chance) / (1 - chance) if chance < 1 else 0.0 for found, chance in (left, right)
    ]
    return "entangled" if min(beyond) > ENTANGLED else "independent"


def _clipped(cosine: float) -> float:
    return min(max(cosine, -1.0), 1.0)


def _ratio(energy: float, inner: float) -> float | None:
    """Return ‖ΣΔW‖² / Σ‖ΔW‖² from Σ‖ΔW‖² and the sum of inner products of every two."""
    return max((energy + 2 * inner) / energy, 0.0) if energy else None


def _pair(
    i: int,
    j: int,
    compared: Sequence[_Compared],
    energies: tuple[float, float],
    mismatched: tuple[str, ...],
) -> PairInterference:
    found = [each for each in compared if (i, j) in each.pairs]
    modules = [each.pairs[i, j] for each in found]
    inner = sum(each.inner[i, j] for each in found)
    norms = math.sqrt(energies[0] * energies[1])
    cosine = _clipped(inner / norms) if norms and modules else None
    means = {
        name: _mean([getattr(module, name) for module in modules])
        for name in ("left_overlap", "right_overlap", "interference", "sign_conflict")
    }
    clashing = [module for module in modules if module.verdict in {"opposed", "entangled"}]
    clashing.sort(key=lambda module: (module.verdict != "opposed", -module.lost_energy))
    return PairInterference(
        a=i,
        b=j,
        shared=len(modules),
        mismatched=mismatched,
        cosine=cosine,
        merge_energy_ratio=_ratio(sum(energies), inner) if modules else None,
        verdict=_pair_verdict(cosine, modules),
        clashes=tuple(module.module for module in clashing),
        modules=tuple(modules),
        **means,
    )


def _pair_verdict(cosine: float | None, modules: Sequence[ModuleInterference]) -> str | None:
    if cosine is None:
        return None
    entangled = sum(module.verdict == "entangled" for module in modules)
    if OPPOSED <= cosine <= REDUNDANT:
        return "entangled" if 2 * entangled > len(modules) else "independent"
    return _verdict(cosine, (0.0, 0.0), (0.0, 0.0))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
