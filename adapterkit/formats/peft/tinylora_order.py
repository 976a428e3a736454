"""Which vector belongs to which module of a PEFT TinyLoRA file: the file does not say.

PEFT numbers the modules in the order in which the model registers them, draws each projection with
that number and cuts the row into groups. A stored projection gives the number away; otherwise the
order of a `.bin` file, or that of the model family, has to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import BaseRequiredError
from adapterkit.tinylora import streams
from adapterkit.tinylora.registration import registered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

    from adapterkit.architectures import Architecture
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[Any]]

# How far a stored projection may be from the drawn one, per unit: rounding of the base's type, and
# torch's vectorised and plain code paths, which differ by up to 2e-6.
_CLOSE = {DType.F32: 1e-5, DType.F16: 2e-3, DType.BF16: 1.6e-2}

# Numbers by which two projections are told apart.
_ENOUGH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Modules in registration order, and how that is known."""

    names: tuple[str, ...]
    note: str


def find_order(
    names: tuple[str, ...],
    projections: Mapping[str, LazyTensor],
    *,
    seed: int,
    rounded: DType,
    in_file_order: bool,
    architecture: Architecture | None,
    path: Path,
) -> Order:
    """Put the modules of a file in registration order.

    Args:
        names: adapted modules, in file order.
        projections: stored projections by module; fewer than all count as none.
        seed: projection_seed.
        rounded: type of the base that the projections went through.
        in_file_order: whether the container keeps the order of registration.
        architecture: family of the base, if known.
        path: for messages.

    Raises:
        BaseRequiredError: if nothing tells.
    """
    if set(projections) == set(names) and streams.available():
        matched = _matched(names, projections, seed, rounded)
        if matched is not None:
            return Order(names=matched, note="told from the stored projections")
    if in_file_order:
        return Order(names=names, note="that of the file")
    known = registered(names, architecture) if architecture else None
    if known is not None and architecture is not None:
        return Order(names=tuple(known), note=f"that of {architecture.title}")
    raise BaseRequiredError(
        "which coefficients belong to which module depends on the order of the base's modules, and "
        "the file does not tell; give the base model with --base, or save the adapter again with "
        "save_projection=True"
        + ("" if streams.available() else "; pip install 'adapterkit[torch]' may do as well"),
        path=path,
    )


def _matched(
    names: tuple[str, ...], projections: Mapping[str, LazyTensor], seed: int, rounded: DType
) -> tuple[str, ...] | None:
    """Sort by the number whose projection each module has; None unless all are clear and apart.

    An adapter that was added to an already wrapped model keeps the numbers of the first one, which
    may have targeted more modules: numbers past the count are looked at too.
    """
    import numpy as np

    drawn: dict[tuple[int, ...], Array] = {}
    places: dict[str, int] = {}
    for name in names:
        stored = projections[name]
        if stored.shape not in drawn:
            size, rank, _ = stored.shape
            every = [
                streams.peft_projection(index, seed, size, rank).reshape(-1)[:_ENOUGH]
                for index in range(4 * len(names) + 64)
            ]
            drawn[stored.shape] = round_through(np.stack(every), rounded)
        values = np.asarray(stored.numpy(), dtype=np.float32).reshape(-1)[:_ENOUGH]
        apart = np.abs(drawn[stored.shape] - values).max(1)
        near = np.flatnonzero(apart <= _CLOSE[rounded] * max(1.0, float(np.abs(values).max())))
        if len(near) != 1:
            return None
        places[name] = int(near[0])
    if len(set(places.values())) != len(places):
        return None
    return tuple(sorted(names, key=places.__getitem__))


def round_through(values: Array, dtype: DType) -> Array:
    """Return float32 values rounded to another type, as moving to the base's device does."""
    return values.astype(dtype.numpy()).astype("float32")


def base_type(factor: LazyTensor) -> DType:
    """Return the type that the base had: the factors are computed in it and stored as float32."""
    import numpy as np

    if factor.dtype in {DType.F16, DType.BF16}:
        return factor.dtype
    values = np.asarray(factor.numpy(), dtype=np.float32)
    for dtype in (DType.BF16, DType.F16):
        with np.errstate(over="ignore"):
            if np.array_equal(round_through(values, dtype), values):
                return dtype
    return DType.F32
