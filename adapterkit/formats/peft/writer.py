"""Write PEFT LoRA adapters that load without a missing or an unexpected key."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from adapterkit.base.places import Places
from adapterkit.beside import carry
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.formats.peft.experts import (
    WRITTEN_VERSION,
    fold_experts,
    wrapped_parameters,
)
from adapterkit.formats.peft.files import CONFIG, WEIGHTS
from adapterkit.formats.peft.keys import saved_name
from adapterkit.formats.peft.losses import lost_seconds
from adapterkit.keys import EMBEDDING_FACTORS, FACTORS, Role, TensorKey
from adapterkit.lora_config.config import NO_TARGETS, LoraConfig
from adapterkit.lora_config.declared import untrained_biases
from adapterkit.lora_config.selection import saved_for
from adapterkit.model import DiffusionSource, Kind, PeftSource, spelled_out
from adapterkit.model.beside import lost_apart
from adapterkit.model.declared import undeclared
from adapterkit.model.losses import lost_columns, lost_layout, lost_metadata
from adapterkit.notes import Loss, first_and_more
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from adapterkit.architectures import Architecture
    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_Number = TypeVar("_Number", int, float)

# Fields that this writer sets itself; every other field of a PEFT source is passed on.
_MEANING: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "modules_to_save": None,
    "layer_replication": None,
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
_TARGETING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)
_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "fan_in_fan_out": False,
}


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List what a PEFT LoRA directory cannot hold of this adapter."""
    del options
    found = [*lost_layout(adapter)]
    if missing := _without(adapter, Role.MAGNITUDE):
        message = "use_dora holds for all modules or none, and this one has none"
        found.append(Loss("dora-partly", missing[0], message))
    found += [*lost_columns(adapter), *_lost_biases(adapter), *lost_seconds(adapter)]
    denied = [_kept_out(loss, adapter) for loss in undeclared(adapter)]
    return [*found, *lost_apart(adapter.beside), *denied, *lost_metadata(adapter)]


def _kept_out(loss: Loss, adapter: AdapterTensorSet) -> Loss:
    """Return what becomes of tensors that the config denies: its own choice of modules stays.

    Then PEFT leaves out of the copy what it leaves out of the adapter, and nothing changed.
    """
    chosen = any(key.role in {*FACTORS, *EMBEDDING_FACTORS} for key in loss.drops)
    if not chosen or not _chooses_alike(_source(adapter).config, adapter):
        return loss
    message = loss.message.partition(";")[0] + " of the copy, too"
    return Loss(loss.code, loss.subject, message, blocks=False)


