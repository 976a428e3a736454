"""Adapters whose initialisation changed the base, as plain LoRA on the original base.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start from a part B0 · A0 of the weight W and
train on W - s · B0 · A0, so the update of W is s · (B · A - B0 · A0): a LoRA of twice the rank at
the same scale s. B0 · A0 follows from W alone. Definitions are those of PEFT 0.21.2
(`pissa_init`, `olora_init`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.base.copies import wide_rows
from adapterkit.base.places import Places
from adapterkit.dtype import DType
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.differences import norm
from adapterkit.model import Kind, PeftSource
from adapterkit.notes import Note
from adapterkit.passes.protocol import Context, Passed
from adapterkit.passes.weights import weight_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

    Array = np.ndarray[Any, np.dtype[np.float64]]

_SETTING = "init_lora_weights"
# Training computed the initial factors in float32.
_ROUNDING = 2.0**-24
# What may be between a frozen copy and the same computed again: by row, and of the whole weight.
_ROUNDINGS = {DType.F64: 1e-5, DType.F32: 1e-5, DType.F16: 2e-3, DType.BF16: 2e-2}
_COARSEST = 2e-2
_SLACK = 1e-6
# Elements that are compared at a time.
_COMPARED = 1 << 22
# Errors of the result, predicted from the base, that are worth a note, and that are too much.
_NOTED, _REFUSED = 1e-3, 1e-1
AGAIN = (
    "save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) where the "
    "initial adapter still is, or merge it there"
)
_IRREPRODUCIBLE = {
    "pissa_niter": "a randomised singular value decomposition, which no one can repeat",
    "corda": "the training data's covariance",
    "lora_ga": "gradients on the training data",
    "loftq": "an alternating quantisation of the base",
}


@dataclass(frozen=True)
class _Initial:
    """The part s · B0 · A0 of a weight that an adapter started from, as left · right.

    Attributes:
        left: (out, r).
        right: (r, in).
        doubt: largest error that rounding in training may have made, ‖·‖ as that of the weight.
    """

    left: Array
    right: Array
    doubt: float


class _Start(Protocol):
    def __call__(self, stored: Array, pair: Update, *, turned: bool) -> _Initial: ...


def undone(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the same model as an adapter of the original base: [A; A0], [B, -B0], same scales.

    Adapters without such an initialisation come back as they are. Embeddings keep their factors:
    PEFT initialises them as ever. DoRA magnitudes stay right, since the direction that they
    normalise, W - s · B0 · A0 + s · B · A, stays the same. A frozen copy, which PEFT saves of an
    output as it was changed, becomes the original weight.

    Args:
        adapter: with or without an initialisation that changed the base.
        context: its base is the original one with its weights, a Hugging Face directory.

    Returns:
        An adapter whose factors are float32 and of twice the rank, without the setting.

    Raises:
        UnsupportedError: if the initial factors do not follow from the base, or its singular values
            lie too close together to tell which were taken.
        BaseRequiredError: if the base or its weights are missing.
        IncompatibleBaseError: if a module is not in the base, or has another shape, or a frozen
            copy is not what the initialisation made of the base's weight.
    """
    setting = adapter.initialisation
    if not setting:
        return Passed(adapter)
    path = adapter.provenance.path if adapter.provenance else None
    initial = _initialisation(setting, path)
    weights = _weights(context.base, setting, path)
    plain: list[Update] = []
    copies: dict[TensorKey, LazyTensor] = {}
    worst = 0.0, ""
    rounded: set[DType] = set()
    for pair in adapter.pairs():
        if pair.embedding:
            continue
        weight = _weight(pair, weights, setting)
        rounded.add(weight.dtype)
        start = initial(_wide(weight), pair, turned=weights.conv1d(pair.module))
        key = TensorKey(pair.module, Role.BASE_COPY)
        if (copy := adapter.tensors.get(key)) is not None:
            _check_changed(copy, weight, start, pair.module, setting)
            copies[key] = weight
        a, b = _joined(pair, start)
        plain.append(replace(pair, a=a, b=b))
        size = norm(plain[-1])
        worst = max(worst, (start.doubt / size if size else 0.0, pair.module))
    notes = _notes(setting, worst, rounded, path)
    return Passed(_plain(adapter.updated(plain, copies)), tuple(map(Note, notes)))


