"""One model family as data: which Hugging Face parameter is which llama.cpp tensor, and how.

A family file holds `title`, `gguf` (the name llama.cpp knows it by), `classes` and `model_types`
(Hugging Face), `other_heads` (classes of the same trunk without a head, with one that llama.cpp
lacks, or around it: multimodal ones of which it is the text tower), `tied` (whether the output
shares the embedding when the config does not say), `verified` (`engine`, `dense` or `no`),
optionally `select` (an expression over parameters that must be non-zero for this family to be
meant, where several share a GGUF name), `include` (blocks of rules), `inert` (tensors that
llama.cpp loads adapters for and never applies), `stand_ins` (classes of another family that
transformers builds this model with, and names in the config it saves), `[parameters]` and
`[rules]`.

A rule's key is the Hugging Face path with `{i}` for the layer and `{e}` for the expert. Its fields:

    gguf      the tensor without `.weight`, or a list of tensors or tables {name, size, rows}
    kind      linear (default), embedding, positions, experts (a 3-D parameter), norm, conv, tensor,
              header (llama.cpp keeps it there, one number for each layer, and has no tensor)
    rows      row order of llama.cpp, a call of a function in transforms.py
    cols      column order, likewise
    scale     factor that llama.cpp's weight carries and Hugging Face's does not
    row_scales  the same for stretches of rows, a list of [rows, factor] that covers them all
    add       constant that llama.cpp's vector carries (Gemma's norms)
    values    `minus_exp`: llama.cpp stores -exp(x)
    folded    the shape of llama.cpp's tensor, as expressions, where it counts axes otherwise
    squeezed  the base stores (channels, 1, width), llama.cpp (channels, width)
    conv1d    the base stores the weight as (in, out); factors are not affected
    shape     (out, in) as expressions, to check an adapter against a bare config
    count     how many of `{e}` there are (`experts` if not given)
    per_head  rows are heads: split every head into the targets, one matrix per head
    layout    `experts` or `fused`, where a family has two spellings of the same experts
    alias     another name of what the table has too, of other checkpoints; read, not written
    stored_turned    the 3-D parameter is (E, in, out); factors are not affected
    declares_turned  and its module says so (`is_transposed`), which PEFT's layout depends on
    bare      PEFT adapts its weight through target_parameters only: transformers 5 holds it without
              a Linear around it, or PEFT takes its name in target_modules for that of experts
    otherwise        fields that hold instead where a base GGUF lacks the targets (legacy layouts)
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from adapterkit.architectures.expressions import Call, parse_call
from adapterkit.errors import UnknownArchitectureError

# The build of llama.cpp that the tables were run on; the last number of xllamacpp's version.
LLAMA_CPP = "b11549"

_HERE = Path(__file__).parent
_FAMILIES = _HERE / "families"
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Target:
    """One llama.cpp tensor that a rule fills.

    Attributes:
        name: pattern of the tensor name, without `.weight`.
        size: rows that it takes, as an expression; an equal share if None.
        rows: row order applied after the split.
        transpose: with `per_head`, whether each head's matrix is stored turned.
    """

    name: str
    size: str | None = None
    rows: Call | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How one Hugging Face parameter corresponds to llama.cpp tensors; see the module's grammar."""

    hf: str
    targets: tuple[Target, ...]
    kind: str = "linear"
    rows: Call | None = None
    cols: Call | None = None
    scale: str | None = None
    row_scales: tuple[tuple[str, str], ...] = ()
    add: float = 0.0
    squeezed: bool = False
    values: str | None = None
    folded: tuple[str, ...] = ()
    conv1d: bool = False
    shape: tuple[str, ...] = ()
    count: str = "experts"
    per_head: str | None = None
    layout: str | None = None
    alias: bool = False
    stored_turned: bool = False
    declares_turned: bool = False
    bare: bool = False
    alternative: WeightRule | None = None

    @property
    def stacked(self) -> bool:
        """Whether many Hugging Face modules, one per expert, fill one tensor."""
        return "{e}" in self.hf

    @property
    def adaptable(self) -> bool:
        """Whether llama.cpp can hold a low-rank update for it."""
        return self.kind in {"linear", "embedding", "experts"}

    def place(self, layer: int | None, expert: int | None) -> str:
        """Return the path in one layer, and of one expert."""
        return self.hf.replace("{i}", str(layer)).replace("{e}", str(expert))

    @property
    def sized(self) -> bool:
        """Whether applying the rule takes sizes of the base model."""
        calls = (self.rows, self.cols, *(target.rows for target in self.targets))
        sizes = (self.scale, self.per_head, *(target.size for target in self.targets))
        calls = (*calls, *self.row_scales)
        return any(calls) or any(sizes)


