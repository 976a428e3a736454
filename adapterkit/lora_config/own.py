"""The LoraConfig that a safetensors file carries itself, as diffusers writes it.

It is JSON under `lora_adapter_metadata` (diffusers 0.36, `LORA_ADAPTER_METADATAKEY`): the fields
of the config, or of a pipeline's component each field as `transformer.r`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.json_file import read_json_object
from adapterkit.lora_config.config import BASE_CHANGING_INITS, LoraConfig
from adapterkit.lora_config.declared import contradictions
from adapterkit.lora_config.meaning import meaning
from adapterkit.notes import Note, NoteKind
from adapterkit.tables import TEXT, shown

if TYPE_CHECKING:
    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

KEY = "lora_adapter_metadata"
_LARGEST = 1 << 20
_LONGEST = 60
_MOST_SHOWN = 4
# A scale that was rounded to float32 is the same one.
_SAME_SCALE = 1e-6
# What says which model an adapter is for: all that a config beside the file may add.
_OF_BASE = ("base_model_name_or_path", "revision")
# What changes neither the update nor where it goes.
_IDLE = frozenset(
    {
        *_OF_BASE,
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    }
)
# What PEFT takes for a field that is not there; nothing for all others.
_USUAL: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "bias": "none",
    "qalora_group_size": 16,
}
# Fields by which a config is known from the name of a component before them.
_KNOWN = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_HEADED = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True, slots=True)
class Counted:
    """The config that counts.

    Attributes:
        raw: its fields.
        path: the file that it stands in, for messages.
        notes: what is to be said of another one.
    """

    raw: Mapping[str, Any]
    path: Path
    notes: tuple[Note, ...] = ()


def own_config(metadata: Mapping[str, str], path: Path) -> Mapping[str, Any] | None:
    """Return the config that a file carries itself, None if it carries none.

    Args:
        metadata: free text of the safetensors file.
        path: the file, for messages.

    Raises:
        FormatError: if what the file carries is no config.
        UnsupportedError: if it carries those of several components that mean different things.
    """
    return _component(_parsed(metadata[KEY], path), path) if KEY in metadata else None


def counted(metadata: Mapping[str, str], weights: Path, beside: Path) -> Counted:
    """Return the config of a weights file: its own, else the one beside it.

    The own one is complete: one beside it adds what model the adapter is for, and nothing else.

    Args:
        metadata: free text of the weights file.
        weights: the file.
        beside: adapter_config.json.

    Raises:
        FormatError: if one of the two is no config.
        UnsupportedError: if the file carries several that mean different things.
    """
    own = own_config(metadata, weights)
    other = read_json_object(beside)
    if own is None:
        return Counted(other, beside)
    named = own if own.get(_OF_BASE[0]) else other
    raw = {**own, **{name: named[name] for name in _OF_BASE if named.get(name)}}
    if not (apart := [name for name in dict.fromkeys((*own, *other)) if _apart(own, other, name)]):
        return Counted(raw, weights)
    each = [f"{n} {_told(_plain(own, n))}, not {_told(_plain(other, n))}" for n in apart]
    more = f" and {len(each) - _MOST_SHOWN} more" if len(each) > _MOST_SHOWN else ""
    listed = ", ".join(each[:_MOST_SHOWN]) + more
    told = (
        f"the LoraConfig in {weights.name} itself counts, not the {beside.name} beside it, which "
        f"says other: {listed}"
    )
    return Counted(raw, weights, (Note(told, NoteKind.OTHER_CONFIG),))


def carried(metadata: Mapping[str, str], path: Path) -> LoraConfig | None:
    """Return the config that a file of another format's names carries itself, None for none.

    Raises:
        FormatError: if what the file carries is no config.
        UnsupportedError: if it carries several, or one that is no low-rank update of a weight.
    """
    raw = own_config(metadata, path)
    return None if raw is None else LoraConfig(raw, path)


def governed(
    adapter: AdapterTensorSet, config: LoraConfig | None, base: BaseModel | None
) -> AdapterTensorSet:
    """Return an adapter that another format spells as the LoraConfig in its file says that it is.

    The config's scales, and what it says of the meaning of the tensors, count before what a file
    beside or a grammar says; a scale that is another is told.

    Args:
        adapter: as its format reads it, under Hugging Face names.
        config: the one that the file carries; None changes nothing.
        base: the model, if known.
    """
    if config is None:
        return adapter
    pairs = [pair for pair in adapter.pairs() if pair.rank]
    scales = {pair.module: config.scale_of(pair.module) for pair in pairs}
    ranks = {pair.module: (config.rank_of(pair.module), pair.rank) for pair in pairs}
    apart = [p for p in pairs if not math.isclose(p.scale, scales[p.module], rel_tol=_SAME_SCALE)]
    declared = contradictions(config, [*adapter.tensors], base)
    notes = adapter.provenance.notes if adapter.provenance else ()
    if apart:
        first, number = apart[0], len(apart)
        told = (
            f"the LoraConfig in {config.path.name} itself counts, which scales {first.module} by "
            f"{scales[first.module]:g}, not by {first.scale:g}"
        )
        more = f" (and {number - 1} more modules)" if number > 1 else ""
        notes = (*notes, Note(f"{told}{more}", NoteKind.OTHER_CONFIG))
    name = config.fields.optional(_OF_BASE[0], TEXT)
    return adapter.replace(
        scales={**adapter.scales, **scales},
        rank_conflicts={m: each for m, each in ranks.items() if each[0] != each[1]},
        unstored={**adapter.unstored, **declared["unstored"]},
        undeclared={**adapter.undeclared, **declared["undeclared"]},
        base=replace(adapter.base, name=name) if name else adapter.base,
        provenance=adapter.provenance and replace(adapter.provenance, notes=notes),
        **meaning(config),
    )


def _parsed(text: str, path: Path) -> Mapping[str, Any]:
    try:
        found: object = json.loads(text) if len(text) <= _LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError("is no JSON object of a LoraConfig", path=path, where=KEY)
    return cast("dict[str, Any]", found)


def _component(found: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the fields of a config, without the name of the component that they may be under."""
    if any(name in found for name in _KNOWN):
        return found
    components: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in found.items():
        component, _, field = name.rpartition(".")
        components[component][field] = value
    configs = list(components.values())
    if not any(name in config for config in configs for name in _KNOWN):
        raise FormatError("holds no field of a LoraConfig", path=path, where=KEY)
    if any(_apart(one, configs[0], name) for one in configs for name in {*one, *configs[0]}):
        raise UnsupportedError(
            f"carries different configs for {' and '.join(components)}; save each component alone",
            path=path,
            where=KEY,
        )
    return configs[0]


def _told(value: object) -> str:
    words = json.dumps(value)
    return words if len(words) <= _LONGEST else shown(value)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return name not in _IDLE and _meant(one, name) != _meant(other, name)


def _meant(config: Mapping[str, Any], name: str) -> object:
    """Return what PEFT takes a field for: null, false, empty are one, and names have no order."""
    value: object = _plain(config, name)
    if name == "init_lora_weights":
        text = value.lower() if isinstance(value, str) else ""
        return text if text.startswith(BASE_CHANGING_INITS) else None
    if name == "task_type":
        return value if value in _HEADED else None
    if isinstance(value, list):
        names = cast("list[object]", value)
        if all(isinstance(each, str) for each in names):
            return sorted(cast("list[str]", names)) or None
        return names
    return value or None


def _plain(config: Mapping[str, Any], name: str) -> object:
    value = config.get(name)
    return _USUAL.get(name) if value is None else value
