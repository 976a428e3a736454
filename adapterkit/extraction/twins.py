"""The tensors of two checkpoints, side by side, and what the family says of each.

Nothing here reads weights, except where a tied copy must be told from a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.architectures.table import Match
from adapterkit.base.places import Places
from adapterkit.errors import IncompatibleBaseError
from adapterkit.extraction.difference import Stored, differ
from adapterkit.extraction.spelling import (
    count_experts,
    live_name,
    output_module,
    rows_of,
    wanted_rule,
)
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.architectures.table import WeightRule
    from adapterkit.base.assemblies import Assembly
    from adapterkit.base.model import BaseModel

_TABLES = ("token_embd", "output")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_MATRIX, _STACK = 2, 3
_UNKNOWN = "is nothing that the family's table knows"


@dataclass(frozen=True, slots=True)
class Twin:
    """One tensor in both checkpoints.

    Attributes:
        name: in the tuned checkpoint.
        base: one matrix, or one for each expert; a vector is one row. Empty where shapes differ.
        tuned: likewise.
        tensor: the whole tensor of the tuned checkpoint.
        modules: the modules that get the update; two where embedding and output share the table.
        embedding: whether the first of them is an embedding.
        stacked: whether it is a stack of experts.
        turned: whether it is stored as (in, out).
        reason: why it is no matrix of a linear layer; empty for those that are.
        respelled: whether it is put together from parts of stored tensors.
    """

    name: str
    base: tuple[Stored, ...]
    tuned: tuple[Stored, ...]
    tensor: LazyTensor
    modules: tuple[str, ...]
    embedding: bool = False
    stacked: bool = False
    turned: bool = False
    reason: str = ""
    respelled: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes to read in both checkpoints."""
        return sum(stored.nbytes for stored in (*self.base, *self.tuned))


def twins(base: BaseModel, tuned: BaseModel, layout: str) -> list[Twin]:
    """Return every tensor of the tuned checkpoint with its counterpart.

    Args:
        base: the checkpoint before.
        tuned: the checkpoint after.
        layout: `experts` or `fused`, how experts of Hugging Face models are wanted.

    Raises:
        IncompatibleBaseError: if a tensor is in one of them only, or has another shape.
    """
    pairing = _Engine(base, tuned) if base.kind == "gguf" else _HuggingFace(base, tuned, layout)
    found = list(pairing.twins())
    if missing := pairing.missing():
        side, names = missing
        more = f", as {len(names) - 1} more are not" if len(names) > 1 else ""
        other = base if side is tuned else tuned
        raise IncompatibleBaseError(
            f"is not in {other.path}{more}; is it the right base?",
            path=side.path,
            where=names[0],
        )
    return found


class _Engine:
    """Two GGUF files: one spelling, one orientation."""

    def __init__(self, base: BaseModel, tuned: BaseModel) -> None:
        self.base, self.tuned = base, tuned
        self.used: set[str] = set()
        self.unpaired: list[str] = []

    def twins(self) -> Iterator[Twin]:
        has_output = bool(self.tuned.architecture.match_gguf("output"))
        for name, tensor in self.tuned.tensors.items():
            there = name if name in self.base.tensors or name != _OUTPUT else _EMBEDDING
            if there not in self.base.tensors:
                self.unpaired.append(name)
                continue
            self.used.add(there)
            stem = name.removesuffix(".weight")
            matches = self.tuned.architecture.match_gguf(stem)
            # An output of the base alone is a copy of its table, or `missing` names it.
            shared = has_output and _OUTPUT not in self.tuned.tensors and name == _EMBEDDING
            yield _twin(
                (self.base, there, self.base.tensors[there]),
                (self.tuned, name, tensor),
                matches[0].rule if matches else None,
                (stem, "output") if shared else (stem,),
            )

    def missing(self) -> tuple[BaseModel, list[str]] | None:
        if self.unpaired:
            return self.tuned, self.unpaired
        left = [name for name in self.base.tensors if name not in self.used]
        if left == [_OUTPUT] and _equal(self.base, _OUTPUT, _EMBEDDING):
            return None
        return (self.base, left) if left else None


