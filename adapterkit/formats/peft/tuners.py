"""PEFT adapters of other tuners, read as the LoRA or the parameters that they are."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from adapterkit.base import find_base
from adapterkit.errors import FormatError, UnsupportedError
from adapterkit.formats.peft.files import locate, lying_beside_adapter, stored_tensors
from adapterkit.formats.peft.keys import KeyReader
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.peft.tuners_refused import REFUSED
from adapterkit.formats.peft.tuners_rules import LEAF, RULES, SHARED, Context, Parts
from adapterkit.formats.peft.tuners_whole import WHOLE, token_indices
from adapterkit.json_file import read_json_object
from adapterkit.keys import Role, TensorKey
from adapterkit.lora_config.config import SELECTING
from adapterkit.lora_config.declared import adapted, unselected
from adapterkit.lora_config.own import own_config
from adapterkit.model import AdapterTensorSet, PeftSource
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tables import TEXT, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.tensor import LazyTensor

# AdaLoRA's leaves are LoRA's without `.weight`; told apart before the common grammar sees them.
_ADALORA = re.compile(r"\.lora_([ABE])(?=$|\.(?!weight$)[^.]+$)")
# LN tuning keeps whole layers.
_NORM = re.compile(r"\.ln_tuning_layers(?:\.[^.]+)?\.(weight|bias)$")
# Fields of the source that a LoRA of the same modules keeps.
_KEPT = ("task_type", "revision", "auto_mapping", "modules_to_save", "fan_in_fan_out")


def read_tuner(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a PEFT adapter of another tuner as factors or whole parameters, computed when needed.

    Args:
        path: directory, or weights file beside its config.
        options: `base`, the base model; looked for in the local hub cache if it is not given.

    Raises:
        NotFoundError: if there is no adapter at the path.
        FormatError: if a file is malformed.
        UnsupportedError: if the tuner is no low-rank update of a weight; says why.
        BaseRequiredError: if the file lacks sizes that only the base has.
    """
    config_path, weights_path = locate(path)
    config = read_json_object(config_path)
    fields = Table(config, config_path)
    kind = fields.get("peft_type", TEXT)
    stored = stored_tensors(weights_path)
    if own_config(stored.metadata, weights_path) is not None:
        return read_peft(path, options)
    if kind not in RULES and kind not in WHOLE:
        reason = REFUSED.get(kind, "`adapterkit list formats` lists what is read")
        raise UnsupportedError(f"peft_type {kind[:80]} is not read: {reason}", path=config_path)
    name = fields.optional("base_model_name_or_path", TEXT) or None
    base = options.base or find_base(name)
    keys = KeyReader(weights_path, stored.tensors, base)
    groups, shared, tensors = _sorted(stored.tensors, keys)
    if not groups:
        raise FormatError(f"holds no tensors of a {kind} adapter", path=weights_path)
    context = Context(config, config_path, shared, base)
    scales, ranks = _understood(kind, groups, context, tensors)
    for field, known in SELECTING.items():
        fields.optional(field, known)
    denied, unchecked = unselected(config, adapted(tensors))
    return AdapterTensorSet(
        tensors=tensors,
        scales=scales,
        undeclared=denied,
        token_indices=_tokens(context, tensors),
        base=BaseReference(
            name=name,
            revision=fields.optional("revision", TEXT) or None,
            architecture=_class(fields),
        ),
        beside=lying_beside_adapter(path, config_path, weights_path, context.base),
        source=PeftSource({f: config[f] for f in _KEPT if f in config}),
        provenance=Provenance(
            path, "peft-tuners", (*keys.notes(), *_notes(kind, ranks), *unchecked)
        ),
    )


def _sorted(
    stored: Mapping[str, LazyTensor], keys: KeyReader
) -> tuple[dict[str, Parts], Parts, dict[TensorKey, LazyTensor]]:
    """Return the tuner's tensors by module, the shared ones, and trained parameters beside them."""
    groups: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    shared: dict[str, LazyTensor] = {}
    others: dict[TensorKey, LazyTensor] = {}
    for name, tensor in stored.items():
        if match := SHARED.match(name):
            shared[match["name"]] = tensor
            continue
        key = keys.read(_NORM.sub(r".ln_tuning_\1", _ADALORA.sub(r".adalora_\1", name)))
        if key is None:
            continue
        if match := LEAF.match(key.module):
            groups[match["module"]][match["leaf"]] = tensor
        else:
            others[key] = tensor
    return dict(groups), shared, others


def _understood(
    kind: str,
    groups: Mapping[str, Parts],
    context: Context,
    tensors: dict[TensorKey, LazyTensor],
) -> tuple[dict[str, float], dict[str, int]]:
    """Add what tensors mean, module by module; return scales, and ranks of factors."""
    scales: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for module, parts in groups.items():
        try:
            if kind in WHOLE:
                tensors |= WHOLE[kind](module, parts, context)
                continue
            factors, scale = RULES[kind](module, parts, context)
        except KeyError as error:
            problem = f"has no {error.args[0]}"
            raise FormatError(problem, path=context.path, where=module) from None
        except ValueError as error:
            raise FormatError(str(error), path=context.path, where=module) from None
        ranks[module] = factors.b.shape[1]
        if ranks[module]:
            tensors[TensorKey(module, Role.LORA_A)] = factors.a
            tensors[TensorKey(module, Role.LORA_B)] = factors.b
            scales[module] = scale
    return scales, ranks


def _tokens(
    context: Context, tensors: Mapping[TensorKey, LazyTensor]
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the trained tokens, by module where it is not the input embedding alone."""
    tokens = token_indices(context)
    modules = [key.module for key in tensors if key.role is Role.TOKEN_ROWS]
    alone = [module.rpartition(".")[2] for module in modules] == ["embed_tokens"]
    return tokens if alone else dict.fromkeys(modules, tokens)


def _notes(kind: str, ranks: Mapping[str, int]) -> Iterable[str]:
    if not ranks:
        yield f"{kind} written out as whole parameters"
        return
    largest, smallest = (
        max(ranks.values()),
        min(value for value in (*ranks.values(), 1 << 30) if value),
    )
    span = f"rank {largest}" if largest == smallest else f"ranks {smallest} to {largest}"
    yield f"{kind} written out as LoRA of {span}"
    if pruned := [module for module, rank in ranks.items() if not rank]:
        yield f"{len(pruned)} modules were pruned to rank 0 and have no update ({pruned[0]})"


def _class(fields: Table) -> str | None:
    recorded = fields.table("auto_mapping")
    return recorded.optional("base_model_class", TEXT) or None if recorded else None
