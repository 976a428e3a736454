"""A base model as far as its headers tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.tables import TEXT, Table
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.architectures import Architecture, Sizes  # noqa: TC004  (slow to import)


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseModel:
    """The model that an adapter was trained on or will be served with.

    Attributes:
        path: what it was read from.
        kind: `hf` (directory or config.json) or `gguf`.
        name: hub id or recorded name, if any.
        candidates: families that it may be; several where they share a GGUF architecture. A class
            that no table describes is a family of its own, without rules.
        layout: `pipeline` for a directory of diffusers and `checkpoint` for a single file, of a
            diffusion model; empty for all others.
        folders: component -> its folder, of a pipeline.
        classes: names of its Hugging Face class, as config.json has them.
        facts: config.json (text tower) or GGUF keys, as `Sizes` looks them up.
        tensors: stored tensors by Hugging Face or llama.cpp name; empty if only a config is known.
        names: names of all stored tensors, also of shards that are not there; empty if unknown.
        identity: `general.*` keys that say what model this is, for `general.base_model.*`.
        tied: whether the output shares the embedding; None if neither config nor tensors tell.
        text_prefix: what a multimodal wrapper puts before its text tower's modules in place of
            `model.`; empty for a plain language model.
    """

    path: Path
    kind: str
    name: str | None
    candidates: Sequence[Architecture]
    facts: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])
    names: Collection[str] = ()
    identity: Mapping[str, str] = field(default_factory=dict[str, str])
    tied: bool | None = None
    text_prefix: str = ""
    classes: tuple[str, ...] = ()
    layout: str = ""
    folders: Mapping[str, str] = field(default_factory=dict[str, str])

    def __repr__(self) -> str:
        families = " or ".join(each.name for each in self.candidates)
        name = f", {self.name!r}" if self.name else ""
        known = f"{len(self.tensors)} tensors" if self.tensors else "no tensors"
        return f"<BaseModel: {self.path}, {self.kind}{name}, {families or 'no family'}, {known}>"

    @property
    def architecture(self) -> Architecture:
        """The most likely family."""
        return self.candidates[0]

    @property
    def family(self) -> Architecture:
        """The most likely family, for names of other programs.

        Raises:
            UnknownArchitectureError: if no table describes the model's class.
        """
        self.architecture.require_known(self.path)
        return self.architecture

    @property
    def model_type(self) -> str:
        """That of the whole model; empty where only a wrapped text tower's, or none, is known."""
        if self.kind != "hf":
            return ""
        if not self.text_prefix:
            return str(self.facts.get("model_type") or "")
        from adapterkit.base.classes import model_class

        known = next(filter(None, map(model_class, self.classes)), None)
        return known.model_type if known else ""

    @property
    def sizes(self) -> Sizes:
        """Sizes of this model in the tables' words."""
        from adapterkit.architectures import Sizes

        return Sizes(self.architecture, self.kind, self.facts, self.path)

    @property
    def expert_layout(self) -> str:
        """How this model's class spells experts: `experts` one by one, or `fused` in one parameter.

        transformers 5 holds them fused, whatever the checkpoint's names are; so does a base of
        which no more is known, since that is what current PEFT loads.
        """
        fields = Table(self.facts if self.kind == "hf" else {}, self.path)
        version = fields.optional("transformers_version", TEXT) or "5"
        return "experts" if version.split(".")[0] in {"2", "3", "4"} else "fused"

    @property
    def has_tensors(self) -> bool:
        """Whether the tensor table is known, not only the configuration."""
        return bool(self.tensors)

    def suited(self, modules: Collection[str]) -> BaseModel:
        """Return this base as the family, of those it may be, that knows most of `modules`.

        A GGUF file does not tell which Hugging Face class it was made from, an adapter does.
        """
        if len(self.candidates) == 1:
            return self
        from adapterkit.architectures.mapping import find_rule

        known = {
            family.name: sum(find_rule(family, module) is not None for module in modules)
            for family in self.candidates
        }
        return replace(self, candidates=sorted(self.candidates, key=lambda f: -known[f.name]))
