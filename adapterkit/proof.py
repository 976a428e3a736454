"""Compare two adapters module by module, from their factors alone."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.dtype import DType
from adapterkit.errors import FormatError, ProofError
from adapterkit.keys import PARTNERS, Role
from adapterkit.lowrank.differences import Difference, all_finite, difference, silent
from adapterkit.model.tying import one_spelling
from adapterkit.tensor import same_bits
from adapterkit.work import in_threads

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator
    from pathlib import Path

    from adapterkit.keys import TensorKey
    from adapterkit.model import AdapterTensorSet, BesideFile, Update
    from adapterkit.tensor import LazyTensor

# Relative Frobenius error that the rounding of a stored dtype explains.
TOLERANCES = {
    DType.F64: 1e-6,
    DType.F32: 1e-6,
    DType.F16: 1e-3,
    DType.BF16: 1e-2,
    DType.Q8_0: 1e-2,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters held against each other.

    Attributes:
        differences: module -> how far the second's update is from the first's.
        only_in_first: modules whose update the second does not have; zero updates are left out.
        only_in_second: likewise.
        elements: tensor beside the updates -> the largest error of one number of it, as a share of
            that number: among the many of a table, one that is wrong is no error of the whole.
    """

    differences: Mapping[str, Difference]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    elements: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def worst(self) -> tuple[str | None, float]:
        """The module with the largest relative error (NaN counts as the largest), and that."""
        module, error = None, 0.0
        for name, found in self.differences.items():
            if module is None or not found.relative_error <= error:
                module, error = name, found.relative_error
                if math.isnan(error):  # nothing is worse
                    break
        return module, error


def compare(
    first: AdapterTensorSet, second: AdapterTensorSet, tables: Collection[TensorKey] = ()
) -> Comparison:
    """Compare every pair of factors, every other tensor by its values, and trained files beside.

    An update that is tied in both counts once. A frozen copy of a table counts where both have it.

    Args:
        first: the reference.
        second: the other.
        tables: frozen copies that are not the base's own, and count where one alone has them.
    """
    (first, second), _ = one_spelling([first, second])
    pairs1 = {pair.module: pair for pair in first.pairs()}
    pairs2 = {pair.module: pair for pair in second.pairs()}
    shared = [(pair, pairs2[module]) for module, pair in pairs1.items() if module in pairs2]
    found = in_threads(lambda each: _shaped_difference(*each), shared)
    differences = {pair.module: each for (pair, _), each in zip(shared, found, strict=True)}
    files1, files2 = _files(first), _files(second)
    differences |= {
        name: _file_difference(file, files2[name])
        for name, file in files1.items()
        if name in files2
    }
    others1 = _others(first, pairs1, second, tables)
    others2 = _others(second, pairs2, first, tables)
    elements: dict[str, float] = {}
    for key, tensor in others1.items():
        if key in others2:
            name = str(key)
            differences[name], elements[name] = _value_difference(tensor, others2[key])
    return Comparison(
        differences,
        (*_unshared(pairs1, pairs2), *_apart(others1, others2), *_missing(files1, files2)),
        (*_unshared(pairs2, pairs1), *_apart(others2, others1), *_missing(files2, files1)),
        elements,
    )


def _shaped_difference(first: Update, second: Update) -> Difference:
    if (first.kind, first.shape) != (second.kind, second.shape):
        return Difference(float("inf"), None, None)
    return difference(first, second)


def _others(
    adapter: AdapterTensorSet,
    pairs: Mapping[str, Update],
    against: AdapterTensorSet,
    tables: Collection[TensorKey],
) -> dict[TensorKey, LazyTensor]:
    """Return what is added or replaced beside the updates: of a bias on B, the scale included.

    A frozen copy counts where both have it, or it is told.
    """
    return {
        key: _at_scale(tensor, pairs[key.module].scale) if _is_scaled(key, pairs) else tensor
        for key, tensor in adapter.tensors.items()
        if (key.role is not Role.BASE_COPY or key in against.tensors or key in tables)
        and not (key.module in pairs and key.role in PARTNERS)
    }


def _is_scaled(key: TensorKey, pairs: Mapping[str, Update]) -> bool:
    return key.role is Role.LORA_BIAS and key.module in pairs and pairs[key.module].scale != 1


def _at_scale(bias: LazyTensor, scale: float) -> LazyTensor:
    return bias.map(lambda values: values.astype("float64") * scale)


def _files(adapter: AdapterTensorSet) -> dict[str, BesideFile]:
    """Return the trained files that lie beside an adapter."""
    return {file.name: file for file in adapter.beside if file.trained}


