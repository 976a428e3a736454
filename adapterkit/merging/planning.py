"""What is merged with what: adapters are checked against each other, and modules get weights.

Nothing here reads tensor data. Every refusal names the adapter and the module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UncheckableError,
    UnsupportedError,
    UsageError,
)
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, Kind, Update
from adapterkit.model.adapter import SETTINGS
from adapterkit.model.declared import UNDECIDED
from adapterkit.model.defects import problems
from adapterkit.notes import first_and_more
from adapterkit.patterns import Allowance, Expression, ending
from adapterkit.text import count as counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.merging.registry import MethodSpec

_OF = {
    Kind.LINEAR: "",
    Kind.EXPERTS: "experts of ",
    Kind.EMBEDDING: "an embedding of ",
    Kind.CONVOLUTION: "a convolution of ",
}
# Settings that all adapters must share, because they say which modules the tensors are applied to.
_SHARED = {
    "layer_replication": "replicates layers in its own way",
    "invocation_tokens": "is active after its own invocation tokens only",
}


# What updates of any size can be multiplied with.
_MOST_WEIGHT = 1e40


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter of a merge.

    Attributes:
        label: path, or place in the list; what messages call it.
        adapter: the adapter.
        weight: its weight.
        patterns: module patterns with weights of their own; the first that matches counts.
    """

    label: str
    adapter: AdapterTensorSet
    weight: float
    patterns: tuple[tuple[str, Expression, float], ...] = ()

    def weight_of(self, *names: str) -> float:
        """Return the weight for a module, or for what has several names."""
        fitting = (w for _, pattern, w in self.patterns if any(map(pattern.fits, names)))
        return next(fitting, self.weight)


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module and the updates it gets.

    Attributes:
        module: Hugging Face path.
        pairs: each adapter's factors, None where it has none.
        weights: each adapter's weight here.
    """

    module: str
    pairs: tuple[Update | None, ...]
    weights: tuple[float, ...]

    @property
    def present(self) -> list[Update]:
        """The factors that are there."""
        return [pair for pair in self.pairs if pair is not None]

    @property
    def rank(self) -> int:
        """Σ rᵢ, the rank of the exact sum."""
        return sum(pair.rank for pair in self.present)

    def largest_rank(self, *, dense: bool) -> int:
        """Return the rank that holds any result: Σ rᵢ, or the smaller side of a dense one."""
        return min(self.present[0].matrix_shape) if dense else self.rank


def sources(
    adapters: Sequence[AdapterTensorSet],
    weights: Sequence[float] | None,
    module_weights: Sequence[Mapping[str, float]] | None,
    spec: MethodSpec,
) -> tuple[Source, ...]:
    """Pair adapters with weights.

    Raises:
        UsageError: if a number of arguments does not fit, or a pattern matches no module.
    """
    count = len(adapters)
    least, most = spec.adapters
    if count < least or (most is not None and count > most):
        wanted = f"{least} or more" if most is None else str(least)
        raise UsageError(f"{spec.name} takes {wanted} adapters, not {count}")
    if weights is None:
        weights = [1 / count if spec.mean else 1.0] * count
    for what, given in (("weight", weights), ("module_weight", module_weights)):
        if given is not None and len(given) != count:
            numbers = f"{counted(count, 'adapter')}, but {counted(len(given), what)}"
            raise UsageError(f"{numbers}: give one for each")
    nothing: Mapping[str, float] = {}
    patterns = module_weights or [nothing] * count
    found = tuple(
        Source(_label(adapter, place), adapter, checked_weight(weight), _compiled(own))
        for place, (adapter, weight, own) in enumerate(
            zip(adapters, weights, patterns, strict=True), start=1
        )
    )
    for source in found:
        _check_patterns(source)
        if spec.directed and min([source.weight, *(w for _, _, w in source.patterns)]) < 0:
            raise UsageError(f"{spec.name} walks between adapters; weights must not be negative")
    return found


def _label(adapter: AdapterTensorSet, place: int) -> str:
    return str(adapter.provenance.path) if adapter.provenance else f"adapter {place}"


def checked_weight(value: float, what: str = "weight") -> float:
    """Return a weight that leaves float64 room for any update.

    Raises:
        UsageError: if it is not finite, or too large.
    """
    number = float(value)
    if number - number != 0:
        raise UsageError(f"{what} {value!r} is not a finite number")
    if abs(number) > _MOST_WEIGHT:
        raise UsageError(f"{what} {value!r} is beyond {_MOST_WEIGHT:g}, and leaves float64 no room")
    return number


def _compiled(own: Mapping[str, float]) -> tuple[tuple[str, Expression, float], ...]:
    """Take patterns as PEFT's rank_pattern reads them: the end of a module path."""
    allowance = Allowance()
    return tuple(
        (text, ending(text, allowance), checked_weight(weight, f"weight of {text!r}"))
        for text, weight in own.items()
    )


