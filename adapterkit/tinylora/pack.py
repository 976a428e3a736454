"""The ANRGUSC pack's adapter, rebuilt from a base: ΔW = (alpha / u) · U diag(S) (Σᵢ vᵢ Pᵢ) Vᵀ.

Formula, seeds and tie rules are those of github.com/ANRGUSC/TinyLoRA; the factor 1 / u is its own,
arXiv 2602.04118 has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UsageError
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora import streams
from adapterkit.tinylora.adapter import TinyModule, middle
from adapterkit.tinylora.frozen import Frozen, flip_error, frozen_svd, like
from adapterkit.tinylora.groups import pack_groups
from adapterkit.tinylora.targets import target_modules, weight_of
from adapterkit.tinylora.witness import align, check_weight, testify

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from adapterkit.base import BaseModel
    from adapterkit.tinylora.settings import TinySettings
    from adapterkit.tinylora.witness import Witness

    Array = np.ndarray[Any, np.dtype[Any]]

# Predicted errors below this are not worth a sentence.
_NOTABLE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """One module with the SVD that it was made from."""

    module: TinyModule
    frozen: Frozen


def pack_targets(base: BaseModel, settings: TinySettings) -> tuple[str, ...]:
    """Return the modules that the pack would inject into, in registration order."""
    return target_modules(base, settings.target_modules, conv1d=False)


def grouping(names: Sequence[str], settings: TinySettings) -> dict[str, int]:
    """Return module -> tie group.

    Raises:
        UsageError: if the tie mode needs a factor and none is set.
    """
    mode = settings.tie_mode or "none"
    if mode in {"tiled", "structured"} and settings.tie_factor is None:
        raise UsageError(f"tie_mode {mode} needs a tie_factor")
    return pack_groups(names, mode, settings.tie_factor or 1)


def rebuild(
    base: BaseModel,
    settings: TinySettings,
    groups: Mapping[str, int],
    *,
    path: Path,
    witnesses: Mapping[str, Witness] | None = None,
    precision: str = "float32",
) -> list[Rebuilt]:
    """Recompute the frozen parts of every module; one weight is in memory at a time.

    Args:
        base: Hugging Face weights.
        settings: complete.
        groups: module -> tie group, of all modules.
        path: what is being read, for messages.
        witnesses: what the SVD was when the adapter was made, by module; checked and followed.
        precision: of the SVD where no witness says.

    Raises:
        IncompatibleBaseError: if a weight is missing or is another one than a witness saw.
        UncheckableError: if torch is not installed, or singular values are too close.
    """
    seen = witnesses or {}
    return [
        _rebuilt(base, settings, name, group, seen.get(name), precision, path)
        for name, group in groups.items()
    ]


def _rebuilt(
    base: BaseModel,
    settings: TinySettings,
    name: str,
    group: int,
    witness: Witness | None,
    precision: str,
    path: Path,
) -> Rebuilt:
    weight = weight_of(base, name)
    if witness:
        check_weight(witness, weight, module=name, path=base.path)
    settings.require(("frozen_rank", "projection_dim", "alpha", "seed"), path=path)
    rank, size = settings.frozen_rank or 1, settings.projection_dim or 1
    precision = witness.precision if witness else precision
    frozen = frozen_svd(weight, rank, settings.weights_dtype, precision, module=name)
    if witness:
        frozen = align(frozen, witness, module=name)
    elif precision != "float32":
        # The vectors are any driver's, the signs those that training would most likely find.
        frozen = like(frozen, frozen_svd(weight, rank, settings.weights_dtype, "float32").u)
    values = (*map(float, frozen.s), *([] if frozen.after is None else [frozen.after]))
    drawn = streams.pack_projection(name, settings.seed or 0, size, len(frozen.s))
    module = TinyModule(
        name=name,
        left=LazyTensor.of(frozen.u * frozen.s, DType.F32),
        right=LazyTensor.of(frozen.vt, DType.F32),
        projection=LazyTensor.of(drawn, DType.F32),
        group=group,
        scale=(settings.alpha or 0.0) / size,
        witness=witness or testify(weight, frozen.u, values, precision),
    )
    return Rebuilt(module=module, frozen=frozen)


def doubts(
    rebuilt: Iterable[Rebuilt], vectors: Mapping[int, LazyTensor], *, witnessed: bool
) -> list[str]:
    """Say how sure the recomputed singular vectors are, one sentence each.

    Args:
        rebuilt: every module.
        vectors: coefficients by group.
        witnessed: whether a witness settled the signs.
    """
    modules = list(rebuilt)
    found: list[str] = []
    if not witnessed:
        found += _sign_doubts(modules, vectors)
    close = [each for each in modules if each.frozen.predicted_error > _NOTABLE]
    if close:
        worst = max(close, key=lambda each: each.frozen.predicted_error)
        found.append(
            f"{len(close)} of {len(modules)} modules have singular values so close that another "
            f"driver may change the update by up to {worst.frozen.predicted_error:.1e} "
            f"({worst.module.name})"
        )
    return found


def _sign_doubts(modules: list[Rebuilt], vectors: Mapping[int, LazyTensor]) -> list[str]:
    driver = modules[0].frozen.driver
    head = f"singular vectors recomputed with {driver}: the checkpoint holds none and no witness"
    errors = [
        (flip_error(each.frozen.s, _core(each.module, vectors)), each.module.name)
        for each in modules
    ]
    error, name = max(errors)
    if error == 0:
        return [f"{head}; no sign can matter here"]
    doubt = f"had training found one pair with its other sign, the update of {name} would be off by"
    return [f"{head}; {doubt} {error:.0%}"]


def _core(module: TinyModule, vectors: Mapping[int, LazyTensor]) -> Array:
    return middle(module, vectors[module.group])