@dataclass(frozen=True, slots=True)
class Match:
    """A name found in a table.

    Attributes:
        rule: the rule.
        target: index into `rule.targets`, for a llama.cpp name.
        layer: `{i}`, or None.
        expert: `{e}`, or None.
    """

    rule: WeightRule
    target: int = 0
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Architecture:
    """A model family: names, transforms and sizes, loaded from its file.

    Attributes:
        name: stem of the family file.
        title: as people call it.
        gguf: `general.architecture` of a GGUF file.
        classes: Hugging Face classes, the first is the one to write.
        other_heads: classes of the same trunk without a head, with one of their own, or around it.
        stand_ins: classes of another family that transformers builds this model with.
        model_types: Hugging Face `model_type` values, of configs that name no class.
        tied: whether output and embedding share weights when the config does not say.
        verified: `engine` (logits equal in llama.cpp), `dense` (full weights), or `no`.
        select: parameter expression that must be non-zero, or None.
        inert: llama.cpp tensors whose adapters load and are never applied, as name patterns.
        rules: every rule, in table order.
        parameters: the family's own sizes, over those of parameters.toml.
        absent: why no file describes this model; empty for a family of a file.
    """

    name: str
    title: str
    gguf: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    tied: bool
    verified: str
    select: str | None
    inert: tuple[str, ...]
    rules: tuple[WeightRule, ...]
    parameters: Mapping[str, Mapping[str, tuple[str, ...]]]
    absent: str = ""
    other_heads: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Architecture: {self.name}, {self.title}, {len(self.rules)} rules>"

    @property
    def names(self) -> frozenset[str]:
        """Every class and model type by which config.json may call it."""
        return frozenset((*self.classes, *self.other_heads, *self.model_types))

    @property
    def known(self) -> bool:
        """Whether a file describes it; of any other nothing is known but the checkpoint's names."""
        return not self.absent

    def require_known(self, path: Path | None = None) -> None:
        """Refuse a model without a table where names of another program are asked for.

        Raises:
            UnknownArchitectureError: naming the model's class.
        """
        if self.absent:
            raise UnknownArchitectureError(self.absent, path=path)

    def is_inert(self, name: str) -> bool:
        """Tell whether llama.cpp ignores an adapter of this tensor (name without `.weight`)."""
        return any(spelling in self.inert for spelling, _, _ in _spellings(name))

    def match_hf(self, path: str) -> Match | None:
        """Find the rule of a Hugging Face module or parameter path, as the table spells it."""
        return _match(path, _by_hf(self))

    def own(self, rule: WeightRule) -> WeightRule:
        """Return the rule that an alias is another name of; itself if there is no such rule."""
        return _own(self, rule) if rule.alias else rule

    def match_gguf(self, name: str) -> tuple[Match, ...]:
        """Find the rules that fill a llama.cpp tensor (name without `.weight`).

        Several rules may fill one tensor: fused experts and experts one by one.
        """
        return _match_all(name, _by_gguf(self))

    @property
    def root(self) -> str:
        """Component that headless models leave out: `model.` or `transformer.`."""
        tables = (rule.hf for rule in self.rules if rule.kind == "embedding")
        return next((table.split(".", 1)[0] + "." for table in tables), "")


@cache
def _by_hf(architecture: Architecture) -> Mapping[str, tuple[tuple[WeightRule, int], ...]]:
    return {rule.hf: ((rule, 0),) for rule in architecture.rules}


@cache
def _own(architecture: Architecture, rule: WeightRule) -> WeightRule:
    for other in architecture.rules:
        if not other.alias and replace(other, hf=rule.hf, bare=rule.bare, alias=True) == rule:
            return other
    return rule


@cache
def _by_gguf(architecture: Architecture) -> Mapping[str, tuple[tuple[WeightRule, int], ...]]:
    table: dict[str, tuple[tuple[WeightRule, int], ...]] = {}
    rules = [r for rule in architecture.rules for r in (rule, rule.alternative) if r]
    for rule in rules:
        for place, target in enumerate(rule.targets):
            table[target.name] = (*table.get(target.name, ()), (rule, place))
    return table


def _spellings(path: str) -> list[tuple[str, int | None, int | None]]:
    """Return `path` with its first, its first two, and none of its numbers as placeholders."""
    spans = [match.span() for match in _NUMBER.finditer(path)]
    found: list[tuple[str, int | None, int | None]] = []
    if len(spans) > 1:
        (a, b), (c, d) = spans[:2]
        name = f"{path[:a]}{{i}}{path[b:c]}{{e}}{path[d:]}"
        found.append((name, int(path[a:b]), int(path[c:d])))
    if spans:
        a, b = spans[0]
        found.append((f"{path[:a]}{{i}}{path[b:]}", int(path[a:b]), None))
        found.append((f"{path[:a]}{{e}}{path[b:]}", None, int(path[a:b])))
    return [*found, (path, None, None)]


