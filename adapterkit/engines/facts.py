"""What engine rules speak of: an adapter and its base as plain values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base.places import Places
from adapterkit.checks.structure import peft_config, unclean_names
from adapterkit.errors import AdapterKitError
from adapterkit.json_file import read_json_object
from adapterkit.keys import Role
from adapterkit.model import Kind
from adapterkit.notes import NoteKind
from adapterkit.passes.stacking import missing
from adapterkit.served import served

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet

_HEADS = {"classifier", "score"}
_TABLES = {"lm_head", "embed_tokens"}
_ADDED_TOKENS = "added_tokens.json"
_PICKLES = {".bin", ".pt", ".pth"}
_LAYERS = re.compile(r"(^|\.)layers\.\d+\.")
_SHARDS = "adapter_model-*-of-*"


def facts(adapter: AdapterTensorSet, base: BaseModel | None, engine: str = "") -> dict[str, Any]:
    """Return the words of `when` in adapterkit/engines/*.toml, with their values.

    Numbers and truth values are of the adapter: `max_rank`, `ranks_differ`, `scales_differ`,
    `dora`, `dora_declared` (by the config, whatever the file holds), `lora_bias`, `saved_biases`,
    `saved_modules`, `saved_heads` and `head_biases` (weights and biases of `classifier` and
    `score`, where that is one matrix), `saved_tables` (weights of `lm_head` and `embed_tokens`, by
    these names), `head_absent` (the base has no such head), `token_rows`,
    `embedding`, `output`, `experts_fused`, `tower`, `rslora`, `rank_pattern`, `alpha_pattern`,
    `alpha_whole`, `alpha_zero`, `regex_targets`, `base_changing_init`, `layer_replication`,
    `invocation_tokens`, `bdlora`, `qalora`, `pickled`, `sharded`, `unclean_names`, `foreign_names`,
    `stacked_apart` (how many of q, v and gate are without an update, and stacked with modules that
    have one), `tower_layers` (how many modules of towers are under `layers.N`),
    `trained_beside` (files without which answers are others), `tokens_added` (how many entries of
    an added_tokens.json beside it the base has no row for); texts: `format`, `init`,
    `architecture` (of the base, empty if unknown). Of the engine's models: `class_unserved`,
    `class_without_lora`, `type_unserved` and `type_without_lora`, false where the base does not
    tell its class; `encoder_decoder`; texts: `base_class`, `model_type`, `served_version`.
    """
    pairs = [pair for pair in adapter.pairs() if pair.sound]
    unclean = list(unclean_names(adapter))
    ranks = {pair.rank for pair in pairs}
    full = [key.module for key in adapter.tensors if key.role is Role.FULL]
    roles = {key.role for key in adapter.tensors}
    config = peft_config(adapter)
    return (
        _of_config(config)
        | _of_models(base, engine)
        | {
            "format": adapter.provenance.format if adapter.provenance else "",
            "architecture": base.architecture.gguf if base else "",
            "max_rank": max(ranks, default=0),
            "ranks_differ": len(ranks) > 1,
            "scales_differ": len({pair.scale for pair in pairs}) > 1,
            "dora": bool(roles & {Role.MAGNITUDE, Role.COLUMN_MAGNITUDE}),
            "lora_bias": Role.LORA_BIAS in roles,
            "saved_biases": sum(name.endswith(".bias") for name in full),
            "saved_modules": sum(not name.endswith(".bias") for name in full),
            "saved_heads": _of(_HEADS, full, "weight"),
            "head_biases": _of(_HEADS, full, "bias"),
            "saved_tables": _of(_TABLES, full, "weight"),
            "head_absent": _head_absent(full, base),
            "token_rows": Role.TOKEN_ROWS in roles,
            "embedding": any(pair.embedding for pair in pairs),
            "output": any(_is_output(pair.module, base) for pair in pairs),
            "experts_fused": any(pair.kind is Kind.EXPERTS for pair in pairs),
            "tower": any(in_tower(pair.module) for pair in pairs),
            "tower_layers": _tower_layers([pair.module for pair in pairs], base),
            "stacked_apart": len(missing(adapter, base)),
            "base_changing_init": adapter.initialisation is not None,
            "init": (adapter.initialisation or "").lower(),
            "layer_replication": bool(adapter.layer_replication),
            "invocation_tokens": bool(adapter.invocation_tokens),
            "unclean_names": bool(unclean),
            # PEFT itself takes names with an adapter's name in them.
            "foreign_names": any(note.kind is NoteKind.PREFIX for note in unclean),
            "trained_beside": any(file.needed for file in adapter.beside),
            "tokens_added": _tokens_added(adapter, base),
            "sharded": bool(adapter.provenance and _sharded(adapter.provenance.path)),
            "pickled": bool(adapter.provenance and _pickled(adapter.provenance.path)),
        }
    )


def _of_models(base: BaseModel | None, engine: str) -> dict[str, Any]:
    """Return what the engine's list of models says of the base."""
    models = served(engine)
    classes = base.classes if base else ()
    config: Mapping[str, Any] = base.facts if base and base.kind == "hf" else {}
    kind = base.model_type if base else ""
    known = bool(classes and models.lora)
    return {
        "base_class": classes[0] if classes else "",
        "model_type": kind,
        "served_version": models.version,
        "encoder_decoder": bool(config.get("is_encoder_decoder")),
        "class_unserved": known and (models.lora | models.without).isdisjoint(classes),
        "class_without_lora": known
        and models.lora.isdisjoint(classes)
        and not models.without.isdisjoint(classes),
        "type_unserved": models.lacks_type(kind),
        "type_without_lora": kind in models.types_without,
    }


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PEFT's config says; for other formats, that it says nothing."""
    alpha = config.get("lora_alpha", 0)
    return {
        "rslora": bool(config.get("use_rslora")),
        "dora_declared": bool(config.get("use_dora")),
        "rank_pattern": bool(config.get("rank_pattern")),
        "alpha_pattern": bool(config.get("alpha_pattern")),
        "alpha_whole": isinstance(alpha, int),
        "alpha_zero": bool(config) and alpha == 0,
        "regex_targets": _is_regex(config.get("target_modules")),
        "bdlora": bool(config.get("use_bdlora")),
        "qalora": bool(config.get("use_qalora")),
    }


def _of(modules: Container[str], names: Sequence[str], parameter: str) -> int:
    """Return how many modules of some last names have a parameter of their own among `names`."""
    return sum(name.endswith(f".{parameter}") and name.split(".")[-2] in modules for name in names)


def _head_absent(names: Sequence[str], base: BaseModel | None) -> bool:
    """Tell whether a classifying head has no place in the base's class."""
    heads = [name for name in names if not _HEADS.isdisjoint(name.split("."))]
    return bool(heads) and base is not None and all(map(Places(base).lacks, heads))


def _tokens_added(adapter: AdapterTensorSet, base: BaseModel | None) -> int:
    """Return how many added tokens have no row in the base; 0 where one of both is unknown."""
    rows = base.facts.get("vocab_size") if base and base.kind == "hf" else None
    file = next((file for file in adapter.beside if file.name == _ADDED_TOKENS), None)
    if file is None or not isinstance(rows, int):
        return 0
    try:
        tokens = read_json_object(file.path)
    except AdapterKitError:
        return 0
    return sum(isinstance(place, int) and place >= rows for place in tokens.values())


def _tower_layers(modules: Sequence[str], base: BaseModel | None) -> int:
    """Return how many modules of towers are under `layers.N`, beside a text model's own layers."""
    found = sum(in_tower(module) and bool(_LAYERS.search(module)) for module in modules)
    beside = base.names if base else ()
    text = [name for name in beside if _LAYERS.search(name) and not in_tower(name)]
    return found if text or not beside else 0


def _is_regex(targets: Any) -> bool:
    """Tell whether targets are an expression: text, and not one of PEFT's two short words."""
    return isinstance(targets, str) and targets not in {"all", "all-linear"}


def _is_output(module: str, base: BaseModel | None) -> bool:
    match = find_rule(base.architecture, module) if base else None
    return match.rule.targets[0].name == "output" if match else module.endswith("lm_head")


def _sharded(path: Path) -> bool:
    whole = (path / f"adapter_model{suffix}" for suffix in (".safetensors", *_PICKLES))
    return path.is_dir() and any(path.glob(_SHARDS)) and not any(file.is_file() for file in whole)


def _pickled(path: Path) -> bool:
    if path.is_file():
        return path.suffix in _PICKLES
    names = {file.suffix for file in path.iterdir() if file.name.startswith("adapter_model")}
    return bool(names) and names <= _PICKLES
