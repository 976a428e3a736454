"""The coefficients that come nearest to given updates, in closed form on small matrices.

Module m of a group has the model c L (Σᵢ vᵢ Pᵢ) R and the target s B A. With G_L = LᵀL, G_R = RRᵀ
and K = s (LᵀB)(ARᵀ), all r x r, the normal equations of the group are H v = b with
H_ij = Σ_m c² tr(Pᵢᵀ G_L Pⱼ G_R) and b_i = Σ_m c ⟨Pᵢ, K⟩. A middle matrix of any kind captures at
most ⟨K, G_L⁺ K G_R⁺⟩ of ‖s B A‖².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.model import Update
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora.adapter import TinyModule, middle, wide

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from adapterkit.lowrank.products import LowRank
    from adapterkit.model import AdapterTensorSet

    Array = np.ndarray[Any, np.dtype[Any]]

# Directions of H below this part of its largest eigenvalue are noise: they get no coefficient.
_NULL = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleResidual:
    """What is left of one update.

    Attributes:
        module: the module.
        norm: ‖ΔW‖ of the source, Frobenius.
        residual: ‖ΔW' - ΔW‖ / ‖ΔW‖, with the fitted coefficients; None if ΔW is zero.
        out_of_reach: the least that any matrix between the frozen factors could leave, for any
            number of coefficients and no ties; None if ΔW is zero.
    """

    module: str
    norm: float
    residual: float | None
    out_of_reach: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Coefficients by least squares.

    Attributes:
        vectors: group -> v, float32 (u,).
        modules: residual of each module, in order.
        residual: of all updates together, relative.
        out_of_reach: the least that any middle matrices could leave, of all together.
    """

    vectors: Mapping[int, LazyTensor]
    modules: tuple[ModuleResidual, ...]
    residual: float
    out_of_reach: float


@dataclass(slots=True)
class _Terms:
    module: TinyModule
    pair: Update | None
    gram: Array
    right_side: Array
    energy: float
    captured: float


def fit(adapter: AdapterTensorSet, modules: Iterable[TinyModule]) -> Fit:
    """Fit the vector of every group; a module that the adapter leaves alone counts as ΔW = 0.

    The minimum-norm solution is taken where several are equally good.

    Args:
        adapter: the updates; modules that are not among `modules` are no concern of this function.
        modules: frozen parts, with groups.
    """
    pairs = {pair.module: pair for pair in adapter.pairs()}
    terms = [_terms(module, pairs.get(module.name)) for module in modules]
    groups: dict[int, list[_Terms]] = {}
    for term in terms:
        groups.setdefault(term.module.group, []).append(term)
    # The file holds float32, so the residual is that of the rounded numbers.
    tensors = {
        group: LazyTensor.of(_rounded(members), DType.F32) for group, members in groups.items()
    }
    left = [_left(term, tensors[term.module.group]) for term in terms]
    total = sum(term.energy for term in terms)
    return Fit(
        vectors=tensors,
        modules=tuple(
            ModuleResidual(
                module=term.module.name,
                norm=term.energy**0.5,
                residual=_relative(rest, term.energy),
                out_of_reach=_relative(max(term.energy - term.captured, 0.0), term.energy),
            )
            for term, rest in zip(terms, left, strict=True)
        ),
        residual=_relative(sum(left), total) or 0.0,
        out_of_reach=_relative(sum(max(t.energy - t.captured, 0.0) for t in terms), total) or 0.0,
    )


def _terms(module: TinyModule, pair: Update | None) -> _Terms:
    import numpy as np

    from adapterkit.lowrank.distances import norm

    left, right = wide(module.left), wide(module.right)
    projection = wide(module.projection) * module.scale
    gram_left, gram_right = left.T @ left, right @ right.T
    turned = gram_left @ projection @ gram_right
    gram = np.tensordot(projection, turned, axes=([1, 2], [1, 2]))
    size = projection.shape[0]
    if pair is None:
        return _Terms(module, None, gram, np.zeros(size), 0.0, 0.0)
    target = _target(pair)
    seen = (left.T @ target.b) @ (target.a @ right.T)
    inner = np.linalg.pinv(gram_left, rcond=_NULL, hermitian=True) @ seen
    inner = inner @ np.linalg.pinv(gram_right, rcond=_NULL, hermitian=True)
    return _Terms(
        module,
        pair,
        gram,
        np.tensordot(projection, seen, axes=([1, 2], [0, 1])),
        norm(target) ** 2,
        float(np.sum(seen * inner)),
    )


def _target(pair: Update) -> LowRank:
    """Return the update of the weight as it is stored: an embedding's is (B · A)ᵀ."""
    from adapterkit.lowrank.products import updates

    update = next(iter(updates(pair)))
    return update.turned if pair.embedding else update


def _solved(terms: Sequence[_Terms]) -> Array:
    import numpy as np

    gram = np.sum([term.gram for term in terms], axis=0)
    right_side = np.sum([term.right_side for term in terms], axis=0)
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    kept = values > _NULL * max(float(values[-1]), 0.0)
    basis = vectors[:, kept]
    return basis @ ((basis.T @ right_side) / values[kept])


def _rounded(members: Sequence[_Terms]) -> Array:
    """Return the vector of a group in float32.

    Raises:
        UnsupportedError: if it does not fit.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        vector = _solved(members).astype(np.float32)
    if not np.isfinite(vector).all():
        message = "the coefficients that come nearest to its update do not fit F32"
        raise UnsupportedError(message, where=members[0].module.name)
    return vector


def _left(term: _Terms, vector: LazyTensor) -> float:
    from adapterkit.lowrank.distances import distance, norm
    from adapterkit.lowrank.products import LowRank

    left, right = wide(term.module.left), wide(term.module.right)
    fitted = LowRank(left @ middle(term.module, vector), right)
    return (norm(fitted) if term.pair is None else distance(_target(term.pair), fitted)) ** 2


def _relative(squared: float, energy: float) -> float | None:
    return (squared / energy) ** 0.5 if energy > 0 else None
