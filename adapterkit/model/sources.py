"""What a format keeps of a file for its own round trip; other formats do not look inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """The base of all; a format of an entry point may have its own."""


@dataclass(frozen=True, slots=True)
class PeftSource(Source):
    """An adapter_config.json of PEFT.

    Attributes:
        config: the document.
        modules: the modules that it selects, if all of them are known.
    """

    config: Mapping[str, Any]
    modules: tuple[str, ...] = ()

    def changed(self, **settings: Any) -> PeftSource:
        """Return a copy with other settings."""
        return replace(self, config={**self.config, **settings})


@dataclass(frozen=True, slots=True)
class GgufSource(Source):
    """The header of a GGUF adapter.

    Attributes:
        family: name of the family table, if there is one.
        metadata: typed values of the keys that the writer does not make itself.
    """

    family: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a LoRA file of a diffusion model spells a module.

    Attributes:
        stem: what the names of its tensors begin with.
        prefix: what stands before the module.
        component: network that the prefix means; empty without one.
        path: the module, with underscores for dots where `flat`.
        flat: whether dots are underscores.
        ends: of its tensors' names.
        alpha: the number that is stored beside its factors, if any.
    """

    stem: str
    prefix: str
    component: str
    path: str
    flat: bool
    ends: tuple[str, ...]
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class DiffusionSource(Source):
    """The names of a LoRA file of a diffusion model.

    Attributes:
        models: names of the tables that it may be of.
        spellings: by module.
    """

    models: tuple[str, ...]
    spellings: Mapping[str, Spelling]


@dataclass(frozen=True, slots=True)
class MlxSource(Source):
    """An adapter_config.json of MLX-LM.

    Attributes:
        config: the document.
        metadata: that of the weights file.
    """

    config: Mapping[str, Any]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OnnxSource(Source):
    """An .onnx_adapter of onnxruntime.

    Attributes:
        adapter_version: a number of its writer's, which onnxruntime does not look at.
        model_version: likewise.
        names: what the graph calls the inputs of a module, A and B, by module.
    """

    adapter_version: int
    model_version: int
    names: Mapping[str, tuple[str, str]]
