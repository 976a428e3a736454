"""Names: from a checkpoint's spelling to the module that PEFT adapts, and between experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from adapterkit.architectures.table import Match, WeightRule
    from adapterkit.base.model import BaseModel
    from adapterkit.base.places import Places
    from adapterkit.tensor import LazyTensor

_STACK = 3


def live_name(places: Places, module: str, match: Match | None) -> str:
    """Return a stored module as the loaded model calls it.

    Checkpoints of a model with a head may leave out the component that it puts before all names
    (`h.0.attn.c_attn` of GPT-2), and multimodal ones spell their text tower in older ways. Without
    a stored name it is the table's.
    """
    model = places.base
    renamed = places.spelling.memory(module)
    if renamed != module:  # stored without the word, as if it were no layer
        renamed = renamed.removesuffix(".weight")
    # A layout of experts is a spelling of its own, which may be another than that in memory.
    if match is None or (renamed != module and match.rule.layout is None):
        return renamed
    if match.rule.alias:
        return module
    canonical = match.rule.place(match.layer, match.expert)
    if model.text_prefix and canonical.startswith("model."):
        return model.text_prefix + canonical.removeprefix("model.")
    headless = canonical == model.architecture.root + module
    return canonical if not module or (headless and _has_head(model)) else module


def output_module(places: Places) -> str | None:
    """Return the output layer of a model that may store none, or None for a model without one."""
    if not places.base.architecture.known:
        return places.tied_output
    if not _has_head(places.base):
        return None
    rules = places.base.architecture.rules
    found = (rule.hf for rule in rules if rule.targets[0].name == "output" and not rule.alias)
    return next(found, None)


def _has_head(model: BaseModel) -> bool:
    classes: Any = model.facts.get("architectures")
    names = cast("list[Any]", classes) if isinstance(classes, list) else []
    return not any(str(n).endswith("Model") and "LMHead" not in str(n) for n in names)


def wanted_rule(model: BaseModel, match: Match | None, layout: str) -> WeightRule | None:
    """Return the rule of another layout of the same experts' block, if that is the wanted one.

    Both fill the same llama.cpp tensors, which is how the tables say that they are the same.
    """
    if match is None or match.rule.layout in {None, layout}:
        return None
    filled = {target.name for target in match.rule.targets}
    for rule in model.architecture.rules:
        if rule.layout == layout and filled & {target.name for target in rule.targets}:
            return rule if _plain(rule) and _plain(match.rule) else None
    return None


def count_experts(names: Places, rule: WeightRule, layer: int | None) -> int:
    """Return how many experts a checkpoint has of a parameter that holds them all."""
    count = 0
    while rows_of(names, rule, layer, count):
        count += 1
    return count


def rows_of(
    names: Places, rule: WeightRule, layer: int | None, expert: int | None
) -> list[tuple[str, LazyTensor]]:
    """Return the stored rows of one matrix, with their tensors' names, in any layout.

    Experts are stored one by one, or all in one parameter with gate and up below one another.

    Args:
        names: of a checkpoint.
        rule: the matrix, as one of its family's layouts has it.
        layer: its layer.
        expert: its expert; None for what has none.

    Returns:
        The parts, one below the other; nothing where the checkpoint has no such matrix, or its
        rows are in another order.
    """
    stored = names.of(rule.place(layer, expert))
    if stored is not None:
        tensor = names.base.tensors[stored]
        if expert is None or rule.stacked:
            return [(stored, tensor)]
        height = tensor.shape[1] if len(tensor.shape) == _STACK else 0
        inside = bool(height) and expert < tensor.shape[0]
        return [(stored, tensor.rows(expert * height, (expert + 1) * height))] if inside else []
    if not _plain(rule):
        return []
    parts = [_target_rows(names, target.name, layer, expert) for target in rule.targets]
    return [part for part in parts if part] if all(parts) else []


def _target_rows(
    names: Places, target: str, layer: int | None, expert: int | None
) -> tuple[str, LazyTensor] | None:
    """Return the rows that fill one llama.cpp tensor, by whatever rule the checkpoint spells."""
    for rule in names.base.architecture.rules:
        places = [place for place, each in enumerate(rule.targets) if each.name == target]
        stored = names.of(rule.place(layer, expert)) if places and _plain(rule) else None
        if stored is None:
            continue
        tensor = names.base.tensors[stored]
        if rule.stacked or expert is None:
            return (stored, tensor) if len(rule.targets) == 1 else None
        if len(tensor.shape) == _STACK and expert < tensor.shape[0]:
            height = tensor.shape[1] // len(rule.targets)
            begin = expert * tensor.shape[1] + places[0] * height
            return stored, tensor.rows(begin, begin + height)
    return None


def _plain(rule: WeightRule) -> bool:
    """Tell whether rows are stored in the order of the table's targets."""
    moved = rule.rows or rule.cols or rule.scale or rule.per_head or rule.stored_turned
    return not moved and not any(t.rows or t.size or t.transpose for t in rule.targets)
