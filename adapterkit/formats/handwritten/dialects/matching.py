"""Does a dialect explain a file: every tensor's place, and shapes that fit together."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError
from adapterkit.factors import turned
from adapterkit.formats.handwritten.dialects.grammar import Dialect
from adapterkit.model.update import is_slice
from adapterkit.tables import shown
from adapterkit.tensor import LazyTensor
from adapterkit.training import is_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from adapterkit.formats.handwritten.dialects.document import Document
    from adapterkit.formats.handwritten.dialects.grammar import TensorRule

A, B = "A", "B"
_MATRIX = 2
_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One pair of factors as the file names it.

    Attributes:
        module: the module as the file spells it, or its position.
        part: which update of the module, where there are several.
        index: which of several updates that add up.
    """

    module: str
    part: str = ""
    index: int = 0

    def __str__(self) -> str:
        """Return the name that messages and the `rename` rules use."""
        return f"{self.module}#{self.part}" if self.part else self.module


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every tensor of a file in its place.

    Attributes:
        dialect: the dialect that explains the file.
        sites: factors by site and half: `A` (r, in), `B` (out, r), `lora_bias`, `down_bias`,
            `magnitude`; both turned to PEFT's orientation.
        embeddings: sites whose factors are those of an embedding table.
        full: trained parameters that are stored whole.
        weights: frozen weights of adapted modules that lie in the same file.
        ignored: what else is in the file -> number of tensors.
        stripped: names that lost a prefix.
    """

    dialect: Dialect
    sites: dict[Site, dict[str, LazyTensor]] = field(
        default_factory=dict[Site, dict[str, LazyTensor]]
    )
    embeddings: set[Site] = field(default_factory=set[Site])
    full: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])
    weights: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])
    ignored: Counter[str] = field(default_factory=Counter[str])
    stripped: Counter[str] = field(default_factory=Counter[str])


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a dialect does not explain a file.

    Attributes:
        dialect: the dialect.
        factors: tensors that it would take as factors; 0 for a dialect that is plainly not meant.
        key: the first tensor that it does not explain, if it is about one.
        reason: what is wrong.
        sliced: whether the file has one rank's part of the factors.
    """

    dialect: Dialect
    factors: int
    key: str | None
    reason: str
    sliced: bool = False


def explain(dialect: Dialect, document: Document) -> Explanation | Mismatch:
    """Give every tensor of the file its place in the dialect, or say what has none.

    Raises:
        FormatError: if two tensors have one place.
    """
    selected = _selected(dialect, document)
    if selected is None:
        return Mismatch(dialect, 0, None, _elsewhere(dialect, document))
    inside, outside = selected
    explanation = Explanation(dialect)
    tensors = _stripped(dialect, inside, explanation.stripped, document)
    unplaced = _place(explanation, tensors, document)
    factors = sum(len(halves) for halves in explanation.sites.values())
    if not factors:
        return Mismatch(dialect, 0, next(iter(tensors), None), "is no factor")
    _find_weights(explanation, tensors)
    if problem := _problem(explanation, document, unplaced, outside):
        complete = [halves for halves in explanation.sites.values() if {A, B} <= halves.keys()]
        sliced = is_slice((halves[A].shape, halves[B].shape) for halves in complete)
        return Mismatch(dialect, factors, *problem, sliced)
    return explanation


def names_a_factor(dialect: Dialect, names: Iterable[str]) -> bool:
    """Tell whether some name is that of a factor, as the dialect's prefixes and stacks have it."""
    for name in names:
        short = _bare(dialect, name, Counter())
        stacked = ((rule, rule.match.fullmatch(short)) for rule in dialect.stacks)
        layers = [rule.to.format_map({**m.groupdict(), "n": 0}) for rule, m in stacked if m]
        if any(r.axes and r.match.fullmatch(n) for r in dialect.tensors for n in (short, *layers)):
            return True
    return False


def _bare(dialect: Dialect, name: str, counts: Counter[str]) -> str:
    """Return a name without the prefixes that the dialect takes off, which are counted."""
    while prefix := next((p for p in dialect.strip if p and name.startswith(p)), None):
        name = name.removeprefix(prefix)
        counts[prefix] += 1
    return name


def _elsewhere(dialect: Dialect, document: Document) -> str:
    if document.container not in dialect.containers:
        return f"is for {' or '.join(dialect.containers)} files, this is {document.container}"
    return f"looks for tensors in {', '.join(name or 'the root' for name in dialect.select)}"


