"""The tokenizer and chat template of a merged model: those that an adapter was trained with."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.json_file import read_json_object
from adapterkit.model import BesideKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.merging.into.checkpoint import CheckpointPlan
    from adapterkit.merging.planning import Source

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template"


def with_tokenizer(
    plan: CheckpointPlan, sources: Sequence[Source]
) -> tuple[CheckpointPlan, list[str]]:
    """Return the plan with the files that lie beside the adapters in place of the base's.

    Only files that the base has otherwise or not at all are looked at. Adapters that disagree on
    one leave the base's; what was done is said.
    """
    found: dict[str, Path] = {}
    split: set[str] = set()
    for source in sources:
        for file in source.adapter.beside:
            if not file.apart:
                continue
            first = found.setdefault(file.name, file.path)
            if first != file.path and not filecmp.cmp(first, file.path, shallow=False):
                split.add(file.name)
    if split:
        names = ", ".join(sorted(split))
        return plan, [f"{names} beside the adapters differ; the base's tokenizer is kept"]
    if not found:
        return plan, []
    hidden = _hidden(found, plan.others)
    kept = [path for path in plan.others if path not in hidden]
    others = tuple(dict.fromkeys([*kept, *map(Path, found)]))
    notes = [f"{', '.join(found)} beside the adapter replace the base's tokenizer files"]
    notes += [f"{path} of the base is left out: {_SETTINGS} holds another" for path in hidden]
    return replace(plan, others=others, carried=found), notes


def unplaced(sources: Sequence[Source]) -> list[str]:
    """Say that a GGUF model keeps its own vocabulary, where a tokenizer lies beside an adapter."""
    labels = [
        source.label
        for source in sources
        if any(file.kind is BesideKind.TOKENIZER for file in source.adapter.beside)
    ]
    return [
        f"{label}: the tokenizer beside it is not used, the GGUF has its own" for label in labels
    ]


def _hidden(found: Mapping[str, Path], others: Sequence[Path]) -> list[Path]:
    """Return template files of the base that would win over the one in an adapter's settings."""
    own = found.get(_SETTINGS)
    if own is None or any(name.startswith(f"{_TEMPLATE}.") for name in found):
        return []
    if not read_json_object(own).get(_TEMPLATE):
        return []
    return [path for path in others if str(path).startswith(f"{_TEMPLATE}.")]