def _lost_biases(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Name what PEFT's lora_bias is not: it holds for all modules or none, and never with DoRA."""
    biases = tuple(key for key in adapter.tensors if key.role is Role.LORA_BIAS)
    if biases and any(key.role is Role.MAGNITUDE for key in adapter.tensors):
        message = "PEFT takes no bias on B beside DoRA; merge the adapter into the base instead"
        yield Loss("lora-bias-dora", first_and_more([k.module for k in biases]), message, biases)
    for module in (without := _without(adapter, Role.LORA_BIAS)):
        if _kind(adapter, module) in {Kind.EXPERTS, Kind.EMBEDDING}:
            message = "lora_bias holds for all modules or none, and this one can have none"
            yield Loss("lora-bias-partly", module, message, biases)
            return
    if without:
        message = "a bias of zeros is written: lora_bias holds for all modules or none"
        yield Loss("lora-bias-partly", first_and_more(without), message, blocks=False)


def _kind(adapter: AdapterTensorSet, module: str) -> Kind:
    if TensorKey(module, Role.EMBEDDING_A) in adapter.tensors:
        return Kind.EMBEDDING
    return adapter.kinds.get(module, Kind.LINEAR)


def _without(adapter: AdapterTensorSet, role: Role) -> list[str]:
    """Return the adapted modules without a role that others have; none where nobody has it."""
    having = {key.module for key in adapter.tensors if key.role is role}
    return [module for module in _adapted(adapter) if having and module not in having]


def _with_zero_biases(adapter: AdapterTensorSet) -> AdapterTensorSet:
    """Return an adapter whose modules have all a bias on B, if one has: zeros change nothing."""
    without = set(_without(adapter, Role.LORA_BIAS))
    zeros = {
        TensorKey(pair.module, Role.LORA_BIAS): _zeros(pair.matrix_shape[0], pair.b.dtype)
        for pair in adapter.pairs()
        if pair.module in without
    }
    return adapter.updated([], zeros) if zeros else adapter


def _zeros(size: int, dtype: DType) -> LazyTensor:
    import numpy as np

    return LazyTensor.of(np.zeros(size, np.float32)).cast(DType.F32 if dtype.quantised else dtype)


def write_peft(adapter: AdapterTensorSet, folder: Path, options: FormatOptions) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a new directory.

    What lies beside the adapter is carried along byte for byte; whole models and other adapters
    stay where they are.

    Args:
        adapter: every tensor in canonical orientation.
        folder: directory to create.
        options: `base` to name the targets briefly and to fill in its name; `dtype` of all tensors,
            None keeps each tensor's, quantised ones as float32.
    """
    folder.mkdir()
    tensors, config = as_peft(adapter, options.base)
    stored = {name: _stored(tensor, options.dtype) for name, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS[0], stored, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    carry(adapter.beside, folder)


def as_peft(
    adapter: AdapterTensorSet, base: BaseModel | None = None
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Return the tensors under PEFT's saved names, and the adapter_config.json beside them."""
    adapted = _adapted(adapter)
    spelled = _with_zero_biases(spelled_out(adapter))
    folded = fold_experts(spelled, base)
    config = config_for(adapter, base)
    if adapter.tied:
        config["ensure_weight_tying"] = True
    if config.get("target_parameters"):
        config["peft_version"] = WRITTEN_VERSION
    tokens = {key.module for key in spelled.tensors if key.role is Role.TOKEN_ROWS}
    return {saved_name(key, adapted, tokens): tensor for key, tensor in folded.items()}, config


def _stored(tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    if not tensor.dtype.floating:
        return tensor
    return tensor.cast(dtype or (DType.F32 if tensor.dtype.quantised else tensor.dtype))


def _adapted(adapter: AdapterTensorSet) -> tuple[str, ...]:
    roles = {Role.FULL, Role.TOKEN_ROWS, Role.BASE_COPY}
    return tuple(dict.fromkeys(k.module for k in adapter.tensors if k.role not in roles))


def _source(adapter: AdapterTensorSet) -> PeftSource:
    return adapter.source if isinstance(adapter.source, PeftSource) else PeftSource({})


def config_for(adapter: AdapterTensorSet, base: BaseModel | None) -> dict[str, Any]:
    """Return the adapter_config.json for an adapter; a PEFT source's own settings are kept."""
    source: Mapping[str, Any] = _source(adapter).config
    task = None if isinstance(adapter.source, DiffusionSource) else _task(base)
    config = {**_DEFAULTS, "task_type": task, **source, **_MEANING}
    config.update(adapter.settings)
    config["use_qalora"] = bool(adapter.pooled_inputs)
    ranks, scales = _ranks_and_scales(spelled_out(adapter))
    parameters = wrapped_parameters(adapter, base)
    loaded = _loaded([*ranks, *parameters.values()], base)
    ranks |= {loaded[name]: rank for name, rank in ranks.items() if name in loaded}
    scales |= {loaded[name]: scale for name, scale in scales.items() if name in loaded}
    parameters |= {
        loaded[name]: loaded[path] for name, path in parameters.items() if name in loaded
    }
    config.update(_scaling(source, adapter, ranks, scales, parameters))
    config.update(_targeting(source, adapter, base, parameters, loaded))
    config["use_dora"] = any(key.role is Role.MAGNITUDE for key in adapter.tensors)
    config["lora_bias"] = any(key.role is Role.LORA_BIAS for key in adapter.tensors)
    config.update(_saved(source, adapter))
    # PEFT loads stored biases whatever it says: what is not stored is not to be promised.
    if not source.get("bias") and (
        base is None or untrained_biases(config["bias"], adapter.tensors, base)
    ):
        config["bias"] = "none"
    name = adapter.base.name or (base.name if base else None)
    config["base_model_name_or_path"] = name
    if base and not source:
        places = Places(base)
        config["fan_in_fan_out"] = any(rule.conv1d for rule in base.architecture.rules) or any(
            map(places.conv1d, ranks)
        )
    return config


def _loaded(names: Iterable[str], base: BaseModel | None) -> dict[str, str]:
    """Return the modules, or parameters, to which PEFT leads names that are other than theirs.

    The config chooses among modules, and who reads the file alone holds it against its names: what
    it says of one it says of both.
    """
    if base is None or base.kind != "hf":
        return {}
    places = Places(base)
    found = {name: places.loaded(name) for name in names}
    return {name: module for name, module in found.items() if module and module != name}


def _task(base: BaseModel | None) -> str | None:
    """Return the task that PEFT is to load a causal model for; encoders need none."""
    classes = base.classes if base else ()
    generates = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if classes and not any(name.endswith(generates) for name in classes):
        return None
    both = base is not None and base.facts.get("is_encoder_decoder") is True
    return "SEQ_2_SEQ_LM" if both else "CAUSAL_LM"


def _ranks_and_scales(adapter: AdapterTensorSet) -> tuple[dict[str, int], dict[str, float]]:
    ranks = {pair.module: pair.rank for pair in adapter.pairs()}
    return ranks, {pair.module: pair.scale for pair in adapter.pairs()}


def _scaling(
    source: Mapping[str, Any],
    adapter: AdapterTensorSet,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    parameters: Mapping[str, str],
) -> dict[str, Any]:
    """Return r, lora_alpha and the patterns; the source's own where they still say the same."""
    if source and adapter.provenance:
        # The file is sorted, as PEFT's own is, and of two patterns that match the first counts.
        ordered = {name: _sorted(source[name]) for name in _PATTERNS if name in source}
        config = LoraConfig({**source, **ordered}, adapter.provenance.path)
        same = all(
            config.rank_of(module) == rank and config.scale_of(module) == scales[module]
            for module, rank in ranks.items()
        )
        if same:
            names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
            return {name: source[name] for name in names if name in source}
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    rank, alpha = _most_common(ranks.values(), 8), _most_common(alphas.values(), 8)
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {
            _exactly(parameters.get(module, module)): other
            for module, other in ranks.items()
            if other != rank
        },
        "alpha_pattern": {
            _exactly(parameters.get(module, module)): _whole(other)
            for module, other in alphas.items()
            if other != alpha
        },
    }


def _sorted(pattern: Any) -> Any:
    known = isinstance(pattern, dict)
    return dict(sorted(cast("dict[str, Any]", pattern).items())) if known else pattern


def _most_common(values: Iterable[_Number], usual: _Number) -> _Number:
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else usual


def _exactly(module: str) -> str:
    """Return a pattern that only this module can match: PEFT's patterns are regular expressions."""
    return "^" + re.escape(module)


def _whole(value: float) -> float:
    return int(value) if math.isfinite(value) and value == int(value) else value


def _targeting(
    source: Mapping[str, Any],
    adapter: AdapterTensorSet,
    base: BaseModel | None,
    parameters: Mapping[str, str],
    loaded: Mapping[str, str],
) -> dict[str, Any]:
    """Return fields that target exactly the adapted modules; the source's if it adapted the same.

    A suffix such as `q_proj` may only stand for modules that are all adapted; otherwise PEFT would
    create, and miss, the others. Full paths are always right.
    """
    adapted = _adapted(adapter)
    if not loaded and _chooses_alike(source, adapter):
        return {name: source[name] for name in _TARGETING if name in source}
    if not adapted:
        return {**dict.fromkeys(_TARGETING), "target_modules": NO_TARGETS}
    stored = [module for module in adapted if module not in parameters]
    modules = [loaded.get(module, module) for module in stored]
    suffixes = sorted({module.rpartition(".")[2] for module in modules})
    known = _base_modules(base) - parameters.keys()
    covered = {name for name in known if name.rpartition(".")[2] in suffixes}
    brief = covered == set(modules)
    return {
        **dict.fromkeys(_TARGETING),
        "target_modules": suffixes if brief else sorted({*stored, *modules}),
        "target_parameters": _target_parameters(parameters.values(), base) or None,
    }


def _chooses_alike(source: Mapping[str, Any], adapter: AdapterTensorSet) -> bool:
    """Tell whether the source's own choice of modules still means the modules that it did."""
    recorded = any(name in source for name in _TARGETING)
    return recorded and set(_source(adapter).modules) == set(_adapted(adapter))


def _target_parameters(paths: Collection[str], base: BaseModel | None) -> list[str]:
    """Name parameters by their last three components where every layer's is adapted."""
    layers = base.sizes.get("layers") if base else None
    counted = Counter(_ending(path) for path in paths)
    return sorted({_ending(path) if counted[_ending(path)] == layers else path for path in paths})


def _ending(path: str) -> str:
    return ".".join(path.split(".")[-3:])


def _base_modules(base: BaseModel | None) -> set[str]:
    """Return the modules of the base that a target suffix could hit; none if that is unknown."""
    if base is None or base.text_prefix or _has_tower(base.architecture):
        return set()  # a suffix could hit a vision tower that no table lists
    if base.kind == "hf" and base.has_tensors:
        # What only holds other modules is hit, too, and PEFT has no adapter for it.
        named = {module for name in base.names for module in _parents(name)}
        return named if base.architecture.known else set(map(Places(base).spelling.memory, named))
    return set(_table_modules(base))


def _parents(name: str) -> Iterator[str]:
    """Yield the modules that a parameter is in, from the outermost."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        yield ".".join(parts[:depth])


def _has_tower(architecture: Architecture) -> bool:
    return any("Conditional" in name for name in architecture.classes)


def _table_modules(base: BaseModel) -> Iterator[str]:
    """Yield every module that the family's table knows, in every layer of the base."""
    layers = base.sizes.get("layers") or 0
    for rule in base.architecture.rules:
        if not rule.adaptable or rule.stacked or rule.alias:
            continue
        for layer in range(layers if "{i}" in rule.hf else 1):
            yield rule.hf.replace("{i}", str(layer))


def _saved(source: Mapping[str, Any], adapter: AdapterTensorSet) -> dict[str, Any]:
    """Return `bias` and `modules_to_save` for the absolute tensors."""
    full = [key for key in adapter.tensors if key.role is Role.FULL]
    adapted = set(_adapted(adapter))
    biases = [key.module.removesuffix(".bias") for key in full if key.module.endswith(".bias")]
    weights = [key.module.rpartition(".")[0] for key in full if not key.module.endswith(".bias")]
    named = sorted(set(weights) - adapted)
    # PEFT saves all that is in a saved module, and cannot load a part of it once more.
    held = {each for each in named for name in named if saved_for(each.rpartition(".")[0], name)}
    saved = [name for name in named if name not in held]
    loose = [module for module in biases if module not in set(weights)]
    bias = source.get("bias") or "none"
    if loose and bias == "none":
        bias = "lora_only" if set(loose) <= adapted else "all"
    return {
        "bias": bias if loose else "none",
        "modules_to_save": source.get("modules_to_save") or saved or None,
    }
