"""Findings about an adapter alone: pairing, ranks, shapes, names, config against tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapterkit.base.places import Places
from adapterkit.checks.findings import Finding, Severity, named
from adapterkit.errors import UncheckableError
from adapterkit.lora_config.selection import ends_with
from adapterkit.model import PeftSource
from adapterkit.model.declared import SELECTORS, undeclared
from adapterkit.model.defects import Defect, defects
from adapterkit.notes import Note, NoteKind
from adapterkit.passes.initialisation import AGAIN, unrepeatable
from adapterkit.patterns import Allowance, ending

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adapterkit.base import BaseModel
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
    "beside": ("AK123", "save the adapter again"),
    "declared-rank": ("AK106", "declare it in rank_pattern, with its alpha"),
    "unsaved": ("AK112", ""),
    "unstored": ("AK115", ""),
    "unplaced": ("AK120", "convert it where it was trained to a spelling with dots"),
}


def structure_findings(
    adapter: AdapterTensorSet, base: BaseModel | None = None
) -> Iterator[Finding]:
    """Yield every structural finding; no tensor data is read.

    The base tells which modules PEFT leads names of a file to that are not theirs.
    """
    if not adapter.tensors:
        yield _error("AK111", None, "holds no tensors", "save the adapter again after training")
    yield from map(_finding, defects(adapter))
    chosen = {name: of for name, of in adapter.undeclared.items() if name in SELECTORS}
    denied = {name: of for name, of in adapter.undeclared.items() if name not in SELECTORS}
    for loss in undeclared(adapter.replace(undeclared=denied)):
        yield _error("AK116", loss.subject, loss.message)
    yield from _outside(chosen)
    yield from _unselected(adapter)
    if (init := adapter.initialisation) and (reason := unrepeatable(init)):
        yield _error("AK119", None, f"{reason}, and the adapter is none for the original", AGAIN)
    yield from _clean_ups(adapter)
    yield from _other_configs(adapter)
    yield from _beside(adapter)
    if config := peft_config(adapter):
        yield from _targets(adapter, config, base)
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
        hint = "adapterkit convert SRC -o DIR writes clean names"
        yield Finding("AK110", Severity.WARNING, (), note, hint, fix="to-peft")


def _other_configs(adapter: AdapterTensorSet) -> Iterator[Finding]:
    """Report a config beside the file that is not the file's: who loads the directory takes it."""
    for note in adapter.provenance.notes if adapter.provenance else ():
        if isinstance(note, Note) and note.kind is NoteKind.OTHER_CONFIG:
            message = f"{note}; other programs do not look into it"
            hint = "adapterkit convert SRC -o DIR writes what it says where all look; load DIR"
            yield Finding("AK122", Severity.ERROR, (), message, hint, fix="to-peft")


def unclean_names(adapter: AdapterTensorSet) -> Iterator[Note]:
    """Yield what the reader did to names that are not as PEFT saves them."""
    for note in adapter.provenance.notes if adapter.provenance else ():
        if isinstance(note, Note) and note.kind in _UNCLEAN:
            yield note


def _targets(
    adapter: AdapterTensorSet, config: Mapping[str, Any], base: BaseModel | None
) -> Iterator[Finding]:
    declared = config.get("target_modules")
    if isinstance(declared, list):
        modules = adapter.modules
        if base is not None:
            modules = (*modules, *filter(None, map(Places(base).loaded, modules)))
        for target in map(str, cast("list[Any]", declared)):
            if not any(ends_with(module, target) for module in modules):
                message = f"target_modules names {target}, and no tensor is of it"
                yield Finding("AK107", Severity.WARNING, (), message)


def _outside(chosen: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Report modules whose factors nobody loads who goes by the adapter's own config."""
    for setting, modules in chosen.items():
        selector = SELECTORS[setting]
        message = f"has factors, and {setting} does not select it: {selector.reader}"
        for module in modules:
            yield _error("AK108", module, message, selector.remedy)


def _unselected(adapter: AdapterTensorSet) -> Iterator[Finding]:
    if (note := unselected_note(adapter)) is not None:
        hint = "write the names of the modules into target_modules"
        yield Finding("AK118", Severity.UNCHECKED, (), note.text, hint)


def unselected_note(adapter: AdapterTensorSet) -> Note | None:
    """Return the note that says that nobody knows which modules the config selects, if any."""
    notes = adapter.provenance.notes if adapter.provenance else ()
    told = (note for note in notes if isinstance(note, Note) and note.kind is NoteKind.UNSELECTED)
    return next(told, None)


def outside_targets(adapter: AdapterTensorSet) -> Iterator[str]:
    """Yield modules whose factors are left out by who goes by the adapter's own config."""
    for setting, modules in adapter.undeclared.items():
        if setting in SELECTORS:
            yield from modules


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
                hint = "adapterkit convert SRC -o DIR writes one for each module"
                message += "sorts them when it saves"
                yield Finding("AK109", Severity.WARNING, (module,), message, hint)
                break