class _HuggingFace:
    """Two directories: names in any spellings of one family."""

    def __init__(self, base: BaseModel, tuned: BaseModel, layout: str) -> None:
        self.base, self.tuned, self.layout = base, tuned, layout
        self.here, self.there = Places(tuned), Places(base)
        self.mine, self.theirs = self.here.output, self.there.output
        # A stored copy of the embedding, in one of them only, counts under the embedding's name.
        self.copies = {
            name
            for names, name in ((self.here, self.mine), (self.there, self.theirs))
            if name and None in {self.mine, self.theirs} and _is_copy(names, name)
        }
        self.mine = None if self.mine in self.copies else self.mine
        self.theirs = None if self.theirs in self.copies else self.theirs
        self.used, self.done = set(self.copies), set(self.copies)
        self.unpaired: list[str] = []

    def twins(self) -> Iterator[Twin]:
        for name, tensor in self.tuned.tensors.items():
            if name in self.done:
                continue
            if units := self._assembled(name):
                yield from units
                continue
            there = self.there.find(name)
            if there is None and name == self.mine and self.base.tied:
                there = self.there.embedding
            match, module = self._match(name)
            other = wanted_rule(self.tuned, match, self.layout)
            if match is not None and (other is not None or there is None):
                units = self._respelled(name, match, other or match.rule)
                yield from units
                if units:
                    continue
            if there is None:
                self.unpaired.append(name)
                continue
            self.used.add(there)
            yield _twin(
                (self.base, there, self.base.tensors[there]),
                (self.tuned, name, tensor),
                match.rule if match else None,
                self._modules(name, module),
                self.here,
            )
        yield from self._output_of_tied()

    def _match(self, name: str) -> tuple[Match | None, str]:
        """Return the rule of a parameter, if it is a weight, and its module as PEFT names it."""
        bias = ".bias" if name.endswith(".bias") else ""
        stem = name.removesuffix(bias or ".weight")
        match = find_rule(self.tuned.architecture, stem)
        module = live_name(self.here, stem, match) + bias
        return (None if bias else match), module

    def _modules(self, name: str, module: str) -> tuple[str, ...]:
        """Return what a tensor is the weight of: a table that both models share, of two modules."""
        output = output_module(self.here)
        shared = all(map(self._one_table, (self.here, self.there)))
        if output is None or not shared or name != self.here.embedding:
            return (module,)
        return module, output

    def _one_table(self, names: Places) -> bool:
        """Tell whether embedding and output of a model are one table, stored twice or not."""
        if names.output is None:
            return bool(names.base.tied)
        return names.output in self.copies

    def _output_of_tied(self) -> Iterator[Twin]:
        """Yield the output of a tied model whose base has a table of its own for it."""
        output, table = output_module(self.here), self.here.embedding
        if self.theirs is None or self.mine is not None or output is None or table is None:
            return
        if not self.tuned.tied:
            return
        self.used.add(self.theirs)
        old, new = self.base.tensors[self.theirs], self.tuned.tensors[table]
        match, _ = self._match(output)
        rule = match.rule if match else None
        models = (self.base, self.theirs, old), (self.tuned, table, new)
        yield _twin(*models, rule, (output,), self.here)

    def _respelled(self, name: str, match: Match, rule: WeightRule) -> list[Twin]:
        """Return the matrices that a rule makes of a tensor, put together from both checkpoints.

        Nothing is returned if one of them does not have all parts.
        """
        if rule.stacked and match.expert is None:
            groups = [(e,) for e in range(count_experts(self.here, match.rule, match.layer))]
        elif rule.kind == "experts":
            groups = [tuple(range(count_experts(self.here, rule, match.layer)))]
        else:
            groups = [(match.expert,)]
        found: list[Twin] = []
        for experts in groups:
            new = [rows_of(self.here, rule, match.layer, expert) for expert in experts]
            old = [rows_of(self.there, rule, match.layer, expert) for expert in experts]
            if not experts or not all(new) or not all(old):
                return []
            self.done |= {part for rows in new for part, _ in rows}
            self.used |= {part for rows in old for part, _ in rows}
            place = Match(rule, layer=match.layer, expert=experts[0])
            twin = Twin(
                name,
                tuple(_put_together(self.base, rows) for rows in old),
                tuple(_put_together(self.tuned, rows) for rows in new),
                self.tuned.tensors[name],
                (live_name(self.here, "", place),),
                stacked=rule.kind == "experts",
                turned=rule.stored_turned,
                respelled=True,
            )
            for first, second in zip(twin.base, twin.tuned, strict=True):
                if first.shape != second.shape:
                    raise _other_shape((self.base, first.name, first.shape), (name, second.shape))
            found.append(twin)
        return found

    def _assembled(self, name: str) -> list[Twin]:
        """Return the matrices that the class makes of a tensor, and of others with it."""
        found: list[Twin] = []
        for module in self.here.assembled_from(name):
            new, old = self.here.assembly(module), self.there.assembly(module)
            if (
                new is None
                or old is None
                or (new.kind, len(new.names)) != (old.kind, len(old.names))
            ):
                return []
            stacked = new.kind == "experts"
            if stacked and self.layout != "fused":
                return []
            self.done |= set(new.names)
            self.used |= set(old.names)
            tensor = self.tuned.tensors[name]
            found.append(
                Twin(
                    name,
                    _of_assembly(self.base, old),
                    _of_assembly(self.tuned, new),
                    new.rows(tensor) if new.kind == "rows" else tensor,
                    (module,),
                    stacked=stacked,
                    respelled=True,
                )
            )
        for twin in found:
            for first, second in zip(twin.base, twin.tuned, strict=True):
                if first.shape != second.shape:
                    raise _other_shape((self.base, first.name, first.shape), (name, second.shape))
        return found

    def missing(self) -> tuple[BaseModel, list[str]] | None:
        if self.unpaired:
            return self.tuned, self.unpaired
        left = [name for name in self.base.tensors if name not in self.used]
        return (self.base, left) if left else None


