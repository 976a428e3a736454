"""`adapterkit list`: what is supported, printed from the data that the program works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from adapterkit_cli import manner, options, rendering
from adapterkit_cli.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN = 2
_TYPES = {
    "f32": "float of 32 bits; relative error up to 6e-8",
    "f16": "float of 16 bits; relative error up to 5e-4, nothing beyond 65504",
    "bf16": "float of 16 bits with the range of 32; relative error up to 4e-3",
    "q8_0": "whole numbers of 8 bits, 32 with one scale",
}


@dataclass(frozen=True)
class Listing:
    """One kind of thing.

    Attributes:
        title: what is listed, in a few words.
        rows: what JSON holds of each.
        header: names of the columns.
        cells: the columns of a row.
        columns: how many of them a terminal shows without --verbose; all by default.
    """

    title: str
    rows: Callable[[], Sequence[Mapping[str, Any]]]
    header: tuple[str, ...]
    cells: Callable[[Mapping[str, Any]], tuple[str, ...]]
    columns: int | None = None

    def table(self, rows: Sequence[Mapping[str, Any]], *, whole: bool) -> str:
        """Return the rows as a table: all columns, or those that a terminal has room for."""
        shown = None if whole else self.columns
        cells = [self.cells(row)[:shown] for row in rows]
        return rendering.columns(cells, header=self.header[:shown])


def _formats() -> list[dict[str, Any]]:
    from adapterkit.registry import formats

    return [
        {
            "name": spec.name,
            "title": spec.title,
            "reads": spec.reads,
            "writes": spec.writes,
            "directory": bool(spec.files),
            "suffixes": spec.suffixes,
            "cannot_hold": spec.cannot_hold,
        }
        for spec in formats()
    ]


def _families() -> list[dict[str, Any]]:
    from adapterkit.architectures import LLAMA_CPP, families, load

    return [
        {
            "name": family.name,
            "title": family.title,
            "gguf": family.gguf,
            "classes": family.classes,
            "model_types": family.model_types,
            "verified": family.verified,
            "inert": family.inert,
            "inert_build": LLAMA_CPP if family.inert else "",
        }
        for family in map(load, families())
    ]


def _engines() -> list[dict[str, Any]]:
    from adapterkit import load_target, target_names

    return [
        {
            "name": engine.name,
            "title": engine.title,
            "rules": (*engine.rules, *engine.names),
            "prepare": engine.prepare,
            "source": engine.source,
            "checked": engine.checked,
        }
        for engine in map(load_target, target_names())
    ]


def _methods() -> list[dict[str, Any]]:
    from adapterkit import merge_methods

    return [
        {
            "name": method.name,
            "title": method.title,
            "kind": method.kind,
            "parameters": method.parameters,
            "space": method.space,
            "random": method.random,
            "adapters": method.adapters,
            "source": method.source,
            "exact_in": "a base" if method.dense else "an adapter",
            "aliases": method.aliases,
        }
        for method in merge_methods()
    ]


def _dialects() -> list[dict[str, Any]]:
    from adapterkit.formats.handwritten.dialects import builtin

    return [
        {
            "name": dialect.name,
            "title": dialect.title,
            "containers": dialect.containers,
            "scale": dialect.scale,
            "detected": dialect.detect,
        }
        for dialect in builtin()
    ]


def _codes() -> list[dict[str, Any]]:
    from adapterkit import explanations

    return [
        {
            "code": known.code,
            "title": known.title,
            "meaning": known.meaning,
            "matters": known.matters,
            "action": known.action,
        }
        for known in explanations().values()
    ]


def _types() -> list[dict[str, Any]]:
    from adapterkit.saving import OUTTYPES

    return [
        {"name": name, "bits": 8 * dtype.block_bytes / dtype.block, "title": _TYPES[name]}
        for name, dtype in OUTTYPES.items()
        if dtype is not None
    ]


def _mixtures() -> list[dict[str, Any]]:
    from adapterkit.architectures.mixtures import mixtures

    return [
        {"name": name, "type": mix.dtype, "bits": 8 * mix.dtype.block_bytes / mix.dtype.block}
        for name, mix in mixtures().items()
    ]


def _listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are; -v and `--json` have all."""
    every = list(names)
    few = rendering.shown(every, _SHOWN)
    more = len(every) - len(few)
    return ", ".join(few) + (f" and {more} more" if more > 0 else "")