def called(key: TensorKey) -> tuple[str, ...]:
    """Return what patterns may call a tensor: its module, a whole one also its own name."""
    module, _, parameter = key.module.rpartition(".")
    own = key.role is Role.FULL and parameter in {"weight", "bias"}
    return (key.module, module) if own else (key.module,)


def _check_patterns(source: Source) -> None:
    for text, pattern, _ in source.patterns:
        try:
            names = dict.fromkeys(name for key in source.adapter.tensors for name in called(key))
            hits = [pattern.fits(name) for name in names]
        except UncheckableError as error:
            raise UsageError(f"module {error.message}") from None
        if not any(hits):
            raise UsageError(f"no module of {source.label} matches the pattern {text!r}")


def check(found: Sequence[Source], *, any_base: bool) -> None:
    """Refuse adapters that are broken, that hold what cannot be merged, or that do not go together.

    Raises:
        FormatError: if an adapter is broken.
        UnsupportedError: if one holds something that is no update of a given base.
        IncompatibleBaseError: if they are made for different bases.
        BaseRequiredError: if some are in llama.cpp's layout and others are not.
    """
    for source in found:
        if broken := problems(source.adapter):
            raise FormatError(broken[0], path=source.label)
        _check_kinds(source)
    if not any_base:
        _check_bases(found)
    for first, second in pairwise(found):
        _check_settings(first, second)
    _check_layouts(found)
    _check_names(found)


def _check_kinds(source: Source) -> None:
    held = source.adapter.tensors
    for key in held:
        if key.role in {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}:
            raise UnsupportedError(
                "has a DoRA magnitude, and its update depends on the base weights; "
                f"{MERGE_INSTEAD}",
                path=source.label,
                where=key.module,
            )
        if key.role is Role.LORA_BIAS and TensorKey(key.module, Role.LORA_A) not in held:
            raise FormatError("has a bias on B and no factors", path=source.label, where=key.module)
    if source.adapter.pooled_inputs:
        raise BaseRequiredError(UNDECIDED, path=source.label)
    if init := source.adapter.initialisation:
        raise UnsupportedError(
            f"init_lora_weights = {init!r} changed the base, so B · A is no update of the original "
            "one; give the original base's directory with --base, which makes PiSSA and OLoRA "
            "plain, or save it with PEFT's path_initial_model_for_weight_conversion",
            path=source.label,
        )


def _check_bases(found: Sequence[Source]) -> None:
    """Compare recorded names by their last part: hubs, folders and GGUF files spell them apart."""
    first: Source | None = None
    for source in found:
        if source.adapter.base.name is None:
            continue
        if first is None:
            first = source
        elif _bare(source.adapter.base.name) != _bare(first.adapter.base.name or ""):
            raise IncompatibleBaseError(
                f"is made for {source.adapter.base.name}, and {first.label} for "
                f"{first.adapter.base.name}; pass --any-base if they are the same model",
                path=source.label,
            )


def _bare(name: str) -> str:
    last = name.rstrip("/").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[ _-]+", "-", last).casefold()


