"""Where a module's weight stands in a base model, whatever its checkpoint calls it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.architectures.fusion import whole_of
from adapterkit.architectures.mapping import find_rule
from adapterkit.base.assemblies import Assembly, assemblies
from adapterkit.base.model import BaseModel
from adapterkit.base.peft_names import peft_names
from adapterkit.base.spelling import SUFFIXES, WEIGHT, Spelling
from adapterkit.errors import BaseRequiredError, FormatError, UnsupportedError
from adapterkit.model import Kind, PeftSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

    Spot = tuple[str, int | None, int | None, str]

EMBEDDING, OUTPUT = "token_embd", "output"
_MATRIX = 2
# Of a diffusion model, all is a layer that ends so, but for tables of a text encoder.
_MATRICES = (WEIGHT, ".in_proj_weight")
_TABLES = ("token_embedding.weight", "position_embedding.weight", "shared.weight")
_MOST_MODULES = 1 << 20


@dataclass(frozen=True)
class Places:
    """The parameters of a base by Hugging Face path, and how they are stored.

    A path is looked for as it stands, then in other spellings of the same place in the family
    (`transformer.h.0` and `h.0`), then under what its class's modules are called on disk, with and
    without the prefix of a class with a head.

    Attributes:
        base: the model.
    """

    base: BaseModel

    @cached_property
    def spelling(self) -> Spelling:
        """What its modules are called."""
        return Spelling(self.base)

    def find(self, parameter: str) -> str | None:
        """Return the stored name of a parameter, or None."""
        if self.base.kind != "hf":
            return None
        if parameter in self.base.tensors:
            return parameter
        spot = self._spot(parameter)
        if spot and (found := self._by_spot.get(spot)):
            return found
        return self._by_class(parameter)

    def of(self, module: str) -> str | None:
        """Return the stored name of a module's weight, or of a bare parameter."""
        return self.find(module + WEIGHT) or self.find(module)

    def stored(self, module: str) -> LazyTensor | None:
        """Return a module's weight as it is stored: (out, in), or (in, out) of a Conv1D.

        Where it is rows of a tensor that holds more, it is those.
        """
        if name := self.find(module + WEIGHT):
            return self.base.tensors[name]
        made = self.assembly(module)
        if made is None or made.kind != "rows":
            return None
        return made.rows(self.base.tensors[made.names[0]])

    def assembly(self, module: str) -> Assembly | None:
        """Return what the class makes a module's weight of, where no stored tensor is that."""
        if self.base.kind != "hf":
            return None
        found = map(self._assemblies.get, self.spelling.prefixed(module))
        return next(filter(None, found), None)

    def assembled(self) -> Iterator[str]:
        """Yield the modules whose weights the class makes of stored tensors."""
        yield from self._assemblies

    def assembled_from(self, stored: str) -> list[str]:
        """Return the modules whose weights the class makes of a stored tensor."""
        return self._origins.get(stored, [])

    def shared(self, parameter: str) -> str | None:
        """Return the table that an output shares, where it has no tensor of its own."""
        if self.role(parameter) != OUTPUT:
            return None
        # Some classes have several outputs, each with a table of its own.
        cls, names = self.spelling.cls, (parameter, self.spelling.memory(parameter))
        table = next(filter(None, map(cls.tied.get, names)), None) if cls else None
        return (self.find(table) if table else None) or self.embedding

    def has(self, module: str) -> bool | None:
        """Tell whether the base has a module; None if nothing is known of its modules."""
        if find_rule(self.base.architecture, module) is not None:
            return True
        if self.base.kind != "hf" or not self.base.names:
            return False if self.base.architecture.known else None
        return bool(
            self.of(module)
            or self.names_place(module)
            or self.assembly(module)
            or self.shared(module + WEIGHT) is not None
        )

    def names_place(self, module: str) -> bool | None:
        """Tell whether the checkpoint names anything of a module; None if its names are unknown.

        Quantised checkpoints have other tensors than `.weight` under a module's name.
        """
        if not self._named:
            return None
        if module in self._named or self._spot(module + WEIGHT) in self._spots:
            return True
        if self.assembly(module) or any(
            map(self._named.__contains__, self.spelling.on_disk(module))
        ):
            return True
        whole = self._whole(module)
        return whole is not None and self.names_place(whole)

    def has_leaf(self, leaf: str) -> bool | None:
        """Tell whether any module's last name is this; None if nothing is known of its modules."""
        return leaf in self._leaves if self._leaves else None

    def own(self, module: str) -> bool:
        """Tell whether a path is that of a module in the base's class, as far as names tell."""
        if not self._named or module in self._named or module in self._live:
            return True
        if module in self._assemblies:
            return True
        return self.spelling.cls is not None and module + WEIGHT in self.spelling.cls.tied

    def role(self, parameter: str) -> str | None:
        """Return `token_embd` or `output` for the two that may be tied, else None."""
        spot = self._spot(parameter)
        match = find_rule(self.base.architecture, parameter.removesuffix(WEIGHT))
        if match is None:  # the class may be around that of the table
            live = self.spelling.memory(parameter)
            return self._tied_roles.get(parameter) or self._tied_roles.get(live)
        if spot is None or spot[-1] != WEIGHT:
            return None
        target = match.rule.targets[0].name
        return target if target in {EMBEDDING, OUTPUT} else None

    def lacks(self, parameter: str) -> bool:
        """Tell whether the checkpoint has no such parameter; false where its names are unknown.

        An output that shares the embedding's table is no parameter that is missing.
        """
        if self.base.kind != "hf" or not self.base.has_tensors:
            return False
        return self.find(parameter) is None and self.shared(parameter) is None

    @cached_property
    def embedding(self) -> str | None:
        """The stored embedding table, where an output may share it."""
        return next((name for name in self.base.tensors if self.role(name) == EMBEDDING), None)

    @cached_property
    def output(self) -> str | None:
        """The stored output."""
        return next((name for name in self.base.tensors if self.role(name) == OUTPUT), None)

    @cached_property
    def tied_output(self) -> str | None:
        """The output, as a path in memory, of a class that no table describes."""
        outputs = (name for name, role in self._tied_roles.items() if role == OUTPUT)
        found = next(outputs, None)
        return found.removesuffix(WEIGHT) if found else None

    @cached_property
    def spelled(self) -> tuple[str, ...]:
        """Every stored weight and bare parameter, without `.weight`."""
        return tuple(name.removesuffix(WEIGHT) for name in self.base.tensors)

    def modules(self) -> Iterator[str]:
        """Yield every module that has a matrix: from the weights, or else from the tables."""
        if self.base.kind == "hf" and self.base.has_tensors:
            for name, tensor in self.base.tensors.items():
                if name.endswith(WEIGHT) and tensor.is_matrix:
                    yield name.removesuffix(WEIGHT)
            return
        for rule in self.base.architecture.rules:
            if rule.kind in {"linear", "embedding"}:
                yield from self._numbered(rule.hf)

    def aliases(self) -> tuple[str, ...]:
        """Return the modules of the base's class that the family's table calls otherwise."""
        if self.spelling.cls is None or "auto_map" in self.base.facts:
            return ()  # who trains the model has the code beside it
        live = dict.fromkeys((*map(self.spelling.memory, self.spelled), *self._assemblies))
        matches = ((name, find_rule(self.base.architecture, name)) for name in live)
        return tuple(name for name, match in matches if match and match.rule.alias)

    def live(self, name: str) -> str:
        """Return the path in the base's class of a module or parameter in any of its spellings.

        What the base does not store keeps its name, but for the wrapper's prefix.
        """
        if (stored := self.of(name)) is not None:
            whole = stored == self.find(name)
            return self.spelling.memory(stored if whole else stored.removesuffix(WEIGHT))
        if made := next((p for p in self.spelling.prefixed(name) if p in self._assemblies), None):
            return made
        path = self.spelling.canonical(name)
        if not self.base.text_prefix or not path.startswith("model."):
            return self.spelling.in_class(path)
        return self.base.text_prefix + path.removeprefix("model.")

    def loaded(self, name: str) -> str | None:
        """Return the module to which PEFT leads a name of an adapter's file; None if to none."""
        names = peft_names(self.base.classes)
        if names.loses(name):
            return None
        return next(filter(self.own, names.modules(name)), name)

    def kind(self, name: str) -> str | None:
        """Return what holds a stored matrix, as `ModelClass.kind`; None for a class not known."""
        if self.base.layout:
            table = name.endswith(_TABLES) or not name.endswith(_MATRICES)
            return None if table else "linear"
        return self.spelling.cls.kind(self.spelling.memory(name)) if self.spelling.cls else None

    def shape(self, module: str) -> tuple[int, int] | None:
        """Return (out, in) of a linear layer, from the weights or from the configuration."""
        stored = self.stored(module)
        match = find_rule(self.base.architecture, module)
        # Quantised checkpoints store packed shapes; their config tells the logical ones.
        if stored is not None and stored.dtype.floating and stored.is_matrix:
            rows, columns = stored.shape
            return (columns, rows) if self.conv1d(module) else (rows, columns)
        if match is None or len(match.rule.shape) != _MATRIX:
            return None
        try:
            rows, columns = (self.base.sizes.value(text, match.layer) for text in match.rule.shape)
        except BaseRequiredError:
            return None
        return rows, columns

    def turned(self, pair: Update, stored: LazyTensor, adapter: AdapterTensorSet) -> bool:
        """Tell whether an update is to be turned, to (in, out), to be added to a stored tensor.

        The tables and transformers' classes know; else shapes tell, and else what PEFT recorded.

        Raises:
            UnsupportedError: if nothing tells.
        """
        if pair.embedding:
            return True
        match = find_rule(self.base.architecture, pair.module)
        if match is not None:
            return match.rule.conv1d or match.rule.stored_turned
        if pair.kind is Kind.CONVOLUTION or self.base.layout:
            return False
        turned = (*pair.shape[:-2], *pair.shape[:-3:-1])
        if turned != pair.shape:
            return pair.shape != stored.shape and turned == stored.shape
        if self.spelling.cls is not None:
            return self.conv1d(pair.module)
        source = adapter.source
        recorded = source.config.get("fan_in_fan_out") if isinstance(source, PeftSource) else None
        if isinstance(recorded, bool):
            return recorded
        raise UnsupportedError(
            f"is square, and nothing tells whether {self.base.architecture.title} stores it as "
            "(out, in) or (in, out)",
            where=pair.module,
        )

    def conv1d(self, module: str) -> bool:
        """Tell whether a module is known to be a Conv1D, whose weight is stored as (in, out)."""
        if match := find_rule(self.base.architecture, module):
            return match.rule.conv1d
        return self.spelling.cls is not None and self.spelling.cls.kind(module + WEIGHT) == "conv1d"

    def _by_class(self, parameter: str) -> str | None:
        for name in self.spelling.on_disk(parameter):
            if name in self.base.tensors:
                return name
        return next(
            (
                self._by_memory[name]
                for name in map(self.spelling.memory, self.spelling.prefixed(parameter))
                if name in self._by_memory
            ),
            None,
        )

    @cached_property
    def _assemblies(self) -> Mapping[str, Assembly]:
        return assemblies(self.base.classes, self.base.tensors)

    @cached_property
    def _origins(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for module, made in self._assemblies.items():
            for name in made.names if made.known else ():
                found.setdefault(name, []).append(module)
        return found

    @cached_property
    def _by_memory(self) -> Mapping[str, str]:
        return {self.spelling.memory(name): name for name in self.base.tensors}

    @cached_property
    def _tied_roles(self) -> Mapping[str, str]:
        """Outputs that share a table, and the table, by their paths in memory."""
        if self.spelling.cls is None:
            return self._plain_roles()
        outputs = {
            output: table
            for output, table in self.spelling.cls.tied.items()
            if output.endswith(WEIGHT) and self.spelling.cls.kind(output) != "embedding"
        }
        roles = dict.fromkeys(outputs, OUTPUT)
        return roles | dict.fromkeys(outputs.values(), EMBEDDING)

    def _plain_roles(self) -> Mapping[str, str]:
        """Tell the two of a class that is not known by name and by the size of the vocabulary."""
        if not self.base.tied or "lm_head.weight" in self.base.names:
            return {}
        rows = self.base.facts.get("vocab_size")
        tables = [
            name
            for name, tensor in self.base.tensors.items()
            if tensor.is_matrix and tensor.shape[0] == rows
        ]
        return {tables[0]: EMBEDDING, "lm_head.weight": OUTPUT} if len(tables) == 1 else {}

    def _numbered(self, pattern: str) -> Iterator[str]:
        layers = range(self.base.sizes.value("layers") if "{i}" in pattern else 1)
        experts = range(self.base.sizes.value("experts") if "{e}" in pattern else 1)
        if len(layers) * len(experts) > _MOST_MODULES:
            message = f"{len(layers)} layers of {len(experts)} experts are no model"
            raise FormatError(message, path=self.base.path)
        for layer in layers:
            for expert in experts:
                yield pattern.replace("{i}", str(layer)).replace("{e}", str(expert))

    @cached_property
    def _by_spot(self) -> dict[Spot, str]:
        spots = ((self._spot(name), name) for name in self.base.tensors)
        return {spot: name for spot, name in spots if spot}

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[0] for name in self.base.names)

    @cached_property
    def _live(self) -> frozenset[str]:
        return frozenset(map(self.spelling.memory, self._named))

    @cached_property
    def _leaves(self) -> frozenset[str]:
        tabled = () if self._named else (rule.hf for rule in self.base.architecture.rules)
        names = (*self._named, *self._live, *tabled)
        return frozenset(name.rpartition(".")[2] for name in names)

    @cached_property
    def _spots(self) -> frozenset[Spot]:
        spots = (self._spot(module + WEIGHT) for module in self._named)
        return frozenset(spot for spot in spots if spot)

    def _whole(self, module: str) -> str | None:
        """Return the module that holds this one's rows, where llama.cpp always has that whole."""
        match = find_rule(self.base.architecture, module)
        tensor = whole_of(self.base.architecture, match.rule.targets[0].name) if match else None
        rules = self.base.architecture.rules if match and tensor else ()
        found = next((each for each in rules if each.targets[0].name == tensor), None)
        return found.place(match.layer, match.expert) if match and found else None

    def _spot(self, parameter: str) -> Spot | None:
        for suffix in (*SUFFIXES, ""):
            if parameter.endswith(suffix):
                match = find_rule(self.base.architecture, parameter[: len(parameter) - len(suffix)])
                if match:
                    rule = self.base.architecture.own(match.rule)
                    return rule.hf, match.layer, match.expert, suffix
        return None


def vocabulary_rows(name: str, base: BaseModel) -> int | None:
    """Return the rows of the base's table of tokens that a module or its weight is; else None."""
    module = name.removesuffix(WEIGHT)
    match = find_rule(base.architecture, module)
    if match is None or match.rule.shape[:1] != ("vocab",):
        return None
    place = match.rule.targets[0].name if base.kind == "gguf" else module
    if stored := base.tensors.get(place + WEIGHT):
        return stored.shape[0]
    rows = base.sizes.get("vocab")
    return int(rows) if rows is not None else None