def _of_assembly(model: BaseModel, made: Assembly) -> tuple[Stored, ...]:
    if made.kind == "rows":
        (name,) = made.names
        return (Stored((made.rows(model.tensors[name]),), model.path, name),)
    return tuple(
        Stored(tuple(model.tensors[name] for name in names), model.path, names[0])
        for names in made.experts()
    )


def _is_copy(names: Places, output: str) -> bool:
    """Tell whether a stored output is the embedding's table to the bit."""
    table = names.embedding
    return table is not None and _equal(names.base, output, table)


def _put_together(model: BaseModel, rows: list[tuple[str, LazyTensor]]) -> Stored:
    return Stored(tuple(part for _, part in rows), model.path, rows[0][0])


def _equal(model: BaseModel, name: str, other: str) -> bool:
    first, second = (Stored((model.tensors[n],), model.path, n) for n in (name, other))
    return first.shape == second.shape and not differ(first, second)


def _twin(
    base: tuple[BaseModel, str, LazyTensor],
    tuned: tuple[BaseModel, str, LazyTensor],
    rule: WeightRule | None,
    modules: tuple[str, ...],
    places: Places | None = None,
) -> Twin:
    model, name, tensor = tuned
    kind = places.kind(name) if places and rule is None else None
    old_model, old_name, old = base
    if old.shape != tensor.shape:
        table = rule is not None and rule.targets[0].name in _TABLES
        if not table or old.shape[1:] != tensor.shape[1:]:
            raise _other_shape((old_model, old_name, old.shape), (name, tensor.shape))
        reason = f"has {tensor.shape[0]} rows, the base {old.shape[0]}: another vocabulary"
        return Twin(name, (), (), tensor, modules, reason=reason)
    return Twin(
        name,
        _matrices(old_model, old_name, old),
        _matrices(model, name, tensor),
        tensor,
        modules,
        embedding=(rule.kind if rule else kind) == "embedding",
        stacked=len(tensor.shape) == _STACK,
        turned=kind == "conv1d"
        or (rule is not None and model.kind == "hf" and (rule.conv1d or rule.stored_turned)),
        reason=_no_matrix(name, tensor, rule, kind),
    )


def _other_shape(
    base: tuple[BaseModel, str, tuple[int, ...]], tuned: tuple[str, tuple[int, ...]]
) -> IncompatibleBaseError:
    model, name, shape = base
    return IncompatibleBaseError(
        f"has shape {list(shape)}, and {tuned[0]} of the tuned model {list(tuned[1])}; is it the "
        "right base?",
        path=model.path,
        where=name,
    )


def _matrices(model: BaseModel, name: str, tensor: LazyTensor) -> tuple[Stored, ...]:
    if len(tensor.shape) != _STACK:
        return (Stored((tensor,), model.path, name),)
    height = tensor.shape[1]
    return tuple(
        Stored((tensor.rows(e * height, (e + 1) * height),), model.path, name)
        for e in range(tensor.shape[0])
    )


def _no_matrix(name: str, tensor: LazyTensor, rule: WeightRule | None, kind: str | None) -> str:
    """Return why a tensor is no matrix of a linear layer, or an empty text."""
    if not tensor.dtype.floating:
        return f"holds {tensor.dtype} values, not real numbers"
    if len(tensor.shape) < _MATRIX:
        kind = "norm" if rule is not None and rule.kind == "norm" else "vector"
        return f"is a {'bias' if name.endswith('.bias') else kind}"
    whole = kind in {"linear", "embedding", "conv1d"} or (
        kind == "bare" and name.endswith(".weight")
    )
    if rule is None and whole and tensor.is_matrix:
        return ""
    if rule is None:
        return f"is no matrix of a linear layer ({kind})" if kind else _UNKNOWN
    stack = rule.kind == "experts" or rule.stacked or rule.per_head
    if not rule.adaptable or (len(tensor.shape) > _MATRIX and not stack):
        return f"is no matrix of a linear layer ({rule.kind})"
    return ""
