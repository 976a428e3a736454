"""What the tensors of one module amount to: factors, a scale, and what stands beside them.

ΔW = alpha / r · up · down, r being the rows of `down`; without alpha it is up · down. Where
`lora_mid` stands between them, and in LoHa and LoKr, the product is written out as two factors;
LoKr's alpha counts for nothing where both matrices are whole (lycoris/modules/lokr.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.keys import Role
from adapterkit.model import Kind, Update
from adapterkit.tensor import LazyTensor
from adapterkit.tuners import Factors, hadamard, kronecker
from adapterkit.tuners.factored import computed, equal, wide

if TYPE_CHECKING:
    import numpy as np

    from adapterkit.tuners.products import Matrix

    Array = np.ndarray[Any, np.dtype[np.float64]]
    Parts = Mapping[str, LazyTensor]

_MATRIX = 2


@dataclass(frozen=True, slots=True)
class Made:
    """An update, and what is beside its factors.

    Attributes:
        update: the factors; its module is empty.
        others: magnitudes (out,), or (in,) by column, and biases (out,) by role.
        written_out: whether the factors are computed from other ones.
    """

    update: Update
    others: Mapping[Role, LazyTensor]
    written_out: bool = False


def made(parts: Parts, kernel: int, scale: float | None = None) -> Made:
    """Return the update that some tensors are.

    Args:
        parts: the tensors of one module, by what they do.
        kernel: width of the kernel of a convolution, for factors that are flattened.
        scale: what the metadata says where there is no alpha; 1 if that is nothing.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if shapes do not fit, or a tensor has no place in an update.
    """
    factors, rank, shape = _factors(parts, kernel)
    number = _alpha(parts)
    if number is not None and rank:
        scale = number / rank
    elif scale is None or rank is None:
        scale = 1.0
    a, b = _folded(factors, shape)
    kind = Kind.CONVOLUTION if len(a.shape) > _MATRIX else Kind.LINEAR
    update = Update("", a, b, scale, kind)
    written_out = not ("down" in parts and "mid" not in parts)
    return Made(update, _others(parts, update), written_out)


def _factors(parts: Parts, kernel: int) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    """Return factors as matrices or as they are, the rank under alpha, and columns to fold to."""
    if "down" in parts or "up" in parts:
        return _pair(parts)
    if any(name.startswith("hada") for name in parts):
        return _hadamard(parts, kernel)
    if any(name.startswith("lokr") for name in parts):
        return _kronecker(parts, kernel)
    if "diff" in parts:
        return _whole(parts["diff"])
    raise ValueError(f"has {', '.join(sorted(parts))} and no factors, which is no low-rank update")


def _pair(parts: Parts) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    down, up = parts["down"], parts["up"]
    for name, tensor in (("down", down), ("up", up)):
        if len(tensor.shape) < _MATRIX:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not that of a factor")
    if "mid" in parts:
        return _with_core(down, parts["mid"], up)
    axes = max(len(down.shape), len(up.shape))
    a, b = _axes(down, axes), _axes(up, axes)
    equal("ranks", a.shape[0], b.shape[1])
    if math.prod(b.shape[2:]) != 1:
        raise ValueError(f"up has shape {list(b.shape)}: its kernel must be of size 1")
    return Factors(a, b), a.shape[0], None


def _axes(tensor: LazyTensor, axes: int) -> LazyTensor:
    """Return a factor with ones for the axes that it lacks."""
    shape = (*tensor.shape, *[1] * (axes - len(tensor.shape)))
    return tensor if shape == tensor.shape else tensor.map(lambda x: x.reshape(shape), shape=shape)


def _with_core(
    down: LazyTensor, mid: LazyTensor, up: LazyTensor
) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    """Return up · (mid ∘ down): a core (r_up, r_down, *kernel) goes into A."""
    inputs, kernel = down.shape[1], mid.shape[2:]
    equal("ranks of mid and up", mid.shape[0], up.shape[1])
    equal("ranks of mid and down", mid.shape[1], down.shape[0])
    equal("kernel sizes of up and down, which are 1", math.prod(down.shape[2:] + up.shape[2:]), 1)
    a = _core(mid, lambda: wide(down).reshape(-1, inputs), inputs)
    b = up.map(lambda x: x.reshape(x.shape[:2]), shape=up.shape[:2])
    return Factors(a, b), down.shape[0], (inputs, *kernel)


def _core(core: LazyTensor, right: Any, columns: int) -> LazyTensor:
    """Return (r, columns · kernel) of a core (r, s, *kernel) times a matrix (s, columns)."""
    import numpy as np

    rank, kernel = core.shape[0], core.shape[2:]

    def values() -> Array:
        product = np.tensordot(wide(core), right(), axes=(1, 0))  # (r, *kernel, columns)
        return np.asarray(np.moveaxis(product, -1, 1).reshape(rank, -1), dtype=np.float64)

    return computed((rank, columns * math.prod(kernel)), values)


def _hadamard(parts: Parts, kernel: int) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in names)
    rank = w1_b.shape[0] if w1_b.shape else 0
    if "hada_t1" not in parts and "hada_t2" not in parts:
        columns = w1_b.shape[-1] if w1_b.shape else 0
        return hadamard(w1_a, w1_b, w2_a, w2_b), rank, _unflattened(columns, kernel)
    sides: list[LazyTensor] = []
    for core, left, right in ((parts["hada_t1"], w1_a, w1_b), (parts["hada_t2"], w2_a, w2_b)):
        sides += _sides(core, left, right)
    shape = (w1_b.shape[1], *parts["hada_t1"].shape[2:])
    equal("kernels", *(math.prod(parts[name].shape[2:]) for name in ("hada_t1", "hada_t2")))
    return hadamard(*sides), rank, shape


def _sides(core: LazyTensor, left: LazyTensor, right: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Return B (out, r) and A (r, in · kernel) of a core with w_a (r, out) and w_b (r, in)."""
    for tensor in (left, right):
        if not tensor.is_matrix:
            raise ValueError(f"a factor has shape {list(tensor.shape)}, not that of a matrix")
    if len(core.shape) <= _MATRIX:
        raise ValueError(f"the core has shape {list(core.shape)}, not that of a convolution's")
    equal("ranks of the core", core.shape[0], left.shape[0])
    equal("ranks of the core", core.shape[1], right.shape[0])
    turned = left.map(lambda x: x.T, shape=(left.shape[1], left.shape[0]))
    return turned, _core(core, lambda: wide(right), right.shape[1])