def _check_settings(first: Source, second: Source) -> None:
    for name, what in _SHARED.items():
        mine, theirs = getattr(first.adapter, name), getattr(second.adapter, name)
        if mine != theirs:
            holder, shown = second if theirs else first, SETTINGS[name]
            raise UnsupportedError(f"{what} ({shown}), and not all others do", path=holder.label)


def _check_layouts(found: Sequence[Source]) -> None:
    """Refuse a module whose rows are in llama.cpp's order in one adapter and not in another."""
    for source in found:
        kept = source.adapter.engine_layout
        for other in found:
            theirs = other.adapter.engine_layout
            clash = set(kept).intersection(other.adapter.modules).difference(theirs)
            if clash:
                raise BaseRequiredError(
                    f"is in llama.cpp's row order here and not in {other.label}; give the base "
                    "model with --base",
                    path=source.label,
                    where=min(clash),
                )


def _check_names(found: Sequence[Source]) -> None:
    """Refuse adapters that name the same modules differently: nothing would be merged."""
    for first, second in pairwise(found):
        mine, theirs = set(first.adapter.modules), set(second.adapter.modules)
        if not mine.isdisjoint(theirs):
            continue
        for module in sorted(theirs):
            twin = next((m for m in sorted(mine) if _same_place(m, module)), None)
            if twin:
                raise IncompatibleBaseError(
                    f"no module is called as in {first.label}, which has {twin}; if both are of "
                    "one model, give its directory with --base, whose names both then get",
                    path=second.label,
                    where=module,
                )


def _same_place(first: str, second: str) -> bool:
    """Tell whether one name ends as the other does, from its layer number on or as a whole."""
    short, long = sorted((first, second), key=len)
    layer = re.search(r"[^.]+\.\d+\..*$", short)
    return f".{long}".endswith(f".{layer[0] if layer else short}")


def plans(found: Sequence[Source], *, missing: str) -> list[ModulePlan]:
    """Return every module with factors, in the order of the first adapter that has it.

    Raises:
        IncompatibleBaseError: if a module has other dimensions in one adapter than in another.
        UsageError: if `missing` is `error` and a module is not in all adapters.
    """
    by_source = [{pair.module: pair for pair in source.adapter.pairs()} for source in found]
    names = dict.fromkeys(name for pairs in by_source for name in pairs)
    planned: list[ModulePlan] = []
    for name in names:
        pairs = tuple(own.get(name) for own in by_source)
        _check_shapes(name, pairs, found)
        if missing == "error" and None in pairs:
            absent = found[pairs.index(None)]
            raise UsageError(f"{absent.label} has no {name}, and missing is error")
        planned.append(ModulePlan(name, pairs, tuple(s.weight_of(name) for s in found)))
    if not planned and not any(source.adapter.tensors for source in found):
        raise FormatError("holds no tensors", path=found[0].label)
    return planned


def _check_shapes(name: str, pairs: Iterable[Update | None], found: Sequence[Source]) -> None:
    known: tuple[Update, Source] | None = None
    for pair, source in zip(pairs, found, strict=True):
        if pair is None:
            continue
        if known is None:
            known = pair, source
        elif (pair.kind, pair.shape) != (known[0].kind, known[0].shape):
            raise IncompatibleBaseError(
                f"updates {_shown(pair)}, and {_shown(known[0])} in {known[1].label}; "
                "are they made for the same model?",
                path=source.label,
                where=name,
            )


def _shown(pair: Update) -> str:
    sizes = " x ".join(str(size) for size in pair.shape)
    return f"{_OF[pair.kind]}{sizes}"


def absences(planned: Sequence[ModulePlan], found: Sequence[Source]) -> list[str]:
    """Say which adapters lack modules that others have."""
    lines: list[str] = []
    for place, source in enumerate(found):
        lacking = [plan.module for plan in planned if plan.pairs[place] is None]
        if lacking:
            named = first_and_more(lacking)
            lines.append(f"{source.label} has no {named}; taken as no update there")
    return lines
