"""What a base has no parameter for: heads of other classes or of the training alone, and biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE, MERGE_INSTEAD
from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.architectures.weights import engine_names
from adapterkit.base.places import Places
from adapterkit.errors import UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.model import AdapterTensorSet

_CLASSIFIERS = {"score", "classifier", "classification_head", "pre_classifier", "qa_outputs"}


def foreign_parameters(adapter: AdapterTensorSet, base: BaseModel | None) -> list[TensorKey]:
    """Return the whole parameters that the base does not have, so that no merge holds them."""
    if base is None or base.layout:
        return []
    places = Places(base)
    full = (key for key in adapter.tensors if key.role is Role.FULL)
    return [key for key in full if _foreign(key.module, places)]


def lost_heads(keys: Sequence[TensorKey], then: str = "") -> Iterator[Loss]:
    """Say of foreign parameters what they are, and how to go on.

    Args:
        keys: as `foreign_parameters` returns them.
        then: what follows a merge into a base of the class that was trained.
    """
    heads = [key for key in keys if key.module.partition(".")[0] in _CLASSIFIERS]
    if heads:
        message = (
            "is the head of a classifier, which this base is none of; merge it into a base of the "
            f"class that was trained ({MERGE}){then}, or leave it out with "
            "--allow-lossy"
        )
        yield Loss("foreign-head", _named(heads), message, tuple(heads))
    if others := [key for key in keys if key not in heads]:
        message = (
            "is no parameter of the base, a head for training; leave it out with --allow-lossy"
        )
        yield Loss("foreign-module", _named(others), message, tuple(others))


def lost_biases(adapter: AdapterTensorSet, base: BaseModel | None, target: str) -> Iterator[Loss]:
    """Say that a target holds no bias on B, and where it would go."""
    homeless = without_bias(adapter, base)
    placed = [key for key in adapter.tensors if key.role is Role.LORA_BIAS and key not in homeless]
    if placed:
        message = f"a bias on B has no place in {target}; {MERGE_INSTEAD}"
        yield Loss("lora-bias", _named(placed), message, tuple(placed))
    if homeless:
        message = (
            f"a bias on B has no place in {target}, nor in the base, which has no bias here; serve "
            "it with PEFT, or leave the bias out with --allow-lossy"
        )
        yield Loss("lora-bias", _named(homeless), message, tuple(homeless))


def without_bias(adapter: AdapterTensorSet, base: BaseModel | None) -> list[TensorKey]:
    """Return the biases on B of modules that have no bias in the base."""
    if base is None or base.layout or not base.has_tensors:
        return []
    places = Places(base)
    biases = (key for key in adapter.tensors if key.role is Role.LORA_BIAS)
    return [key for key in biases if not _has_bias(key.module, places)]


def _has_bias(module: str, places: Places) -> bool:
    base, name = places.base, f"{module}.bias"
    if base.kind == "hf":
        return places.find(name) is not None
    try:
        return all(part in base.tensors for part in engine_names(base.architecture, name))
    except UnsupportedError:
        return False


def _named(keys: Sequence[TensorKey]) -> str:
    return first_and_more(list(dict.fromkeys(key.module for key in keys)))


def _foreign(parameter: str, places: Places) -> bool:
    base, top = places.base, parameter.partition(".")[0]
    if base.kind == "hf" and base.has_tensors:
        held = places.names_place(parameter.rpartition(".")[0])  # stored in blocks, under any name
        return places.lacks(parameter) and not held
    if base.text_prefix or in_tower(parameter):
        return False
    # Only its class is known, whose modules all lie under a few names that the table has.
    tops = {rule.hf.partition(".")[0] for rule in base.architecture.rules}
    known = find_rule(base.architecture, parameter.rpartition(".")[0])
    named = any(name.startswith(f"{top}.") for name in base.names) if base.kind == "hf" else False
    return base.architecture.known and top not in tops and known is None and not named
