"""What an engine does with every pair: apply it, ignore it, refuse it, or find no place for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.base.fit import misfits
from adapterkit.errors import UnsupportedError
from adapterkit.formats.gguf_engine import engine_adapter
from adapterkit.formats.gguf_losses import losses
from adapterkit.formats.protocol import Options
from adapterkit.structure import problems
from adapterkit.validation.findings import CoveredModule, Finding, Outcome, Severity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet, LoraPair, Loss
    from adapterkit.validation.engines import Target


def cover(
    adapter: AdapterTensorSet, base: BaseModel | None, target: Target
) -> tuple[list[CoveredModule], list[Finding]]:
    """Return what the engine does with each module, and the findings that follow.

    Without a base nothing is known of any module: that is one finding, and no coverage.
    """
    if base is None:
        message = f"what {target.title} does with each module depends on the base model"
        hint = "give it with --base"
        finding = Finding("AK300", Severity.UNCHECKED, None, message, hint, target.name)
        return [], [finding]
    if problems(adapter):
        return [], []
    if target.coverage == "gguf":
        return _by_tensor(adapter, base, target)
    return _by_module(adapter, base, target), []


def _by_tensor(
    adapter: AdapterTensorSet, base: BaseModel, target: Target
) -> tuple[list[CoveredModule], list[Finding]]:
    options = Options(base=base, unverified=True)
    try:
        lost = losses(adapter, options)
        engine = engine_adapter(adapter, options)
    except UnsupportedError as error:
        return [], [
            Finding("AK305", Severity.UNCHECKED, error.where, error.message, target=target.name)
        ]
    tensors = {module: name for name, modules in engine.sources.items() for module in modules}
    wrong = dict(misfits(adapter, base))
    refused = {key.module: loss for loss in lost if loss.blocks for key in loss.drops}
    covered = [
        _covered(pair, tensors.get(pair.module), base, wrong, refused) for pair in adapter.pairs()
    ]
    return covered, [_finding(loss, target) for loss in lost if loss.code in target.losses]


def _covered(
    pair: LoraPair,
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
        reason = f"loaded and never applied (seen on {base.architecture.inert_build})"
        return CoveredModule(pair.module, Outcome.IGNORED, name, reason)
    if not pair.scale:
        return CoveredModule(pair.module, Outcome.IGNORED, name, "its scale is 0")
    return CoveredModule(pair.module, Outcome.APPLIED, name)


def _finding(loss: Loss, target: Target) -> Finding:
    severity = Severity.ERROR if loss.blocks else Severity.WARNING
    return Finding(
        target.losses[loss.code], severity, loss.subject, loss.message, target=target.name
    )


def _by_module(adapter: AdapterTensorSet, base: BaseModel, target: Target) -> list[CoveredModule]:
    wrong = dict(misfits(adapter, base))
    known = {name.removesuffix(".weight") for name in base.tensors} if base.kind == "hf" else None
    covered: list[CoveredModule] = []
    for pair in adapter.pairs():
        missing = find_rule(base.architecture, pair.module) is None
        if known and pair.module not in known and not _fused(pair):
            missing = missing or not _spelled_alike(pair.module, known)
        if missing:
            reason = f"{target.title} finds no such module and says nothing"
            outcome = Outcome(target.unmatched)
            reason = reason if outcome is Outcome.IGNORED else f"{target.title} has no such module"
            covered.append(CoveredModule(pair.module, outcome, None, reason))
        elif pair.module in wrong:
            covered.append(
                CoveredModule(pair.module, Outcome.REFUSED, pair.module, wrong[pair.module])
            )
        else:
            covered.append(CoveredModule(pair.module, Outcome.APPLIED, pair.module))
    return covered


def _fused(pair: LoraPair) -> bool:
    return len(pair.a.shape) > 2  # noqa: PLR2004  (experts)


def _spelled_alike(module: str, known: set[str]) -> bool:
    """Tell whether the base's checkpoint has the module under the adapter's very path.

    Checkpoints of wrapped models name their text tower in several ways; then the table decides.
    """
    last = module.rpartition(".")[2]
    return not any(name.endswith(f".{last}") for name in known)


def silent_no_ops(covered: Sequence[CoveredModule], target: Target) -> list[Finding]:
    """Return the headline: modules that load without a word and do nothing."""
    found: list[Finding] = []
    for outcome, code in ((Outcome.IGNORED, "AK501"), (Outcome.UNMATCHED, "AK502")):
        modules = [module for module in covered if module.outcome is outcome]
        if modules:
            whole = len(modules) == len(covered)
            severity = Severity.ERROR if whole or outcome is Outcome.UNMATCHED else Severity.WARNING
            message = f"{len(modules)} of {len(covered)} modules do nothing: {modules[0].reason}"
            found.append(Finding(code, severity, modules[0].module, message, target=target.name))
    return found