def _kronecker(parts: Parts, kernel: int) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    w1, w2 = _matrix(parts, "lokr_w1"), _matrix(parts, "lokr_w2")
    shape: tuple[int, ...] | None = None
    if "lokr_t2" in parts:
        core = parts["lokr_t2"]
        shape, w2 = (w2[-1].shape[-1], *core.shape[2:]), _sides(core, w2[0], w2[-1])
        ranks = [parts["lokr_w2_b"].shape[0]]
    else:
        ranks = [side[-1].shape[0] for side in (w2, w1) if len(side) > 1]
        if len(w2) == 1 and len(w2[0].shape) > _MATRIX:
            shape, w2 = w2[0].shape[1:], (_flat(w2[0]),)
    factors = kronecker(w1, w2)
    if shape is None:
        columns = _unflattened(factors.a.shape[1], kernel)
    else:
        columns = (w1[-1].shape[-1] * shape[0], *shape[1:])
    return factors, ranks[0] if ranks else None, columns


def _matrix(parts: Parts, name: str) -> Matrix:
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _flat(tensor: LazyTensor) -> LazyTensor:
    shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
    return tensor.map(lambda x: x.reshape(shape), shape=shape)


def _whole(diff: LazyTensor) -> tuple[Factors, int | None, tuple[int, ...] | None]:
    """Return a whole ΔW beside a unit matrix on its shorter side."""
    import numpy as np

    if len(diff.shape) < _MATRIX:
        raise ValueError(
            f"diff has shape {list(diff.shape)}: an update of a norm or a bias, which is no product"
        )
    matrix = _flat(diff)
    rows, columns = matrix.shape
    side = min(rows, columns)
    unit = LazyTensor.of(np.eye(side, dtype=np.float32)).cast(matrix.dtype)
    factors = Factors(matrix, unit) if rows <= columns else Factors(unit, matrix)
    return factors, None, diff.shape[1:] if len(diff.shape) > _MATRIX else None


