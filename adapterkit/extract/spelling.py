"""Names: from a checkpoint's spelling to the module that PEFT adapts, and between experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.architectures.mapping import find_rule

if TYPE_CHECKING:
    from adapterkit.architectures.table import Match, Rule
    from adapterkit.base.model import BaseModel
    from adapterkit.merge.into.huggingface import HuggingFaceNames
    from adapterkit.tensor import LazyTensor

_STACK = 3


def live_name(model: BaseModel, module: str, match: Match | None) -> str:
    """Return a stored module as the loaded model calls it.

    Checkpoints of a model with a head may leave out the component that it puts before all names
    (`h.0.attn.c_attn` of GPT-2), and multimodal ones spell their text tower in older ways.
    """
    if match is None or match.rule.alias:
        return module
    canonical = match.rule.hf.replace("{i}", str(match.layer)).replace("{e}", str(match.expert))
    if model.text_prefix and canonical.startswith("model."):
        return model.text_prefix + canonical.removeprefix("model.")
    headless = canonical == model.architecture.root + module
    return canonical if headless and _has_head(model) else module


def output_module(model: BaseModel) -> str | None:
    """Return the output layer of a model that may store none, or None for a model without one."""
    if not _has_head(model):
        return None
    rules = model.architecture.rules
    found = (rule.hf for rule in rules if rule.targets[0].name == "output" and not rule.alias)
    return next(found, None)


def _has_head(model: BaseModel) -> bool:
    classes: Any = model.facts.get("architectures")
    names = cast("list[Any]", classes) if isinstance(classes, list) else []
    return not any(str(n).endswith("Model") and "LMHead" not in str(n) for n in names)


def other_spelling(
    names: HuggingFaceNames, tuned: BaseModel, name: str
) -> list[list[tuple[str, LazyTensor]]] | None:
    """Find the rows of a base that spells the experts' block in the other way.

    Experts are stored one by one, or all in one parameter with gate and up below one another; both
    fill the same llama.cpp tensors, which is how the tables say that they are the same.

    Args:
        names: of the base.
        tuned: the model that `name` is from.
        name: one expert's matrix, the parameter of all, or the router.

    Returns:
        For each expert of `name` the stored rows that make it up, with their names; None if there
        are none, or their order differs.
    """
    match = find_rule(tuned.architecture, name.removesuffix(".weight"))
    if match is None or not _plain(match.rule):
        return None
    if match.expert is not None:
        found = _of_fused(names, match)
        return None if found is None else [found]
    shape = tuned.tensors[name].shape
    if len(shape) != _STACK or match.rule.kind != "experts":
        router = _same_targets(names, match)
        return None if router is None else [[router]]
    experts = [_one_by_one(names, match, expert) for expert in range(shape[0])]
    complete = [expert for expert in experts if expert is not None]
    return complete if len(complete) == len(experts) else None


def _plain(rule: Rule) -> bool:
    """Tell whether rows are stored in the order of the table's targets."""
    moved = rule.rows or rule.cols or rule.scale or rule.per_head or rule.stored_turned
    return not moved and not any(t.rows or t.size or t.transpose for t in rule.targets)


def _same_targets(names: HuggingFaceNames, match: Match) -> tuple[str, LazyTensor] | None:
    for rule in names.base.architecture.rules:
        if rule.targets == match.rule.targets and not rule.stacked and _plain(rule):
            stored = names.of(rule.hf.replace("{i}", str(match.layer)))
            if stored is not None:
                return stored, names.base.tensors[stored]
    return None


def _of_fused(names: HuggingFaceNames, match: Match) -> list[tuple[str, LazyTensor]] | None:
    wanted = match.rule.targets[0].name
    for rule in names.base.architecture.rules:
        places = [place for place, target in enumerate(rule.targets) if target.name == wanted]
        if rule.kind != "experts" or not places or not _plain(rule):
            continue
        stored = names.of(rule.hf.replace("{i}", str(match.layer)))
        if stored is None:
            continue
        tensor = names.base.tensors[stored]
        if len(tensor.shape) != _STACK or match.expert is None:
            continue
        height = tensor.shape[1] // len(rule.targets)
        begin = match.expert * tensor.shape[1] + places[0] * height
        return [(stored, tensor.rows(begin, begin + height))]
    return None


def _one_by_one(
    names: HuggingFaceNames, match: Match, expert: int
) -> list[tuple[str, LazyTensor]] | None:
    parts: list[tuple[str, LazyTensor]] = []
    for target in match.rule.targets:
        for rule in names.base.architecture.rules:
            if not rule.stacked or rule.targets[0].name != target.name or not _plain(rule):
                continue
            module = rule.hf.replace("{i}", str(match.layer)).replace("{e}", str(expert))
            if (stored := names.of(module)) is not None:
                parts.append((stored, names.base.tensors[stored]))
                break
    return parts if len(parts) == len(match.rule.targets) else None
