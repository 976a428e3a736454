"""Known ways in which converters break adapters, recognised by undoing them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from adapterkit.architectures.transforms import inverse, rope
from adapterkit.factors import take_rows, transposed
from adapterkit.lowrank.differences import difference
from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.proof import Comparison

# Two updates that point the same way are one update and two scales.
_PARALLEL = 1e-4
# An undone error leaves rounding only.
_UNDONE = 2e-2
_HEAD_SIZES = (16, 32, 64, 80, 96, 128, 160, 192, 256)


def diagnose(
    first: AdapterTensorSet,
    second: AdapterTensorSet,
    comparison: Comparison,
    options: FormatOptions,
) -> tuple[str, ...]:
    """Return what explains the difference of two adapters, one sentence for each cause."""
    pairs = {pair.module: pair for pair in second.pairs()}
    wrong = {
        pair.module: (pair, pairs[pair.module])
        for pair in first.pairs()
        if pair.module in comparison.differences
        and not comparison.differences[pair.module].relative_error <= _PARALLEL
    }
    sentences = list(_scales(comparison, wrong))
    parallel = {m for m in wrong if _is_parallel(comparison.differences[m].cosine)}
    causes = Counter(
        cause
        for module, (one, other) in wrong.items()
        if module not in parallel and (cause := _cause(one, other, options))
    )
    return (*sentences, *(f"{cause}: {_modules(count)}" for cause, count in causes.items()))


def _is_parallel(cosine: float | None) -> bool:
    return cosine is not None and 1 - abs(cosine) < _PARALLEL


def _scales(comparison: Comparison, wrong: Iterable[str]) -> Iterator[str]:
    found = [comparison.differences[module] for module in wrong]
    ratios = [
        d.norm_ratio * (1 if d.cosine > 0 else -1)
        for d in found
        if d.cosine is not None and d.norm_ratio is not None and _is_parallel(d.cosine)
    ]
    silent = sum(1 for d in found if d.norm_ratio == 0)
    if silent:
        yield f"no update in B where A has one: {_modules(silent)}"
    if not ratios:
        return
    low, high = min(ratios), max(ratios)
    if high - low < _PARALLEL * abs(high):
        everywhere = "everywhere" if len(ratios) == len(comparison.differences) else "where wrong"
        yield f"scale lost: {_short(high)} {everywhere} ({_modules(len(ratios))})"
    else:
        span = f"{_short(low)} to {_short(high)}"
        yield f"scales differ, directions agree: ratio {span} ({_modules(len(ratios))})"


_ARTICLE = {
    Kind.LINEAR: "a linear layer",
    Kind.EXPERTS: "stacked experts",
    Kind.EMBEDDING: "an embedding",
    Kind.CONVOLUTION: "a convolution",
}


def _cause(first: Update, second: Update, options: FormatOptions) -> str | None:
    if first.kind is not second.kind:
        return f"the update of {_ARTICLE[first.kind]} in A, of {_ARTICLE[second.kind]} in B"
    if first.kind is Kind.CONVOLUTION:
        return None if first.shape == second.shape else "shapes differ"
    if first.shape == second.shape[:-2] + second.shape[-2:][::-1] and _equal(
        first, transposed(second)
    ):
        return "factors transposed or swapped"
    if first.shape != second.shape:
        return "shapes differ"
    for heads in _head_counts(first, options):
        order = rope(first.shape[-2], heads)
        if any(_equal(first, take_rows(second, o)) for o in (order, inverse(order))):
            return "q/k rows not permuted between Hugging Face's and llama.cpp's rotary order"
    return None


def _head_counts(pair: Update, options: FormatOptions) -> Iterator[int]:
    rows = pair.shape[-2]
    sizes = [options.base.sizes.get(name) for name in ("heads", "kv_heads")] if options.base else []
    counts = [size for size in sizes if isinstance(size, int)]
    counts += [rows // size for size in _HEAD_SIZES]
    for heads in dict.fromkeys(counts):
        if heads > 0 and rows % (2 * heads) == 0:
            yield heads


def _equal(first: Update, second: Update) -> bool:
    """Compare up to a common factor, so that two errors in one file are both found."""
    found = difference(first, second)
    if found.relative_error <= _UNDONE:
        return True
    return found.cosine is not None and 1 - abs(found.cosine) < _PARALLEL


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _short(value: float) -> str:
    return f"{value:.4g}"
