"""Does an adapter fit a base model: do its targets exist, and have they its dimensions?"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, to_engine
from adapterkit.base.places import Places
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError
from adapterkit.keys import Role
from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.architectures.table import Match
    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update

_MATRIX = 2
_LAYER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class Misfit:
    """One module that the base contradicts.

    Attributes:
        module: Hugging Face path.
        message: what is wrong, with the sizes.
        kind: `layer`, `expert`, `missing`, `shape`, `rows` of what is stored whole, or `unknown`
            where the base does not tell.
    """

    module: str
    message: str
    kind: str


def check_fit(adapter: AdapterTensorSet, base: BaseModel) -> None:
    """Compare every module with the base's tensors, or with what its config implies.

    Raises:
        IncompatibleBaseError: if a module does not fit; names the first and counts the others.
    """
    found = [wrong for wrong in misfits(adapter, base) if wrong.kind != "unknown"]
    # Rows are a vocabulary's or those of classes, and what becomes of them is for a pass to say.
    found += [wrong for wrong in whole_misfits(adapter, base) if wrong.kind == "shape"]
    if found:
        count = len(adapter.modules)
        raise IncompatibleBaseError(
            f"{found[0].message}; {len(found)} of {count} modules do not fit the base {base.path}",
            path=adapter.provenance.path if adapter.provenance else None,
            where=found[0].module,
        )


def misfits(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Misfit]:
    """Yield what is wrong with modules that the family knows and the base contradicts.

    Pairs that are broken whatever the base is are left to `adapterkit.model.defects`.
    """
    if base.layout == "checkpoint":
        return  # its names are others; who merges into it respells the adapter first
    kept = adapter.engine_layout
    pairs = [pair for pair in adapter.pairs() if pair.module not in kept and pair.sound]
    weights = Places(base)
    fitting: list[Update] = []
    origins = [layer for begin, end in adapter.layer_replication for layer in range(begin, end)]
    for named in pairs:
        pair = _before_replication(named, origins)
        match = find_rule(base.architecture, pair.module)
        wrong = _beyond(pair, match, base)
        if wrong is None and pair.kind is Kind.CONVOLUTION:
            wrong = _other_kernel(pair, weights)
        elif wrong is None and base.kind == "hf":
            wrong = (
                _absent(pair, match, weights) or _wrong_shape(pair, match, weights)
                if match
                else _untabled(pair, weights)
            )
        if wrong:
            yield replace(wrong, module=named.module)
        else:
            fitting.append(pair)
    if base.kind == "gguf":
        yield from _engine_misfits(fitting, base)
        yield from (
            Misfit(module, f"the base has no {name}.weight", "missing")
            for module, name in kept.items()
            if f"{name}.weight" not in base.tensors
        )


def whole_misfits(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Misfit]:
    """Yield whole parameters, and rows of tokens, for which the base has no place of that size.

    Their kind is `rows` where the base has more or fewer rows, and `shape` otherwise.
    """
    places = Places(base)
    for key, tensor in adapter.tensors.items() if base.kind == "hf" else ():
        if key.role not in {Role.FULL, Role.TOKEN_ROWS}:
            continue
        name = key.module if key.role is Role.FULL else f"{key.module}.weight"
        stored = base.tensors.get(places.find(name) or "")
        if stored is None or not stored.dtype.floating:
            continue
        of_rows = len(tensor.shape) > 1 and tensor.shape[1:] == stored.shape[1:]
        last = max(adapter.tokens_of(key.module), default=-1)
        here = f"and the base has {_shown(stored.shape)} here"
        if key.role is Role.FULL and tensor.shape != stored.shape:
            message = f"is stored whole, {_shown(tensor.shape)}, {here}"
        elif key.role is Role.TOKEN_ROWS and not of_rows:
            message = f"holds rows of tokens, {_shown(tensor.shape)}, {here}"
        elif key.role is Role.TOKEN_ROWS and last >= stored.shape[0]:
            message = (
                f"trains the row of token {last}, and the base has {stored.shape[0]} rows here"
            )
        else:
            continue
        yield Misfit(key.module, message, "rows" if of_rows else "shape")


def _before_replication(pair: Update, origins: Sequence[int]) -> Update:
    """Return an update of a replicated layer as one of the layer that the base has for it."""
    number = _LAYER.search(pair.module)
    if number is None or int(number[0]) >= len(origins):
        return pair
    begin, end = number.span()
    module = f"{pair.module[:begin]}{origins[int(number[0])]}{pair.module[end:]}"
    return replace(pair, module=module)


def _beyond(pair: Update, match: Match | None, base: BaseModel) -> Misfit | None:
    """Compare the layer, the expert and the number of stacked experts with the base's."""
    if match is None:
        return None
    layers = base.sizes.get("layers")
    if match.layer is not None and layers is not None and match.layer >= layers:
        return Misfit(pair.module, f"the base has {layers} layers", "layer")
    experts = base.sizes.get(match.rule.count, match.layer)
    if experts is None or base.kind != "hf":
        return None
    if match.expert is not None and match.expert >= experts:
        return Misfit(pair.module, f"the base has {experts} experts", "expert")
    stacked = pair.kind is Kind.EXPERTS and match.rule.kind == "experts"
    if stacked and pair.experts != experts:
        message = f"the base has {experts} experts, the adapter {pair.experts}"
        return Misfit(pair.module, message, "expert")
    return None


