"""Updates between Hugging Face modules and llama.cpp tensors, by the rules of a family."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import factors
from adapterkit.architectures.fusion import fuse_for, split_fused
from adapterkit.architectures.rows import row_factors, row_order
from adapterkit.architectures.transforms import inverse
from adapterkit.errors import IncompatibleBaseError
from adapterkit.model import Kind, Update

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from adapterkit.architectures.sizes import Sizes
    from adapterkit.architectures.table import Architecture, Match, Target, WeightRule


@dataclass(frozen=True, slots=True)
class Mapped:
    """The outcome of a mapping.

    Attributes:
        pairs: updates under their new names.
        unmatched: modules or tensors that no rule knows.
        sources: new name -> the old names that went into it.
        unsized: names kept in the engine's own layout, because no base gave the sizes.
    """

    pairs: tuple[Update, ...]
    unmatched: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    unsized: tuple[str, ...] = ()

    def renamed(self, rename: Callable[[str], str]) -> Mapped:
        """Return this with other new names."""
        return replace(
            self,
            pairs=tuple(replace(pair, module=rename(pair.module)) for pair in self.pairs),
            sources={rename(name): old for name, old in self.sources.items()},
            unsized=tuple(map(rename, self.unsized)),
        )


def find_rule(architecture: Architecture, module: str) -> Match | None:
    """Find the rule of a Hugging Face path, whatever wrapper or headless class spelled it."""
    if match := architecture.match_hf(module):
        return match
    if match := architecture.match_hf(architecture.root + module):
        return match
    for prefix, plain in _wrappers():
        if module.startswith(prefix) and (
            match := architecture.match_hf(plain + module.removeprefix(prefix))
        ):
            return match
    return None


def in_tower(module: str) -> bool:
    """Tell whether a path lies in a vision or audio tower."""
    return not _towers().isdisjoint(module.split("."))


def to_engine(
    architecture: Architecture,
    sizes: Sizes,
    pairs: Iterable[Update],
    present: Collection[str] = (),
) -> Mapped:
    """Rename and reorder updates of Hugging Face modules into llama.cpp's tensors.

    Args:
        architecture: the family.
        sizes: sizes of the base.
        pairs: updates by Hugging Face module.
        present: names of the base GGUF's tensors, which decide between layouts; empty if unknown.

    Raises:
        BaseRequiredError: if the base does not state a size that a rule needs.
        IncompatibleBaseError: if a module's rows cannot be heads of this base.
        UnknownArchitectureError: if no table describes the model.
    """
    architecture.require_known()
    engine: list[Update] = []
    unmatched: list[str] = []
    sources: dict[str, tuple[str, ...]] = {}
    stacks: dict[tuple[WeightRule, int | None], dict[int, Update]] = defaultdict(dict)
    for pair in pairs:
        match = _present(find_rule(architecture, pair.module), present)
        if match is None or not match.rule.adaptable or pair.kind is Kind.CONVOLUTION:
            unmatched.append(pair.module)
        elif match.rule.stacked and match.expert is not None:
            moved = _reordered(match.rule, sizes, match.layer, pair)
            stacks[match.rule, match.layer][match.expert] = moved
        else:
            parts = _split(match, sizes, _reordered(match.rule, sizes, match.layer, pair))
            sources.update({part.module: (pair.module,) for part in parts})
            engine.extend(parts)
    for (rule, layer), members in stacks.items():
        stack = _stack(rule, layer, members, sizes)
        engine.append(stack)
        sources[stack.module] = tuple(pair.module for pair in members.values())
    if whole := present or _whole(architecture, sizes):
        engine, fused = fuse_for(engine, whole, sizes)
        for name, parts in fused.items():
            sources[name] = tuple(m for part in parts for m in sources.pop(part))
    return Mapped(tuple(engine), tuple(unmatched), sources)


def _whole(architecture: Architecture, sizes: Sizes) -> frozenset[str]:
    """Return the tensors that llama.cpp has whole in every layer, where the family has such."""
    return frozenset(
        f"{_named(pattern, layer)}.weight"
        for pattern in architecture.fused
        for layer in range(sizes.value("layers"))
    )


def _present(match: Match | None, present: Collection[str]) -> Match | None:
    """Take the rule's alternative where the base has that layout's tensors and not this one's."""
    if match is None or match.rule.alternative is None or not present:
        return match
    name = _named(match.rule.targets[0].name, match.layer)
    other = _named(match.rule.alternative.targets[0].name, match.layer)
    if f"{name}.weight" not in present and f"{other}.weight" in present:
        return replace(match, rule=match.rule.alternative)
    return match


def _stack(
    rule: WeightRule, layer: int | None, members: Mapping[int, Update], sizes: Sizes
) -> Update:
    count = sizes.value(rule.count, layer)
    name = _named(rule.targets[0].name, layer)
    if max(members) >= count:
        raise IncompatibleBaseError(
            f"expert {max(members)} is adapted, but the base has {count}", where=name
        )
    return factors.stack_experts([members.get(expert) for expert in range(count)], name)


