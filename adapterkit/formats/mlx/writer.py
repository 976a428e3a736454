"""Write MLX adapters: one rank, one scale, and keys that create exactly the adapted modules."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import to_engine
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import IncompatibleBaseError
from adapterkit.factors import padded, slice_rows, stack_experts, turned, with_scale
from adapterkit.formats.mlx import spelling
from adapterkit.formats.mlx.config import targeting, written
from adapterkit.formats.mlx.reader import CONFIG, WEIGHTS
from adapterkit.keys import Role, TensorKey
from adapterkit.model import Kind, MlxSource, Update, spelled_out
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_STORABLE = {DType.F32, DType.F16, DType.BF16}


@dataclass(frozen=True, slots=True)
class MLXAdapter:
    """An adapter by the modules of MLX-LM.

    Attributes:
        pairs: updates in canonical orientation, experts stacked.
        magnitudes: DoRA's m, by module.
        unknown: Hugging Face modules whose MLX name only the base could tell.
        stranded: Hugging Face modules that MLX-LM's model has no place for, and why.
    """

    pairs: tuple[Update, ...]
    magnitudes: Mapping[str, LazyTensor]
    unknown: tuple[str, ...]
    stranded: Mapping[str, str]


def mlx_adapter(adapter: AdapterTensorSet, base: BaseModel | None) -> MLXAdapter:
    """Map an adapter onto MLX-LM's modules.

    Raises:
        IncompatibleBaseError: if an expert is adapted that the base does not have.
        UnknownArchitectureError: if no table describes the base.
    """
    if base is not None:
        base.architecture.require_known(base.path)
    pairs: list[Update] = []
    unknown: list[str] = []
    stranded: dict[str, str] = {}
    stacks: dict[str, dict[int, Update]] = defaultdict(dict)
    tied = _tied_outputs(adapter, base)
    for pair in adapter.pairs():
        if pair.module in tied or pair.kind is Kind.CONVOLUTION:
            continue  # the embedding's own update is applied to the output; none to a convolution
        if expert := spelling.expert_of(pair.module):
            stacks[spelling.stack_in(expert[0], base)][expert[1]] = pair
        elif pair.kind is Kind.EXPERTS:
            split = _split(pair, base)
            pairs += split
            if not split:
                stranded[pair.module] = _why(base)
        elif name := spelling.mlx(pair.module, base):
            pairs.append(replace(pair, module=name))
        else:
            unknown.append(pair.module)
    pairs += [_stacked(name, members, base) for name, members in stacks.items()]
    magnitudes = {
        spelling.mlx(key.module, base) or key.module: tensor
        for key, tensor in adapter.tensors.items()
        if key.role is Role.MAGNITUDE
    }
    return MLXAdapter(tuple(pairs), magnitudes, tuple(unknown), stranded)


def _tied_outputs(adapter: AdapterTensorSet, base: BaseModel | None) -> set[str]:
    """Return outputs that share the table of an adapted embedding: MLX has no module for them."""
    if base is None or not base.tied:
        return set()
    tables = any(key.role is Role.EMBEDDING_A for key in adapter.tensors)
    return {"lm_head"} if tables and TensorKey("lm_head", Role.LORA_A) in adapter.tensors else set()


def _split(pair: Update, base: BaseModel | None) -> list[Update]:
    """Return the SwitchGLU projections of a fused parameter; none if no family tells them."""
    place = spelling.in_block(pair.module)
    container, _, leaf = place[2].rpartition(".") if place else ("", "", "")
    if base and place and base.architecture.gguf in spelling.SWITCHES:
        return _by_engine(pair, base, place[0])
    names = spelling.expert_names(base, place[0]) if base and place else None
    if place is None or names is None or container != names.fused:
        return [pair] if spelling.stack_of(pair.module) else []
    stem = f"{place[0]}{place[1]}.{names.mlx}."
    if leaf == spelling.DOWN:
        return [replace(pair, module=stem + leaf)]
    half = pair.b.shape[-2] // 2
    gate, up = slice_rows(pair, 0, half), slice_rows(pair, half, 2 * half)
    return [
        replace(gate, module=stem + spelling.GATE),
        replace(up, module=stem + spelling.UP),
    ]


def _by_engine(pair: Update, base: BaseModel, blocks: str) -> list[Update]:
    """Return the projections of a parameter that llama.cpp's tensors take apart, if they do."""
    if spelling.engine_stack(pair.module, base):
        return [pair]
    mapped = to_engine(base.architecture, base.sizes, [pair])
    parts = [part for found in mapped.pairs for part in _halves(found)]
    names = [spelling.switch_of(part.module, base, blocks) for part in parts]
    return [replace(p, module=n) for p, n in zip(parts, names, strict=True) if n]


