"""Which tensor of a Hugging Face checkpoint gets what, whatever either of them calls it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import from_engine, to_engine
from adapterkit.base.spreading import spread
from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.merging.into.magnitudes import column_magnitude_of, magnitude_of, moved_magnitudes
from adapterkit.merging.into.reading import token_rows
from adapterkit.merging.into.steps import Added, Magnitude, Product, Replaced, RowsReplaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from adapterkit.base.places import Places
    from adapterkit.merging.into.steps import Step
    from adapterkit.merging.planning import Source
    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor


def checkpoint_steps(source: Source, names: Places) -> dict[str, list[Step]]:
    """Return what each stored tensor gets from one adapter; every tensor of it is used.

    An output that the checkpoint does not store is named as the adapter names it.

    Raises:
        IncompatibleBaseError: if a module is not in the base or has another shape.
        UnsupportedError: if something cannot be told apart there.
    """
    found: dict[str, list[Step]] = defaultdict(list)
    unknown: list[Update] = []
    for pair in source.adapter.pairs():
        name = names.of(pair.module) or _tied_output(pair.module + ".weight", names)
        if name is None:
            unknown.append(pair)
        else:
            found[name].append(_product(source, names, name, pair))
    for pair, (origin, *others), magnitude in _respelled(source, names, unknown):
        name = names.of(pair.module)
        if name is None:
            raise _absent(source, names, origin)
        product = _product(source, names, name, pair)
        found[name].append(
            replace(product, module=origin, magnitude=magnitude, others=tuple(others))
        )
    for key, tensor in source.adapter.tensors.items():
        for name, step in _beside(source, names, key, tensor):
            found[name].append(step)
    return found


def _tied_output(parameter: str, names: Places) -> str | None:
    return parameter if names.role(parameter) == "output" else None


def _product(source: Source, names: Places, name: str, pair: Update) -> Product:
    stored = names.base.tensors.get(name) or names.base.tensors[names.embedding or ""]
    try:
        turned = names.turned(pair, stored, source.adapter)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, path=source.label, where=pair.module) from None
    shape = _swapped(pair.shape) if turned else pair.shape
    if shape != stored.shape:
        raise IncompatibleBaseError(
            f"the base has {_shown(stored.shape)} in {name}, the adapter {_shown(shape)}; is it "
            "the right base?",
            path=source.label,
            where=pair.module,
        )
    held = magnitude_of(source, pair)
    magnitude = column_magnitude_of(source, pair) if held is None else Magnitude(held)
    weight = source.weight_of(pair.module)
    return Product(source.label, pair.module, pair, weight, turned, magnitude)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1])


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _respelled(
    source: Source, names: Places, pairs: list[Update]
) -> Iterator[tuple[Update, list[str], Magnitude | None]]:
    """Yield updates of what the class makes its weights of, and of experts in other spellings.

    The latter go by way of llama.cpp's names. With each, the modules that it was made from, and its
    magnitudes.
    """
    apart = spread(pairs, names)

    def cut(markers: Iterable[Update]) -> Sequence[Update]:
        return spread(markers, names).pairs

    left = {pair.module for pair in apart.left}
    taken = [pair for pair in pairs if pair.module not in left]
    magnitudes = moved_magnitudes(source, taken, cut)
    for pair in apart.pairs:
        yield pair, list(apart.sources[pair.module]), magnitudes.get(pair.module)
    pairs = apart.left
    if not pairs:
        return
    base = names.base
    if not base.architecture.known:
        raise _absent(source, names, pairs[0].module)
    there = to_engine(base.architecture, base.sizes, pairs)
    if there.unmatched:
        raise _absent(source, names, there.unmatched[0])
    back = from_engine(base.architecture, base.sizes, there.pairs, like=names.spelled)

    def move(markers: Iterable[Update]) -> Sequence[Update]:
        engine = to_engine(base.architecture, base.sizes, markers).pairs
        return from_engine(base.architecture, base.sizes, engine, like=names.spelled).pairs

    magnitudes = moved_magnitudes(source, pairs, move)
    for pair in back.pairs:
        origins = [o for part in back.sources[pair.module] for o in there.sources[part]]
        yield pair, origins, magnitudes.get(pair.module)


def _beside(
    source: Source, names: Places, key: TensorKey, tensor: LazyTensor
) -> Iterator[tuple[str, Step]]:
    weight = source.weight_of(key.module)
    if key.role is Role.LORA_BIAS:
        name = names.find(f"{key.module}.bias")
        if name is None:
            raise UnsupportedError(
                "has a bias on B, and the base has no bias here that it could be added to",
                path=source.label,
                where=key.module,
            )
        scale = source.adapter.scales.get(key.module, 1.0)
        yield name, Added(source.label, key.module, tensor, weight * scale)
    elif key.role is Role.FULL:
        name = names.find(key.module) or _tied_output(key.module, names)
        if name is None:
            raise _without(source, names, key.module)
        yield name, Replaced(source.label, key.module, tensor, weight)
    elif key.role is Role.TOKEN_ROWS:
        name = names.of(key.module) or _tied_output(f"{key.module}.weight", names)
        if name is None:
            raise _absent(source, names, key.module)
        tokens = token_rows(source, key.module)
        yield name, RowsReplaced(source.label, key.module, tokens, tensor, weight)


def _without(source: Source, names: Places, parameter: str) -> IncompatibleBaseError:
    """Say of a parameter that was trained whole, mostly a head, that the base has none."""
    titled = ", ".join(names.base.classes) or "a model of no named class"
    return IncompatibleBaseError(
        f"was trained whole, and the base {names.base.path}, {titled}, has no such parameter; "
        "merge into a base of the class that was trained",
        path=source.label,
        where=parameter,
    )


def _absent(source: Source, names: Places, module: str) -> IncompatibleBaseError:
    made = names.assembly(module)
    if made is not None and not made.known:
        return IncompatibleBaseError(
            f"is no part of a tensor as it is in the base {names.base.path}: transformers makes it "
            f"of {made.names[0]} ({made.kind}); merge in PEFT and save the model there",
            path=source.label,
            where=module,
        )
    return IncompatibleBaseError(
        f"is not in the base {names.base.path}; is it the right base?",
        path=source.label,
        where=module,
    )
