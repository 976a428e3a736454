"""From factors as a dialect explains them to updates of Hugging Face modules."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError, UnsupportedError, UsageError
from adapterkit.formats.handwritten.blocks import Slots, convolution, summed, unfolded
from adapterkit.formats.handwritten.merged import merged
from adapterkit.formats.handwritten.names import Names
from adapterkit.formats.handwritten.parts import parted
from adapterkit.keys import FACTORS, Role, TensorKey
from adapterkit.model import AdapterTensorSet, Kind, Update
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tables import Table, number
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.handwritten.dialects import Dialect, Document, Explanation, Site
    from adapterkit.formats.protocol import FormatOptions

_IMAGE = 4


@dataclass(frozen=True, slots=True)
class _Update:
    """One update under the file's name, and what goes with it.

    Attributes:
        pair: the factors, named by module; several indices are summed.
        part: which update of the module.
        vectors: bias after B and magnitude, by role.
        slots: the slots of a fused layer, instead of `pair`, if it is one.
    """

    pair: Update
    part: str = ""
    vectors: dict[Role, LazyTensor] = field(default_factory=dict[Role, LazyTensor])
    slots: Slots | None = None


def interpret(
    explanation: Explanation, document: Document, path: Path, options: FormatOptions
) -> AdapterTensorSet:
    """Return the adapter that the explained file holds.

    Raises:
        UsageError: if alpha, enabled slots, a kernel or module names must be given.
        FormatError: if the settings beside the file contradict it.
        BaseRequiredError: if the row order of the file depends on the base model.
        UnsupportedError: if a bias or magnitude belongs to rows of a fused layer.
    """
    dialect = explanation.dialect
    alpha = _alpha(dialect, document, options, explanation)
    names = Names(dialect, document, options.base)
    loose: dict[TensorKey, LazyTensor] = {}
    updates = _updates(explanation, document, alpha, options.base, loose)
    for update in updates:
        names.add(update.pair, update.part, update.vectors, update.slots)
    finished = list(names.finished())
    halves = {TensorKey(names.plain(k.module), k.role): t for k, t in loose.items()}
    beside = {
        TensorKey(pair.module, role): tensor
        for pair, vectors in finished
        for role, tensor in vectors.items()
    }
    for name, tensor in explanation.full.items():
        beside[TensorKey(names.parameter(name), Role.FULL)] = tensor
    notes = (*_notes(explanation), *names.notes(), *_merged(explanation, updates))
    return AdapterTensorSet.of(
        (pair for pair, _ in finished),
        beside | halves,
        kinds={key.module: _kind(half) for key, half in halves.items() if key.role in FACTORS},
        base=BaseReference(name=_base_name(dialect, document)),
        provenance=Provenance(path, "handwritten", notes),
    )


def _alpha(
    dialect: Dialect, document: Document, options: FormatOptions, explanation: Explanation
) -> float:
    """Return alpha, from the file, a file beside it, or else the options."""
    stored = dialect.alpha if isinstance(dialect.alpha, float) else None
    for source in dialect.alpha if isinstance(dialect.alpha, tuple) else ():
        if stored is None and (value := document.value(source)) is not None:
            stored = _number(value, source, document)
    given = options.alpha
    if dialect.scale == "1":
        return 1.0
    if given is None and stored is None:
        ranks = sorted({h["B"].shape[1] for h in explanation.sites.values() if "B" in h})
        raise UsageError(
            f"alpha is not in the file, and the scale is {dialect.scale} (r = "
            f"{', '.join(map(str, ranks))}); pass the alpha of the training run with --alpha",
            path=document.path,
            needs="alpha",
        )
    return _number(given if stored is None else stored, "--alpha", document)


def _number(value: object, source: str, document: Document) -> float:
    return Table({}, document.path).checked(source, value, number(spelled=True))


def _scale(dialect: Dialect, alpha: float, rank: int) -> float:
    match dialect.scale:
        case "alpha/r":
            return alpha / rank
        case "alpha/sqrt(r)":
            return alpha / math.sqrt(rank)
        case _:
            return alpha


def _updates(
    explanation: Explanation,
    document: Document,
    alpha: float,
    base: BaseModel | None,
    loose: dict[TensorKey, LazyTensor],
) -> list[_Update]:
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in explanation.sites:
        groups[site.module, site.part].append(site)
    updates: list[_Update] = []
    for (module, part), sites in groups.items():
        complete = [s for s in sites if {"A", "B"} <= explanation.sites[s].keys()]
        if complete != sites:
            _keep_halves(explanation, module, sites, loose)
            continue
        found = [_update(explanation, document, alpha, base, site) for site in sorted(sites)]
        if len(found) == 1:
            updates.append(found[0])
        elif any(update.vectors or update.slots for update in found):
            raise UnsupportedError(
                "holds several updates that add up, with biases or slots", where=module
            )
        else:
            updates.append(_Update(summed([update.pair for update in found]), part))
    return updates


def _keep_halves(
    explanation: Explanation, module: str, sites: list[Site], loose: dict[TensorKey, LazyTensor]
) -> None:
    """Keep what is there of a broken update: it can be inspected, and no writer takes it."""
    for site in sites:
        table = site in explanation.embeddings
        roles = {
            "A": Role.EMBEDDING_A if table else Role.LORA_A,
            "B": Role.EMBEDDING_B if table else Role.LORA_B,
            "lora_bias": Role.LORA_BIAS,
            "magnitude": Role.MAGNITUDE,
        }
        name = module + (f"#{site.part}" if site.part else "")
        for half, tensor in explanation.sites[site].items():
            if half in roles:
                loose[TensorKey(name, roles[half])] = tensor


def _update(
    explanation: Explanation,
    document: Document,
    alpha: float,
    base: BaseModel | None,
    site: Site,
) -> _Update:
    dialect, halves = explanation.dialect, explanation.sites[site]
    a, b = halves["A"], halves["B"]
    rank = b.shape[1]
    table = site in explanation.embeddings
    kind = Kind.EMBEDDING if table else _kind(a)
    pair = Update(site.module, a, b, _scale(dialect, alpha, rank or 1), kind)
    kernel = _kernel(explanation, document, pair)
    if kernel:
        pair = convolution(replace(pair, scale=_scale(dialect, alpha, rank // kernel or 1)), kernel)
    _check_vectors(halves, document, site)
    vectors = _vectors(halves, b)
    rule = next((r for r in dialect.blocks if r.match.fullmatch(str(site))), None)
    slots = unfolded(pair, rule, dialect, document) if rule and not (table or kernel) else None
    if parts := [rule for rule in dialect.parts if rule.match.fullmatch(str(site))]:
        slots = parted(pair, parts, base, document)
    if slots and vectors:
        raise UnsupportedError("holds a bias or magnitude of a fused layer", where=site.module)
    return _Update(pair, site.part, vectors, slots)


def _kind(factor: LazyTensor) -> Kind:
    """Return what a factor is of: only the axes `r in *` and `out r *` of a dialect exceed two."""
    return Kind.LINEAR if len(factor.shape) <= 2 else Kind.CONVOLUTION  # noqa: PLR2004  (a matrix)


def _check_vectors(halves: dict[str, LazyTensor], document: Document, site: Site) -> None:
    rows, rank = halves["B"].shape[:2]
    for half, size in (("lora_bias", rows), ("magnitude", rows), ("down_bias", rank)):
        tensor = halves.get(half)
        if tensor is not None and (tensor.size != size or max(tensor.shape, default=0) != size):
            raise FormatError(
                f"has shape {list(tensor.shape)} beside factors of {rows} rows and rank {rank}",
                path=document.path,
                where=f"{site}.{half}",
            )


def _vectors(halves: dict[str, LazyTensor], b: LazyTensor) -> dict[Role, LazyTensor]:
    """Return magnitude and bias; a bias after A is a bias after B once B is applied to it."""
    vectors: dict[Role, LazyTensor] = {}
    if magnitude := halves.get("magnitude"):
        vectors[Role.MAGNITUDE] = magnitude.map(lambda m: m.reshape(-1), shape=(magnitude.size,))
    bias, down = halves.get("lora_bias"), halves.get("down_bias")
    if down is not None:
        vectors[Role.LORA_BIAS] = down.map(
            lambda d: b.numpy() @ d.reshape(-1) + (0 if bias is None else bias.numpy().reshape(-1)),
            shape=(b.shape[0],),
        )
    elif bias is not None:
        vectors[Role.LORA_BIAS] = bias.map(lambda x: x.reshape(-1), shape=(bias.size,))
    return vectors


def _kernel(explanation: Explanation, document: Document, pair: Update) -> int | None:
    """Return the kernel size of a convolution with folded factors, None for anything else."""
    weight = explanation.weights.get(pair.module)
    image = weight is not None and len(weight.shape) == _IMAGE
    rules = explanation.dialect.convolutions
    rule = next((rule for rule in rules if rule.match.fullmatch(pair.module)), None)
    if pair.kind is Kind.CONVOLUTION or (rule is None and not (image and rules)):
        return None
    kernel = weight.shape[-1] if weight is not None and image else rule and rule.kernel
    if not kernel:
        raise UsageError(
            "is called as convolutions are, and their kernel size is not in the file; state it in "
            f'a dialect file that extends "{explanation.dialect.name}", in [[convolution]]',
            path=document.path,
            where=pair.module,
        )
    (folded, width), out = pair.a.shape, pair.b.shape[0]
    shape = (out // kernel, width // kernel, kernel, kernel)
    wrong = image and weight is not None and weight.shape != shape
    if folded % kernel or width % kernel or out % kernel or wrong:
        raise FormatError(
            f"A {[folded, width]}, B {[out, folded]} do not fold a kernel of {kernel} x {kernel}",
            path=document.path,
            where=pair.module,
        )
    return kernel


def _merged(explanation: Explanation, updates: list[_Update]) -> list[str]:
    weights = explanation.weights
    pairs = (
        (update.pair, weights[update.pair.module])
        for update in updates
        if update.pair.module in weights and not update.part and update.slots is None
    )
    if weights and merged(pairs):
        what = "the weights beside the factors hold the update already (saved in evaluation mode)"
        return [f"{what}: never use them as the base model"]
    return []


def _base_name(dialect: Dialect, document: Document) -> str | None:
    values = [document.value(source) for source in dialect.base_name]
    parts = [value for value in values if isinstance(value, str) and value]
    return "/".join(parts) if parts and len(parts) == len(values) else None


def _notes(explanation: Explanation) -> list[str]:
    dialect = explanation.dialect
    notes = [f"read as dialect {dialect.name}: {dialect.title}"]
    notes += [
        f"{count} tensor{'s' if count > 1 else ''} left out: {what}"
        for what, count in explanation.ignored.items()
    ]
    notes += [f"{n} names lost the prefix {prefix}" for prefix, n in explanation.stripped.items()]
    tables = sorted({site.module for site in explanation.embeddings})
    if tables:
        notes.append(f"taken as embedding tables, by their names: {', '.join(tables)}")
    return notes
