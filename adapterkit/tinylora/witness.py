"""A few numbers by which another machine finds the same frozen SVD, or learns that it cannot.

Per singular pair the largest entry of U: its row and its sign; the leading singular values; and the
sha256 of the base tensor's stored bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError, IncompatibleBaseError, UncheckableError
from adapterkit.tables import ANY_MAPPING, TEXT, listed, number, one_of, whole

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from adapterkit.tables import Table
    from adapterkit.tensor import LazyTensor
    from adapterkit.tinylora.frozen import Frozen

    Array = np.ndarray[Any, np.dtype[Any]]

# Singular values of the same bytes agree to rounding, whatever computes them.
_DRIFT = 1e-5
# Beyond this the singular vectors of two drivers are different vectors, not rounded ones.
_TOO_CLOSE = 1e-2
_LARGEST_ROW = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """What the frozen SVD of one module was.

    Attributes:
        sha256: digest of the base tensor's stored bytes.
        dtype: stored type of the base tensor.
        singular_values: the first r, and the next one where there is one.
        anchors: for each pair the row of U's largest entry.
        signs: 1 or -1, the sign of that entry.
        precision: type in which the SVD was computed, `float32` or `float64`.
    """

    sha256: str
    dtype: str
    singular_values: tuple[float, ...]
    anchors: tuple[int, ...]
    signs: tuple[int, ...]
    precision: str

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "sha256": self.sha256,
            "dtype": self.dtype,
            "singular_values": list(self.singular_values),
            "anchors": list(self.anchors),
            "signs": list(self.signs),
            "precision": self.precision,
        }


def parse_witness(fields: Table) -> Witness:
    """Check the JSON form of a witness.

    Raises:
        FormatError: naming the field.
    """
    return Witness(
        sha256=fields.get("sha256", TEXT),
        dtype=fields.get("dtype", TEXT),
        singular_values=fields.get("singular_values", listed(number())),
        anchors=fields.get("anchors", listed(whole(0, _LARGEST_ROW))),
        signs=fields.get("signs", listed(whole(-1, 1))),
        precision=fields.get("precision", one_of("float32", "float64")),
    )


def testify(weight: LazyTensor, left: Array, values: tuple[float, ...], precision: str) -> Witness:
    """Write down what identifies a base tensor and the frozen factors made from it.

    Args:
        weight: the base tensor, as stored.
        left: U, or U times anything positive on its columns, (out, r).
        values: singular values.
        precision: type in which they were computed.
    """
    import numpy as np

    rows = np.abs(left).argmax(0)
    signs = np.where(left[rows, np.arange(left.shape[1])] < 0, -1, 1)
    return Witness(
        sha256=digest(weight),
        dtype=weight.dtype.value,
        singular_values=values,
        anchors=tuple(int(row) for row in rows),
        signs=tuple(int(sign) for sign in signs),
        precision=precision,
    )


def digest(weight: LazyTensor) -> str:
    """Return the sha256 of a tensor's stored bytes."""
    return hashlib.sha256(weight.tobytes()).hexdigest()


def check_weight(witness: Witness, weight: LazyTensor, *, module: str, path: Path) -> None:
    """Refuse a base whose tensor is another one than the witness saw.

    Raises:
        IncompatibleBaseError: naming the module.
    """
    if weight.dtype.value != witness.dtype:
        raise IncompatibleBaseError(
            f"the adapter was made on {witness.dtype} weights, {path} has {weight.dtype}",
            where=module,
        )
    if digest(weight) != witness.sha256:
        raise IncompatibleBaseError(
            f"its weight in {path} is not the one that the adapter was made on (sha256 differs)",
            where=module,
        )


def align(frozen: Frozen, witness: Witness, *, module: str) -> Frozen:
    """Return the frozen SVD with the signs that the witness saw.

    Raises:
        FormatError: if the witness is of another rank or matrix.
        IncompatibleBaseError: if the singular values are others.
        UncheckableError: if two singular values are too close for the vectors to be determined.
    """
    import numpy as np

    rank, rows = len(frozen.s), frozen.u.shape[0]
    if not len(witness.anchors) == len(witness.signs) == rank or max(witness.anchors) >= rows:
        raise FormatError("its witness does not fit the weight", where=module)
    seen = np.array(witness.singular_values[:rank])
    if len(seen) != rank or np.abs(frozen.s - seen).max() > _DRIFT * max(float(seen[0]), 0.0):
        raise IncompatibleBaseError(
            "its singular values are not those that the adapter was made with; another base, or "
            "another rounding of it",
            where=module,
        )
    if frozen.predicted_error > _TOO_CLOSE:
        raise UncheckableError(
            f"two singular values are {frozen.relative_gap:.1e} of the largest apart, so their "
            "vectors cannot be found again; use a form that carries its factors",
            where=module,
        )
    found = np.where(frozen.u[list(witness.anchors), np.arange(rank)] < 0, -1, 1)
    turn = (found * np.array(witness.signs)).astype(np.float32)
    return replace(frozen, u=frozen.u * turn, vt=frozen.vt * turn[:, None])


def parse_witnesses(settings: Table) -> dict[str, Witness]:
    """Return module -> witness of a settings document, empty where there is none.

    Raises:
        FormatError: if one of them is malformed.
    """
    known = settings.table("witness")
    if known is None:
        return {}
    return {
        str(name): parse_witness(known.inner(str(name), known.get(name, ANY_MAPPING)))
        for name in known.fields
    }