def _initialisation(setting: str, path: Path | None) -> _Start:
    """Return what computes the initial factors from the stored weight."""
    if setting == "pissa":
        return _pissa
    if setting.lower() == "olora":
        return _olora
    raise UnsupportedError(f"{unrepeatable(setting)}; {AGAIN}", path=path)


def unrepeatable(setting: str) -> str:
    """Return why nobody can compute the initial factors again; empty for those that follow."""
    if setting == "pissa" or setting.lower() == "olora":
        return ""
    kind = next((name for name in _IRREPRODUCIBLE if setting.lower().startswith(name)), "")
    source = _IRREPRODUCIBLE.get(kind, "something that adapterkit does not know")
    return f"{_SETTING} = {setting!r} changed the base by what it took from {source}"


def _weights(base: BaseModel | None, setting: str, path: Path | None) -> Places:
    if base is None or base.kind != "hf" or not base.has_tensors:
        way = "give the model's directory with --base"
        if base is not None:
            way = (
                f"{base.path} has no Hugging Face weights; make it an adapter of the original "
                f"first: adapterkit convert {path or 'ADAPTER'} -o PLAIN --to peft --base MODEL"
            )
        raise BaseRequiredError(
            f"{_SETTING} = {setting!r} changed the base, and what it changed follows from the "
            f"original weights: {way}",
            path=path,
        )
    return Places(base)


def _weight(pair: Update, weights: Places, setting: str) -> LazyTensor:
    table = weights.shared(f"{pair.module}.weight")
    if table and weights.stored(pair.module) is None:
        raise UnsupportedError(
            f"shares its weight with {table}, so {_SETTING} = {setting!r} changed both; an adapter "
            "of the original base cannot say that: serve it with PEFT, or train with a base that "
            "does not tie them",
            where=pair.module,
        )
    weight = weight_of(pair, weights)
    if pair.kind is not Kind.LINEAR or not weight.is_matrix:
        message = "is no linear layer; what its initialisation changed is not known"
        raise UnsupportedError(message, where=pair.module)
    return weight


def _wide(tensor: LazyTensor) -> Array:
    import numpy as np

    return np.asarray(tensor.numpy(), dtype=np.float64)


def _pissa(stored: Array, pair: Update, *, turned: bool) -> _Initial:
    """Return the r largest singular triples of W, as the projection of W on their vectors.

    U_r · U_rᵀ · W needs only the eigenvectors of the smaller Gram matrix, and no sign or basis of
    theirs changes it. It is certain only as far as singular value r stands off r + 1.
    """
    import numpy as np

    weight = stored.T if turned else stored
    tall = weight.shape[0] > weight.shape[1]
    values, vectors = np.linalg.eigh(weight.T @ weight if tall else weight @ weight.T)
    basis = vectors[:, ::-1][:, : pair.rank]
    spectrum = np.sqrt(np.maximum(values[::-1], 0.0))
    left, right = (weight @ basis, basis.T) if tall else (basis, basis.T @ weight)
    doubt = 0.0
    if len(spectrum) > pair.rank:
        gap = max(spectrum[pair.rank - 1] - spectrum[pair.rank], 0.0)
        angle = min(1.0, _ROUNDING * spectrum[0] / gap) if gap else 1.0
        doubt = float(angle * spectrum[pair.rank - 1] * 2**0.5)
    return _Initial(left, right, doubt)


def _olora(stored: Array, pair: Update, *, turned: bool) -> _Initial:
    """Return s · Q_r · R_r of the QR decomposition of the stored weight.

    The first r columns of Q span the first r columns of the weight, and R_r = Q_rᵀ · W, so a QR of
    those columns is enough; signs cancel. PEFT decomposes a Conv1D as it is stored, (in, out), and
    adds the product of the factors turned.
    """
    import numpy as np

    first = stored[:, : pair.rank]
    basis, triangle = np.linalg.qr(first)
    left, right = basis, pair.scale * (basis.T @ stored)
    values = np.linalg.svd(triangle, compute_uv=False)
    angle = min(1.0, _ROUNDING * values[0] / values[-1]) if values[-1] else 1.0
    doubt = float(angle * np.linalg.norm(right))
    return _Initial(right.T, left.T, doubt) if turned else _Initial(left, right, doubt)


