"""Two checkpoints, opened and found to be the same model as far as their headers tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import IncompatibleBaseError, NotFoundError, UnsupportedError
from adapterkit.loading import open_model

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.base.model import BaseModel

_KINDS = {"hf": "a Hugging Face directory", "gguf": "a GGUF file"}


def open_both(
    base: BaseModel | Path | str, tuned: BaseModel | Path | str
) -> tuple[BaseModel, BaseModel]:
    """Open both, in one family.

    Raises:
        NotFoundError: if there is nothing at a path, or a shard is missing.
        UnsupportedError: if one is packed, without weights, or of the other kind.
        IncompatibleBaseError: if they are different architectures.
    """
    before, after = open_model(base), open_model(tuned)
    for model in (before, after):
        _check_whole(model)
    if before.kind != after.kind:
        raise UnsupportedError(
            f"is {_KINDS[after.kind]}, and the base {_KINDS[before.kind]}: give both in one "
            "format, for instance as llama.cpp's convert_hf_to_gguf.py writes them",
            path=after.path,
        )
    if before.layout != after.layout:
        message = f"is another kind of checkpoint than {before.path}; give both as one kind"
        raise UnsupportedError(message, path=after.path)
    shared = [family for family in before.candidates if family in after.candidates]
    if not shared and _same_type(before, after):
        return before, after
    if not shared:
        raise IncompatibleBaseError(
            f"is {after.architecture.title}, and the base {before.path} is "
            f"{before.architecture.title}: an adapter lies between checkpoints of one model",
            path=after.path,
        )
    return replace(before, candidates=shared), replace(after, candidates=shared)


def _same_type(before: BaseModel, after: BaseModel) -> bool:
    """Tell whether two models that no table describes are one but for their heads."""
    known = before.architecture.known or after.architecture.known
    kinds = {model.facts.get("model_type") for model in (before, after)}
    return not known and len(kinds) == 1 and None not in kinds


def _check_whole(model: BaseModel) -> None:
    packed = model.facts.get("quantization_config") if model.kind == "hf" else None
    if packed:
        raise UnsupportedError(
            "is quantised (quantization_config); give the 16-bit model, or have transformers "
            "dequantise it and save_pretrained first",
            path=model.path,
        )
    if not model.has_tensors and not model.names:
        raise UnsupportedError(
            "has no safetensors weights; save it with save_pretrained(safe_serialization=True)",
            path=model.path,
        )
    for name in sorted(model.names):
        if name not in model.tensors:
            raise NotFoundError(
                "its shard is missing, or does not hold it; download the model again",
                path=model.path,
                where=name,
            )
