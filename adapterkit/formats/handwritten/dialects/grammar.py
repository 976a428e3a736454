"""A dialect: how one program that writes LoRA by hand names, turns and scales its factors.

A dialect is a TOML file. Every regular expression is matched against a whole name.

    title       what writes such files, for people
    extends     another dialect whose fields these replace, one by one
    detect      false: only used when it is named (it states what no file can say)
    rivals      true: other programs give these names to the factors the other way round, so a file
                whose modules are all square is only read when the dialect is named
    file        name of the file to read where a directory is given
    containers  any of "torch" (sharded checkpoints too), "npz", "safetensors"
    select      sub-dictionaries that may hold the tensors, the first that exists; "" is the root
    outside     names elsewhere in the file that are no part of the adapter (optimizer states)
    requires    sources that must have a value for the dialect to be meant
    expect      list of {source, values, message}: where the source has a value, one of these
    strip       prefixes to take off
    scale       "alpha/r", "alpha/sqrt(r)", "alpha" or "1"
    alpha       sources, the first that has a value, or a number; without any it must be given
    base_name   sources whose values, joined by "/", name the base model
    weight      {name, axes}: where the frozen weight of "{module}" lies in the same file, one name
                or several; axes "out in", or "either" where some layers store it turned
    modules     names for factors that are told apart by position: a list, or a table of lists
    stride      positions that one module takes in such a list

A source is "file:a.b" (a plain value in the saved object), "metadata:key" (safetensors), or
"beside:name.yaml:a.b" (a JSON or YAML file in the same directory).

`[[tensor]]` gives each tensor its place, first match first; `match` has the groups `module` or
`position` (with `set`), and optionally `part` (several updates of one module) and `index` (updates
of one module that add up):

    axes        "r in" or "in r" for the factor next to the input, "out r" or "r out" for the other;
                "r in *", "out r *" for convolutions
    embedding   the same for embedding tables, "r vocab" and "width r" or turned; without it the
                program has none
    role        instead of axes: lora_bias (added after the second factor), down_bias (after the
                first), magnitude, or full (a trained parameter, named whole by `module`)
    unless      a name with groups in braces: the rule holds only where no tensor has it

`[[ignore]]` explains what is no part of the adapter: `match`, `what`, and `whole = true` if only a
whole state dict, with the frozen weight of every adapted module, may hold it.

`[[blocks]]` unfolds factors of fused layers: `match` (of modules), `slots` in the order of the
rows, `enabled` (a list, or a table slot -> source), `sizes` (slot -> rows, expressions over the
numbers in `numbers`, a source; equal rows if absent). A holds r rows and B its own rows for every
enabled slot.

`[[stack]]` takes apart tensors that run over the layers of a model: `match`, and `to`, the name
that each slice of the first axis gets, with its number as `{n}`.

`[[parts]]` cuts the rows of a fused layer whose parts share A: `match` (of modules), `rows` (part
-> rows, expressions over the sizes of the base model, in the order that they lie in), and
`repeats`, how often all parts follow each other. Of several rules for a module, the first whose
rows add up is meant.

`[[convolution]]` unfolds loralib's: `match` (of modules), `kernel` unless the frozen weight tells.

`[[rename]]` turns names into Hugging Face's: `match` of the module, with `#part` or `#slot` behind
it; `to` with the groups in braces; `slot` and `slots` where it fills rows of a fused layer; `rows`,
a table from model family to the row order of the file (a function of architectures/transforms.py,
"" for Hugging Face's own), which needs the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from adapterkit.patterns import Expression

Pattern: TypeAlias = re.Pattern[str] | Expression

SCALES = ("alpha/r", "alpha/sqrt(r)", "alpha", "1")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Which tensors are factors, and which way round they are stored."""

    match: Pattern
    axes: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    role: str | None = None
    unless: str | None = None


@dataclass(frozen=True, slots=True)
class IgnoreRule:
    """Which tensors are no part of the adapter, and what they are."""

    match: Pattern
    what: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Expectation:
    """A setting that must have one of some values where it is known."""

    source: str
    values: tuple[object, ...]
    message: str


@dataclass(frozen=True, slots=True)
class WeightRule:
    """Where the frozen weight of an adapted module lies, and whether it may be turned."""

    names: tuple[str, ...]
    axes: str


@dataclass(frozen=True, slots=True)
class BlockRule:
    """How the factors of a fused layer fold the updates of its slots."""

    match: Pattern
    slots: tuple[str, ...]
    enabled: Mapping[str, str] | tuple[str, ...] = ()
    sizes: Mapping[str, str] | None = None
    numbers: str = ""


@dataclass(frozen=True, slots=True)
class StackRule:
    """Which tensors hold one slice for each layer, and what each is called."""

    match: Pattern
    to: str


@dataclass(frozen=True, slots=True)
class PartRule:
    """How the rows of a fused layer divide into parts, by the sizes of the base model."""

    match: Pattern
    rows: Mapping[str, str]
    repeats: str = "1"


@dataclass(frozen=True, slots=True)
class ConvolutionRule:
    """Which modules are convolutions with loralib's folded factors, and their kernel."""

    match: Pattern
    kernel: int | None = None


@dataclass(frozen=True, slots=True)
class RenameRule:
    """How a module is called in Hugging Face's model, and which rows of it these are."""

    match: Pattern
    to: str
    slot: int = 0
    slots: int = 1
    rows: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One dialect; the fields are those of the grammar above.

    Attributes:
        name: as `--dialect` takes it; the path of a user's own file.
        path: the TOML file.
        extends: name of the dialect that it was made from, or None.
    """

    name: str
    path: Path
    title: str
    containers: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    scale: str
    extends: str | None = None
    detect: bool = True
    rivals: bool = False
    file: str = ""
    select: tuple[str, ...] = ("",)
    outside: tuple[Pattern, ...] = ()
    requires: tuple[str, ...] = ()
    expect: tuple[Expectation, ...] = ()
    strip: tuple[str, ...] = ()
    alpha: float | tuple[str, ...] = ()
    base_name: tuple[str, ...] = ()
    weight: WeightRule | None = None
    modules: Mapping[str, tuple[str, ...]] | None = None
    stride: int = 1
    ignore: tuple[IgnoreRule, ...] = ()
    stacks: tuple[StackRule, ...] = ()
    blocks: tuple[BlockRule, ...] = ()
    parts: tuple[PartRule, ...] = ()
    convolutions: tuple[ConvolutionRule, ...] = ()
    renames: tuple[RenameRule, ...] = ()
