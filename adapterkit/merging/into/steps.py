"""What happens to one stored tensor of a base, step by step, in the orientation it is stored in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterkit.dtype import DType
from adapterkit.merging.combination import Combination
from adapterkit.model import Update
from adapterkit.quantisation.shaped import ROUNDS
from adapterkit.tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA's magnitudes of a stored tensor, one for each row that factors write to.

    Attributes:
        values: (out,), or (E, out) of stacked experts; by column (in,).
        covered: of the same shape, which rows have one; None for all. Rows of a fused tensor, or
            experts, that were trained without DoRA have none.
        by_column: whether there is one for each input instead, all of whose columns have one norm
            together: those of a convolution are its kernel's.
    """

    values: LazyTensor
    covered: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    by_column: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A low-rank update: W + w · s · B · A, or with a magnitude m the DoRA of it.

    DoRA (arXiv 2402.09353) is m / ‖W + ΔW‖ · (X + ΔW), where the norm is that of the unmerged base
    W and X is what earlier adapters have made of it; at weight w, X + w · (that - X).

    Attributes:
        label: the adapter, as messages name it.
        module: the adapted module.
        pair: the factors.
        weight: w, on top of the pair's own scale.
        turned: whether the base stores (in, out), or an embedding's (vocabulary, width).
        magnitude: of DoRA, in the order of the stored rows.
        others: more adapted modules, whose rows stand in the same tensor.
    """

    label: str
    module: str
    pair: Update
    weight: float
    turned: bool
    magnitude: Magnitude | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Added:
    """A vector that is added: W + w · v, the bias of B.

    Attributes:
        label: the adapter.
        module: the adapted module.
        vector: (out,).
        weight: w, the scale of the module included.
    """

    label: str
    module: str
    vector: LazyTensor
    weight: float


@dataclass(frozen=True, slots=True)
class Replaced:
    """A parameter that training saved whole: W + w · (M - W).

    Attributes:
        label: the adapter.
        module: the parameter.
        tensor: M, in the stored orientation.
        weight: w.
    """

    label: str
    module: str
    tensor: LazyTensor
    weight: float


@dataclass(frozen=True, slots=True)
class RowsReplaced:
    """Rows of an embedding that training saved whole: row t becomes W_t + w · (R_t - W_t).

    Attributes:
        label: the adapter.
        module: the embedding.
        tokens: row numbers.
        tensor: (tokens, width).
        weight: w.
    """

    label: str
    module: str
    tokens: tuple[int, ...]
    tensor: LazyTensor
    weight: float


@dataclass(frozen=True, slots=True)
class Ruled:
    """All low-rank updates of a tensor, made one by a rule on their entries.

    Attributes:
        products: each adapter's, None where it has none.
        weights: each adapter's.
        how: the rule and its numbers.
    """

    products: tuple[Product | None, ...]
    weights: tuple[float, ...]
    how: Combination

    @property
    def _first(self) -> Product:
        return next(product for product in self.products if product is not None)

    @property
    def label(self) -> str:
        """The first adapter that has one."""
        return self._first.label

    @property
    def module(self) -> str:
        """The adapted module."""
        return self._first.module

    @property
    def pair(self) -> Update:
        """The first of the updates."""
        return self._first.pair


# What an adapter does, and what becomes of it.
Step = Product | Added | Replaced | RowsReplaced
Applied = Step | Ruled


@dataclass(frozen=True, slots=True, eq=False)
class Shaping:
    """What counts beside an adapter's own directions when a change of it is rounded.

    Attributes:
        seen: (k, columns), the first directions of the inputs, as long as they weigh.
        rest: (columns,), the squares of the inputs that these leave; all zero where none are known.
        first: (n, columns), the first token's direction, as long as it weighs; none if unknown.
        others: the weight of every direction alike.
        rounds: of scales and levels after the first pass.
    """

    seen: np.ndarray[Any, np.dtype[Any]]
    rest: np.ndarray[Any, np.dtype[Any]]
    first: np.ndarray[Any, np.dtype[Any]]
    others: float
    rounds: int = ROUNDS


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor of the output that is not a byte range of the base.

    Attributes:
        name: the stored name.
        source: the base's tensor.
        steps: in the order of the adapters; none for a mere change of type.
        dtype: the type to store.
        shape: the shape to store; more rows than the source only where all of them are replaced.
        via: a type that the result is rounded to before it is quantised, as a file of that type
            would have held it.
        least: the smallest survival at which the change is stored; rounding can make it less than
            zero.
        most: the largest error along the adapter's own directions, where rounding is shaped.
        shaping: what rounding keeps errors away from; None to round to the nearest value.
    """

    name: str
    source: LazyTensor
    steps: tuple[Applied, ...]
    dtype: DType
    shape: tuple[int, ...]
    via: DType | None = None
    least: float = -math.inf
    most: float = math.inf
    shaping: Shaping | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules and parameters that go into it, each once."""
        found: list[str] = []
        for step in self.steps:
            found += [step.module, *(step.others if isinstance(step, Product) else ())]
        return tuple(dict.fromkeys(found))

    @property
    def stored(self) -> LazyTensor:
        """The result's type and shape, without a way to read it."""
        return LazyTensor(self.dtype, self.shape, bytes)
