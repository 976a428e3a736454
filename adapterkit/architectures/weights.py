"""Weights of a Hugging Face model as llama.cpp stores them, by the rules of a family.

`mapping` moves low-rank factors by the same rules; here the full parameters move: weights, biases,
norms, embeddings, experts. Names are whole parameter names on both sides,
`model.layers.0.self_attn.q_proj.bias` and `blk.0.attn_q.bias`. A rule of kind `tensor` is spelled
whole in the table too, for parameters that llama.cpp renames past the suffix.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.mapping import find_rule
from adapterkit.architectures.rows import row_factors, row_order
from adapterkit.architectures.table import WeightRule
from adapterkit.errors import IncompatibleBaseError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from adapterkit.architectures.sizes import Sizes
    from adapterkit.architectures.table import Architecture

    Array = np.ndarray[Any, np.dtype[Any]]

_SUFFIXES = (".weight", ".bias")
# Kinds whose names the tables spell whole, past the suffix.
_WHOLE = ("tensor", "header")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter, or a stack of one per expert, goes.

    Attributes:
        rule: the rule of its module.
        layer: its layer, or None.
        suffix: what llama.cpp's names end with after the table's.
    """

    rule: WeightRule
    layer: int | None
    suffix: str

    @property
    def names(self) -> list[str]:
        """Tensors that it fills, in the table's order."""
        return [
            target.name.replace("{i}", str(self.layer)) + self.suffix
            for target in self.rule.targets
        ]


def weight_to_engine(
    architecture: Architecture, sizes: Sizes, name: str, array: Array
) -> list[tuple[str, Array]]:
    """Turn one Hugging Face parameter into the llama.cpp tensors that hold it.

    Args:
        architecture: the family.
        sizes: sizes of the base model.
        name: whole parameter name, such as `model.layers.0.mlp.down_proj.weight`.
        array: the parameter, any numeric dtype; the same dtype comes back, except that rules which
            compute (`scale`, `add`) give float32.

    Returns:
        Whole tensor names and arrays, at least one.

    Raises:
        UnsupportedError: if no rule knows the parameter, it is one expert of a stacked tensor, or a
            number that llama.cpp keeps in its header.
        IncompatibleBaseError: if its rows do not divide as this base's sizes demand.
        BaseRequiredError: if the base does not state a size that the rule needs.
    """
    return _moved(_whole(architecture, name), sizes, name, array)


def engine_names(architecture: Architecture, name: str) -> list[str]:
    """Return the names of the llama.cpp tensors that hold a Hugging Face parameter, at least one.

    Raises:
        UnsupportedError: as `weight_to_engine` does.
    """
    return _whole(architecture, name).names


def _whole(architecture: Architecture, name: str) -> _Place:
    """Return where a parameter goes that fills its place alone."""
    place, expert = _place(architecture, name)
    if place.rule.kind == "header":
        raise UnsupportedError(
            f"is no tensor of llama.cpp, which keeps it in the header ({place.names[0]})",
            where=name,
        )
    if expert is not None:
        raise UnsupportedError(
            f"is one expert of {place.names[0]}, which is written whole; convert the state dict "
            "with model_to_engine",
            where=name,
        )
    return place


def model_to_engine(
    architecture: Architecture, sizes: Sizes, state: Mapping[str, Array]
) -> dict[str, Array]:
    """Turn a whole Hugging Face state dict into llama.cpp tensors, experts stacked.

    Args:
        architecture: the family.
        sizes: sizes of the base model.
        state: parameter name -> array; tied copies left out, as `save_pretrained` leaves them. What
            llama.cpp keeps in its header is no tensor and left out of the answer.

    Raises:
        UnsupportedError: if no rule knows a parameter, or two parameters claim one tensor.
        IncompatibleBaseError: if rows do not divide as this base's sizes demand, or the experts of
            a layer are not exactly those that the base counts.
        BaseRequiredError: if the base does not state a size that a rule needs.
    """
    engine: dict[str, Array] = {}
    stacks: dict[_Place, dict[int, Array]] = defaultdict(dict)
    for name, array in state.items():
        place, expert = _place(architecture, name)
        if place.rule.kind == "header":
            continue
        if expert is None:
            _add(engine, name, _moved(place, sizes, name, array))
        else:
            stacks[place][expert] = array
    for place, members in stacks.items():
        stacked = _stacked(place, sizes, members)
        _add(engine, place.rule.hf, _moved(place, sizes, place.rule.hf, stacked))
    return engine


