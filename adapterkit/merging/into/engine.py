"""Which tensor of a GGUF base gets what: rows, names and values by the tables of its family."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, to_engine
from adapterkit.architectures.weights import weight_to_engine
from adapterkit.dtype import DType
from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.merging.into.magnitudes import magnitude_of, moved_magnitudes
from adapterkit.merging.into.reading import token_rows
from adapterkit.merging.into.steps import Added, Magnitude, Product, Replaced, RowsReplaced
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.merging.into.steps import Step
    from adapterkit.merging.planning import Source
    from adapterkit.model import Update

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_TABLES = {EMBEDDING, OUTPUT}


def engine_steps(source: Source, base: BaseModel) -> dict[str, list[Step]]:
    """Return what each tensor of a GGUF base gets from one adapter; every tensor of it is used.

    Raises:
        IncompatibleBaseError: if a module is not in the base or has another shape.
        UnsupportedError: if the family's tables have no place for something.
    """
    found: dict[str, list[Step]] = defaultdict(list)
    for name, step in _products(source, base):
        found[name].append(step)
    for key, tensor in source.adapter.tensors.items():
        for name, step in _beside(source, base, key, tensor):
            found[name].append(step)
    for name, steps in found.items():
        if name not in base.tensors and not (name == OUTPUT and base.tied):
            raise IncompatibleBaseError(
                f"becomes {name}, which is not in {base.path}; is it the right base?",
                path=source.label,
                where=steps[0].module,
            )
        for step in steps:
            _check_shape(source, base, name, step)
    return found


def _products(source: Source, base: BaseModel) -> Iterator[tuple[str, Product]]:
    mapped = to_engine(base.architecture, base.sizes, source.adapter.pairs(), base.tensors)
    if mapped.unmatched:
        raise UnsupportedError(
            f"has no place in a GGUF of {base.architecture.title}; merge it into the Hugging Face "
            "model and convert that",
            path=source.label,
            where=mapped.unmatched[0],
        )
    magnitudes = _magnitudes(source, base)
    for pair in mapped.pairs:
        origin, *others = mapped.sources[pair.module]
        product = Product(
            source.label,
            origin,
            pair,
            source.weight_of(origin),
            pair.embedding,
            magnitudes.get(pair.module),
            tuple(others),
        )
        yield f"{pair.module}.weight", product


def _magnitudes(source: Source, base: BaseModel) -> dict[str, Magnitude]:
    """Return DoRA's magnitudes by llama.cpp tensor."""

    def move(pairs: Iterable[Update]) -> Sequence[Update]:
        return to_engine(base.architecture, base.sizes, pairs, base.tensors).pairs

    pairs = tuple(source.adapter.pairs())
    found = moved_magnitudes(source, pairs, move)
    for pair in pairs:
        if pair.embedding and (magnitude := magnitude_of(source, pair)) is not None:
            found[EMBEDDING.removesuffix(".weight")] = Magnitude(magnitude)
    return found


def _beside(
    source: Source, base: BaseModel, key: TensorKey, tensor: LazyTensor
) -> Iterator[tuple[str, Step]]:
    weight = source.weight_of(key.module)
    if key.role is Role.LORA_BIAS:
        scale = source.adapter.scales.get(key.module, 1.0)
        for name, part in _moved(source, base, f"{key.module}.bias", tensor):
            if name not in base.tensors:
                raise UnsupportedError(
                    f"has a bias on B, and the base has no {name} that it could be added to",
                    path=source.label,
                    where=key.module,
                )
            yield name, Added(source.label, key.module, part, weight * scale)
    elif key.role is Role.FULL:
        for name, part in _moved(source, base, key.module, tensor):
            yield name, Replaced(source.label, key.module, part, weight)
    elif key.role is Role.TOKEN_ROWS:
        match = find_rule(base.architecture, key.module)
        target = f"{match.rule.targets[0].name}.weight" if match else ""
        if target not in _TABLES:
            raise UnsupportedError(
                "holds token rows of something that is no embedding",
                path=source.label,
                where=key.module,
            )
        tokens = token_rows(source, key.module)
        yield target, RowsReplaced(source.label, key.module, tokens, tensor, weight)


def _moved(
    source: Source, base: BaseModel, name: str, tensor: LazyTensor
) -> list[tuple[str, LazyTensor]]:
    """Return a parameter as llama.cpp stores it, read again when it is needed."""
    try:
        parts = weight_to_engine(base.architecture, base.sizes, name, tensor.numpy())
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error.message}; merge it into the Hugging Face model and convert that",
            path=source.label,
            where=name,
        ) from error

    def part(place: int) -> LazyTensor:
        found, array = parts[place]
        if array.shape == tensor.shape and array.tobytes() == bytes(tensor.tobytes()):
            return tensor  # a byte range, of which blocks can be read
        dtype = DType.of(array.dtype)

        def read() -> memoryview:
            again = weight_to_engine(base.architecture, base.sizes, name, tensor.numpy())
            return encode(dict(again)[found], dtype)

        return LazyTensor(dtype, tuple(int(size) for size in array.shape), read)

    return [(found, part(place)) for place, (found, _) in enumerate(parts)]


def _check_shape(source: Source, base: BaseModel, name: str, step: Step) -> None:
    stored = (base.tensors.get(name) or base.tensors[EMBEDDING]).shape
    match step:
        case Product(pair=pair, turned=turned):
            shape = pair.shape[::-1] if turned else pair.shape
            fits = shape == stored
        case RowsReplaced(tokens=tokens, tensor=tensor):
            shape = tensor.shape
            fits = max(tokens, default=-1) < stored[0] and shape[-1] == stored[-1]
        case Added(vector=tensor) | Replaced(tensor=tensor):
            shape = tensor.shape
            fits = shape == stored
    if not fits:
        raise IncompatibleBaseError(
            f"the base has {list(stored)} in {name}, the adapter {list(shape)}; is it the right "
            "base?",
            path=source.label,
            where=step.module,
        )
