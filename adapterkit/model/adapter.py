"""The neutral model: what an adapter is, whatever file it came from.

Nothing here is validated beyond its types. A broken adapter (A without B, ranks that disagree, NaN)
is representable, so that it can be inspected; writers refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, PARTNERS, Role, TensorKey
from adapterkit.model.beside import BesideFile
from adapterkit.model.sources import Source
from adapterkit.model.update import Kind, Update
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tensor import LazyTensor

_MAPPINGS = (
    *("tensors", "scales", "kinds", "tied", "engine_layout"),
    *("rank_conflicts", "unstored", "undeclared", "unplaced", "metadata"),
)
# Fields that change what the tensors mean and are none, by the names that PEFT's users know.
SETTINGS = {
    "initialisation": "init_lora_weights",
    "layer_replication": "layer_replication",
    "invocation_tokens": "alora_invocation_tokens",
    "token_indices": "trainable_token_indices",
    "pooled_inputs": "qalora_group_size",
}


def _frozen(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(value))


# Modules that a notebook's table shows.
_TABLE_ROWS = 20


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterTensorSet:
    """An adapter in neutral form; it pickles and copies, whatever its tensors are read from.

    Attributes:
        tensors: every tensor by its key, in file order.
        scales: effective multiplier of each module that has factors.
        kinds: what the factors of a module are those of, EXPERTS or CONVOLUTION; where nothing is
            said, those of a linear layer or, by their roles, of an embedding.
        base: the model it was trained on, as recorded.
        initialisation: the one that changed the base, by PEFT's name: B · A alone is no update.
        layer_replication: (first, end) of the ranges of layers that make up the model, if any.
        invocation_tokens: those after which alone it acts (aLoRA); empty if it always does.
        token_indices: the tokens of TOKEN_ROWS, of the input embedding or by name of a module.
        pooled_inputs: the inputs that A takes as one (QA-LoRA) if the base is quantised with GPTQ,
            and only then; 0 where that is decided.
        tied: embedding whose update is that of every output that the base ties to it (PEFT's
            `ensure_weight_tying`) -> further names that the file has it under; what is stored under
            those is not among the tensors: `spelled_out` brings it back.
        engine_layout: module -> llama.cpp tensor, for those still in llama.cpp's own layout because
            no base was given.
        rank_conflicts: module -> (declared, stored) ranks, where its file contradicts itself.
        unstored: setting -> modules whose tensors it promises and the file lacks.
        undeclared: setting -> modules whose tensors the file holds, though it says that there are
            none; what the adapter is depends on who reads it.
        unplaced: module, as its file names it -> why nothing says what it is called in the model.
        beside: files beside its own that belong to what was trained.
        metadata: free text of the source file, which is not interpreted.
        source: what only the writer of its own format reads back.
        provenance: where it was read from.
    """

    tensors: Mapping[TensorKey, LazyTensor]
    scales: Mapping[str, float]
    kinds: Mapping[str, Kind] = field(default_factory=dict[str, Kind])
    base: BaseReference = field(default_factory=BaseReference)
    initialisation: str | None = None
    layer_replication: tuple[tuple[int, ...], ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    pooled_inputs: int = 0
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    engine_layout: Mapping[str, str] = field(default_factory=dict[str, str])
    rank_conflicts: Mapping[str, tuple[int, int]] = field(
        default_factory=dict[str, tuple[int, int]]
    )
    unstored: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    undeclared: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    unplaced: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: tuple[BesideFile, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    source: Source | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields with plain dictionaries, which can be pickled and copied."""
        return {**vars(self), **{name: dict(getattr(self, name)) for name in _MAPPINGS}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the fields and close their dictionaries again."""
        self.__dict__.update(state)
        self.__post_init__()

    def __repr__(self) -> str:
        """Return counts and names; what is in the tensors is for `summarize` to tell."""
        facts = [f"{len(self.modules)} modules", f"{len(self.tensors)} tensors"]
        if self.provenance:
            facts.append(self.provenance.format)
        if self.base.name:
            facts.append(f"base {self.base.name!r}")
        return f"<AdapterTensorSet: {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        """Return the modules and their factors as a table, for notebooks."""
        from html import escape

        pairs = list(self.pairs())
        rows = "".join(
            f"<tr><td>{escape(p.module)}<td>{p.rank}<td>{p.scale:.6g}"
            f"<td>{escape(str(p.a.shape))}<td>{escape(str(p.b.shape))}<td>{p.a.dtype.value}"
            for p in pairs[:_TABLE_ROWS]
        )
        more = len(pairs) - _TABLE_ROWS
        rows += f"<tr><td colspan=6>and {more:,} more" if more > 0 else ""
        head = "<tr><th>module<th>rank<th>scale<th>A<th>B<th>dtype"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>"

    @classmethod
    def of(
        cls, updates: Iterable[Update], others: Mapping[TensorKey, LazyTensor], **fields: Any
    ) -> AdapterTensorSet:
        """Return the adapter of some updates.

        Args:
            updates: no two of one module.
            others: tensors that are no factors, or halves alone.
            fields: the other fields.
        """
        return cls(tensors={}, scales={}, **fields).updated(updates, others)

    def updated(
        self, updates: Iterable[Update], others: Mapping[TensorKey, LazyTensor] | None = None
    ) -> AdapterTensorSet:
        """Return a copy with these updates, and tensors beside them, in place of what was there."""
        tensors, scales, kinds = dict(self.tensors), dict(self.scales), dict(self.kinds)
        for update in updates:
            tensors.update(zip(update.keys, (update.a, update.b), strict=True))
            scales[update.module] = update.scale
            kinds.pop(update.module, None)
            if update.kind in {Kind.EXPERTS, Kind.CONVOLUTION}:
                kinds[update.module] = update.kind
        return self.replace(tensors={**tensors, **(others or {})}, scales=scales, kinds=kinds)

    def kind_of(self, key: TensorKey) -> Kind:
        """Return what a factor is one of."""
        if key.role in EMBEDDING_FACTORS:
            return Kind.EMBEDDING
        return self.kinds.get(key.module, Kind.LINEAR)

    def pairs(self) -> Iterator[Update]:
        """Yield every complete pair of factors, in file order; halves alone are skipped."""
        for key, tensor in self.tensors.items():
            if key.role not in {Role.LORA_A, Role.EMBEDDING_A}:
                continue
            other = TensorKey(key.module, PARTNERS[key.role])
            if other not in self.tensors:
                continue
            yield Update(
                key.module,
                tensor,
                self.tensors[other],
                self.scales.get(key.module, 1.0),
                self.kind_of(key),
            )

    def update_of(self, module: str) -> Update | None:
        """Return the update of a module, None where it has no complete pair of factors."""
        for a, b in (FACTORS, EMBEDDING_FACTORS):
            first = self.tensors.get(key := TensorKey(module, a))
            second = self.tensors.get(TensorKey(module, b))
            if first is not None and second is not None:
                scale = self.scales.get(module, 1.0)
                return Update(module, first, second, scale, self.kind_of(key))
        return None

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the tokens whose rows are trained in a module; none where that is not said."""
        numbers = self.token_indices
        if isinstance(numbers, tuple):
            return numbers
        named = [rows for name, rows in numbers.items() if f".{module}".endswith(f".{name}")]
        return named[0] if len(named) == 1 else ()

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the meaning of the tensors and is none, by PEFT's names, as JSON has it."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {SETTINGS[name]: _plain(value) for name, value in values.items() if value}

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules and replaced parameters, in file order."""
        return tuple(dict.fromkeys(key.module for key in self.tensors))

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(tensor.size for tensor in self.tensors.values())

    def renamed(self, names: Mapping[str, str]) -> AdapterTensorSet:
        """Return a copy whose modules have other names, in every field that names modules.

        Args:
            names: module or replaced parameter -> its new name; those not there keep theirs.
        """

        def new(name: str) -> str:
            return names.get(name, name)

        fields = ("scales", "kinds", "engine_layout", "rank_conflicts")
        moved = {each: {new(k): v for k, v in getattr(self, each).items()} for each in fields}
        for setting in ("unstored", "undeclared"):
            listed = getattr(self, setting)
            moved[setting] = {what: tuple(map(new, each)) for what, each in listed.items()}
        tokens = self.token_indices
        return self.replace(
            **moved,
            tensors={TensorKey(new(k.module), k.role): each for k, each in self.tensors.items()},
            tied={new(table): tuple(map(new, others)) for table, others in self.tied.items()},
            token_indices=tokens
            if isinstance(tokens, tuple)
            else {new(name): rows for name, rows in tokens.items()},
        )

    def replace(self, **changes: Any) -> AdapterTensorSet:
        """Return a copy with the named fields changed."""
        return replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in cast("tuple[Any, ...]", value)]
    return value