def _halves(pair: Update) -> list[Update]:
    """Return llama.cpp's tensors of gate and up where one holds both, gate first."""
    if not pair.module.endswith(".ffn_gate_up_exps"):
        return [pair]
    stem, half = pair.module.removesuffix("gate_up_exps"), pair.b.shape[-2] // 2
    gate, up = slice_rows(pair, 0, half), slice_rows(pair, half, 2 * half)
    return [replace(gate, module=f"{stem}gate_exps"), replace(up, module=f"{stem}up_exps")]


def _why(base: BaseModel | None) -> str:
    if base is None:
        return "MLX-LM's name for these experts depends on the base model; give it with --base"
    return f"MLX-LM keeps the experts of {base.architecture.title} in a layout that is not written"


def _stacked(name: str, members: Mapping[int, Update], base: BaseModel | None) -> Update:
    known = base.sizes.get("experts") if base else None
    count = int(known) if known else max(members) + 1
    if max(members) >= count:
        raise IncompatibleBaseError(
            f"expert {max(members)} is adapted, but the base has {count}", where=name
        )
    return stack_experts([members.get(expert) for expert in range(count)], name)


def write_mlx(adapter: AdapterTensorSet, folder: Path, options: FormatOptions) -> None:
    """Write `adapter_config.json` and `adapters.safetensors` into a new directory.

    Args:
        adapter: what to write; parts that MLX cannot hold have been reported as losses already.
        folder: directory to create.
        options: `base` for names and the number of blocks, `dtype` for the factors (None keeps each
            factor's, with float32 where a scale had to be folded in).
    """
    adapter = spelled_out(adapter)
    mapped = mlx_adapter(adapter, options.base)
    rank = max((pair.rank for pair in mapped.pairs), default=1)
    scale = common_scale(mapped.pairs)
    tensors: dict[str, LazyTensor] = {}
    for pair in mapped.pairs:
        ready = padded(with_scale(pair, scale), rank)
        stack = pair.kind is Kind.EXPERTS
        a, b = (ready.a, ready.b) if stack else (turned(ready.a), turned(ready.b))
        tensors[f"{pair.module}.lora_a"] = _stored(a, options.dtype)
        tensors[f"{pair.module}.lora_b"] = _stored(b, options.dtype)
    for module, magnitude in mapped.magnitudes.items():
        tensors[f"{module}.m"] = _stored(magnitude, options.dtype)
    layers = options.base.sizes.get("layers") if options.base else None
    count, keys = targeting([pair.module for pair in mapped.pairs], layers)
    source = adapter.source if isinstance(adapter.source, MlxSource) else MlxSource({}, {})
    config = written(
        source.config,
        adapter.base,
        dora=bool(mapped.magnitudes),
        parameters={"rank": rank, "scale": scale, "keys": keys},
        layers=count,
    )
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, tensors, source.metadata)
    text = json.dumps(config, indent=4, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def common_scale(pairs: tuple[Update, ...]) -> float:
    """Return the scale that leaves most pairs untouched; 1 for an adapter that does nothing."""
    scales: Iterator[float] = (pair.scale for pair in pairs if pair.scale)
    ranked = Counter(scales).most_common(1)
    return ranked[0][0] if ranked else 1.0


def _stored(tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    wanted = dtype or tensor.dtype
    return tensor.cast(wanted if wanted in _STORABLE else DType.F32)
