"""A quantised Hugging Face base as the float tensors that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base.coded import coded, companions
from adapterkit.base.decoding import PackedRows, ScaledRows, stored_type
from adapterkit.base.model import BaseModel
from adapterkit.base.schemes import FIELDS, Scheme, quantisation
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


_PLAIN = {DType.F64, DType.F32, DType.F16, DType.BF16}
# No parameter of a model is stored as one of these, unless it is quantised.
_NARROW = {DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0, DType.U8, DType.I8}
_SCALES = {*_PLAIN, DType.U8, DType.F8_E8M0}
_WEIGHT = ".weight"
_MATRIX, _PACKED = 2, 4


@dataclass(frozen=True, slots=True)
class DecodedBase:
    """A base whose quantised tensors read as what they stand for.

    Attributes:
        base: the same base, with one float tensor where values and scales are stored.
        stored: name of each decoded tensor -> the type that its values are stored as.
        left_out: stored tensors that are about activations or the cache, and no part of `base`.
        files: files of the checkpoint that hold any of these.
    """

    base: BaseModel
    stored: Mapping[str, str]
    left_out: tuple[str, ...]
    files: frozenset[Path]


def decoded(base: BaseModel, scheme: Scheme) -> DecodedBase:
    """Return a base whose tensors are float; nothing is read before it is asked for.

    Every stored tensor is a plain one, a part of a decoded one, or named in `left_out`.

    Raises:
        FormatError: if values and scales do not belong together.
        UnsupportedError: if something is stored in a way that the scheme does not have.
    """
    taken = dict(_pairs(base, scheme))
    used = {name for parts in taken.values() for name in parts}
    left = tuple(
        name
        for name in base.tensors
        if name not in used and name.rpartition(".")[2] in scheme.left_out
    )
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in base.tensors.items():
        parameter = name.removesuffix(scheme.values)
        if parameter in taken and taken[parameter][0] == name:
            beside = {part: base.tensors[part] for part in taken[parameter][1:]}
            tensors[parameter] = (
                coded(parameter, tensor, beside, base.path)
                if scheme.coded
                else _decoded(parameter, tensor, *beside.values(), scheme=scheme, base=base)
            )
        elif name not in used and name not in left:
            _check_plain(name, tensor, scheme, base)
            tensors[name] = tensor
    facts = {key: value for key, value in base.facts.items() if key not in FIELDS}
    parts = [base.tensors[name] for name in (*used, *left)]
    return DecodedBase(
        base=replace(base, tensors=tensors, names=frozenset(tensors), facts=facts),
        stored={name: stored_type(tensors[name]).value for name in taken},
        left_out=left,
        files=frozenset(part.path for part in parts if part.path),
    )


def as_floats(base: BaseModel) -> BaseModel:
    """Return a base decoded where that is possible, for those who only look at its weights.

    Raises:
        FormatError: if quantised values and scales do not belong together.
        UnsupportedError: if something is stored in a way that is not known.
    """
    scheme = quantisation(base) if base.kind == "hf" and base.has_tensors else None
    return decoded(base, scheme).base if isinstance(scheme, Scheme) else base


def _pairs(base: BaseModel, scheme: Scheme) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every quantised parameter with the names of its values, scales and further parts."""
    ordered = sorted(base.tensors)
    for name, tensor in base.tensors.items():
        if not name.endswith(scheme.values):
            continue
        parameter = name.removesuffix(scheme.values)
        scales = [f"{parameter}{end}" for end in scheme.scales if f"{parameter}{end}" in base.names]
        narrow = tensor.dtype in scheme.types
        if scales and not narrow and (scheme.values or parameter.endswith(_WEIGHT)):
            raise _refused(f"is stored as {tensor.dtype} beside {scales[0]}", name, scheme, base)
        if narrow and scales:
            if not isinstance(tensor.read, FileSlice):
                raise _refused("is not in one piece of its file", name, scheme, base)
            if len(scales) > 1 or scales[0] not in base.tensors:
                raise FormatError(
                    f"needs one tensor of scales, of {', '.join(scales)}",
                    path=base.path,
                    where=name,
                )
            others = companions(parameter, ordered) if scheme.coded else ()
            yield parameter, tuple(dict.fromkeys((name, scales[0], *others)))


