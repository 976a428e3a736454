"""What no merge into a base holds of an adapter, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.architectures.weights import engine_names
from adapterkit.base.heads import foreign_parameters, lost_heads, without_bias
from adapterkit.base.places import vocabulary_rows
from adapterkit.errors import UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.model.losses import lost_tensors
from adapterkit.notes import Loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet

_ELSEWHERE = (
    "merge it into the Hugging Face model and convert that with llama.cpp's convert_hf_to_gguf.py, "
    "or leave it out with --allow-lossy"
)


def losses(adapter: AdapterTensorSet, base: BaseModel) -> list[Loss]:
    """List what the base has no place for; no tensor data is read.

    Modules that it ought to have are no loss: without them it is another base.
    """
    found = list(_biases(adapter, base))
    foreign = foreign_parameters(adapter, base)
    if base.kind == "gguf":
        found += _placeless(adapter, base, foreign)
    return [*found, *lost_heads(foreign)]


def _biases(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Loss]:
    if found := without_bias(adapter, base):
        message = (
            "has a bias on B, and the base has no bias here that it could be added to; serve it as "
            "an adapter with PEFT, or leave the bias out with --allow-lossy"
        )
        yield lost_tensors("lora-bias", found, message)


def _placeless(
    adapter: AdapterTensorSet, base: BaseModel, foreign: Sequence[TensorKey]
) -> Iterator[Loss]:
    """Name what llama.cpp keeps in another file, or nowhere."""
    towers = [key for key in adapter.tensors if in_tower(key.module)]
    towers = [key for key in towers if find_rule(base.architecture, key.module) is None]
    if towers:
        message = "is of a vision or audio tower, which llama.cpp keeps in another file"
        yield lost_tensors("tower", towers, f"{message}; {_ELSEWHERE}")
    full = [key for key in adapter.tensors if key.role is Role.FULL]
    others = [key for key in full if key not in foreign and key not in towers]
    for key in others:
        held, rows = adapter.tensors[key].shape[0], vocabulary_rows(key.module, base)
        if rows not in {None, held}:
            reason = f"holds {held} rows, the base {rows}, and the vocabulary of a GGUF stays"
            yield lost_tensors("vocabulary", [key], f"{reason}; {_ELSEWHERE}")
    if nowhere := [key for key in others if not _placed(key.module, base)]:
        message = f"has no place of its own in a GGUF of {base.architecture.title}"
        yield lost_tensors("saved-module", nowhere, f"{message}; {_ELSEWHERE}")


def _placed(parameter: str, base: BaseModel) -> bool:
    try:
        return bool(engine_names(base.architecture, parameter))
    except UnsupportedError:
        return False
