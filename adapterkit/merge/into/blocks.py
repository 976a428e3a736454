"""Blocks of rows: read, add everything, round once.

Memory is a block and the factors, whatever the size of the tensor; ΔW is never there as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.base.decoding import RowReader, stored_type
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.merge.into.report import TensorReport
from adapterkit.merge.into.steps import Added, Change, Product, Replaced, RowsReplaced
from adapterkit.storage import FileSlice
from adapterkit.tensor import LazyTensor, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Array = np.ndarray[Any, np.dtype[Any]]

# Elements of a block: small enough for all passes to stay in the cache, and for malloc to reuse it.
BLOCK = 1 << 15
_STACK = 3
_EXPONENT = {DType.F16: 0x7C00, DType.BF16: 0x7F80}


@dataclass(frozen=True, slots=True)
class Place:
    """Some rows of one matrix of a tensor, which may be a stack of matrices."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Sums:
    """Squared norms and the inner product that survival is made of.

    Attributes:
        base: ‖W‖².
        update: ‖ΔW‖².
        kept: ⟨W' - W, ΔW⟩.
    """

    base: float = 0.0
    update: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        """Add up the sums of two disjoint blocks."""
        return Sums(self.base + other.base, self.update + other.update, self.kept + other.kept)


class Merger:
    """Computes a change, block by block, in any order.

    Sums are formed in float32 for bases of 16 bits and fewer, in float64 for others, for all
    adapters together, and rounded once.
    """

    def __init__(self, change: Change) -> None:
        self.change = change
        self.matrices, self.rows, self.columns = _geometry(change)
        wide = stored_type(change.source) in {DType.F32, DType.F64} or change.dtype is DType.F64
        self.kind = np.dtype(np.float64 if wide else np.float32)

    def prepare(self) -> None:
        """Open the adapters' tensors, before several threads ask for blocks."""
        _ = self._operations

    def places(self) -> list[Place]:
        """Return all blocks, in the order in which they are stored."""
        height = max(1, BLOCK // max(1, self.columns))
        return [
            Place(matrix, start, min(start + height, self.rows))
            for matrix in range(self.matrices)
            for start in range(0, self.rows, height)
        ]

    def offset(self, place: Place) -> int:
        """Return the first byte of a block in the stored tensor."""
        rows = place.matrix * self.rows + place.start
        return rows * self.change.dtype.nbytes((self.columns,))

    def block(self, place: Place) -> tuple[memoryview, Sums]:
        """Return the stored bytes of a block, and its sums.

        Raises:
            FormatError: if an adapter holds NaN or infinity.
            UnsupportedError: if the stored type cannot hold a value.
        """
        if self._unchanged:
            rows = place.matrix * self.rows
            found = self._found(rows + place.start, rows + place.stop)
            return memoryview(found.tobytes()), Sums()
        base = self._base(place)
        merged = base.copy()
        for operation in self._operations:
            merged = operation.apply(merged, base, place)
        data = encode(merged, self.change.dtype)
        if not self.change.steps:
            if _overflows(data, self.change.dtype) and np.isfinite(base).all():
                self._refuse(base)
            return data, Sums()
        shape = (place.stop - place.start, self.columns)
        rounded = _decoded(LazyTensor(self.change.dtype, shape, lambda: data), self.kind)
        update = merged - base
        sums = Sums(_inner(base, base), _inner(update, update), _inner(rounded - base, update))
        if not np.isfinite(sums.kept):
            self._refuse(base)
        return data, sums

    def report(self, sums: Sums) -> TensorReport:
        """Return what the change did, from the sums of all blocks."""
        return TensorReport(
            tensor=self.change.name,
            modules=tuple(dict.fromkeys(step.module for step in self.change.steps)),
            stored=stored_type(self.change.source).value,
            dtype=self.change.dtype.value,
            relative_norm=(sums.update / sums.base) ** 0.5 if sums.base else None,
            survival=sums.kept / sums.update if sums.update else None,
        )

    def _refuse(self, base: Array) -> None:
        where = self.change.name
        if not np.isfinite(base).all():
            raise FormatError("the base holds NaN or infinity", where=where)
        raise UnsupportedError(
            f"a value does not fit {self.change.dtype}; store a wider type (--dtype, or "
            "--gguf-type for a GGUF base)",
            where=where,
        )

    @property
    def _unchanged(self) -> bool:
        """Whether the rows of the source are those to store."""
        source, change = self.change.source, self.change
        return not change.steps and (source.dtype, source.shape) == (change.dtype, change.shape)

    def _found(self, begin: int, end: int) -> LazyTensor:
        return _rows(self.change.source, begin, end, self.columns)

    def _base(self, place: Place) -> Array:
        source = self.change.source
        have = source.size // (self.matrices * self.columns)
        stop = min(place.stop, have)
        begin = place.matrix * have + min(place.start, stop)
        found = self._found(begin, begin + max(0, stop - place.start))
        values = _decoded(found, self.kind)
        missing = place.stop - place.start - len(values)
        return np.pad(values, ((0, missing), (0, 0))) if missing else values

    @cached_property
    def _operations(self) -> Sequence[_Operation]:
        """Open the steps; updates next to each other become one product."""
        found: list[_Operation] = []
        plain: list[Product] = []
        for step in self.change.steps:
            if not isinstance(step, Product) or step.magnitude is not None:
                found += [_Sum(plain, self.kind)] if plain else []
                plain = []
            match step:
                case Product(magnitude=magnitude) if magnitude is not None:
                    found.append(_Dora(step, magnitude, self))
                case Product():
                    plain.append(step)
                case Added():
                    found.append(_Vector(step, self.kind))
                case Replaced():
                    found.append(_Whole(step, self))
                case RowsReplaced():
                    found.append(_TokenRows(step, self.kind))
        return [*found, _Sum(plain, self.kind)] if plain else found

    def base_block(self, place: Place) -> Array:
        """Return the rows of the unmerged base."""
        return self._base(place)


class _Sum:
    """Σ wᵢ sᵢ Bᵢ Aᵢ of all adapters as one product."""

    def __init__(self, steps: Sequence[Product], kind: np.dtype[Any]) -> None:
        factors = [_factors(step, kind) for step in steps]
        self.left = np.concatenate([left for left, _ in factors], axis=-1)
        self.right = np.concatenate([right for _, right in factors], axis=-2)

    def delta(self, place: Place) -> Array:
        return self.left[place.matrix, place.start : place.stop] @ self.right[place.matrix]

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        del base
        merged += self.delta(place)
        return merged


class _Dora:
    """X + w · (m / ‖W + ΔW‖ · (X + ΔW) - X), norms over the inputs."""

    def __init__(self, step: Product, magnitude: LazyTensor, merger: Merger) -> None:
        # The direction has the adapter's own scale; w is how far to go there.
        self.weight = step.weight
        self.sum = _Sum([_unweighted(step)], merger.kind)
        values = _finite(magnitude, step, merger.kind).reshape(-1)
        self.turned = step.turned
        if step.turned:
            squares = np.zeros(merger.columns)
            for place in merger.places():
                direction = merger.base_block(place) + self.sum.delta(place)
                squares += np.einsum("ij,ij->j", direction, direction, dtype=np.float64)
            values = (values / np.sqrt(squares)).astype(merger.kind)
        self.values = values

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        delta = self.sum.delta(place)
        if self.turned:
            factor = self.values
        else:
            norms = np.linalg.norm(base + delta, axis=1)
            factor = (self.values[place.start : place.stop] / norms)[:, None]
        return merged + self.weight * (factor * (merged + delta) - merged)


class _Vector:
    def __init__(self, step: Added, kind: np.dtype[Any]) -> None:
        self.values = _finite(step.vector, step, kind).reshape(-1) * step.weight

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        del base, place
        merged += self.values
        return merged


class _Whole:
    def __init__(self, step: Replaced, merger: Merger) -> None:
        self.step, self.merger = step, merger
        ranged = isinstance(step.tensor.read, FileSlice)
        self.whole = None if ranged else step.tensor.numpy().reshape(-1, merger.columns)

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        begin = place.matrix * self.merger.rows + place.start
        end = begin + len(merged)
        kind = self.merger.kind
        if self.whole is not None:
            new = self.whole[begin:end].astype(kind)
        else:
            new = _decoded(_rows(self.step.tensor, begin, end, self.merger.columns), kind)
        _check_finite(new, self.step)
        alone = self.step.weight == 1 and len(self.merger.change.steps) == 1
        return new if alone else merged + self.step.weight * (new - base)


class _TokenRows:
    def __init__(self, step: RowsReplaced, kind: np.dtype[Any]) -> None:
        self.values = _finite(step.tensor, step, kind)
        self.tokens, self.weight = np.asarray(step.tokens), step.weight

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        chosen = (self.tokens >= place.start) & (self.tokens < place.stop)
        rows = self.tokens[chosen] - place.start
        new = self.values[chosen]
        # What W + (R - W) rounds to is not always R.
        same = self.weight == 1 and np.array_equal(merged[rows], base[rows])
        merged[rows] = new if same else merged[rows] + self.weight * (new - base[rows])
        return merged


_Operation = _Sum | _Dora | _Vector | _Whole | _TokenRows


def _geometry(change: Change) -> tuple[int, int, int]:
    """Return (matrices, rows, columns); a vector is one row."""
    shape = change.shape
    if len(shape) < 2:  # noqa: PLR2004  (a vector)
        return 1, 1, change.stored.size
    stacked = len(shape) == _STACK and any(
        isinstance(step, Product) and len(step.pair.shape) == _STACK for step in change.steps
    )
    matrices = shape[0] if stacked else 1
    rows = shape[1] if stacked else shape[0]
    if not change.steps or change.dtype.quantised or change.source.dtype.quantised:
        # Blocks run along the last axis only; and what is only decoded has no matrices to keep.
        rows = change.stored.size // (matrices * shape[-1])
    return matrices, rows, change.stored.size // (matrices * rows)


def _unweighted(step: Product) -> Product:
    return Product(step.label, step.module, step.pair, 1.0, step.turned, step.magnitude)


def _factors(step: Product, kind: np.dtype[Any]) -> tuple[Array, Array]:
    """Return (E, rows, r) and (E, r, columns) as stored, weight and scale in the first."""
    pair = step.pair
    a = _finite(pair.a, step, np.dtype(np.float64))
    b = _finite(pair.b, step, np.dtype(np.float64)) * (pair.scale * step.weight)
    if _is_convolution(a, b):
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if step.turned else (b, a)
    return np.ascontiguousarray(left, kind), np.ascontiguousarray(right, kind)


def _is_convolution(a: Array, b: Array) -> bool:
    """Tell (r, in, *kernel) and (out, r, 1...) from stacked experts, (E, r, in) and (E, out, r)."""
    stack = a.ndim == _STACK and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    return a.ndim >= _STACK and not stack


def _finite(tensor: LazyTensor, step: Any, kind: np.dtype[Any]) -> Array:
    values = np.asarray(tensor.numpy(), dtype=kind)
    _check_finite(values, step)
    return values


def _check_finite(values: Array, step: Any) -> None:
    if not np.isfinite(values).all():
        raise FormatError("holds NaN or infinity", path=step.label, where=step.module)


def _rows(tensor: LazyTensor, begin: int, end: int, columns: int) -> LazyTensor:
    """Return rows of a tensor: a byte range of their own, or decoded by its reader."""
    span, shape = tensor.read, (end - begin, columns)
    if isinstance(span, FileSlice):
        width = tensor.dtype.nbytes((columns,))
        part = FileSlice(span.path, span.offset + begin * width, (end - begin) * width)
        return LazyTensor(tensor.dtype, shape, part)
    if not isinstance(span, RowReader):
        raise TypeError(f"{tensor} is no byte range of a file, and cannot be read by rows")
    times = columns // tensor.shape[-1]
    return LazyTensor(tensor.dtype, shape, partial(span.rows, begin * times, end * times))


def _decoded(tensor: LazyTensor, kind: np.dtype[Any]) -> Array:
    return np.asarray(tensor.numpy(), dtype=kind)


def _overflows(data: memoryview, dtype: DType) -> bool:
    """Tell whether numbers of 16 bits hold infinity or NaN, by their exponents."""
    if dtype not in _EXPONENT:
        return False
    exponents = np.frombuffer(data, np.uint16) & _EXPONENT[dtype]
    return bool(exponents.size and exponents.max() == _EXPONENT[dtype])


def _inner(first: Array, second: Array) -> float:
    # An overflow is looked for in the result.
    with np.errstate(all="ignore"):
        return float(np.dot(first.reshape(-1), second.reshape(-1)))


def total(parts: Iterable[Sums]) -> Sums:
    """Add up the sums of all blocks."""
    return sum(parts, start=Sums())