def _file_difference(first: BesideFile, second: BesideFile) -> Difference:
    if filecmp.cmp(first.path, second.path, shallow=False):
        return Difference(0.0, 1.0, 1.0)
    return Difference(float("inf"), None, None)


def _apart(mine: Mapping[TensorKey, LazyTensor], theirs: Container[TensorKey]) -> list[str]:
    """Return tensors that the other lacks; a bias of zeros is the same as none."""
    missing = [key for key in mine if key not in theirs]
    return [str(k) for k in missing if k.role is not Role.LORA_BIAS or mine[k].numpy().any()]


def _missing(mine: Iterable[object], theirs: Container[object]) -> list[str]:
    return [str(name) for name in mine if name not in theirs]


def _unshared(mine: Mapping[str, Update], theirs: Mapping[str, Update]) -> list[str]:
    """Return modules that the other lacks; a zero update is the same as none."""
    return [module for module, pair in mine.items() if module not in theirs and not silent(pair)]


def _value_difference(first: LazyTensor, second: LazyTensor) -> tuple[Difference, float]:
    """Compare tensors by their values, as a whole and number by number."""
    if first.shape != second.shape:
        return Difference(math.inf, None, None), math.inf
    if same_bits(first, second):
        if not all_finite(first):
            return Difference(math.nan, None, None), math.nan
        return Difference(0.0, 1.0, 1.0), 0.0
    import numpy as np

    x, y = (np.asarray(t.numpy(), dtype=np.float64).reshape(-1) for t in (first, second))
    norm1, norm2 = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    errors = np.abs(y - x)
    apart = float(np.linalg.norm(errors))
    error = apart / norm1 if norm1 else (0.0 if apart == 0 else math.inf)
    cosine = float(x @ y) / (norm1 * norm2) if norm1 and norm2 else None
    # Numbers below the normal ones of a type are rounded as the smallest of those.
    sizes = np.abs(x) + second.dtype.smallest_normal
    with np.errstate(divide="ignore"):
        np.divide(errors, sizes, out=errors, where=errors != 0)
    of_one = float(errors.max(initial=0.0))
    return Difference(error, cosine, norm2 / norm1 if norm1 else None), of_one


def tolerance_for(dtypes: Iterable[DType]) -> float:
    """Return the error that storing in these dtypes explains: that of the coarsest."""
    return max((TOLERANCES.get(dtype, TOLERANCES[DType.BF16]) for dtype in dtypes), default=1e-6)


def prove(
    source: AdapterTensorSet, written: AdapterTensorSet, *, path: Path
) -> tuple[str | None, float]:
    """Return the worst module and its error, or raise if the written adapter is another one.

    Raises:
        FormatError: if a factor of the source is not finite.
        ProofError: if a module is missing, added, or further off than rounding to the dtype that it
            is stored in explains; of what is added or replaced beside updates, every number.
    """
    comparison = compare(source, written)
    module, error = comparison.worst
    if not math.isfinite(error):
        _blame(source, module or "")
    missing = (*comparison.only_in_first, *comparison.only_in_second)
    if missing:
        raise ProofError("was not written, or written twice", path=path, where=missing[0])
    for where, found, allowed in _beyond_rounding(comparison, written):
        of = "one of its numbers" if where in comparison.elements else "the update"
        raise ProofError(
            f"relative error {found:.3g} of {of}, more than {allowed:g} that rounding to the "
            "stored dtype explains; try --outtype f32",
            path=path,
            where=where,
        )
    return module, error


def _beyond_rounding(
    comparison: Comparison, written: AdapterTensorSet
) -> Iterator[tuple[str, float, float]]:
    """Yield what is further off than its own stored dtype explains: where, by how much, allowed."""
    coarsest = tolerance_for(tensor.dtype for tensor in written.tensors.values())
    own = {str(key): tolerance_for([tensor.dtype]) for key, tensor in written.tensors.items()}
    own |= {pair.module: tolerance_for([pair.a.dtype, pair.b.dtype]) for pair in written.pairs()}
    for name, each in comparison.differences.items():
        found = comparison.elements.get(name, each.relative_error)
        if not found <= (allowed := own.get(name, coarsest)):
            yield name, found, allowed


def _blame(source: AdapterTensorSet, module: str) -> None:
    """Raise for a source that is not finite; a finite one overflowed in the output."""
    for key, tensor in source.tensors.items():
        if module in {key.module, str(key)} and not all_finite(tensor):
            raise FormatError(
                "holds NaN or infinity; this adapter is broken, a diverged training run?",
                path=source.provenance.path if source.provenance else None,
                where=str(key),
            )
    raise ProofError("overflows the stored dtype; use --outtype f32 or bf16", where=module)
