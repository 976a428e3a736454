"""DoRA as plain LoRA: the nearest of a rank, with what that costs, for engines without DoRA.

DoRA (arXiv 2402.09353) makes m / ‖W + ΔW‖ · (W + ΔW) of a weight W, row by row. What that adds to W
has full rank as soon as a magnitude m is not the norm: its truncated singular value decomposition
is the best LoRA of a rank, and how far off it is, is known.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from adapterkit.advice import MERGE_INSTEAD
from adapterkit.base.places import Places
from adapterkit.dtype import DType
from adapterkit.errors import BaseRequiredError, FormatError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.model import Kind, Update
from adapterkit.notes import Loss, Note
from adapterkit.passes.protocol import Context, Passed
from adapterkit.passes.weights import weight_of
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from adapterkit.lowrank.operators import Operator
    from adapterkit.model import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

_KINDS = {Kind.LINEAR, Kind.CONVOLUTION}
_STORED = {DType.F16, DType.BF16, DType.F32, DType.F64}
_SEED = (0, 0)


def truncated(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return a LoRA of `context.dora_rank` for every DoRA, each a loss with its relative error.

    The error is that of the stored factors, ‖ΔW - s · B · A‖ / ‖ΔW‖ (Frobenius) of all that DoRA
    adds to the weight. Adapters and modules without a magnitude come back as they are.

    Args:
        adapter: with or without magnitudes.
        context: its base is the one that was trained on, with its weights.

    Raises:
        BaseRequiredError: if the base or its weights are missing.
        UnsupportedError: if a magnitude is that of an embedding or of experts, or by column.
        IncompatibleBaseError: if a module is not in the base, or has another shape.
        FormatError: if a magnitude has not one number for each output.
    """
    held = {key.module: key for key in adapter.tensors if key.role is Role.MAGNITUDE}
    if context.dora_rank is None:
        return Passed(adapter)
    for key in adapter.tensors:
        if key.role is Role.COLUMN_MAGNITUDE:
            message = f"is a DoRA by column; {MERGE_INSTEAD}"
            raise UnsupportedError(message, where=key.module)
    if not held:
        return Passed(adapter, (Note("holds no DoRA: a rank for it changes nothing"),))
    path = adapter.provenance.path if adapter.provenance else None
    base = context.base
    if base is None or base.kind != "hf" or not base.has_tensors:
        raise BaseRequiredError(
            "what DoRA adds to a weight follows from that weight: give the Hugging Face model's "
            "directory with --base",
            path=path,
        )
    pairs = [pair for pair in adapter.pairs() if pair.module in held]
    for pair in pairs:
        _check(pair, adapter.tensors[held[pair.module]])
    work = partial(_nearest, adapter=adapter, weights=Places(base), rank=context.dora_rank)
    found = in_threads(work, pairs)
    left = {key: t for key, t in adapter.tensors.items() if key not in held.values()}
    losses = tuple(_loss(pair, error) for pair, error in found)
    changed = adapter.replace(tensors=left).updated([pair for pair, _ in found])
    return Passed(changed, (), losses)


def _check(pair: Update, magnitude: LazyTensor) -> None:
    if pair.kind not in _KINDS:
        raise UnsupportedError(
            f"is a DoRA of {pair.kind}s; {MERGE_INSTEAD}",
            where=pair.module,
        )
    if magnitude.size != pair.shape[0]:
        message = f"has {magnitude.size} DoRA magnitudes for {pair.shape[0]} outputs"
        raise FormatError(message, where=pair.module)


def _nearest(
    pair: Update, *, adapter: AdapterTensorSet, weights: Places, rank: int
) -> tuple[Update, float]:
    """Return the best LoRA of a rank, and its relative error as it is stored."""
    import numpy as np

    from adapterkit.lowrank.products import LowRank, stored, wide
    from adapterkit.lowrank.sketching import compressed

    change = _change(pair, adapter, weights)
    rank = min(rank, *change.shape)
    plane = change.plane.held()
    found = compressed(plane, rank, np.asarray(change.right), _SEED)
    b, a = found.factors(rank)
    kind = pair.a.dtype if pair.a.dtype in _STORED else DType.F32
    a_shape, b_shape = pair.factor_shapes(rank)
    sides = stored(a.reshape(a_shape), kind), stored(b.reshape(b_shape), kind)
    new = Update(pair.module, *sides, 1.0, pair.kind)
    held = LowRank(wide(new.b).reshape(b.shape), wide(new.a).reshape(a.shape))
    return new, plane.distance(held) / found.norm if found.norm else 0.0


def _change(pair: Update, adapter: AdapterTensorSet, weights: Places) -> Operator:
    """Return what DoRA adds to a weight."""
    import numpy as np

    from adapterkit.lowrank.operators import Operator
    from adapterkit.lowrank.products import wide

    values = weight_of(pair, weights).numpy()
    values = values.T if weights.conv1d(pair.module) else values
    weight = values.reshape(len(values), -1)
    weight = weight.astype(np.float64 if weight.dtype == np.float64 else np.float32)
    ((b, a),) = pair.matrices(wide)
    magnitude = wide(adapter.tensors[TensorKey(pair.module, Role.MAGNITUDE)]).reshape(-1)
    both = Operator(weight, pair.scale * b, a)
    lengths = both.row_norms()
    rows = np.divide(magnitude, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return Operator(weight, both.left, both.right, rows, minus=True)


def _loss(pair: Update, error: float) -> Loss:
    message = (
        f"DoRA becomes the nearest LoRA of rank {pair.rank}, off by {error:.2g} of its update; a "
        "larger --dora-rank is nearer, and merge --into is exact"
    )
    return Loss("dora-truncated", pair.module, message, (TensorKey(pair.module, Role.MAGNITUDE),))
