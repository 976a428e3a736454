"""An adapter as llama.cpp sees it: tensor names, row orders and one alpha for the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.architectures import Architecture, Sizes, load
from adapterkit.architectures.mapping import to_engine
from adapterkit.errors import BaseRequiredError
from adapterkit.factors import with_scale
from adapterkit.model import GgufSource, Kind, Update

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet


@dataclass(frozen=True)
class EngineAdapter:
    """The pairs of an adapter by llama.cpp tensor.

    Attributes:
        architecture: value of `general.architecture`.
        pairs: pairs named by tensor, without `.weight`.
        sources: tensor -> modules that went into it.
        unmatched: modules for which llama.cpp has no tensor that can be adapted.
    """

    architecture: str
    pairs: tuple[Update, ...]
    sources: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...]


def engine_adapter(adapter: AdapterTensorSet, options: FormatOptions) -> EngineAdapter:
    """Map an adapter onto llama.cpp's tensors.

    Modules that were read in llama.cpp's own layout go back as they are.

    Raises:
        BaseRequiredError: if the family or a size is unknown.
        IncompatibleBaseError: if a module cannot belong to the base.
    """
    kept: Mapping[str, str] = adapter.engine_layout
    pairs = list(adapter.pairs())
    raw = [replace(pair, module=kept[pair.module]) for pair in pairs if pair.module in kept]
    rest = [pair for pair in pairs if pair.module not in kept]
    known = all(pair.kind is Kind.CONVOLUTION for pair in rest)  # it has no place whatever the base
    architecture, sizes = _family(adapter, options, needed=not known)
    sources = {kept[name]: (name,) for name in kept}
    if architecture is None or sizes is None:
        return EngineAdapter(str(adapter.base.architecture), tuple(raw), sources, ())
    present = options.base.tensors if options.base and options.base.kind == "gguf" else ()
    mapped = to_engine(architecture, sizes, rest, present)
    return EngineAdapter(
        architecture.gguf, (*raw, *mapped.pairs), sources | dict(mapped.sources), mapped.unmatched
    )


def _family(
    adapter: AdapterTensorSet, options: FormatOptions, *, needed: bool
) -> tuple[Architecture | None, Sizes | None]:
    if options.base:
        return options.base.family, options.base.sizes
    if isinstance(adapter.source, GgufSource) and adapter.source.family:
        # The file names its own family; its sizes stay unknown, and rules that need some say so.
        architecture = load(adapter.source.family)
        return architecture, Sizes(architecture, "gguf", {})
    if needed:
        recorded = adapter.base.name
        hint = f"; {recorded} is not in the local hub cache" if recorded else ""
        raise BaseRequiredError(
            "llama.cpp's names and row order depend on the base model: give its directory, "
            f"config.json or GGUF with --base{hint}"
        )
    return None, None


# Of the float32 in which a file holds alpha; what is smaller loses digits.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127


def common_alpha(pairs: Iterable[Update]) -> float:
    """Return the alpha that leaves most pairs untouched: the most common scale · rank.

    A file without a pair that does anything gets 1: alpha 0 would mean scale 1 to llama.cpp. So
    does one whose alphas float32 cannot hold.
    """
    alphas = Counter(
        pair.scale * pair.rank
        for pair in pairs
        if _SMALLEST <= abs(pair.scale * pair.rank) <= _LARGEST
    )
    return alphas.most_common(1)[0][0] if alphas else 1.0


def folded(pair: Update, alpha: float) -> Update:
    """Return the pair as it must be stored for `alpha / rank` to be its scale."""
    return with_scale(pair, alpha / pair.rank)
