"""Read MLX adapters into Hugging Face names and orientation.

Stored is ΔW = scale · (a · b)ᵀ with a (in, r) and b (r, out); of embeddings ΔE = scale · a · b with
a (vocabulary, r) and b (r, width); of experts ΔW = scale · b · a with a (E, r, in) and
b (E, out, r) (mlx_lm/tuner/lora.py). Before mlx-lm 0.28.3 the a of experts was (E · r, in).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import from_engine
from adapterkit.base import BaseModel, find_base
from adapterkit.beside import lying_beside
from adapterkit.containers.npz import read_npz
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    NotFoundError,
    UnsupportedError,
)
from adapterkit.factors import fuse_rows, turned, unstack_experts
from adapterkit.formats.mlx import spelling
from adapterkit.formats.mlx.config import MLXConfig
from adapterkit.formats.protocol import FormatOptions
from adapterkit.json_file import read_json_object
from adapterkit.keys import Role, TensorKey
from adapterkit.lora_config.own import KEY as OWN
from adapterkit.lora_config.own import carried, governed
from adapterkit.model import AdapterTensorSet, Kind, MlxSource, Update
from adapterkit.notes import BaseReference, Provenance
from adapterkit.stamps import KEY as PROOF
from adapterkit.storage import readable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.tensor import LazyTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
# What mlx-examples saved until the spring of 2024, without any config.
_OLD_WEIGHTS = "adapters.npz"
_ZIP = b"PK"
# mlx-lm; Unsloth, whose factors are the weights of linear layers; mlx-vlm.
LEAF = re.compile(r"^(?P<module>.+)\.(?P<leaf>lora_[ab](?:\.weight)?|m|[AB])$")
_STACK, _MATRIX = 3, 2
# mlx-lm keeps the states of its training beside the last.
_CHECKPOINTS = (f"*_{WEIGHTS}", "adapters.npz")


@dataclass(frozen=True, slots=True)
class _Source:
    """Everything that reading one adapter needs.

    Attributes:
        config: what the file says of itself.
        weights: the tensors' file.
        options: as given.
        base: as given, or as found in the local hub cache.
    """

    config: MLXConfig
    weights: Path
    options: FormatOptions
    base: BaseModel | None

    @property
    def fused(self) -> bool:
        """Whether experts are one parameter in the Hugging Face class."""
        known = self.base.expert_layout if self.base else "fused"
        return (self.options.moe_layout or known) == "fused"


def locate(path: Path) -> tuple[Path | None, Path]:
    """Return the config, if there is one, and the weights file that a path means.

    Raises:
        NotFoundError: if there is no adapter.
    """
    if path.is_file():
        weights = path.parent / WEIGHTS if path.name == CONFIG else path
    else:
        weights = path / WEIGHTS
        if not weights.is_file() and (path / _OLD_WEIGHTS).is_file():
            weights = path / _OLD_WEIGHTS
    if not weights.is_file():
        checkpoints = (
            sorted(file.name for file in path.glob(f"*_{WEIGHTS}")) if path.is_dir() else []
        )
        hint = f"; name one of its checkpoints ({', '.join(checkpoints)})" if checkpoints else ""
        raise NotFoundError(f"has no {WEIGHTS}{hint}", path=path)
    config = weights.parent / CONFIG
    return (config if config.is_file() else None), weights


def read_mlx(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read an MLX adapter; tensors stay on disk until they are asked for.

    Args:
        path: directory, a checkpoint in it, or its config.
        options: `alpha` where the file does not settle the scale, `moe_layout` and `like` for the
            spelling of experts, `base` for embeddings, which a tied base applies twice.

    Raises:
        NotFoundError: if there is no adapter at the path.
        FormatError: if a file is malformed, or holds a tensor that mlx-lm would not load.
        UnsupportedError: if it is a full fine-tune, or its scale is not settled.
        BaseRequiredError: if it adapts an embedding and the base is unknown.
    """
    config_path, weights_path = locate(path)
    raw = read_json_object(config_path) if config_path else {}
    config = MLXConfig(raw, config_path or weights_path)
    name = config.base
    stored, metadata = stored_tensors(weights_path)
    own = carried(metadata, weights_path)
    if own is not None and options.alpha is None:
        options = replace(options, alpha=own.alpha if config.leaves_scale_open else None)
    source = _Source(config, weights_path, options, options.base or _cached(name))
    groups = _grouped(stored, weights_path)
    pairs = [pair for module, parts in groups.items() for pair in _pair(module, parts, source)]
    spelled = _spelled(pairs, source)
    adapter = AdapterTensorSet.of(
        spelled,
        _others(groups, source),
        base=BaseReference(name=name),
        rank_conflicts=_conflicts(config, pairs),
        **_contradictions(source, groups, pairs),
        beside=lying_beside(
            weights_path.parent,
            {CONFIG, weights_path.name, *_CHECKPOINTS},
            source.base,
        ),
        source=MlxSource(dict(raw), {k: v for k, v in metadata.items() if k not in {PROOF, OWN}}),
        provenance=Provenance(path, "mlx", _notes(groups, pairs)),
    )
    return governed(adapter, own, source.base)


