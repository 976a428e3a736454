"""Findings about an adapter alone: pairing, ranks, shapes, names, config against tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.checks.selection import ends_with, selection
from adapterkit.errors import UncheckableError
from adapterkit.model import Kind, PeftSource
from adapterkit.model.declared import undeclared
from adapterkit.model.defects import Defect, defects
from adapterkit.notes import Note, NoteKind
from adapterkit.passes.initialisation import AGAIN, unrepeatable
from adapterkit.patterns import Allowance, ending

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adapterkit.model import AdapterTensorSet

_UNCLEAN = frozenset({NoteKind.ADAPTER_NAME, NoteKind.PREFIX, NoteKind.STRAY})
# kind of defect -> code, and what to do
_CODES = {
    "half": ("AK101", "save the adapter again"),
    "ranks": ("AK102", ""),
    "empty": (
        "AK103",
        "gather sharded parameters before saving (ZeRO-3, FSDP) and save again",
    ),
    "integers": ("AK104", ""),
    "axes": ("AK105", ""),
    "declared-rank": ("AK106", "declare it in rank_pattern, with its alpha"),
    "unsaved": ("AK112", ""),
    "unstored": ("AK115", ""),
    "unplaced": ("AK120", "convert it where it was trained to a spelling with dots"),
}


def structure_findings(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Yield every structural finding; no tensor data is read."""
    if not adapter.tensors:
        yield _error("AK111", None, "holds no tensors", "save the adapter again after training")
    yield from map(_finding, defects(adapter))
    for loss in undeclared(adapter):
        yield _error("AK116", loss.subject, loss.message)
    if (init := adapter.initialisation) and (reason := unrepeatable(init)):
        yield _error("AK119", None, f"{reason}, and the adapter is none for the original", AGAIN)
    yield from _clean_ups(adapter)
    yield from _other_configs(adapter)
    yield from _beside(adapter)
    if config := peft_config(adapter):
        yield from _targets(adapter, config)
        yield from _overlaps(adapter, config)


def peft_config(adapter: AdapterTensorSet) -> Mapping[str, Any]:
    """Return the adapter_config.json that an adapter was read with; empty for other formats."""
    return adapter.source.config if isinstance(adapter.source, PeftSource) else {}


def _error(code: str, module: str | None, message: str, hint: str = "") -> Finding:
    return Finding(code, Severity.ERROR, named(module), message, hint)


def _finding(defect: Defect) -> Finding:
    code, hint = _CODES[defect.kind]
    if defect.kind == "ranks" and defect.embedding:
        # llama.cpp compares the ranks of all pairs as it loads them, but not of this table's.
        code = "AK113"
    if defect.kind == "unplaced":
        return Finding(code, Severity.UNCHECKED, (defect.where,), defect.message, hint)
    return _error(code, defect.where, defect.message, hint)


def _clean_ups(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Report names that had to be cleaned up: other programs look for the clean ones."""
    for note in unclean_names(adapter):
        hint = "convert it to peft: names are written clean"
        yield Finding("AK110", Severity.WARNING, (), note, hint, fix="to-peft")


def _other_configs(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Report a config beside the file that is not the file's: who loads the directory takes it."""
    for note in adapter.provenance.notes if adapter.provenance else ():
        if isinstance(note, Note) and note.kind is NoteKind.OTHER_CONFIG:
            message = f"{note}; programs that load PEFT directories take the one beside it"
            hint = "adapterkit convert SRC -o DIR writes the file's own beside it; load DIR"
            yield Finding("AK122", Severity.ERROR, (), message, hint, fix="to-peft")


def unclean_names(adapter: AdapterTensorSet) -> Iterator[Note]:
    """Yield what the reader did to names that are not as PEFT saves them."""
    for note in adapter.provenance.notes if adapter.provenance else ():
        if isinstance(note, Note) and note.kind in _UNCLEAN:
            yield note


def _targets(adapter: AdapterTensorSet, config: Mapping[str, Any]) -> Iterator[Finding]:
    declared = config.get("target_modules")
    if isinstance(declared, list):
        modules = adapter.modules
        for target in map(str, cast("list[Any]", declared)):
            if not any(ends_with(module, target) for module in modules):
                message = f"target_modules names {target}, and no tensor is of it"
                yield Finding("AK107", Severity.WARNING, (), message)
    try:
        for module in outside_targets(adapter):
            message = "has factors, but the config does not select it: PEFT leaves them out"
            yield _error("AK108", module, message, "add it to target_modules")
    except UncheckableError as error:
        message = f"which modules the config selects is unchecked: {error.message}"
        hint = "adapterkit convert -o DIR writes the list of modules"
        yield Finding("AK118", Severity.UNCHECKED, (), message, hint, fix="to-peft")


def outside_targets(adapter: AdapterTensorSet) -> Iterator[str]:
    """Yield modules whose factors PEFT would leave out, by the adapter's own config.

    Experts in one tensor are selected by target_parameters; they are not looked at.

    Raises:
        UncheckableError: if an expression of the config could not be evaluated.
    """
    config = peft_config(adapter)
    chosen = selection(config)
    if chosen is None:
        return
    parameters = [str(name) for name in config.get("target_parameters") or ()]
    for pair in adapter.pairs():
        plain = pair.kind is not Kind.EXPERTS and not _names_parameter(pair.module, parameters)
        if plain and not chosen.selects(pair.module):
            yield pair.module


def _names_parameter(module: str, parameters: Sequence[str]) -> bool:
    return any(ends_with(f"{module}.weight", name) for name in parameters)


def _beside(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Report trained files that lie beside the adapter: who loads the adapter loads it alone."""
    for file in adapter.beside:
        if file.trained:
            message = f"{file.what} lies beside the adapter: nothing loads it with the adapter"
            hint = "load it as the program that trained it does"
            yield Finding("AK117", Severity.WARNING, named(file.name), message, hint)


def _overlaps(adapter: AdapterTensorSet, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Report modules that two patterns claim: PEFT sorts patterns when it saves."""
    modules = [pair.module for pair in adapter.pairs()]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = config.get(field) or {}
        if len(patterns) == 1:
            continue  # one pattern cannot be overruled by another
        allowance = Allowance()
        ready = [(key, value, ending(key, allowance)) for key, value in patterns.items()]
        for module in modules:
            try:
                hits = [(key, value) for key, value, pattern in ready if pattern.fits(module)]
            except UncheckableError as error:
                message = f"whether {field} has several answers is unchecked: {error.message}"
                yield Finding("AK118", Severity.UNCHECKED, (module,), message)
                break
            if len({value for _, value in hits}) > 1:
                shown = ", ".join(f"{key} = {value}" for key, value in hits)
                message = f"{field} has several answers ({shown}); the first counts, and PEFT "
                hint = "anchor the patterns, so that each module has one"
                message += "sorts them when it saves"
                yield Finding("AK109", Severity.WARNING, (module,), message, hint)
                break