def _absent(pair: Update, match: Match, weights: Places) -> Misfit | None:
    """Look the module up among the names of the base's checkpoint, where those are known.

    Experts have several spellings in checkpoints, and a tied output is in none.
    """
    experts = pair.kind is Kind.EXPERTS or match.rule.kind == "experts"
    exempt = match.rule.layout or experts or match.layer is None
    if exempt or weights.names_place(pair.module) is not False:
        return None
    return Misfit(pair.module, "the base's checkpoint has no such module", "missing")


def _wrong_shape(pair: Update, match: Match, weights: Places) -> Misfit | None:
    actual = _oriented(pair)[-2:]
    try:
        expected = _expected(pair, match, weights)
    except BaseRequiredError as error:
        return Misfit(pair.module, error.message, "unknown")
    if expected is None:
        message = "the tables do not tell its dimensions, and the base's weights are not there"
        return Misfit(pair.module, message, "unknown")
    if expected == actual:
        return None
    message = f"the base has {_shown(expected)} here, the adapter {_shown(actual)}"
    return Misfit(pair.module, message, "shape")


def _untabled(pair: Update, weights: Places) -> Misfit | None:
    """Compare a module that no table describes with what the checkpoint stores, either way."""
    if weights.has(pair.module) is None:
        message = "no table describes this model, and the base's weights are not there"
        return Misfit(pair.module, message, "unknown")
    stored = weights.base.tensors.get(weights.of(pair.module) or "")
    loose = bool(weights.base.layout)
    if stored is None or not stored.dtype.floating:
        return None
    if len(stored.shape) != len(pair.shape) and not loose:
        return None
    actual = _oriented(pair)
    if stored.shape in {actual, (*actual[:-2], *actual[:-3:-1])}:
        return None
    if weights.base.layout and _core(stored.shape) == _core(actual):
        return None
    message = f"the base has {_shown(stored.shape)} here, the adapter {_shown(actual)}"
    return Misfit(pair.module, message, "shape")


def _other_kernel(pair: Update, weights: Places) -> Misfit | None:
    """Compare a convolution with the base's, which no table describes."""
    stored = weights.stored(pair.module)
    if stored is None or stored.shape == pair.shape:
        return None
    if weights.base.layout and _core(stored.shape) == _core(pair.shape):
        return None
    message = f"the base has {_shown(stored.shape)} here, the adapter {_shown(pair.shape)}"
    return Misfit(pair.module, message, "shape")


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without a kernel of size 1: such a convolution is a linear layer."""
    return shape if set(shape[_MATRIX:]) - {1} else shape[:_MATRIX]


def _expected(pair: Update, match: Match, weights: Places) -> tuple[int, ...] | None:
    stored = weights.stored(pair.module)
    # Quantised checkpoints store packed shapes; their config tells the logical ones.
    if stored is not None and stored.dtype.floating and stored.is_matrix:
        return stored.shape[::-1] if match.rule.conv1d else stored.shape
    if not match.rule.shape:
        return None
    return tuple(int(weights.base.sizes.value(text, match.layer)) for text in match.rule.shape)


def _oriented(pair: Update) -> tuple[int, ...]:
    """Return (out, in), with experts in front, or (vocabulary, width) of an embedding."""
    return pair.shape[::-1] if pair.embedding else pair.shape


def _engine_misfits(pairs: list[Update], base: BaseModel) -> Iterator[Misfit]:
    try:
        yield from _compared(pairs, base)
    except IncompatibleBaseError as error:
        if len(pairs) == 1:
            yield Misfit(pairs[0].module, error.message, "shape")
            return
        # Rows that are no heads of this base: which modules are it?
        for pair in pairs:
            yield from _engine_misfits([pair], base)


def _compared(pairs: list[Update], base: BaseModel) -> list[Misfit]:
    mapped = to_engine(base.architecture, base.sizes, pairs, base.tensors)
    found: list[Misfit] = []
    for part in mapped.pairs:
        module = mapped.sources[part.module][0]
        stored = base.tensors.get(f"{part.module}.weight")
        if stored is None:
            if part.module != "output":  # a tied output is refused with its own reason
                found.append(Misfit(module, f"the base has no {part.module}.weight", "missing"))
        elif _lengths(stored.shape) != _lengths(_oriented(part)):
            shapes = f"{_shown(stored.shape)} here, the adapter {_shown(_oriented(part))}"
            same = stored.shape[-2:] == _oriented(part)[-2:]
            found.append(Misfit(module, f"the base has {shapes}", "expert" if same else "shape"))
    return found


def _lengths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out leading axes of 1: llama.cpp pads them, and old converters cut them off."""
    first = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