def stored_tensors(path: Path) -> tuple[Mapping[str, LazyTensor], Mapping[str, str]]:
    """Return the tensors of a safetensors or NumPy file, and its metadata.

    Raises:
        FormatError: if the file is malformed.
    """
    with readable(path), path.open("rb") as start:
        zipped = start.read(len(_ZIP)) == _ZIP
    if zipped:
        return read_npz(path), {}
    file = read_safetensors(path)
    return file.tensors, file.metadata


def _cached(name: str | None) -> BaseModel | None:
    found = find_base(name)
    return found if found and found.architecture.known else None


def _grouped(stored: Mapping[str, LazyTensor], path: Path) -> dict[str, dict[str, LazyTensor]]:
    groups: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        match = LEAF.match(name)
        if match is None:
            raise FormatError(
                "is no tensor of an adapter (.lora_a, .lora_b or .m); mlx-lm would not load it",
                path=path,
                where=name,
            )
        groups[match["module"]][match["leaf"]] = tensor
    if not groups:
        raise FormatError("holds no tensors", path=path)
    return dict(groups)


def _pair(module: str, parts: Mapping[str, LazyTensor], source: _Source) -> list[Update]:
    """Return the factors of a module in canonical orientation, none if a half is missing."""
    found = next((s for s in _SPELLINGS if s[0] in parts and s[1] in parts), None)
    if found is None:
        return []
    a, b = parts[found[0]], parts[found[1]]
    kind = Kind.EMBEDDING if spelling.is_table(module) else Kind.LINEAR
    if len(b.shape) == _STACK and len(a.shape) in {_MATRIX, _STACK}:
        kind = Kind.EXPERTS
        a = _unflattened(module, a, b, source.weights)
    elif a.is_matrix and b.is_matrix:
        a, b = (a, b) if found[2] else (turned(a), turned(b))
    else:
        raise FormatError(
            f"a has shape {list(a.shape)}, b {list(b.shape)}; no layer of mlx-lm has these",
            path=source.weights,
            where=module,
        )
    scale = source.config.scale(b.shape[-1] or 1, source.options.alpha)
    return [Update(module, a, b, scale, kind)]


# names of a and b, and whether they are stored as (r, in) and (out, r) already
_SPELLINGS = (
    ("lora_a", "lora_b", False),
    ("lora_a.weight", "lora_b.weight", True),
    ("A", "B", False),
)


def _unflattened(module: str, a: LazyTensor, b: LazyTensor, path: Path) -> LazyTensor:
    """Return the a of experts as (E, r, in); older files hold it as (E · r, in), expert-major."""
    experts, _, rank = b.shape
    if len(a.shape) == _STACK:
        return a
    if a.shape[0] != experts * rank:
        raise FormatError(
            f"a has {a.shape[0]} rows, not {experts} experts times rank {rank}",
            path=path,
            where=module,
        )
    shape = (experts, rank, a.shape[1])
    return a.map(lambda x: x.reshape(shape), shape=shape)


def _spelled(pairs: list[Update], source: _Source) -> list[Update]:
    """Return the pairs under Hugging Face names, experts regrouped and tied outputs added."""
    found: list[Update] = []
    halves: dict[str, dict[str, Update]] = defaultdict(dict)
    like = set(source.options.like)
    engine, pairs = _by_engine(pairs, source)
    found += engine
    for pair in pairs:
        stack = spelling.stack_of(pair.module) if pair.kind is Kind.EXPERTS else None
        if stack is None:
            name = spelling.hugging_face(pair.module, like, fused=source.fused, base=source.base)
            found += _tied(replace(pair, module=name), source)
            continue
        names, block, leaf = stack
        block = _block(block, source)
        if _one_by_one(names, block, leaf, source):
            single = f"{block}{names.single}.{names.leaves[leaf]}"
            count = pair.experts
            found += unstack_experts(pair, [single.replace("{e}", str(e)) for e in range(count)])
        elif leaf == spelling.DOWN:
            found.append(replace(pair, module=f"{block}{names.fused}.{leaf}"))
        else:
            halves[f"{block}{names.fused}.{spelling.FUSED}"][leaf] = pair
    for module, members in halves.items():
        parts = [members.get(spelling.GATE), members.get(spelling.UP)]
        height = next(iter(members.values())).b.shape[1]
        found.append(fuse_rows(parts, [height, height], module))
    return found


def _by_engine(pairs: list[Update], source: _Source) -> tuple[list[Update], list[Update]]:
    """Return stacks that llama.cpp's tensors explain under Hugging Face names, and the others."""
    base = source.base
    named = [
        spelling.engine_stack(pair.module, base) if base and pair.kind is Kind.EXPERTS else None
        for pair in pairs
    ]
    if base is None or not any(named):
        return [], pairs
    stacks = [replace(p, module=name) for p, name in zip(pairs, named, strict=True) if name]
    mapped = from_engine(
        base.architecture,
        base.sizes,
        stacks,
        layout="fused" if source.fused else "experts",
        like=source.options.like,
        text_prefix=base.text_prefix,
    )
    rest = [pair for pair, name in zip(pairs, named, strict=True) if not name]
    return list(mapped.pairs), rest


