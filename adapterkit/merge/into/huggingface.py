"""Which tensor of a Hugging Face checkpoint gets what, whatever either of them calls it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, from_engine, to_engine
from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.merge.into.magnitudes import magnitude_of, moved_magnitudes
from adapterkit.merge.into.reading import token_rows
from adapterkit.merge.into.steps import Added, Magnitude, Product, Replaced, RowsReplaced
from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.merge.into.steps import Step
    from adapterkit.merge.planning import Source
    from adapterkit.model import Update
    from adapterkit.tensor import LazyTensor

_SUFFIXES = (".weight", ".bias")


class HuggingFaceNames:
    """The stored names of a checkpoint, by Hugging Face name in any spelling of its family."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    def find(self, parameter: str) -> str | None:
        """Return the stored name of a parameter, or None."""
        if parameter in self.base.tensors:
            return parameter
        place = self._place(parameter)
        return self._by_place.get(place) if place else None

    def of(self, module: str) -> str | None:
        """Return the stored name of a module's weight, or of a bare parameter."""
        return self.find(f"{module}.weight") or self.find(module)

    def role(self, parameter: str) -> str | None:
        """Return `token_embd` or `output` for the two that may be tied, else None."""
        place = self._place(parameter)
        match = find_rule(self.base.architecture, parameter.removesuffix(".weight"))
        if place is None or match is None or place[-1] != ".weight":
            return None
        target = match.rule.targets[0].name
        return target if target in {"token_embd", "output"} else None

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module of the checkpoint, as adapters name it."""
        return tuple(name.removesuffix(".weight") for name in self.base.tensors)

    @cached_property
    def embedding(self) -> str | None:
        """The stored embedding table."""
        return next((name for name in self.base.tensors if self.role(name) == "token_embd"), None)

    @cached_property
    def _by_place(self) -> dict[tuple[str, int | None, int | None, str], str]:
        places = ((self._place(name), name) for name in self.base.tensors)
        return {place: name for place, name in places if place}

    def _place(self, parameter: str) -> tuple[str, int | None, int | None, str] | None:
        for suffix in (*_SUFFIXES, ""):
            if parameter.endswith(suffix):
                match = find_rule(self.base.architecture, parameter[: len(parameter) - len(suffix)])
                if match:
                    return match.rule.hf, match.layer, match.expert, suffix
        return None


def checkpoint_steps(source: Source, names: HuggingFaceNames) -> dict[str, list[Step]]:
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


def _tied_output(parameter: str, names: HuggingFaceNames) -> str | None:
    return parameter if names.role(parameter) == "output" else None


def _product(source: Source, names: HuggingFaceNames, name: str, pair: Update) -> Product:
    stored = names.base.tensors.get(name) or names.base.tensors[names.embedding or ""]
    match = find_rule(names.base.architecture, pair.module)
    turned = pair.embedding or (
        match is not None and (match.rule.conv1d or match.rule.stored_turned)
    )
    shape = _swapped(pair.shape) if turned else pair.shape
    swaps = match is None and pair.kind is not Kind.CONVOLUTION
    if swaps and shape != stored.shape and _swapped(shape) == stored.shape:
        turned, shape = not turned, _swapped(shape)
    if shape != stored.shape:
        raise IncompatibleBaseError(
            f"the base has {_shown(stored.shape)} in {name}, the adapter {_shown(shape)}; is it "
            "the right base?",
            path=source.label,
            where=pair.module,
        )
    held = magnitude_of(source, pair)
    magnitude = None if held is None else Magnitude(held)
    weight = source.weight_of(pair.module)
    return Product(source.label, pair.module, pair, weight, turned, magnitude)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1])


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _respelled(
    source: Source, names: HuggingFaceNames, pairs: list[Update]
) -> Iterator[tuple[Update, list[str], Magnitude | None]]:
    """Yield updates under the checkpoint's spelling of experts, by way of llama.cpp's names.

    With each, the modules that it was made from, and its magnitudes.
    """
    if not pairs:
        return
    base = names.base
    there = to_engine(base.architecture, base.sizes, pairs)
    if there.unmatched:
        raise _absent(source, names, there.unmatched[0])
    back = from_engine(base.architecture, base.sizes, there.pairs, like=names.modules)

    def move(markers: Iterable[Update]) -> Sequence[Update]:
        engine = to_engine(base.architecture, base.sizes, markers).pairs
        return from_engine(base.architecture, base.sizes, engine, like=names.modules).pairs

    magnitudes = moved_magnitudes(source, pairs, move)
    for pair in back.pairs:
        origins = [o for part in back.sources[pair.module] for o in there.sources[part]]
        yield pair, origins, magnitudes.get(pair.module)


def _beside(
    source: Source, names: HuggingFaceNames, key: TensorKey, tensor: LazyTensor
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
            raise _without_place(source, names, key.module)
        yield name, Replaced(source.label, key.module, tensor, weight)
    elif key.role is Role.TOKEN_ROWS:
        name = names.of(key.module) or _tied_output(f"{key.module}.weight", names)
        if name is None:
            raise _absent(source, names, key.module)
        tokens = token_rows(source, key.module)
        yield name, RowsReplaced(source.label, key.module, tokens, tensor, weight)


def _without_place(source: Source, names: HuggingFaceNames, module: str) -> IncompatibleBaseError:
    return IncompatibleBaseError(
        f"is stored whole, and the base {names.base.path} has no such parameter: give a base of "
        "the class that it was trained on, which has it",
        path=source.label,
        where=module,
    )


def _absent(source: Source, names: HuggingFaceNames, module: str) -> IncompatibleBaseError:
    return IncompatibleBaseError(
        f"is not in the base {names.base.path}; is it the right base?",
        path=source.label,
        where=module,
    )