def from_engine(
    architecture: Architecture,
    sizes: Sizes | None,
    pairs: Iterable[Update],
    *,
    layout: str | None = None,
    like: Collection[str] = (),
    text_prefix: str = "",
) -> Mapped:
    """Undo `to_engine`: Hugging Face names, rows and experts from llama.cpp's tensors.

    Args:
        architecture: the family.
        sizes: sizes of the base; without them, rules that need some leave the rows as they are.
        pairs: updates named by tensor, without `.weight`.
        layout: `experts` for one module per expert, `fused` for one 3-D parameter.
        like: modules of another adapter, whose spelling is to be used where a family has several.
        text_prefix: spelling of the text tower in a multimodal class, in place of `model.`.

    Raises:
        UnknownArchitectureError: if no table describes the model.
    """
    architecture.require_known()
    spelling = _spelling(architecture, like)
    groups: dict[tuple[WeightRule, int | None], dict[int, Update]] = {}
    unmatched: list[str] = []
    for pair in split_fused(architecture, sizes, pairs, spelling.rules):
        match = _preferred(architecture.match_gguf(pair.module), layout, spelling)
        if match is None:
            unmatched.append(pair.module)
        else:
            groups.setdefault((match.rule, match.layer), {})[match.target] = pair
    found: list[Update] = []
    sources: dict[str, tuple[str, ...]] = {}
    unsized: list[str] = []
    for (rule, layer), members in groups.items():
        modules, raw = _restored(rule, sizes, layer, members)
        modules = [
            replace(pair, module=spelling.names.get(pair.module) or _in_class(pair, text_prefix))
            for pair in modules
        ]
        names = tuple(pair.module for pair in members.values())
        sources.update({pair.module: names for pair in modules})
        unsized.extend(pair.module for pair in modules if raw)
        found.extend(modules)
    return Mapped(tuple(found), tuple(unmatched), sources, tuple(unsized))


def _in_class(pair: Update, text_prefix: str) -> str:
    if text_prefix and pair.module.startswith("model."):
        return text_prefix + pair.module.removeprefix("model.")
    return pair.module


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How an adapter spells the modules of a table: rules it uses, table name -> its own name."""

    rules: frozenset[tuple[str, int | None]]
    names: Mapping[str, str]


def _spelling(architecture: Architecture, modules: Collection[str]) -> _Spelling:
    found = [(module, find_rule(architecture, module)) for module in modules]
    matches = [(module, match) for module, match in found if match]
    return _Spelling(
        frozenset((match.rule.hf, match.layer) for _, match in matches),
        {_named(m.rule.hf, m.layer, m.expert): module for module, m in matches},
    )


def _preferred(matches: Sequence[Match], layout: str | None, spelling: _Spelling) -> Match | None:
    for match in matches:
        if (match.rule.hf, match.layer) in spelling.rules:
            return match
    for match in matches:
        if layout is not None and match.rule.layout == layout:
            return match
    return matches[0] if matches else None


def _restored(
    rule: WeightRule, sizes: Sizes | None, layer: int | None, members: Mapping[int, Update]
) -> tuple[list[Update], bool]:
    if rule.sized and sizes is None:
        if len(rule.targets) > 1:
            return list(members.values()), True
        pair = replace(members[0], module=_named(rule.hf, layer))
        return [pair], True
    if rule.stacked:
        (pair,) = members.values()
        names = [_named(rule.hf, layer, expert) for expert in range(pair.experts)]
        parts = factors.unstack_experts(pair, names)
        return [_unordered(rule, sizes, layer, part) for part in parts], False
    fused = (
        _joined(rule, sizes, layer, members)
        if rule.per_head and sizes
        else _fused(rule, sizes, layer, members)
    )
    return [_unordered(rule, sizes, layer, fused)], False


def _fused(
    rule: WeightRule, sizes: Sizes | None, layer: int | None, members: Mapping[int, Update]
) -> Update:
    name = _named(rule.hf, layer)
    if len(rule.targets) == 1:
        return replace(members[0], module=name)
    parts: list[Update | None] = []
    heights: list[int] = []
    for place, target in enumerate(rule.targets):
        pair = members.get(place)
        heights.append(_height(rule, target, sizes, layer, members, pair))
        if pair is not None and target.rows and sizes is not None:
            order = row_order(target.rows, heights[-1], sizes, layer, pair.module)
            pair = factors.take_rows(pair, inverse(order))
        parts.append(pair)
    return factors.fuse_rows(parts, heights, name)


def _joined(
    rule: WeightRule, sizes: Sizes, layer: int | None, members: Mapping[int, Update]
) -> Update:
    """Undo `_split_heads`: every head's parts side by side, then head after head."""
    parts: list[Update | None] = []
    heights: list[int] = []
    for place, target in enumerate(rule.targets):
        pair = members.get(place)
        if pair is not None and target.transpose:
            pair = factors.transposed(pair)
        parts.append(pair)
        heights.append(sizes.value(target.size or "0", layer))
    fused = factors.fuse_rows(parts, heights, _named(rule.hf, layer))
    return factors.join_heads(fused)


