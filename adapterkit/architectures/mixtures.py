"""The types that llama.cpp's quantiser gives to the tensors of a file, such as q4_k_m, as data."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.architectures.expressions import evaluate
from adapterkit.dtype import DType
from adapterkit.tables import Table, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.tensor import LazyTensor

_LAYER = re.compile(r"blk\.(\d+)\.")
_ATTENTION_V, _OUTPUT, _EMBEDDING = "attention_v", "output", "embedding"
_FEED_FORWARD = "ffn_"
_STACK = 3
_SIZE = whole(0, 1 << 40, integral=True)


@dataclass(frozen=True, slots=True)
class Mixture:
    """One of llama.cpp's file types.

    Attributes:
        name: as `llama-quantize` takes it, in lower case.
        file_type: its number in `general.file_type`.
        dtype: the type of most matrices.
    """

    name: str
    file_type: int
    dtype: DType

    def types(
        self, architecture: str, facts: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
    ) -> dict[str, DType]:
        """Return the type of every tensor; those that are not quantised keep theirs.

        Args:
            architecture: `general.architecture` of the model.
            facts: its GGUF keys, as `Sizes` looks them up.
            tensors: all of its tensors, by llama.cpp name.
        """
        chooser = _Chooser(self, tensors, _known(architecture, facts))
        # The quantiser counts in the order of layers, and of names in a layer.
        order = sorted(tensors, key=lambda name: (_layer(name), name))
        chosen = {name: chooser.choose(name, tensors[name]) for name in order}
        return {name: chosen[name] for name in tensors}


@cache
def mixtures() -> Mapping[str, Mixture]:
    """Return every mixture by its name."""
    return {
        name: Mixture(name, row["file_type"], DType(row["type"]))
        for name, row in _table()["mixture"].items()
    }


def _known(architecture: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that the table's conditions ask for; of the first layer, if they vary."""
    known: dict[str, Any] = {"arch": architecture}
    for word, names in _table()["facts"].items():
        name = next((name for name in names if name in facts), names[0])
        fact = facts.get(name, 0)
        first = next(iter(cast("list[Any]", fact)), 0) if isinstance(fact, list) else fact
        known[word] = Table(facts, None).checked(name, first, _SIZE)
    return known


class _Chooser:
    """Follows the quantiser from tensor to tensor, and counts as it does."""

    def __init__(
        self, mixture: Mixture, tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any]
    ) -> None:
        table = _table()
        self.mixture, self.facts = mixture, facts
        self.own, self.always = table["mixture"][mixture.name], table["always"]
        self.tied = "output.weight" not in tensors
        # Of attention the quantiser counts tensors, of feed-forward matrices layers.
        values = sum(_kind(name) == _ATTENTION_V for name in tensors)
        self.counts = {_ATTENTION_V: values}
        self.seen: dict[str, int] = {}

    def choose(self, name: str, tensor: LazyTensor) -> DType:
        """Return the type of the next tensor."""
        if not _quantised(name, tensor.shape):
            return tensor.dtype
        kind = _kind(name)
        output = kind == _OUTPUT or (kind == _EMBEDDING and self.tied)
        found = self._exception(name, _OUTPUT if output else kind, tensor)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        while tensor.shape[-1] % found.block:
            found = DType(_table()["fallback"].get(found.value, DType.F16))
        return found

    def _exception(self, name: str, kind: str, tensor: LazyTensor) -> DType:
        found = self.mixture.dtype
        everything = self.own.get("all")
        rules = (everything,) if everything else (self.own.get(kind), self.always.get(kind))
        words = self._words(name, kind, tensor)
        for rule in rules:
            known = {**words, "type": found.value, "block": found.block}
            types = (dtype for condition, dtype in rule or () if _holds(condition, known))
            found = DType(next(types, found))
        return found

    def _words(self, name: str, kind: str, tensor: LazyTensor) -> dict[str, Any]:
        heads, groups = self.facts["heads"], self.facts["kv_heads"]
        by_layer = kind.startswith(_FEED_FORWARD) and self.facts["experts"] > 1
        return {
            **self.facts,
            "i": _layer(name) if by_layer else self.seen.get(kind, 0),
            "n": self.counts.get(kind, self.facts["layers"]),
            "gqa": heads // groups if groups else 0,
            "width": tensor.shape[-1],
            "stacked": len(tensor.shape) == _STACK and tensor.shape[0] > 1,
            "output": kind == _OUTPUT,
        }


def _holds(condition: str, known: Mapping[str, Any]) -> bool:
    words = _table()["words"]

    def lookup(word: str) -> Any:
        return known[word] if word in known else evaluate(words[word], lookup)

    return bool(evaluate(condition, lookup))


def _quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether the quantiser looks at a tensor: a matrix, or a stack of them, of weights."""
    table = _table()
    rows = any(size > 1 for size in shape[:-1])
    return rows and name.endswith(table["suffix"]) and not any(p in name for p in table["kept"])


def _kind(name: str) -> str:
    table = _table()
    parts: Mapping[str, str] = table["parts"]
    return table["whole"].get(name) or next((k for p, k in parts.items() if p in name), "other")


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


@cache
def _table() -> Mapping[str, Any]:
    text = (Path(__file__).parent / "mixtures.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
