"""What several adapters that become one agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.model.sources import GgufSource, PeftSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.model.adapter import AdapterTensorSet
    from adapterkit.notes import BaseReference

# Fields of adapter_config.json that say what the model is for, not what the adapter holds.
_PEFT_FIELDS = ("task_type", "revision", "auto_mapping", "fan_in_fan_out")

_PARAMETERS = "target_parameters"


def joint_base(adapters: Sequence[AdapterTensorSet]) -> BaseReference:
    """Return the first base that is recorded by name, else what the first adapter says."""
    bases = [adapter.base for adapter in adapters]
    return next((base for base in bases if base.name), bases[0])


def joint_source(adapters: Sequence[AdapterTensorSet]) -> PeftSource | GgufSource | None:
    """Return what a format's writer needs and all adapters of that format agree on."""
    sources = [adapter.source for adapter in adapters]
    engine = [source for source in sources if isinstance(source, GgufSource)]
    families = {source.family for source in engine}
    if len(engine) == len(sources) and len(families) == 1:
        return GgufSource(families.pop())
    peft = [source.config for source in sources if isinstance(source, PeftSource)]
    if not peft:
        return None
    agreed = {
        name: peft[0][name]
        for name in _PEFT_FIELDS
        if all(name in config and config[name] == peft[0][name] for config in peft)
    }
    # Which modules are bare parameters is a fact of the model that any of them may tell.
    bare = sorted({name for config in peft for name in _names(config.get(_PARAMETERS))})
    return PeftSource({**agreed, **({_PARAMETERS: bare} if bare else {})})


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