def _match_all(
    path: str, table: Mapping[str, tuple[tuple[WeightRule, int], ...]]
) -> tuple[Match, ...]:
    for name, layer, expert in _spellings(path):
        if name in table:
            return tuple(Match(rule, place, layer, expert) for rule, place in table[name])
    return ()


def _match(path: str, table: Mapping[str, tuple[tuple[WeightRule, int], ...]]) -> Match | None:
    return next(iter(_match_all(path, table)), None)


def families() -> tuple[str, ...]:
    """Return the names of all family files, sorted."""
    return tuple(sorted(path.stem for path in _FAMILIES.glob("*.toml")))


@cache
def load(name: str) -> Architecture:
    """Read one family file.

    Raises:
        ValueError: if the file breaks the grammar; the tests load every file.
    """
    data = tomllib.loads((_FAMILIES / f"{name}.toml").read_text(encoding="utf-8"))
    raw: dict[str, dict[str, Any]] = {}
    for block in data.get("include", ()):
        for path, fields in _blocks()[block].items():
            raw[path] = {**raw.get(path, {}), **fields}
    for path, fields in data.get("rules", {}).items():
        raw[path] = {**raw.get(path, {}), **fields}
    return Architecture(
        name=name,
        title=data["title"],
        gguf=data["gguf"],
        classes=tuple(data["classes"]),
        model_types=tuple(data["model_types"]),
        tied=data["tied"],
        verified=data["verified"],
        select=data.get("select"),
        inert=tuple(data.get("inert", ())),
        other_heads=tuple(data.get("other_heads", ())),
        stand_ins=tuple(data.get("stand_ins", ())),
        rules=tuple(_rule(path, fields) for path, fields in raw.items()),
        parameters=_parameters(data.get("parameters", {})),
    )


@cache
def unlisted(names: tuple[str, ...]) -> Architecture:
    """Return the family of a model that no file describes: without rules, titled by its class.

    Args:
        names: its classes and model types, as config.json has them, the class first.
    """
    shown = ", ".join(dict.fromkeys(names)) or "no architecture"
    reason = next(filter(None, map(refusal, names)), None)
    missing = f"{shown} is not in the tables; `adapterkit list families` lists what is"
    return Architecture(
        name="",
        title=names[0] if names else "a model without a class",
        gguf="",
        classes=names,
        model_types=(),
        tied=False,
        verified="no",
        select=None,
        inert=(),
        rules=(),
        parameters={},
        absent=f"{shown}: {reason}" if reason else missing,
    )


def find(key: str) -> tuple[Architecture, ...]:
    """Return the families that name `key` as a class, a model type or a GGUF architecture.

    Only files that mention the word are parsed.
    """
    quoted = f'"{key}"'
    names = (path.stem for path in sorted(_FAMILIES.glob("*.toml")) if quoted in _text(path))
    loaded = (load(name) for name in names)
    return tuple(a for a in loaded if key in {*a.names, a.gguf})


def refusal(name: str) -> str | None:
    """Return why llama.cpp cannot serve a class or model type, or None."""
    return _refusals().get(name)


@cache
def _refusals() -> Mapping[str, str]:
    data = tomllib.loads((_HERE / "refused.toml").read_text(encoding="utf-8"))
    return {name: group["reason"] for group in data["refused"] for name in group["names"]}


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _blocks() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    return tomllib.loads((_HERE / "blocks.toml").read_text(encoding="utf-8"))


@cache
def common_parameters() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Return the sizes that every family knows, from parameters.toml."""
    return _parameters(tomllib.loads((_HERE / "parameters.toml").read_text(encoding="utf-8")))


def _parameters(data: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    return {
        name: {side: tuple(candidates) for side, candidates in sides.items()}
        for name, sides in data.items()
    }


def _rule(path: str, fields: Mapping[str, Any]) -> WeightRule:
    known = dict(fields)
    targets = known.pop("gguf")
    other = known.pop("otherwise", None)
    calls = {name: parse_call(known.pop(name)) for name in ("rows", "cols") if name in known}
    return WeightRule(
        hf=path,
        targets=tuple(_target(t) for t in ([targets] if isinstance(targets, str) else targets)),
        shape=tuple(known.pop("shape", ())),
        folded=tuple(known.pop("folded", ())),
        scale=_text_of(known.pop("scale", None)),
        row_scales=tuple((rows, factor) for rows, factor in known.pop("row_scales", ())),
        alternative=_rule(path, {**_common(fields), **other}) if other else None,
        **calls,
        **known,
    )


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("kind", "shape") if name in fields}


def _target(value: str | Mapping[str, Any]) -> Target:
    if isinstance(value, str):
        return Target(value)
    fields = dict(value)
    rows = fields.pop("rows", None)
    size = _text_of(fields.pop("size", None))
    return Target(size=size, rows=parse_call(rows) if rows else None, **fields)


def _text_of(value: float | str | None) -> str | None:
    return None if value is None else str(value)
