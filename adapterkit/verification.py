"""Check a file against the proof that it carries, against its source, and against its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.alterations import ROUNDED, Change, altered, changed_updates, distance
from adapterkit.base import BaseModel
from adapterkit.base.identity import identified
from adapterkit.certificates import Certificate, read_certificate, source_digest
from adapterkit.diagnosis import diagnose
from adapterkit.errors import AdapterKitError, BaseRequiredError, UncheckableError, UsageError
from adapterkit.fingerprints import fingerprinted
from adapterkit.hub import located
from adapterkit.loading import Loaded, Need, Source, load, load_all, open_model, recognise
from adapterkit.model import AdapterTensorSet
from adapterkit.model.losses import other_tables
from adapterkit.notes import first_and_more
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import apply
from adapterkit.proof import compare, tolerance_for
from adapterkit.stamps import contents, stamped
from adapterkit.text import PLAIN, Pen, Shown, count, printable, short
from adapterkit.work import watchable

if TYPE_CHECKING:
    from adapterkit.fingerprints import Fingerprint

_MOST = 20
# Commands whose output does what its source does; of old proofs none is known.
_FAITHFUL = ("", "convert", "write")
# Changes that are listed.
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class VerifyReport(Shown):
    """What a file's own proof says of it.

    Attributes:
        path: the file or directory.
        format: its format.
        sound: whether everything is as it was, and agrees with what it was held against.
        written_by: version of adapterkit that wrote it.
        command: of adapterkit that wrote it.
        options: of that command.
        sources: sha256 of what it was made from, by name.
        max_relative_error: largest error of a module when it was written.
        tensors: how many there are.
        modules: how many updates were compared with the proof.
        changes: what is not as it was.
        notes: what could not be compared, and what else is known.
    """

    path: str
    format: str
    sound: bool
    written_by: str
    command: str
    options: Mapping[str, str]
    sources: Mapping[str, str]
    max_relative_error: float
    tensors: int
    modules: int
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    _entries = "changes"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return whether it is as it was written, what is not, and what it was written from."""
        lines = [
            "sound: every byte and every update is as it was written"
            if self.sound
            else f"changed: {count(len(self.changes), 'finding')}"
        ]
        told = pen.shown(self.changes, _SHOWN)
        lines += [f"  {change.kind}: {change.where}: {change.message}" for change in told]
        if more := len(self.changes) - len(told):
            lines.append(f"  and {more:,} more; --json lists all")
        by = f" {self.command}" if self.command else ""
        names = ", ".join(f"{name} ({digest[:12]})" for name, digest in self.sources.items())
        lines.append(
            f"written by adapterkit {self.written_by}{by} from {names or 'memory'}, largest "
            f"relative error {short(self.max_relative_error)}"
        )
        return "\n".join(map(printable, lines))