def _block(block: str, source: _Source) -> str:
    """Return the path of a block as the adapter that was written spells it, if there is one."""
    usual = spelling.hugging_face(block, (), fused=source.fused, base=source.base)
    told = any(name.startswith(block) for name in source.options.like)
    return block if told else usual


def _one_by_one(names: spelling.ExpertNames, block: str, leaf: str, source: _Source) -> bool:
    """Tell whether experts are modules of their own: as in the adapter that was written, if any."""
    like = source.options.like
    stack = f"{block}{names.mlx}.{leaf}"
    if any((spelling.expert_of(name) or ("", 0))[0] == stack for name in like):
        return True
    fused = f"{block}{names.fused}.{leaf if leaf == spelling.DOWN else spelling.FUSED}"
    return fused not in like and not source.fused


def _tied(pair: Update, source: _Source) -> list[Update]:
    """Return an embedding's update, and that of a tied output, which MLX applies it to as well."""
    if not pair.embedding:
        return [pair]
    tied = source.base.tied if source.base else None
    if tied is None:
        raise BaseRequiredError(
            "MLX applies the update of an embedding to the output too if the two are tied; give "
            "the base model with --base",
            path=source.weights,
            where=pair.module,
        )
    if not tied:
        return [pair]
    output = Update("lm_head", turned(pair.b), turned(pair.a), pair.scale)
    return [pair, output]


def _others(
    groups: Mapping[str, Mapping[str, LazyTensor]], source: _Source
) -> dict[TensorKey, LazyTensor]:
    """Return DoRA magnitudes, and halves without a partner in canonical orientation."""
    found: dict[TensorKey, LazyTensor] = {}
    like = set(source.options.like)
    for module, parts in groups.items():
        name = spelling.hugging_face(module, like, fused=source.fused, base=source.base)
        if "m" in parts:
            if spelling.is_table(module):
                raise UnsupportedError(
                    "is the DoRA of an embedding, which MLX normalises for every token and PEFT "
                    "for every dimension; fuse it in mlx-lm",
                    path=source.weights,
                    where=module,
                )
            found[TensorKey(name, Role.MAGNITUDE)] = parts["m"]
        for first, second, canonical in _SPELLINGS:
            for leaf, other, role in (
                (first, second, Role.LORA_A),
                (second, first, Role.LORA_B),
            ):
                if leaf in parts and other not in parts:
                    tensor = parts[leaf]
                    turn = not canonical and tensor.is_matrix
                    found[TensorKey(name, role)] = turned(tensor) if turn else tensor
    return found


def _conflicts(config: MLXConfig, pairs: list[Update]) -> dict[str, tuple[int, int]]:
    """Return modules of another rank than the config's: mlx-lm would not load them."""
    declared = config.rank
    return {
        pair.module: (declared, pair.a.shape[-2])
        for pair in pairs
        if declared is not None and pair.a.shape[-2] != declared
    }


def _contradictions(
    source: _Source, groups: Mapping[str, Mapping[str, LazyTensor]], pairs: list[Update]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return what the config promises and the file lacks, or denies and it holds.

    mlx-lm makes what its config says and loads nothing else: older versions leave the rest out
    without a word.
    """
    config = source.config
    having = tuple(module for module, parts in groups.items() if "m" in parts)
    without = tuple(module for module, parts in groups.items() if "m" not in parts)
    missing, denied = {}, _unselected(source, pairs)
    if config.raw.get("fine_tune_type") == "dora":
        missing = {"fine_tune_type": without} if without else {}
    elif having and config.raw:
        denied["fine_tune_type"] = having
    return {"unstored": missing, "undeclared": denied}


def _unselected(source: _Source, pairs: list[Update]) -> dict[str, tuple[str, ...]]:
    """Return the modules that mlx-lm would not adapt, by the field that denies them."""
    layers = source.base.sizes.get("layers") if source.base else None
    found: dict[str, list[Update]] = {}
    for pair in pairs:
        if field := source.config.denied_by(pair.module, layers):
            found.setdefault(field, []).append(pair)
    return {
        field: tuple(update.module for update in _spelled(denied, source))
        for field, denied in found.items()
    }


def _notes(groups: Mapping[str, Mapping[str, LazyTensor]], pairs: list[Update]) -> tuple[str, ...]:
    notes: list[str] = []
    if any("lora_a.weight" in parts for parts in groups.values()):
        notes.append("factors are weights of linear layers (.lora_a.weight), stored (r, in)")
    stacks = {pair.module for pair in pairs if pair.kind is Kind.EXPERTS}
    flat = [name for name in stacks if len(groups[name].get("lora_a", pairs[0].a).shape) == _MATRIX]
    if flat:
        notes.append("expert factors are in the layout before mlx-lm 0.28.3")
    return tuple(notes)