def _problem(
    explanation: Explanation, document: Document, unplaced: list[str], outside: list[str]
) -> tuple[str | None, str] | None:
    """Return what a file that has factors of the dialect has against it, and where."""
    dialect = explanation.dialect
    for source in dialect.requires:
        if document.value(source) is None:
            return None, f"needs {source}, which is not there"
    key = _unexplained(explanation, unplaced) or _outside(explanation, outside)
    if key is not None:
        return key, "is not explained"
    for expected in dialect.expect:
        value = document.value(expected.source)
        if value is not None and value not in expected.values:
            return None, f"{expected.source} is {shown(value)}; {expected.message}"
    return next(_misfits(explanation), None)


def _selected(
    dialect: Dialect, document: Document
) -> tuple[dict[str, LazyTensor], list[str]] | None:
    """Return the tensors of the first sub-dictionary that has some, and the names elsewhere."""
    for select in dialect.select if document.container in dialect.containers else ():
        inside = document.tensors(select) or {}
        if not select:
            inside = {n: t for n, t in inside.items() if "." in n or not is_state(n, t.size)}
        if inside:
            prefix = f"{select}." if select else ""
            names = {prefix + name for name in inside}
            return inside, [name for name in document.all_tensors() if name not in names]
    return None


def _stripped(
    dialect: Dialect,
    tensors: Mapping[str, LazyTensor],
    counts: Counter[str],
    document: Document,
) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for inner, part in _slices(dialect, _bare(dialect, name, counts), tensor):
            if inner in found:
                raise FormatError("two tensors have this name", path=document.path, where=inner)
            found[inner] = part
    return found