def _mark(able: bool) -> str:
    return "yes" if able else "no"


def _parameters(row: Mapping[str, Any]) -> str:
    """Return a method's own numbers, as --param takes them, with their defaults."""
    found = [n if v is None else f"{n}={v:g}" for n, v in row["parameters"].items()]
    return " ".join([*found, *(["seed"] if row["random"] else [])])


LISTINGS = {
    "formats": Listing(
        "what can be read and written, and what each cannot hold",
        _formats,
        ("name", "what it is", "read", "write", "cannot hold"),
        lambda r: (r["name"], r["title"], _mark(r["reads"]), _mark(r["writes"]), r["cannot_hold"]),
    ),
    "families": Listing(
        "model families for GGUF. verified: engine, the logits are equal in llama.cpp; dense, the "
        "full weights are; no, only with --unverified. inert: llama.cpp loads adapters of these "
        "tensors and never applies them",
        _families,
        ("name", "family", "verified", "Hugging Face classes", "inert in llama.cpp"),
        lambda r: (
            r["name"],
            r["title"],
            r["verified"],
            _listed(r["classes"]),
            " ".join(name.removeprefix("blk.{i}.") for name in r["inert"]),
        ),
    ),
    "engines": Listing(
        "engines that --target and --for know, and where their rules come from",
        _engines,
        ("name", "title", "rules", "checked", "source"),
        lambda r: (r["name"], r["title"], str(len(r["rules"])), r["checked"], r["source"]),
        columns=4,
    ),
    "methods": Listing(
        "what --method of `merge` takes, and what --param takes with it",
        _methods,
        ("name", "what it does", "parameters", "exact in", "source", "also called"),
        lambda r: (
            r["name"],
            r["title"],
            _parameters(r),
            r["exact_in"],
            r["source"],
            ", ".join(f"{each.name} ({each.programs})" for each in r["aliases"]),
        ),
        columns=4,
    ),
    "dialects": Listing(
        "key grammars of hand-written adapters, for --dialect",
        _dialects,
        ("name", "what it is", "files", "scale"),
        lambda r: (r["name"], r["title"], ", ".join(r["containers"]), r["scale"]),
    ),
    "codes": Listing(
        "what `validate` finds; --explain says more",
        _codes,
        ("code", "title", "what to do"),
        lambda r: (r["code"], r["title"], r["action"]),
    ),
    "types": Listing(
        "stored types of factors (--outtype) and of merged GGUF tensors (--gguf-type)",
        _types,
        ("name", "what it is", "bits a value"),
        lambda r: (r["name"], r["title"], f"{r['bits']:g}"),
    ),
    "mixtures": Listing(
        "mixtures of types that --gguf-type quantises a whole model to, as llama.cpp does",
        _mixtures,
        ("name", "most tensors", "bits a value"),
        lambda r: (r["name"], r["type"].value, f"{r['bits']:.3g}"),
    ),
}


@click.command(
    "list",
    epilog=options.examples(
        "adapterkit list formats",
        "adapterkit list methods",
        "adapterkit list codes --json",
    ),
)
@click.argument("kind", metavar="KIND", type=Choice(list(LISTINGS)), required=False)
@options.as_json
def command(kind: str | None, *, as_json: bool) -> None:
    """List formats, families, engines, methods, codes and more.

    KIND is formats, families, engines, methods, dialects, codes, types or mixtures; without it the
    kinds are listed.
    """
    if kind is None:
        titles = [(name, listing.title) for name, listing in LISTINGS.items()]
        if as_json:
            rendering.emit_json({"kinds": dict(titles)})
        else:
            rendering.emit(rendering.columns(titles, header=("kind", "what it lists")))
        return
    listing = LISTINGS[kind]
    rows = listing.rows()
    if as_json:
        rendering.emit_json({kind: rows})
        return
    whole = manner.verbose() or rendering.pen().width is None
    rendering.emit(listing.table(rows, whole=whole))
    if left := listing.header[listing.columns :] if listing.columns and not whole else ():
        rendering.remark("note", f"-v shows {' and '.join(left)} too")
    if manner.verbose():
        rendering.remark("note", listing.title)