def _check_plain(name: str, tensor: LazyTensor, scheme: Scheme, base: BaseModel) -> None:
    """Refuse what is a part of something quantised, and of nothing that is there."""
    if tensor.dtype in _NARROW:
        raise _refused(f"is stored as {tensor.dtype} and has no scales", name, scheme, base)
    for end in scheme.scales:
        if name.endswith(f"{_WEIGHT}{end}"):
            missing = f"{name.removesuffix(end)}{scheme.values}"
            raise FormatError(f"scales {missing}, which is not there", path=base.path, where=name)


def _refused(what: str, name: str, scheme: Scheme, base: BaseModel) -> UnsupportedError:
    return UnsupportedError(
        f"{what}, which {scheme.name} does not explain: merge into the 16-bit original",
        path=base.path,
        where=name,
    )


def _decoded(
    name: str, values: LazyTensor, scales: LazyTensor, *, scheme: Scheme, base: BaseModel
) -> LazyTensor:
    if scheme.packed:
        return _unpacked(name, values, scales, scheme, base)
    if len(values.shape) < _MATRIX or scales.dtype not in _SCALES:
        raise _refused(f"has scales stored as {scales.dtype}", name, scheme, base)
    if scheme.matrices and len(values.shape) > _MATRIX:
        raise _refused(f"has {len(values.shape)} axes", name, scheme, base)
    shape = _aligned(scales.shape, values.shape)
    blocks = _blocks(shape, values.shape, scheme) if shape else []
    if len(blocks) != 1 or shape is None:
        fit = "no" if not blocks else "more than one"
        raise _refused(
            f"has shape {list(values.shape)} and scales of {list(scales.shape)}, to which {fit} "
            f"size of a block leads",
            name,
            scheme,
            base,
        )
    reader = ScaledRows(values, scales, (shape[-2], shape[-1]), blocks[0])
    return LazyTensor(DType.F32, values.shape, reader)


def _unpacked(
    name: str, values: LazyTensor, scales: LazyTensor, scheme: Scheme, base: BaseModel
) -> LazyTensor:
    shape, group = values.shape, DType.MXFP4.block // 2
    fits = len(shape) == _PACKED and shape[-1] == group and scales.shape == shape[:-1]
    if not fits or scales.dtype is not DType.U8:
        raise _refused(
            f"has blocks of {list(shape)} and {scales.dtype} scales of {list(scales.shape)}",
            name,
            scheme,
            base,
        )
    experts, height, groups, _ = shape
    turned = (experts, groups * DType.MXFP4.block, height)
    return LazyTensor(DType.BF16, turned, PackedRows(values, scales))


def _aligned(scales: tuple[int, ...], values: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of scales with the axes of the values, or None if they have other ones."""
    if not scales or set(scales) == {1}:
        return (1,) * len(values)
    if len(values) == _MATRIX and scales == values[:1]:
        return (*scales, 1)  # one for each row
    return scales if len(scales) == len(values) and scales[:-2] == values[:-2] else None


def _blocks(
    grid: tuple[int, ...], values: tuple[int, ...], scheme: Scheme
) -> list[tuple[int, int]]:
    """Return the blocks that may be meant: as the configuration says, or what the grid divides."""
    rows, columns = values[-2:]
    even = rows % grid[-2] == 0 and columns % grid[-1] == 0
    divided = [(rows // grid[-2], columns // grid[-1])] if even else []
    if set(grid) == {1}:
        return divided
    given = scheme.declared_blocks()
    fitting = [b for b in given if (-(-rows // b[0]), -(-columns // b[1])) == grid[-2:]]
    # A block as large as the matrix, and one that is larger, are the same.
    cut = {(min(b[0], rows), min(b[1], columns)) for b in (*fitting, *([] if given else divided))}
    return sorted(cut)