def _slices(dialect: Dialect, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Yield a tensor, or one of each layer where it runs over them."""
    found = ((rule, rule.match.fullmatch(name)) for rule in dialect.stacks)
    rule, match = next(((rule, match) for rule, match in found if match), (None, None))
    if rule is None or match is None or not 0 < (tensor.shape or (0,))[0] <= _MOST_LAYERS:
        yield name, tensor
        return
    count, *shape = tensor.shape
    height = math.prod(shape[:-1])
    for n in range(count):
        layer = tensor.rows(n * height, (n + 1) * height)
        own = LazyTensor(layer.dtype, tuple(shape), layer.read)
        yield rule.to.format_map({**match.groupdict(), "n": n}), own


def _place(
    explanation: Explanation, tensors: Mapping[str, LazyTensor], document: Document
) -> list[str]:
    """Give factors, biases and trained parameters their places; return the names without one."""
    unplaced: list[str] = []
    for name, tensor in tensors.items():
        for rule in explanation.dialect.tensors:
            match = rule.match.fullmatch(name)
            if match is None:
                continue
            groups = match.groupdict()
            if rule.unless and rule.unless.format_map(groups) in tensors:
                continue
            if rule.role == "full":
                explanation.full[groups["module"]] = tensor
            elif not _put(explanation, rule, _site(explanation.dialect, groups), tensor):
                raise FormatError("two tensors have this meaning", path=document.path, where=name)
            break
        else:
            unplaced.append(name)
    return unplaced


def _site(dialect: Dialect, groups: Mapping[str, str | None]) -> Site:
    module = groups.get("module")
    if module is None:
        place = int(groups.get("position") or 0) // dialect.stride
        module = f"{groups.get('set') or ''}:{place}"
    return Site(module, groups.get("part") or "", int(groups.get("index") or 0))


def _put(explanation: Explanation, rule: TensorRule, site: Site, tensor: LazyTensor) -> bool:
    """Put a tensor at its site, turned to PEFT's orientation; False if something is there."""
    half, stored = rule.role or "", tensor
    if rule.axes:
        axes = rule.axes
        if rule.embedding and is_embedding(site.module):
            axes = rule.embedding
            explanation.embeddings.add(site)
        half = A if {"in", "vocab"} & set(axes) else B
        # A begins with the rank, B does not.
        if (axes[0] == "r") != (half == A) and tensor.is_matrix:
            stored = turned(tensor)
    halves = explanation.sites.setdefault(site, {})
    if half in halves:
        return False
    halves[half] = stored
    return True


def is_embedding(module: str) -> bool:
    """Tell whether a module is called as embedding tables are."""
    return module.rpartition(".")[2] in _embedding_names()


@cache
def _embedding_names() -> frozenset[str]:
    path = Path(__file__).parent / "names" / "embeddings.toml"
    return frozenset(tomllib.loads(path.read_text(encoding="utf-8"))["names"])


def _find_weights(explanation: Explanation, tensors: Mapping[str, LazyTensor]) -> None:
    rule = explanation.dialect.weight
    if rule is not None:
        for site in explanation.sites:
            for template in rule.names:
                if tensor := tensors.get(template.format(module=site.module)):
                    explanation.weights[site.module] = tensor


def _unexplained(explanation: Explanation, names: list[str]) -> str | None:
    """Return the first name that no `ignore` rule knows, counting the others."""
    whole = {site.module for site in explanation.sites} == set(explanation.weights)
    for name in names:
        for rule in explanation.dialect.ignore:
            if (whole or not rule.whole) and rule.match.fullmatch(name):
                explanation.ignored[rule.what] += 1
                break
        else:
            return name
    return None


def _outside(explanation: Explanation, names: list[str]) -> str | None:
    for name in names:
        stated = any(pattern.fullmatch(name) for pattern in explanation.dialect.outside)
        if not stated and not is_state(name):
            return name
        explanation.ignored[f"outside the adapter ({name.partition('.')[0]})"] += 1
    return None


def _misfits(explanation: Explanation) -> Iterator[tuple[str, str]]:
    """Yield sites whose factors cannot be what the dialect says of them."""
    for site, halves in explanation.sites.items():
        for half in (A, B):
            tensor = halves.get(half)
            if tensor is not None and not _is_factor(explanation, tensor):
                yield f"{site}.{half}", f"has shape {list(tensor.shape)}, not that of a factor"
                return
        if {A, B} <= halves.keys():
            a, b = halves[A].shape, halves[B].shape
            if a[0] != b[1] and not _folded(explanation, site, a, b):
                shapes = f"its factors would be A {list(a)} and B {list(b)}"
                yield str(site), f"{shapes}, which share no rank: they are stored another way round"
            elif wrong := _contradiction(explanation, site, a, b):
                yield str(site), wrong


def _contradiction(
    explanation: Explanation, site: Site, a: tuple[int, ...], b: tuple[int, ...]
) -> str | None:
    """Hold an update against the frozen weight of its module, if that is in the file."""
    weight, rule = explanation.weights.get(site.module), explanation.dialect.weight
    if weight is None or rule is None or not weight.is_matrix or a[0] != b[1] or site.part:
        return None
    expected = (a[1], b[0]) if site in explanation.embeddings else (b[0], a[1])
    if weight.shape == expected or (rule.axes == "either" and weight.shape == expected[::-1]):
        return None
    return f"its update would be {list(expected)}, its weight is {list(weight.shape)}"


def _is_factor(explanation: Explanation, tensor: LazyTensor) -> bool:
    convolutions = any("*" in rule.axes for rule in explanation.dialect.tensors)
    return tensor.is_matrix or (convolutions and len(tensor.shape) > _MATRIX)


def _folded(explanation: Explanation, site: Site, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Tell whether these can be the factors of several slots of a fused layer."""
    for rule in explanation.dialect.blocks:
        if rule.match.fullmatch(str(site)):
            count, rest = divmod(a[0], b[1] or 1)
            return not rest and 1 < count <= len(rule.slots) and b[1] <= a[1]
    return False


def plausible(explanation: Explanation) -> bool:
    """Tell whether some pair has a rank that is no larger than both its sides."""
    complete = [halves for halves in explanation.sites.values() if {A, B} <= halves.keys()]
    if not complete:
        return True
    return any(
        halves[B].shape[1] <= min(halves[B].shape[0], halves[A].shape[1]) for halves in complete
    )


def undecided(explanation: Explanation) -> str | None:
    """Return a module that shows that nothing in the file tells which factor is which, or None.

    A square update turned round has the same shape, and no base can contradict it; one that is not
    square would. Where no program has the same names the other way round, a rank below the width
    tells which axis is which.
    """
    shown: str | None = None
    for site, halves in explanation.sites.items():
        if not {A, B} <= halves.keys():
            continue
        a, b = halves[A].shape, halves[B].shape
        if (b[0] != a[1] and site not in explanation.embeddings) or (
            not explanation.dialect.rivals and a[0] < a[1]
        ):
            return None
        shown = shown or str(site)
    return shown
