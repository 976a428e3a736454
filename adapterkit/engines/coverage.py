"""What an engine does with every pair: apply it, ignore it, refuse it, or find no place for it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.architectures import LLAMA_CPP, find
from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base.fit import misfits
from adapterkit.base.peft_names import peft_names
from adapterkit.base.places import Places
from adapterkit.checks.findings import CoveredModule, Finding, Outcome, Severity, named
from adapterkit.checks.fitting import other_architecture
from adapterkit.checks.structure import outside_targets, unselected_note
from adapterkit.errors import IncompatibleBaseError, UnsupportedError
from adapterkit.formats.protocol import FormatOptions
from adapterkit.model.defects import problems
from adapterkit.served import served

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from adapterkit.base import BaseModel
    from adapterkit.base.fit import Misfit
    from adapterkit.engines.engine import Target
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.notes import Loss

# What becomes of modules, the finding of it, and its words.
_UNSERVED = (
    (Outcome.IGNORED, "AK501", "do nothing"),
    (Outcome.UNMATCHED, "AK502", "do nothing"),
    (Outcome.REFUSED, "AK503", "are refused"),
)
_TABLES = {"embed_tokens", "lm_head"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def cover(
    adapter: AdapterTensorSet, base: BaseModel | None, target: Target
) -> tuple[list[CoveredModule], list[Finding]]:
    """Return what the engine does with each module, and the findings that follow.

    Without a base nothing is known of any module, where names alone do not tell: that is one
    finding, and no coverage.
    """
    if target.coverage == "names":
        from adapterkit.engines.names import cover_names

        return ([], []) if problems(adapter) else cover_names(adapter, target, base)
    if base is None:
        message = f"what {target.title} does with each module depends on the base model"
        hint = "give it with --base"
        finding = Finding("AK300", Severity.UNCHECKED, (), message, hint, target.name)
        return [], [finding]
    if problems(adapter) or other_architecture(adapter, base):
        return [], []  # said already, and nothing would be applied
    if target.coverage == "gguf":
        return _by_tensor(adapter, base, target)
    return _by_module(adapter, base, target), []


def _by_tensor(
    adapter: AdapterTensorSet, base: BaseModel, target: Target
) -> tuple[list[CoveredModule], list[Finding]]:
    from adapterkit.formats.gguf.engine import engine_adapter
    from adapterkit.formats.gguf.losses import losses

    options = FormatOptions(base=base)
    try:
        lost = losses(adapter, options)
        engine = engine_adapter(adapter, options)
    except IncompatibleBaseError:
        return [], []  # as above: the comparison with the base says which modules do not fit
    except UnsupportedError as error:
        return [], [
            Finding(
                "AK305", Severity.UNCHECKED, named(error.where), error.message, engine=target.name
            )
        ]
    tensors = {module: name for name, modules in engine.sources.items() for module in modules}
    wrong = {
        found.module: found.message for found in misfits(adapter, base) if found.kind != "unknown"
    }
    refused = {key.module: loss for loss in lost if loss.blocks for key in loss.drops}
    covered = [
        _covered(pair, tensors.get(pair.module), base, wrong, refused) for pair in adapter.pairs()
    ]
    return covered, [_finding(loss, target) for loss in lost if loss.code in target.losses]


def _covered(
    pair: Update,
    tensor: str | None,
    base: BaseModel,
    wrong: Mapping[str, str],
    refused: Mapping[str, Loss],
) -> CoveredModule:
    name = f"{tensor}.weight" if tensor else None
    if tensor is None:
        return CoveredModule(pair.module, Outcome.UNMATCHED, None, "llama.cpp has no such tensor")
    if pair.module in refused:
        return CoveredModule(pair.module, Outcome.REFUSED, name, refused[pair.module].message)
    if pair.module in wrong:
        return CoveredModule(pair.module, Outcome.REFUSED, name, wrong[pair.module])
    if base.architecture.is_inert(tensor):
        reason = f"loaded and never applied (seen on {LLAMA_CPP})"
        return CoveredModule(pair.module, Outcome.IGNORED, name, reason)
    return CoveredModule(pair.module, Outcome.APPLIED, name)


def _finding(loss: Loss, target: Target) -> Finding:
    # Without a test of ours the engine may do right all the same.
    blocks = loss.blocks and loss.code != "unverified"
    severity = Severity.ERROR if blocks else Severity.WARNING
    return Finding(
        target.losses[loss.code], severity, named(loss.subject), loss.message, engine=target.name
    )


def _by_module(adapter: AdapterTensorSet, base: BaseModel, target: Target) -> list[CoveredModule]:
    wrong = {found.module: found for found in misfits(adapter, base) if found.kind != "unknown"}
    if unselected_note(adapter) is not None:
        return []  # the check of the adapter alone says that nothing is known of its targets
    outside = set(outside_targets(adapter))
    places = Places(base)
    covered = [_placed(pair, places, target, wrong, outside) for pair in adapter.pairs()]
    return _in_every_layer(covered, base, target) if target.whole else covered


def _in_every_layer(
    covered: Sequence[CoveredModule], base: BaseModel, target: Target
) -> list[CoveredModule]:
    """Pass over the kinds of modules that not every layer has."""
    depth = base.sizes.get("layers") or 0
    layers: dict[str, set[str]] = {}
    numbered = [(module, _NUMBER.search(module.module)) for module in covered]
    for module, number in numbered:
        if number and module.outcome is Outcome.APPLIED:
            layers.setdefault(_leaf(module), set()).add(number[0])

    def result(module: CoveredModule, number: re.Match[str] | None) -> CoveredModule:
        leaf = _leaf(module)
        if number is None or not 0 < len(layers.get(leaf, ())) < depth:
            return module
        reason = (
            f"{target.title} takes {leaf} only where all of the {depth} layers have it, here "
            f"{len(layers[leaf])}"
        )
        return replace(module, outcome=Outcome.IGNORED, reason=reason)

    return [result(module, number) for module, number in numbered]


def _leaf(module: CoveredModule) -> str:
    return module.module.rpartition(".")[2]


def _placed(
    pair: Update,
    places: Places,
    target: Target,
    wrong: Mapping[str, Misfit],
    outside: Collection[str],
) -> CoveredModule:
    module = pair.module
    misfit = wrong.get(module)
    if misfit and misfit.kind in {"shape", "expert"}:
        return CoveredModule(module, Outcome.REFUSED, module, misfit.message)
    if target.within and not re.search(target.within, f"{module}."):
        reason = f"{target.title} looks only at modules under layers.N, and says nothing"
        return CoveredModule(module, Outcome.IGNORED, None, reason)
    if misfit or places.has(module) is False:
        return _absent(module, places, target)
    path = places.loaded(module) if target.wrapped == "loaded" else module
    if path is None:
        return CoveredModule(module, Outcome.IGNORED, None, _renamed(module, places, target))
    if target.wrapped != "any" and not _own_path(path, places):
        reason = f"{target.title} looks for its very path, and the base's class has another"
        return CoveredModule(module, Outcome.IGNORED, None, reason)
    return _taken(module, places.base, target, outside)


def _absent(module: str, places: Places, target: Target) -> CoveredModule:
    """Return what the engine makes of a module that the base does not have."""
    leaf = module.rpartition(".")[2]
    outcome = Outcome(target.unmatched)
    if places.has_leaf(leaf) is False and Outcome(target.strangers) is not outcome:
        reason = f"{target.title} has no module that is called {leaf}, and refuses the adapter"
        return CoveredModule(module, Outcome(target.strangers), None, reason)
    silent = " and says nothing" if outcome is Outcome.IGNORED else ""
    return CoveredModule(module, outcome, None, f"{target.title} finds no such module{silent}")


def _taken(module: str, base: BaseModel, target: Target, outside: Collection[str]) -> CoveredModule:
    """Return what the engine makes of a module of the base, by the class and type of the model."""
    models, kind = served(target.models), base.model_type
    table = module.rpartition(".")[2] in _TABLES
    if table and not models.tableless.isdisjoint(base.classes):
        reason = f"{target.title} {models.version} takes no factors of it for {base.classes[0]}"
        return CoveredModule(module, Outcome.REFUSED, None, reason)
    if not models.takes(kind, module):
        reason = f"{target.title} has no place for it in models of type {kind}, and says nothing"
        return CoveredModule(module, Outcome.IGNORED, None, reason)
    if module in outside:
        reason = "the adapter's config does not select it"
        return CoveredModule(module, Outcome.IGNORED, module, reason)
    return CoveredModule(module, Outcome.APPLIED, module)


def _renamed(module: str, places: Places, target: Target) -> str:
    """Return why PEFT loads nothing under a name, and what it loads."""
    reason = (
        f"{target.title} loads a name as the renamings of its class's checkpoints make it, which "
        "change this one, and says nothing"
    )
    written = peft_names(places.base.classes).written(module)
    if written == module:
        return reason
    return f"{reason}; adapterkit convert --base BASE --for peft writes {written}"


def _own_path(module: str, places: Places) -> bool:
    """Tell whether the base's class has the module under this path, wrappers and all."""
    base = places.base
    if not base.architecture.known:
        return places.own(module)
    plain = base.architecture.match_hf(module) is not None
    if base.kind == "gguf":
        return True  # a GGUF does not tell which class it was made from
    if stand_ins := {*base.classes} & {*base.architecture.stand_ins}:
        return _in_stand_in(module, stand_ins)  # other spellings arrive in part, if at all
    if places.aliases():
        made = places.assembled_from(places.of(module) or "")
        return places.live(module) == module and (not made or module in made)
    if not base.text_prefix:
        names = places.spelling
        return names.in_class(names.canonical(module)) == module if names.cls else plain
    # transformers moved text towers about; every wrapped spelling is taken for one of them.
    return not plain or in_tower(module)


def _in_stand_in(module: str, classes: Collection[str]) -> bool:
    """Tell whether a class of another family, which stands in for the base's own, has a module."""
    matches = (find_rule(family, module) for name in classes for family in find(name))
    return any(match is not None and not match.rule.alias for match in matches)


def unserved(
    covered: Sequence[CoveredModule], target: Target, errors: Sequence[Finding]
) -> list[Finding]:
    """Return the headline: modules that load without a word and do nothing, or are refused.

    Args:
        covered: what the engine does with each module.
        target: the engine.
        errors: what is told already; a refused module that one of them is about is not told again.
    """
    about = {module for error in errors for module in error.modules}
    reasons = {error.message for error in errors}
    found: list[Finding] = []
    for outcome, code, what in _UNSERVED:
        modules = [module for module in covered if module.outcome is outcome]
        if outcome is Outcome.REFUSED:
            modules = [m for m in modules if m.module not in about and m.reason not in reasons]
        if modules:
            message = f"{len(modules)} of {len(covered)} modules {what}: {modules[0].reason}"
            names = tuple(module.module for module in modules)
            found.append(Finding(code, Severity.ERROR, names, message, engine=target.name))
    return found