def _place(architecture: Architecture, name: str) -> tuple[_Place, int | None]:
    whole = find_rule(architecture, name)
    if whole and whole.rule.kind in _WHOLE:
        return _Place(whole.rule, whole.layer, ""), whole.expert
    for suffix in _SUFFIXES:
        if not name.endswith(suffix):
            continue
        match = find_rule(architecture, name.removesuffix(suffix))
        if match and match.rule.kind not in _WHOLE:
            return _Place(match.rule, match.layer, suffix), match.expert
    if whole:
        # A bare parameter: fused experts.
        return _Place(whole.rule, whole.layer, ".weight"), whole.expert
    raise UnsupportedError(
        f"no rule of {architecture.name!r} says which llama.cpp tensor this is", where=name
    )


def _add(engine: dict[str, Array], name: str, tensors: list[tuple[str, Array]]) -> None:
    for tensor, array in tensors:
        if tensor in engine:
            raise UnsupportedError(f"{tensor} is filled by another parameter too", where=name)
        engine[tensor] = array


def _stacked(place: _Place, sizes: Sizes, members: Mapping[int, Array]) -> Array:
    import numpy as np

    count = int(sizes.value(place.rule.count, place.layer))
    if sorted(members) != list(range(count)):
        raise IncompatibleBaseError(
            f"the base has {count} {place.rule.count}, the weights hold {sorted(members)}",
            where=place.names[0],
        )
    return np.stack([members[expert] for expert in range(count)])


def _moved(place: _Place, sizes: Sizes, name: str, array: Array) -> list[tuple[str, Array]]:
    """Apply a rule: turn, reorder, compute, split, in that order."""
    rule, layer = place.rule, place.layer
    # Rows are outputs: the last axis of a vector (stacked per expert or not), else the one before.
    vector = array.ndim == 1 or place.names[0].endswith(".bias")
    axis = -1 if vector else -2
    if rule.squeezed and not vector:
        array = array.squeeze(1)
    if (rule.conv1d or rule.stored_turned) and not vector:
        array = array.swapaxes(-1, -2)
    if rule.rows:
        array = array.take(row_order(rule.rows, array.shape[axis], sizes, layer, name), axis)
    if rule.cols and not vector:
        array = array.take(row_order(rule.cols, array.shape[-1], sizes, layer, name), -1)
    if rule.scale:
        array = array.astype("float32") * sizes.number(rule.scale, layer)
    if rule.row_scales and not vector:
        given = row_factors(rule, sizes, layer, array.shape[axis], name)
        array = array.astype("float32") * given.astype("float32")[:, None]
    if rule.add and place.suffix != ".bias":
        array = array.astype("float32") + rule.add
    if rule.per_head:
        heads = int(sizes.value(rule.per_head, layer))
        array = array.reshape(heads, -1, array.shape[-1])
    if rule.values or (rule.folded and place.suffix != ".bias"):
        array = _stored(rule, sizes, layer, array)
    return list(zip(place.names, _parts(place, sizes, name, array, axis), strict=True))


def _stored(rule: WeightRule, sizes: Sizes, layer: int | None, array: Array) -> Array:
    """Compute the values and take the shape that llama.cpp stores."""
    import numpy as np

    if rule.values:
        array = _VALUES[rule.values](array.astype("float32"))
    shape = tuple(int(sizes.value(size, layer)) for size in rule.folded) or array.shape
    if np.prod(shape) != array.size:
        raise IncompatibleBaseError(
            f"holds {array.size} values, the base's sizes say {shape}", where=rule.hf
        )
    return array.reshape(shape)


def _minus_exp(array: Array) -> Array:
    import numpy as np

    return -np.exp(array)


_VALUES: dict[str, Callable[[Array], Array]] = {"minus_exp": _minus_exp}


def _parts(place: _Place, sizes: Sizes, name: str, array: Array, axis: int) -> list[Array]:
    import numpy as np

    rule, layer = place.rule, place.layer
    height = array.shape[axis]
    shares = [
        int(sizes.value(target.size, layer)) if target.size else height // len(rule.targets)
        for target in rule.targets
    ]
    if len(shares) > 1 and sum(shares) != height:
        raise IncompatibleBaseError(
            f"has {height} output rows, the base splits it into {shares}", where=name
        )
    parts: list[Array] = []
    pieces = np.split(array, np.cumsum(shares)[:-1], axis)
    for target, piece in zip(rule.targets, pieces, strict=True):
        part = piece
        if target.rows:
            order = row_order(target.rows, part.shape[axis], sizes, layer, name)
            part = part.take(order, axis)
        parts.append(part.swapaxes(-1, -2) if target.transpose else part)
    return parts