def _split_heads(match: Match, sizes: Sizes, pair: Update) -> list[Update]:
    rule, layer = match.rule, match.layer
    heads = sizes.value(rule.per_head or "1", layer)
    shares = [sizes.value(target.size or "0", layer) for target in rule.targets]
    if pair.b.shape[-2] != heads * sum(shares):
        raise IncompatibleBaseError(
            f"has {pair.b.shape[-2]} rows, the base {heads} heads of {shares}", where=pair.module
        )
    stacked = factors.split_heads(pair, heads)
    parts: list[Update] = []
    start = 0
    for target, share in zip(rule.targets, shares, strict=True):
        part = factors.slice_rows(stacked, start, start + share)
        start += share
        part = factors.transposed(part) if target.transpose else part
        parts.append(replace(part, module=_named(target.name, layer)))
    return parts


def _height(
    rule: WeightRule,
    target: Target,
    sizes: Sizes | None,
    layer: int | None,
    members: Mapping[int, Update],
    pair: Update | None,
) -> int:
    if pair is not None:
        return pair.b.shape[-2]
    if target.size and sizes is not None:
        return sizes.value(target.size, layer)
    if target.size:
        raise IncompatibleBaseError(f"a part is missing ({target.name})", where=rule.hf)
    return next(iter(members.values())).b.shape[-2]


def _reordered(rule: WeightRule, sizes: Sizes, layer: int | None, pair: Update) -> Update:
    if rule.rows:
        order = row_order(rule.rows, pair.b.shape[-2], sizes, layer, pair.module)
        pair = factors.take_rows(pair, order)
    if rule.cols:
        order = row_order(rule.cols, pair.a.shape[-1], sizes, layer, pair.module)
        pair = factors.take_columns(pair, order)
    if rule.scale:
        pair = replace(pair, scale=pair.scale * sizes.number(rule.scale, layer))
    if rule.row_scales:
        pair = factors.scale_rows(
            pair, row_factors(rule, sizes, layer, pair.b.shape[-2], pair.module)
        )
    return pair


def _unordered(rule: WeightRule, sizes: Sizes | None, layer: int | None, pair: Update) -> Update:
    if sizes is None:
        return pair
    if rule.rows:
        order = row_order(rule.rows, pair.b.shape[-2], sizes, layer, pair.module)
        pair = factors.take_rows(pair, inverse(order))
    if rule.cols:
        order = row_order(rule.cols, pair.a.shape[-1], sizes, layer, pair.module)
        pair = factors.take_columns(pair, inverse(order))
    if rule.scale:
        pair = replace(pair, scale=pair.scale / sizes.number(rule.scale, layer))
    if rule.row_scales:
        given = row_factors(rule, sizes, layer, pair.b.shape[-2], pair.module)
        pair = factors.scale_rows(pair, 1 / given)
    return pair


def _split(match: Match, sizes: Sizes, pair: Update) -> list[Update]:
    rule, layer = match.rule, match.layer
    if rule.per_head:
        return _split_heads(match, sizes, pair)
    if len(rule.targets) == 1:
        return [replace(pair, module=_named(rule.targets[0].name, layer))]
    height = pair.b.shape[-2]
    shares = [
        sizes.value(target.size, layer) if target.size else height // len(rule.targets)
        for target in rule.targets
    ]
    if sum(shares) != height:
        raise IncompatibleBaseError(
            f"has {height} output rows, the base splits it into {shares}", where=pair.module
        )
    parts: list[Update] = []
    start = 0
    for target, share in zip(rule.targets, shares, strict=True):
        part = factors.slice_rows(pair, start, start + share)
        start += share
        if target.rows:
            order = row_order(target.rows, share, sizes, layer, pair.module)
            part = factors.take_rows(part, order)
        parts.append(replace(part, module=_named(target.name, layer)))
    return parts


def _named(pattern: str, layer: int | None, expert: int | None = None) -> str:
    return pattern.replace("{i}", str(layer)).replace("{e}", str(expert))


@cache
def _wrapper_data() -> Mapping[str, Any]:
    path = Path(__file__).parent / "wrappers.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def _wrappers() -> tuple[tuple[str, str], ...]:
    return tuple((prefix, plain) for prefix, plain in _wrapper_data()["text"])


@cache
def _towers() -> frozenset[str]:
    return frozenset(_wrapper_data()["towers"])
