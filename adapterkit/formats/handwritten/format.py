"""Hand-written LoRA: files whose meaning a dialect states, because they do not.

What a file cannot say is asked for, never guessed: the dialect where several explain it, alpha
where it is nowhere stored, the orientation where every module is square.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit import strangers
from adapterkit.containers.folders import dcp_folder
from adapterkit.errors import AdapterKitError, FormatError, NotFoundError, UsageError
from adapterkit.formats.handwritten.dialects import (
    Explanation,
    Mismatch,
    builtin,
    explain,
    load,
    open_document,
)
from adapterkit.formats.handwritten.dialects.document import is_checkpoint
from adapterkit.formats.handwritten.dialects.matching import names_a_factor, plausible, undecided
from adapterkit.formats.handwritten.reader import interpret
from adapterkit.lora_config.own import carried, governed
from adapterkit.model.update import GATHER, ONE_RANK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.formats.handwritten.dialects import Dialect, Document
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_MOST_SHOWN = 5


def read(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a file, a sharded checkpoint, or the file that a dialect expects in a directory.

    Args:
        path: `.pt`, `.npz` or `.safetensors`, told by content; a folder of `.distcp` files; or
            litgpt's output directory.
        options: `dialect` names the key grammar or its TOML file, `alpha` the scale numerator.

    Raises:
        FormatError: if no dialect explains every tensor; the message lists the nearest.
        UsageError: if the file cannot say something (which of several dialects, alpha, which
            slots of a fused layer), or says other than what was given.
        BaseRequiredError: if the row order of the file depends on the base model.
    """
    document = open_document(_file(path, options.dialect))
    if not document.all_tensors():
        what = "holds no tensors; training saved an empty adapter, or this is no file of weights"
        raise FormatError(what, path=path)
    own = carried(document.metadata, document.path)
    if own is not None and options.alpha is None:
        options = replace(options, alpha=own.alpha)
    adapter = interpret(_explained(document, options.dialect), document, path, options)
    return governed(adapter, own, options.base)


def probe(path: Path) -> bool:
    """Tell whether a path may be hand-written LoRA; consulted after every other format.

    Files that numpy or torch wrote are claimed whole, so that the reader says what is wrong with
    them. A safetensors file is claimed if some tensor is a factor in some dialect.
    """
    if path.is_dir():
        return any((path / dialect.file).is_file() for dialect in builtin() if dialect.file)
    if not path.is_file():
        return False
    if is_checkpoint(path):
        return True
    try:
        document = open_document(path)
        names = document.all_tensors()
    except AdapterKitError:
        return False
    return any(
        names_a_factor(dialect, names)
        for dialect in builtin()
        if document.container in dialect.containers
    )


def _file(path: Path, reference: str | None) -> Path:
    if folder := dcp_folder(path):
        return folder
    if not path.is_dir():
        return path
    dialects = [load(reference)] if reference else builtin()
    names = list(dict.fromkeys(dialect.file for dialect in dialects if dialect.file))
    found = [path / name for name in names if (path / name).is_file()]
    if len(found) != 1:
        shown = ", ".join(file.name for file in found) or f"no {' and no '.join(names) or 'file'}"
        raise NotFoundError(f"holds {shown}; name the file", path=path)
    return found[0]


def _explained(document: Document, reference: str | None) -> Explanation:
    if reference is not None:
        answer = explain(load(reference), document)
        if isinstance(answer, Mismatch):
            raise FormatError(
                f"dialect {reference} does not explain the file: {answer.reason}",
                path=document.path,
                where=answer.key,
            )
        return answer
    answers = [explain(dialect, document) for dialect in builtin() if dialect.detect]
    found = [answer for answer in answers if isinstance(answer, Explanation)]
    found = [answer for answer in found if plausible(answer)] or found
    if len(found) > 1:
        raise _ambiguous([answer.dialect for answer in found], document)
    if not found:
        raise _unknown([a for a in answers if isinstance(a, Mismatch)], document)
    if module := undecided(found[0]):
        name = found[0].dialect.name
        raise UsageError(
            "every module is square, so nothing in the file tells which factor is which; if it is "
            f"of dialect {name}, pass --dialect {name}",
            path=document.path,
            where=module,
        )
    return found[0]


def _ambiguous(dialects: Sequence[Dialect], document: Document) -> UsageError:
    lines = [f"--dialect {dialect.name}  ({dialect.title})" for dialect in dialects]
    return UsageError(
        "\n  ".join([f"{len(dialects)} dialects explain every tensor; pass one of", *lines]),
        path=document.path,
    )


def _by_name_only(document: Document) -> list[Dialect]:
    """Return the dialects that would explain the file, but state what no file can say."""
    dialects = [dialect for dialect in builtin() if not dialect.detect]
    return [d for d in dialects if isinstance(explain(d, document), Explanation)]


def _unknown(mismatches: Sequence[Mismatch], document: Document) -> AdapterKitError:
    near = sorted((m for m in mismatches if m.factors), key=lambda m: (-m.factors, m.dialect.name))
    first = next(iter(document.all_tensors()))
    if named := _by_name_only(document):
        lines = [f"--dialect {dialect.name}  ({dialect.title})" for dialect in named]
        return UsageError(
            "\n  ".join(["its scale cannot be told from the file; if it is right, pass", *lines]),
            path=document.path,
        )
    if part := next((m for m in near if m.sliced), None):
        return FormatError(f"{ONE_RANK}; {GATHER}", path=document.path, where=part.key)
    if not near:
        if known := strangers.holding(document.all_tensors()):
            return FormatError(known, path=document.path)
        return FormatError(
            "no dialect knows a factor in this file; of a model that was trained whole, save it "
            "with save_pretrained and find the update with: adapterkit extract --base BASE --tuned "
            "MODEL -o ADAPTER; factors of a program of your own are described in a dialect file, "
            "passed with --dialect",
            path=document.path,
            where=first,
        )
    lines = [
        f"{m.dialect.name}: {f'{m.key}: ' if m.key else ''}{m.reason}" for m in near[:_MOST_SHOWN]
    ]
    head = "no dialect explains every tensor; pass a dialect file of your own with --dialect"
    return FormatError("\n  ".join([head, *lines]), path=document.path, where=near[0].key)