def _check_changed(
    copy: LazyTensor, weight: LazyTensor, start: _Initial, module: str, setting: str
) -> None:
    """Refuse a frozen copy that is not W - s · B0 · A0: it is of another base than W."""
    import numpy as np

    if copy.shape != weight.shape:
        here, there = (" x ".join(map(str, each.shape)) for each in (copy, weight))
        message = f"its frozen copy (base_layer) is {here}, and the base's weight {there}"
        raise IncompatibleBaseError(message, where=module)
    rounding = max(_ROUNDINGS.get(each.dtype, _COARSEST) for each in (copy, weight))
    step = max(1, _COMPARED // max(1, weight.shape[-1]))
    blocks = (slice(row, row + step) for row in range(0, weight.shape[0], step))
    size = 0.0
    apart: list[Array] = []
    for rows in blocks:
        begin, end, _ = rows.indices(weight.shape[0])
        whole, kept = (wide_rows(each.rows(begin, end)) for each in (weight, copy))
        taken = start.left[rows] @ start.right
        lengths = [np.linalg.norm(each, axis=1) for each in (whole, taken, kept)]
        size += float(np.square(lengths[0]).sum())
        apart.append(np.linalg.norm(kept - (whole - taken), axis=1) - rounding * sum(lengths))
    others = np.concatenate(apart) > start.doubt + _SLACK * size**0.5
    if others.any():
        raise IncompatibleBaseError(
            f"its frozen copy (base_layer) has another row {int(others.argmax())} than {setting} "
            "leaves of the base's weight: it was trained on another base; give that with --base",
            where=module,
        )


def _joined(pair: Update, start: _Initial) -> tuple[LazyTensor, LazyTensor]:
    """Return [A; A0] and [B, -B0] in float32; row i of A0 and column i of B0 have equal norms."""
    import numpy as np

    if not pair.scale:
        raise UnsupportedError("has scale 0, with which PEFT cannot initialise", where=pair.module)
    size = np.linalg.norm(start.right, axis=1) * np.linalg.norm(start.left, axis=0)
    lefts = np.linalg.norm(start.left, axis=0)
    balance = np.sqrt(size / abs(pair.scale)) / np.where(lefts, lefts, 1.0)
    b0 = start.left * balance
    a0 = start.right / np.where(balance, balance * pair.scale, 1.0)[:, None]

    def stacked_a(a: Array) -> Array:
        return np.concatenate([a.astype(np.float64), a0], axis=0)

    def stacked_b(b: Array) -> Array:
        return np.concatenate([b.astype(np.float64), -b0], axis=1)

    a_shape = (pair.a.shape[0] + len(a0), pair.a.shape[1])
    b_shape = (pair.b.shape[0], pair.b.shape[1] + b0.shape[1])
    return (
        pair.a.map(stacked_a, shape=a_shape, dtype=DType.F32),
        pair.b.map(stacked_b, shape=b_shape, dtype=DType.F32),
    )


def _notes(
    setting: str, worst: tuple[float, str], rounded: set[DType], path: Path | None
) -> list[str]:
    error, module = worst
    if error > _REFUSED:
        raise UnsupportedError(
            f"its first singular values lie so close together that {setting} in float32 may have "
            f"taken others (error up to {error:.2g} of the update); {AGAIN}",
            path=path,
            where=module,
        )
    notes = [f"{setting}: what it took from the base is taken back, which doubles the rank"]
    if error > _NOTED:
        notes.append(f"{module}: rounding in training may amount to {error:.2g} of the update")
    if lossy := sorted(kind.value for kind in rounded - {DType.F32, DType.F64}):
        kinds = " and ".join(lossy)
        notes.append(f"training ran on weights rounded to {kinds} after that; the rounding is left")
    return notes


def _plain(adapter: AdapterTensorSet) -> AdapterTensorSet:
    source = adapter.source
    return adapter.replace(
        initialisation=None,
        source=source.changed(**{_SETTING: True}) if isinstance(source, PeftSource) else source,
    )
