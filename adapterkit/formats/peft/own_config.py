"""The LoraConfig that a safetensors file carries itself, as diffusers writes it.

It is JSON under `lora_adapter_metadata` (diffusers 0.36, `LORA_ADAPTER_METADATA_KEY`): the fields
of the config, or of a pipeline's component each field as `transformer.r`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_KEY = "lora_adapter_metadata"
_LARGEST = 1 << 20
# What decides the update, and what stands for a field that is not there.
_MEANING: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}


def own_config(
    metadata: Mapping[str, str], beside: Mapping[str, Any], path: Path
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the config that counts, the file's own before the one beside it, and what to say.

    A config beside the file that means the same fills in what the own one leaves open, such as the
    name of the base; one that means something else is that of another adapter.

    Args:
        metadata: free text of the safetensors file.
        beside: adapter_config.json.
        path: the file, for messages.

    Raises:
        FormatError: if what the file carries is no config.
        UnsupportedError: if it carries those of several components that mean different things.
    """
    if _KEY not in metadata:
        return beside, ()
    own = _component(_parsed(metadata[_KEY], path), path)
    apart = [name for name in _MEANING if _meant(own, name) != _meant(beside, name)]
    if not apart:
        return {**beside, **{name: value for name, value in own.items() if value is not None}}, ()
    shown = ", ".join(f"{n} {_meant(own, n)!r}, not {_meant(beside, n)!r}" for n in apart)
    note = (
        f"the LoraConfig in {path.name} itself counts, not the adapter_config.json beside it, "
        f"which is another adapter's: {shown}"
    )
    return own, (note,)


def _parsed(text: str, path: Path) -> Mapping[str, Any]:
    try:
        found: object = json.loads(text) if len(text) <= _LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError("is no JSON object of a LoraConfig", path=path, where=_KEY)
    return cast("dict[str, Any]", found)


def _component(found: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the fields of a config, without the name of the component that they may be under."""
    if any(name in found for name in _MEANING):
        return found
    components: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in found.items():
        component, _, field = name.rpartition(".")
        components[component][field] = value
    configs = list(components.values())
    if not configs or not any(name in config for config in configs for name in _MEANING):
        raise FormatError("holds no field of a LoraConfig", path=path, where=_KEY)
    if any(_meant(one, name) != _meant(configs[0], name) for one in configs for name in _MEANING):
        raise UnsupportedError(
            f"carries different configs for {' and '.join(components)}; save each component alone",
            path=path,
            where=_KEY,
        )
    return configs[0]


def _meant(config: Mapping[str, Any], name: str) -> object:
    value = config.get(name)
    return _MEANING[name] if value is None else value