def _unflattened(columns: int, kernel: int) -> tuple[int, ...] | None:
    """Return the columns (in, kernel, kernel) of a convolution's factor; None for a matrix."""
    if not kernel or columns % kernel**2:
        return None
    return columns // kernel**2, kernel, kernel


def _folded(factors: Factors, shape: tuple[int, ...] | None) -> tuple[LazyTensor, LazyTensor]:
    """Return factors with the columns folded to a convolution's, where it is one."""
    a, b = factors
    if shape is None:
        return a, b
    to_a, to_b = (a.shape[0], *shape), (*b.shape[:2], *[1] * (len(shape) - 1))
    return (
        a.map(lambda x: x.reshape(to_a), shape=to_a),
        b.map(lambda x: x.reshape(to_b), shape=to_b),
    )


def _alpha(parts: Parts) -> float | None:
    stored = parts.get("alpha")
    if stored is None:
        return None
    if stored.size != 1:
        raise ValueError(f"alpha has shape {list(stored.shape)}, not that of a number")
    alpha = float(stored.numpy().reshape(()))
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, not a finite number")
    return alpha


def _others(parts: Parts, update: Update) -> dict[Role, LazyTensor]:
    found: dict[Role, LazyTensor] = {}
    rows = update.matrix_shape[0]
    if "dora" in parts:
        role, tensor = _magnitude(parts["dora"], update)
        found[role] = tensor
    if "magnitude" in parts:
        found[Role.MAGNITUDE] = _vector(parts["magnitude"], rows)
    if "scaled_bias" in parts:
        found[Role.LORA_BIAS] = _vector(parts["scaled_bias"], rows)
    if "bias" in parts:
        if not update.scale:
            raise ValueError("has a bias beside an alpha of 0, which no scaled bias stands for")
        bias, scale = _vector(parts["bias"], rows), update.scale
        scaled = scale == 1.0
        found[Role.LORA_BIAS] = bias if scaled else bias.map(lambda x: x.astype("float64") / scale)
    return found


def _magnitude(tensor: LazyTensor, update: Update) -> tuple[Role, LazyTensor]:
    """Return DoRA's magnitudes: (out, 1...) by row, (1, in, 1...) by column, as vectors."""
    shape, rows, inputs = tensor.shape, update.matrix_shape[0], update.a.shape[1]
    by_column = len(shape) > 1 and shape[0] == 1 and (shape[1] != 1 or rows != 1)
    if not by_column:
        return Role.MAGNITUDE, _vector(tensor, rows)
    if tensor.size != inputs:
        raise ValueError(f"has {inputs} inputs, and magnitudes of shape {list(shape)} beside them")
    return Role.COLUMN_MAGNITUDE, tensor.map(lambda x: x.reshape(inputs), shape=(inputs,))


def _vector(tensor: LazyTensor, rows: int) -> LazyTensor:
    if tensor.size != rows:
        raise ValueError(f"has {rows} rows, and a vector of shape {list(tensor.shape)} beside them")
    if tensor.shape == (rows,):
        return tensor
    return tensor.map(lambda x: x.reshape(rows), shape=(rows,))
