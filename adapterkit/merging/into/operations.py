"""What the steps of a change do to a block of rows, in the orientation in which it is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from adapterkit.errors import FormatError
from adapterkit.merging.into.rows import decoded, reader
from adapterkit.merging.into.ruled import Rules
from adapterkit.merging.into.steps import Added, Product, Replaced, RowsReplaced, Ruled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.merging.into.rows import Place, Unmerged
    from adapterkit.merging.into.steps import Applied, Magnitude, Step
    from adapterkit.tensor import LazyTensor

Array = np.ndarray[Any, np.dtype[Any]]


class Operation(Protocol):
    """One or more steps."""

    @property
    def products(self) -> Sum | None:
        """The low-rank updates in it."""
        ...

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        """Return what `merged` becomes; it may be the same array.

        Args:
            merged: (rows, columns), what the steps before have made of the base; may be changed.
            base: (rows, columns), unmerged.
            place: which rows.
        """
        ...


def operations(steps: Sequence[Applied], tensor: Unmerged) -> list[Operation]:
    """Open the steps; low-rank updates next to each other become one product.

    Raises:
        FormatError: if an adapter holds NaN or infinity.
    """
    found: list[Operation] = []
    plain: list[Product] = []
    for step in steps:
        if not isinstance(step, Product) or step.magnitude is not None:
            found += [Sum(plain, tensor.kind)] if plain else []
            plain = []
        match step:
            case Product(magnitude=magnitude) if magnitude is not None:
                found.append(_Dora(step, magnitude, tensor))
            case Product():
                plain.append(step)
            case Added():
                found.append(_Vector(step, tensor.kind))
            case Replaced():
                found.append(_Whole(step, tensor))
            case RowsReplaced():
                found.append(_TokenRows(step, tensor.kind))
            case Ruled():
                found.append(Rules(step, tensor, _unscaled))
    return [*found, Sum(plain, tensor.kind)] if plain else found


class Sum:
    """Σ wᵢ sᵢ Bᵢ Aᵢ of all adapters as one product."""

    def __init__(self, steps: Sequence[Product], kind: np.dtype[Any]) -> None:
        """Read and stack the factors, (E, rows, R) and (E, R, columns)."""
        factors = [_factors(step, kind) for step in steps]
        self.left = np.concatenate([left for left, _ in factors], axis=-1)
        self.right = np.concatenate([right for _, right in factors], axis=-2)

    @property
    def products(self) -> Sum:
        """The updates themselves."""
        return self

    def delta(self, place: Place, out: Array | None = None) -> Array:
        """Return ΔW of some rows, in `out` if given."""
        left = self.left[place.matrix, place.start : place.stop]
        return np.matmul(left, self.right[place.matrix], out=out)

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        """Add the rows of ΔW."""
        del base
        merged += self.delta(place)
        return merged


class _Dora:
    """X + w · (m / ‖W + ΔW‖ · (X + ΔW) - X), norms over inputs or, by column, outputs."""

    def __init__(self, step: Product, magnitude: Magnitude, tensor: Unmerged) -> None:
        # The direction has the adapter's own scale; w is how far to go there.
        self.weight = step.weight
        self.sum = Sum([_unweighted(step)], tensor.kind)
        values = _finite(magnitude.values, step, tensor.kind)
        # Whether the norms are those of stored columns.
        self.across = step.turned != magnitude.by_column
        if self.across:
            self.values = _normed(values, self._squares(tensor)).astype(tensor.kind)
        else:
            self.values = values.reshape(-1, tensor.rows)
        covered = magnitude.covered
        self.covered = None if covered is None else covered.reshape(self.values.shape)

    @property
    def products(self) -> Sum:
        return self.sum

    def _squares(self, tensor: Unmerged) -> Array:
        """Return the squared norms of the columns of W + ΔW, (E, columns)."""
        places = tensor.places()
        squares = np.zeros((places[-1].matrix + 1, tensor.columns))
        for place in places:
            direction = tensor.base_block(place) + self.sum.delta(place)
            squares[place.matrix] += np.einsum("ij,ij->j", direction, direction, dtype=np.float64)
        return squares

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        delta = self.sum.delta(place)
        normed = slice(None) if self.across else slice(place.start, place.stop)
        factor = self.values[place.matrix, normed]
        if not self.across:
            factor = factor / np.linalg.norm(base + delta, axis=1)
        if self.covered is not None:
            # Outputs of a part that has no magnitude are a plain sum.
            one = np.ones_like(factor)
            factor = np.where(self.covered[place.matrix, normed], factor, one)
        factor = factor if self.across else factor[:, None]
        return merged + self.weight * (factor * (merged + delta) - merged)


def _normed(values: Array, squares: Array) -> Array:
    """Return m / ‖·‖ for every column; columns of one kernel share their m and their norm."""
    size = squares.shape[1] * len(squares) // values.size
    together = squares.reshape(len(squares), -1, size).sum(axis=2)
    return np.repeat(values.reshape(together.shape) / np.sqrt(together), size, axis=1)


class _Vector:
    """W + w · v."""

    products = None

    def __init__(self, step: Added, kind: np.dtype[Any]) -> None:
        self.values = _finite(step.vector, step, kind).reshape(-1) * step.weight

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        del base, place
        merged += self.values
        return merged


class _Whole:
    """W + w · (M - W)."""

    products = None

    def __init__(self, step: Replaced, tensor: Unmerged) -> None:
        self.step, self.tensor = step, tensor
        self.read = reader(step.tensor, tensor.columns)

    def apply(self, merged: Array, base: Array, place: Place) -> Array:
        begin = place.matrix * self.tensor.rows + place.start
        new = decoded(self.read(begin, begin + len(merged)), self.tensor.kind)
        _check_finite(new, self.step)
        alone = self.step.weight == 1 and self.tensor.steps == 1
        return new if alone else merged + self.step.weight * (new - base)


class _TokenRows:
    """W_t + w · (R_t - W_t)."""

    products = None

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


def _unweighted(step: Product) -> Product:
    return Product(step.label, step.module, step.pair, 1.0, step.turned, step.magnitude)


def _unscaled(step: Product) -> tuple[Array, Array]:
    return _factors(_unweighted(step), np.dtype(np.float64))


def _factors(step: Product, kind: np.dtype[Any]) -> tuple[Array, Array]:
    """Return (E, rows, r) and (E, r, columns) as stored, weight and scale in the first."""
    pair = step.pair
    b, a = pair.stacked(lambda tensor: _finite(tensor, step, np.dtype(np.float64)))
    # What overflows here overflows the merged weight, which is refused by its name.
    with np.errstate(over="ignore"):
        b = b * (pair.scale * step.weight)
        left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if step.turned else (b, a)
        return np.ascontiguousarray(left, kind), np.ascontiguousarray(right, kind)


def _finite(tensor: LazyTensor, step: Step, kind: np.dtype[Any]) -> Array:
    values = np.asarray(tensor.numpy(), dtype=kind)
    _check_finite(values, step)
    return values


def _check_finite(values: Array, step: Step) -> None:
    if not np.isfinite(values).all():
        raise FormatError("holds NaN or infinity", path=step.label, where=step.module)
