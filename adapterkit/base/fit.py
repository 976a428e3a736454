"""Does an adapter fit a base model: do its targets exist, and have they its dimensions?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, to_engine
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet, LoraPair

_MATRIX = 2


def check_fit(adapter: AdapterTensorSet, base: BaseModel) -> None:
    """Compare every module with the base's tensors, or with what its config implies.

    Raises:
        IncompatibleBaseError: if a module does not fit; names the first and counts the others.
    """
    found = list(misfits(adapter, base))
    if found:
        module, message = found[0]
        count = sum(1 for _ in adapter.pairs())
        raise IncompatibleBaseError(
            f"{message}; {len(found)} of {count} modules do not fit the base {base.path}",
            path=adapter.provenance.path if adapter.provenance else None,
            where=module,
        )


def misfits(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield (module, what is wrong) for modules that the family knows and the base contradicts."""
    kept = adapter.traits.get("engine_layout", {})
    pairs = [pair for pair in adapter.pairs() if pair.module not in kept]
    layers = base.sizes.get("layers")
    fitting: list[LoraPair] = []
    for pair in pairs:
        match = find_rule(base.architecture, pair.module)
        if match and match.layer is not None and layers is not None and match.layer >= layers:
            yield pair.module, f"the base has {layers} layers"
        elif base.kind == "hf" and (wrong := _wrong_shape(pair, base)):
            yield pair.module, wrong
        else:
            fitting.append(pair)
    if base.kind == "gguf":
        yield from _engine_misfits(fitting, base)


def _wrong_shape(pair: LoraPair, base: BaseModel) -> str | None:
    expected, actual = _expected(pair, base), _oriented(pair)[-2:]
    if expected is None or expected == actual:
        return None
    return f"the base has {_shown(expected)} here, the adapter {_shown(actual)}"


def _expected(pair: LoraPair, base: BaseModel) -> tuple[int, ...] | None:
    match = find_rule(base.architecture, pair.module)
    stored = base.tensors.get(f"{pair.module}.weight")
    # Quantised checkpoints store packed shapes; their config tells the logical ones.
    if stored is not None and stored.dtype.floating and len(stored.shape) == _MATRIX:
        turn = match is not None and match.rule.conv1d
        return stored.shape[::-1] if turn else stored.shape
    if match is None or not match.rule.shape:
        return None
    try:
        return tuple(int(base.sizes.value(text, match.layer)) for text in match.rule.shape)
    except BaseRequiredError:
        return None


def _oriented(pair: LoraPair) -> tuple[int, ...]:
    """Return (out, in), with experts in front, or (vocabulary, width) of an embedding."""
    return pair.shape[::-1] if pair.embedding else pair.shape


def _engine_misfits(pairs: list[LoraPair], base: BaseModel) -> Iterator[tuple[str, str]]:
    mapped = to_engine(base.architecture, base.sizes, pairs, base.tensors)
    for part in mapped.pairs:
        module = mapped.sources[part.module][0]
        stored = base.tensors.get(f"{part.module}.weight")
        if stored is None:
            if part.module != "output":  # a tied output is refused with its own reason
                yield module, f"the base has no {part.module}.weight"
        elif stored.shape != _oriented(part):
            shapes = f"{_shown(stored.shape)} here, the adapter {_shown(_oriented(part))}"
            yield module, f"the base has {shapes}"


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