@watchable
def verify(
    source: AdapterTensorSet | Path | str,
    *,
    against: AdapterTensorSet | Path | str | None = None,
    base: BaseModel | Path | str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check an adapter or merged model that adapterkit wrote against the proof that it carries.

    Of a model every tensor and setting is compared, and what it was merged from: the adapters by
    their updates, the base by its bytes.

    The proof is no signature: who can change a file can write another proof into it.

    Args:
        source: adapter or model, file or directory; or an adapter that was read from one, whose
            updates are compared as they are in memory now.
        against: what it was made from, or should be equal to: every update is compared. Of a model:
            an adapter that was merged into it.
        base: the base model; it must be the one that the file was written with.
        dialect: key grammar of `against`, where its file cannot tell.
        alpha: scale numerator of `against`, where its file does not hold it.
        as_format: format of `source`, where its content does not tell.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        UncheckableError: if the file carries no proof, or the adapter was never read from one.
        FormatError: if a file or the proof cannot be read.
    """
    del progress  # told by `watchable`
    path = _place(source)
    document = stamped(path) if path.exists() else None
    if document is None:
        if not path.exists():
            recognise(path, as_format=as_format)
        message = "carries no proof: it was not written by adapterkit, or saved again by another"
        raise UncheckableError(message, path=path)
    proof = read_certificate(document, path)
    known = open_model(base)
    notes: list[str] = []
    changes: list[Change] = []
    kind = "model"
    if proof.fingerprint is not None:
        held = source if isinstance(source, AdapterTensorSet) else _recognised(path, as_format)
        kind = _format(held)
        if isinstance(held, Change):
            changes.append(held)
        else:
            changes += _updates(proof, proof.fingerprint, held, known, notes)
            if against is not None:
                changes += _source(proof, held, against, known, dialect, alpha, notes)
    elif against is not None:
        changes += _merged(proof, against, known, dialect, alpha, notes)
    found = contents(path)
    others = (*known.names, *known.tensors) if known is not None else ()
    changes = [*altered(proof, found, others), *changes]
    if known is not None:
        changes += _base(proof, known, notes)
    return VerifyReport(
        path=str(path),
        format=kind,
        sound=not changes,
        written_by=proof.version,
        command=proof.command,
        options=proof.options,
        sources=proof.sources,
        max_relative_error=proof.max_relative_error,
        tensors=len(found.tensors),
        modules=len(proof.fingerprint.modules) if proof.fingerprint else 0,
        changes=tuple(changes),
        notes=tuple(notes),
    )


def _place(source: AdapterTensorSet | Path | str) -> Path:
    """Return the path of what carries the proof."""
    if not isinstance(source, AdapterTensorSet):
        return located(source)
    if source.provenance is None:
        message = "was made in memory and carries no proof; write it, and verify the file"
        raise UncheckableError(message, where="the adapter")
    return source.provenance.path


def _recognised(path: Path, as_format: str | None) -> Source | Change:
    """Return what a path holds; a change if that cannot be told any more."""
    try:
        return recognise(path, as_format=as_format)
    except UsageError:
        raise
    except AdapterKitError as error:
        return Change("update", error.where or str(path), error.message)


def _format(held: Source | AdapterTensorSet | Change) -> str:
    if isinstance(held, Source):
        return held.format.name
    provenance = held.provenance if isinstance(held, AdapterTensorSet) else None
    return provenance.format if provenance is not None else "unknown"


def _updates(
    proof: Certificate,
    written: Fingerprint,
    held: Source | AdapterTensorSet,
    base: BaseModel | None,
    notes: list[str],
) -> list[Change]:
    """Compare what the file does, module by module, by norms and sketches."""
    layout = proof.options.get("moe_layout")
    try:
        loaded = load(held, base=base, moe_layout=layout, need=Need.STORED)
        found = fingerprinted(loaded.adapter)
    except BaseRequiredError as error:
        notes.append(f"compared by bytes alone: {error.message}")
        return []
    except UncheckableError:
        raise
    except AdapterKitError as error:
        return [Change("update", error.where or _label(held), error.message)]
    if found.version != written.version:
        notes.append("its sketches are of another version and were not compared")
        return []
    # Rows in llama.cpp's order are not those of the proof, or the other way round.
    turned = set(found.unplaced) ^ set(written.unplaced)
    if turned:
        notes.append(
            f"{first_and_more(sorted(turned))}: compared by bytes alone; give --base for its update"
        )
    known = {n: m for n, m in written.modules.items() if n not in turned}
    now = {n: m for n, m in found.modules.items() if n not in turned}
    if not known:
        return []
    return list(changed_updates(known, now))


def _source(
    proof: Certificate,
    held: Source | AdapterTensorSet,
    against: AdapterTensorSet | Path | str,
    base: BaseModel | None,
    dialect: str | None,
    alpha: float | None,
    notes: list[str],
) -> Iterator[Change]:
    """Compare every update with what the file was made from."""
    origin, name, known = _origin(proof, against, dialect)
    if known and proof.command not in _FAITHFUL:
        notes.append(
            f"it was made from {name}, by its sha256; {proof.command} makes other updates "
            "of it, so they are not compared"
        )
        return
    if proof.sources and not known and isinstance(origin, Source):
        notes.append(f"{name} is not the file that it was made from, by its sha256")
    one, other = load_all([origin, held], base=base, dialect=dialect, alpha=alpha, need=Need.FITTED)
    first, second = _as_declared(one, name, notes), _as_declared(other, "the file", [])
    yield from _held_against(first, second, name)


def _as_declared(loaded: Loaded, name: str, notes: list[str]) -> Loaded:
    """Return what was loaded without what its own config denies; a note names that."""
    settled = apply(["declaration"], loaded.adapter, Context(allow_lossy=True))
    notes += [f"{name}: {loss.subject}: {loss.message}" for loss in settled.losses]
    return replace(loaded, adapter=settled.adapter)


def _origin(
    proof: Certificate, against: AdapterTensorSet | Path | str, dialect: str | None
) -> tuple[Source | AdapterTensorSet, str, bool]:
    """Return what is held against a file, its name, and whether the file was made of its bytes."""
    if isinstance(against, AdapterTensorSet):
        return against, _label(against), False
    origin = recognise(against, dialect=dialect)
    return origin, str(origin.path), source_digest(origin.path) in proof.sources.values()


def _label(held: Source | AdapterTensorSet) -> str:
    return str(held.path) if isinstance(held, Source) else "the adapter in memory"


def _merged(
    proof: Certificate,
    against: AdapterTensorSet | Path | str,
    base: BaseModel | None,
    dialect: str | None,
    alpha: float | None,
    notes: list[str],
) -> Iterator[Change]:
    """Tell whether an adapter is one of those that were merged into a model, by its update."""
    origin, name, known = _origin(proof, against, dialect)
    if known:
        return
    if isinstance(origin, Source):
        notes.append(f"{name} is none of the files that were merged, by their sha256")
    if not proof.adapters:
        notes.append("the merged adapters were too many to list, and are not compared")
        return
    loaded = load(origin, base=base, dialect=dialect, alpha=alpha, need=Need.FITTED)
    found = fingerprinted(_as_declared(loaded, name, notes).adapter)
    if found.unplaced:
        raise UncheckableError("is in llama.cpp's row order; give --base", where=name)
    alike = {k: each for k, each in proof.adapters.items() if each.version == found.version}
    apart = {key: distance(each, found) for key, each in alike.items()}
    if not apart:
        notes.append("its sketches are of another version and were not compared")
    elif (closest := min(apart, key=lambda key: apart[key])) and apart[closest] > ROUNDED:
        message = f"is not what was merged; the closest, {closest}, is {apart[closest]:.2g} away"
        yield Change("source", name, message)


def _held_against(one: Loaded, other: Loaded, name: str) -> Iterator[Change]:
    first, second = one.adapter, other.adapter
    if set(first.engine_layout) != set(second.engine_layout):
        message = "is in llama.cpp's row order in one of the two; give --base"
        raise UncheckableError(message, where=name)
    found = compare(first, second, other_tables([*one.losses, *other.losses]))
    stored = (tensor.dtype for each in (first, second) for tensor in each.tensors.values())
    allowed = tolerance_for(stored)
    far = [(k, d) for k, d in found.differences.items() if not d.relative_error <= allowed]
    for module, difference in far[:_MOST]:
        message = f"relative error {difference.relative_error:.3g} against {name}"
        yield Change("source", module, message)
    for module in found.only_in_first:
        yield Change("source", module, f"is in {name} alone")
    for module in found.only_in_second:
        yield Change("source", module, f"is not in {name}")
    if far:
        for cause in diagnose(first, second, found, one.options):
            yield Change("source", name, cause)


def _base(proof: Certificate, base: BaseModel, notes: list[str]) -> Iterator[Change]:
    known, now = proof.base, identified(base)
    if known is None:
        notes.append("it was written without a base model, so the base is not compared")
    elif known.kind != now.kind:
        forms = {"hf": "a Hugging Face model", "gguf": "a GGUF file"}
        notes.append(
            f"it was written with {forms.get(known.kind, known.kind)}, and {base.path} is "
            f"{forms[now.kind]}: they are not compared"
        )
    elif known.config != now.config:
        yield Change("base", str(base.path), f"is not {_called(known.name)}: its sizes differ")
    elif known.weights and now.weights and known.weights != now.weights:
        yield Change("base", str(base.path), f"is not {_called(known.name)}: its weights differ")
    elif not (known.weights and now.weights):
        notes.append("the base is compared by its configuration alone")


def _called(name: str | None) -> str:
    return f"the base that it was written with{f' ({name})' if name else ''}"
