"""The tensors of two checkpoints, side by side, and what the family says of each.

Nothing here reads weights, except where a tied copy must be told from a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule
from adapterkit.errors import IncompatibleBaseError
from adapterkit.extract.difference import Stored, differ
from adapterkit.extract.spelling import live_name, other_spelling, output_module
from adapterkit.merge.into.huggingface import HuggingFaceNames
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.architectures.table import Rule
    from adapterkit.base.model import BaseModel

_TABLES = ("token_embd", "output")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_MATRIX, _STACK = 2, 3


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

    @property
    def nbytes(self) -> int:
        """Bytes to read in both checkpoints."""
        return sum(stored.nbytes for stored in (*self.base, *self.tuned))


def twins(base: BaseModel, tuned: BaseModel) -> list[Twin]:
    """Return every tensor of the tuned checkpoint with its counterpart.

    Raises:
        IncompatibleBaseError: if a tensor is in one of them only, or has another shape.
    """
    pairing = _Engine(base, tuned) if base.kind == "gguf" else _HuggingFace(base, tuned)
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
        stored = {*self.base.tensors, *self.tuned.tensors}
        has_output = bool(self.tuned.architecture.match_gguf("output"))
        for name, tensor in self.tuned.tensors.items():
            there = name if name in self.base.tensors or name != _OUTPUT else _EMBEDDING
            if there not in self.base.tensors:
                self.unpaired.append(name)
                continue
            self.used.add(there)
            stem = name.removesuffix(".weight")
            matches = self.tuned.architecture.match_gguf(stem)
            shared = has_output and _OUTPUT not in stored and name == _EMBEDDING
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

    def __init__(self, base: BaseModel, tuned: BaseModel) -> None:
        self.base, self.tuned = base, tuned
        self.here, self.there = HuggingFaceNames(tuned), HuggingFaceNames(base)
        self.mine, self.theirs = _own_output(self.here), _own_output(self.there)
        # A stored copy of the embedding, in one of them only, counts under the embedding's name.
        self.copies = {
            name
            for names, name in ((self.here, self.mine), (self.there, self.theirs))
            if name and None in {self.mine, self.theirs} and _is_copy(names, name)
        }
        self.mine = None if self.mine in self.copies else self.mine
        self.theirs = None if self.theirs in self.copies else self.theirs
        self.used = set(self.copies)
        self.unpaired: list[str] = []

    def twins(self) -> Iterator[Twin]:
        for name, tensor in self.tuned.tensors.items():
            if name in self.copies:
                continue
            there = self.there.find(name)
            if there is None and name == self.mine and self.base.tied:
                there = self.there.embedding
            rule, module = self._rule(name)
            if there is None:
                yield from self._respelled(name, rule, module)
                continue
            self.used.add(there)
            yield _twin(
                (self.base, there, self.base.tensors[there]),
                (self.tuned, name, tensor),
                rule,
                self._modules(name, module),
            )
        yield from self._output_of_tied()

    def _rule(self, name: str) -> tuple[Rule | None, str]:
        """Return the rule of a parameter, if it is a weight, and its module as PEFT names it."""
        bias = ".bias" if name.endswith(".bias") else ""
        stem = name.removesuffix(bias or ".weight")
        match = find_rule(self.tuned.architecture, stem)
        module = live_name(self.tuned, stem, match) + bias
        return (match.rule if match and not bias else None), module

    def _modules(self, name: str, module: str) -> tuple[str, ...]:
        """Return what a tensor is the weight of: a table that both models share, of two modules."""
        output = output_module(self.tuned)
        shared = self.mine is None and self.theirs is None and self.tuned.tied and self.base.tied
        if output is None or not shared or name != self.here.embedding:
            return (module,)
        return module, output

    def _output_of_tied(self) -> Iterator[Twin]:
        """Yield the output of a tied model whose base has a table of its own for it."""
        output, table = output_module(self.tuned), self.here.embedding
        if self.theirs is None or self.mine is not None or output is None or table is None:
            return
        if not self.tuned.tied:
            return
        self.used.add(self.theirs)
        old, new = self.base.tensors[self.theirs], self.tuned.tensors[table]
        rule = self._rule(output)[0]
        yield _twin((self.base, self.theirs, old), (self.tuned, table, new), rule, (output,))

    def _respelled(self, name: str, rule: Rule | None, module: str) -> Iterator[Twin]:
        rows = other_spelling(self.there, self.tuned, name)
        if rows is None or rule is None:
            self.unpaired.append(name)
            return
        self.used |= {each for expert in rows for each, _ in expert}
        tensor = self.tuned.tensors[name]
        new = _matrices(self.tuned, name, tensor)
        old = tuple(
            Stored(tuple(part for _, part in expert), self.base.path, expert[0][0])
            for expert in rows
        )
        for first, second in zip(old, new, strict=True):
            if first.shape != second.shape:
                raise _other_shape((self.base, first.name, first.shape), (name, second.shape))
        yield Twin(name, old, new, tensor, (module,), stacked=len(tensor.shape) == _STACK)

    def missing(self) -> tuple[BaseModel, list[str]] | None:
        if self.unpaired:
            return self.tuned, self.unpaired
        left = [name for name in self.base.tensors if name not in self.used]
        return (self.base, left) if left else None


def _own_output(names: HuggingFaceNames) -> str | None:
    return next((name for name in names.base.tensors if names.role(name) == "output"), None)


def _is_copy(names: HuggingFaceNames, output: str) -> bool:
    """Tell whether a stored output is the embedding's table to the bit."""
    table = names.embedding
    return table is not None and _equal(names.base, output, table)


def _equal(model: BaseModel, name: str, other: str) -> bool:
    first, second = (Stored((model.tensors[n],), model.path, n) for n in (name, other))
    return first.shape == second.shape and not differ(first, second)


def _twin(
    base: tuple[BaseModel, str, LazyTensor],
    tuned: tuple[BaseModel, str, LazyTensor],
    rule: Rule | None,
    modules: tuple[str, ...],
) -> Twin:
    model, name, tensor = tuned
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
        embedding=rule is not None and rule.kind == "embedding",
        stacked=len(tensor.shape) == _STACK,
        turned=rule is not None and model.kind == "hf" and (rule.conv1d or rule.stored_turned),
        reason=_no_matrix(name, tensor, rule),
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


def _no_matrix(name: str, tensor: LazyTensor, rule: Rule | None) -> str:
    """Return why a tensor is no matrix of a linear layer, or an empty text."""
    if not tensor.dtype.floating:
        return f"holds {tensor.dtype} values, not real numbers"
    if len(tensor.shape) < _MATRIX:
        kind = "norm" if rule is not None and rule.kind == "norm" else "vector"
        return f"is a {'bias' if name.endswith('.bias') else kind}"
    if rule is None:
        return "is nothing that the family's table knows"
    stack = rule.kind == "experts" or rule.stacked or rule.per_head
    if not rule.adaptable or (len(tensor.shape) > _MATRIX and not stack):
        return f"is no matrix of a linear layer ({rule.kind})"
    return ""
