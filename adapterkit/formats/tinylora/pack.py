"""TinyLoRA checkpoints of the ANRGUSC pack: thirteen numbers that mean nothing without the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.base import find_base
from adapterkit.beside import beside_file
from adapterkit.errors import IncompatibleBaseError
from adapterkit.formats.tinylora.checkpoint import (
    COMPLETED,
    MANIFEST,
    STATE,
    Checkpoint,
    find_checkpoint,
    is_pack,
    read_vectors,
)
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tables import TEXT, Table
from adapterkit.tinylora.adapter import TinyAdapter, neutral
from adapterkit.tinylora.inference import tie_groups
from adapterkit.tinylora.pack import doubts, pack_targets, rebuild
from adapterkit.tinylora.registration import registered
from adapterkit.tinylora.settings import SEED, SETTINGS_FILE, TinySettings
from adapterkit.tinylora.targets import require_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.tensor import LazyTensor

NAME = "tinylora-pack"
# What a checkpoint is made of; the state first.
FILES = (STATE, MANIFEST, COMPLETED, SETTINGS_FILE)


def read(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Rebuild the frozen parts from the base, and return the plain LoRA they make.

    Raises:
        BaseRequiredError: without the base's Hugging Face weights.
        UsageError: if rank, alpha, seed or ties are not known.
        IncompatibleBaseError: if the base does not have the injected modules.
    """
    checkpoint = find_checkpoint(path, options.dialect)
    vectors = read_vectors(checkpoint.state)
    return _read(path, checkpoint, vectors, options)


def _read(
    path: Path, checkpoint: Checkpoint, vectors: Mapping[str, LazyTensor], options: FormatOptions
) -> AdapterTensorSet:
    metadata = checkpoint.metadata
    stated = Table(metadata, path)
    model = stated.optional("model_name", TEXT) or None
    base = require_weights(options.base or find_base(model), path=path, name=model)
    size = next(iter(vectors.values())).size
    settings = checkpoint.settings.updated(TinySettings(projection_dim=size, alpha=options.alpha))
    settings = settings.updated(TinySettings(seed=stated.optional("seed", SEED)))
    settings.require(("frozen_rank", "alpha", "seed"), path=path)
    names = pack_targets(base, settings)
    _check_targets(names, list(vectors), metadata, base)
    ordered = registered(names, base.architecture) is not None
    settings, groups, ties = tie_groups(
        names, vectors, settings, metadata, ordered=ordered, path=path
    )
    witnesses = checkpoint.witnesses
    rebuilt = rebuild(base, settings, groups, path=path, witnesses=witnesses)
    by_group = {groups[name]: vector for name, vector in vectors.items()}
    witnessed = all(name in witnesses for name in names)
    notes = [*checkpoint.notes, *ties, *doubts(rebuilt, by_group, witnessed=witnessed)]
    tiny = TinyAdapter(
        modules=tuple(each.module for each in rebuilt),
        vectors=by_group,
        form="pack",
        settings=settings,
        config={"keys": tuple(vectors), "metadata": dict(metadata)},
    )
    return neutral(
        tiny,
        base=BaseReference(name=model),
        provenance=Provenance(
            path, NAME, (*notes, *_rounding_notes(_stored_types(base, names), settings))
        ),
    ).replace(beside=beside_file(checkpoint.state, FILES, path, base))


def _stored_types(base: BaseModel, names: Sequence[str]) -> set[str]:
    """Return the stored types of the modules' weights."""
    return {base.tensors[f"{name}.weight"].dtype.value for name in names}


def _rounding_notes(types: set[str], settings: TinySettings) -> list[str]:
    if settings.dtype or types == {"BF16"}:
        return []
    stored = ", ".join(sorted(types))
    note = (
        f"the base's weights are taken as stored ({stored}); if training loaded them as bfloat16,"
    )
    return [f'{note} say "dtype": "bfloat16" in tinylora.json']


def _check_targets(
    names: Sequence[str], keys: list[str], metadata: Mapping[str, Any], base: BaseModel
) -> None:
    known = set(names)
    if stranger := next((key for key in keys if key not in known), None):
        raise IncompatibleBaseError(
            f"{base.path} has no such target; another base or other target_modules", where=stranger
        )
    match metadata.get("inject_summary"):
        case {"replaced_modules": int(count)} if count != len(names):
            raise IncompatibleBaseError(
                f"training injected {count} modules, the base has {len(names)} of these targets",
                path=base.path,
            )
        case _:
            pass


__all__ = ["is_pack", "read"]
