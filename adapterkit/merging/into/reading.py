"""The adapters of a merge into a base: read with it, and checked to be constant updates of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import FormatError, LossyConversionError, UnsupportedError, UsageError
from adapterkit.keys import Role, TensorKey
from adapterkit.loading import load_all
from adapterkit.lowrank.effect import IDLE, idle
from adapterkit.merging.into.losses import losses
from adapterkit.merging.planning import Source, checked_weight
from adapterkit.model.beside import BesideKind, left_behind, lost_trained
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import apply
from adapterkit.text import count as counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.loading import Loaded
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss

_NO_UPDATE = {
    "layer_replication": "replicates layers; build that base first, then merge into it",
    "alora_invocation_tokens": "is active after its invocation tokens only, which no weight can "
    "hold; serve it as an adapter",
    "engine_layout": "holds tensors that the tables cannot bring back from llama.cpp's layout",
}


def read_sources(
    given: Sequence[AdapterTensorSet | Path | str],
    weights: Sequence[float] | None,
    base: BaseModel,
    *,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    allow_lossy: bool = False,
    growing: bool = False,
) -> tuple[list[Source], BaseModel, tuple[Loss, ...], tuple[str, ...]]:
    """Read all adapters with the base's row orders, names and vocabulary.

    Where `growing` is true, a vocabulary whose rows an adapter carries stays as it is.

    Returns:
        The adapters in the base's family, that family's base, what was dropped, and notes.

    Raises:
        UsageError: if there is no adapter, or another number of weights.
        FormatError: if one is malformed or broken.
        UnsupportedError: if one is no constant update of this base.
    """
    if not given:
        raise UsageError("nothing to merge; name one adapter or more")
    if weights is not None and len(weights) != len(given):
        numbers = f"{counted(len(given), 'adapter')}, but {counted(len(weights), 'weight')}"
        raise UsageError(f"{numbers}: give one for each")
    weights = list(map(checked_weight, weights or [1.0] * len(given)))
    found: list[Source] = []
    dropped: list[Loss] = []
    loaded = load_all(
        given,
        base=base,
        dialect=dialect,
        alpha=alpha,
        as_format=as_format,
        allow_lossy=allow_lossy,
        growing=growing,
    )
    for each, weight in zip(loaded, weights, strict=True):
        for setting, reason in _NO_UPDATE.items():
            if setting in each.adapter.settings:
                raise UnsupportedError(f"{reason} ({setting})", path=each.label)
        lost = [*lost_trained(each.adapter.beside), *losses(each.adapter, each.base or base)]
        dropped += [*each.losses, *lost]
        if dropped and not allow_lossy:
            raise LossyConversionError(dropped, path=each.label)
        left = apply(["drop"], each.adapter, Context(losses=tuple(lost))).adapter
        source = Source(each.label, left, weight)
        _check_halves(source)
        found.append(source)
    notes = (f"{each.label}: {note}" for each in loaded for note in (*each.notes, *_left(each)))
    silence = (f"{each.label}: {IDLE}" for each in found if idle(each.adapter))
    return found, loaded[-1].base or base, tuple(dropped), (*notes, *silence)


def _left(loaded: Loaded) -> list[str]:
    """Say which files beside an adapter no model holds; of the tokenizer is told where it goes."""
    files = loaded.adapter.beside
    return left_behind(file for file in files if file.kind is not BesideKind.TOKENIZER)


def token_rows(source: Source, module: str) -> tuple[int, ...]:
    """Return the token numbers of trained rows, as `trainable_token_indices` has them.

    Raises:
        FormatError: if the setting does not tell.
    """
    numbers = source.adapter.tokens_of(module)
    key = TensorKey(module, Role.TOKEN_ROWS)
    count = source.adapter.tensors[key].shape[0]
    if len(numbers) != count or min(numbers, default=0) < 0:
        raise FormatError(
            f"holds {count} rows, and trainable_token_indices names {len(numbers)} tokens",
            path=source.label,
            where=str(key),
        )
    return numbers


def _check_halves(source: Source) -> None:
    """Refuse what stands beside factors without factors: nothing would say what it means."""
    adapted = {pair.module for pair in source.adapter.pairs()}
    beside = {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE, Role.LORA_BIAS}
    for key in source.adapter.tensors:
        if key.role in beside and key.module not in adapted:
            raise FormatError("has no factors beside it", path=source.label, where=str(key))
