"""A merged Hugging Face directory: shards one after the other, the index last, then a rename."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.base.model import BaseModel
from adapterkit.base.opening import INDEX
from adapterkit.base.places import Places
from adapterkit.base.schemes import BESIDE, FIELDS
from adapterkit.destination import Directory
from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.json_file import read_json_object
from adapterkit.merging.into.huggingface import checkpoint_steps
from adapterkit.merging.into.ruled import ruled
from adapterkit.merging.into.shards import Shard, planned_shards, stored_in
from adapterkit.merging.into.steps import Added, Change, Product, Replaced, RowsReplaced, Ruled
from adapterkit.merging.into.tying import Tying, as_spelled, resolved
from adapterkit.merging.into.vocabulary import grown
from adapterkit.merging.into.writing import write_files
from adapterkit.stamps import BESIDE as STAMP
from adapterkit.storage import copy_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.base.quantised import DecodedBase
    from adapterkit.merging.combination import Combination
    from adapterkit.merging.into.journal import Journal
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.into.steps import Applied, Step
    from adapterkit.merging.into.writing import OutputFile, Progress
    from adapterkit.merging.planning import Source
    from adapterkit.storage import FileSlice
    from adapterkit.tensor import LazyTensor

# What a model directory consists of, whoever has written it; adapters have other names.
MODEL = Directory(
    "model directory",
    marks=lambda: ("config.json",),
    files=lambda: (
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "*.safetensors.index.json",
        "consolidated*.safetensors",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template*",
        "*processor_config.json",
        STAMP,
    ),
)
_PLAIN = {DType.F64, DType.F32, DType.F16, DType.BF16}
_TORCH = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
# Other copies of the weights: they would still be the unmerged model.
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".h5", ".msgpack", ".ot"}
    | {".onnx", ".onnx_data", ".tflite"}
)


@dataclass(frozen=True)
class CheckpointPlan:
    """What will be written.

    Attributes:
        base: the base.
        shards: files with tensors.
        config: fields of config.json to change.
        others: files to copy, relative to the base.
        left_out: files that hold other copies of the unmerged weights.
        without: fields of config.json to leave out.
        carried: files of `others` that lie elsewhere than in the base.
    """

    base: BaseModel
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]
    without: tuple[str, ...] = ()
    carried: Mapping[str, Path] = field(default_factory=dict[str, Path])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def origin(self, other: Path) -> Path:
        """Return where a file of `others` is copied from."""
        return self.carried.get(str(other), self.base.path / other)

    @cached_property
    def outputs(self) -> list[OutputFile]:
        """The files with tensors, as they are written."""
        return [shard.output() for shard in self.shards]

    @property
    def spans(self) -> list[FileSlice]:
        """The byte ranges of the base that are read."""
        return [span for file in self.outputs for span in file.spans()]


def plan_checkpoint(
    sources: Sequence[Source],
    base: BaseModel,
    *,
    dtype: DType | None,
    tied: str | None,
    decoded: DecodedBase | None = None,
    how: Combination | None = None,
) -> CheckpointPlan:
    """Decide what every stored tensor gets, before anything is written.

    Args:
        sources: the adapters.
        base: the base; with `decoded`, that one.
        dtype: type for all tensors, if not their own.
        tied: what to do with tables that are one.
        decoded: what of the base was quantised, if it was.
        how: the rule on entries that makes one update of all; None for their weighted sum.

    Raises:
        UnsupportedError: if a change has no right place in the base.
        IncompatibleBaseError: if an adapter does not fit the base; names what.
    """
    spelled = as_spelled(sources, tied=base.tied, choice=tied)
    sources, tables = grown(spelled, Places(base))
    stored, base = base, replace(base, tensors={**base.tensors, **tables})
    names = Places(base)
    steps: dict[str, list[Step]] = {}
    for source in sources:
        for name, more in checkpoint_steps(source, names).items():
            steps.setdefault(name, []).extend(more)
    fields: dict[str, Any] = {}
    outputs = [name for name in (*base.tensors, *steps) if names.role(name) == "output"]
    if base.tied and names.embedding:
        output = outputs[0] if outputs else "lm_head.weight"
        tying = Tying(names.embedding, output, output in base.tensors)
        steps = resolved(steps, tying, tied, sources)
        if tied == "untie" and output in steps:
            fields["tie_word_embeddings"] = False
    applied = ruled(steps, sources, how)
    kinds = dict.fromkeys(decoded.stored, dtype or _sixteen_bits(base)) if decoded else {}
    kinds |= {name: dtype or kinds.get(name, stored.tensors[name].dtype) for name in tables}
    changes = _changes(base, names, applied, dtype, kinds)
    if dtype is not None:
        fields |= {"torch_dtype": _TORCH[dtype], "dtype": _TORCH[dtype]}
    fields |= _vocabulary(stored, names, changes)
    files = decoded.files if decoded else frozenset[Path]()
    shards = planned_shards(base.tensors, changes, {*files, *map(stored_in, tables.values())})
    own = {path.name for path in (*files, *(shard.path for shard in shards))}
    others, left_out = _other_files(base.path, own)
    if decoded:
        others = tuple(path for path in others if str(path) not in BESIDE)
    return CheckpointPlan(
        stored, tuple(shards), fields, others, left_out, FIELDS if decoded else ()
    )


def _changes(
    base: BaseModel,
    names: Places,
    steps: Mapping[str, Sequence[Applied]],
    dtype: DType | None,
    decoded: Mapping[str, DType],
) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name in dict.fromkeys((*base.tensors, *steps)):
        origin = name if name in base.tensors else names.embedding or ""
        source = base.tensors[origin]
        given = tuple(steps.get(name, ()))
        if given and source.dtype not in _PLAIN:
            raise UnsupportedError(
                f"{name} is stored as {source.dtype}, which cannot be added to: give the 16-bit "
                "model before it was quantised",
                path=base.path,
                where=given[0].module,
            )
        kind = dtype if dtype and source.dtype in _PLAIN else decoded.get(origin, source.dtype)
        if given or origin != name or origin in decoded or kind is not source.dtype:
            shape = _checked_shape(source, given, names.role(name))
            changes[name] = Change(name, source, given, kind, shape)
    return changes


def _sixteen_bits(base: BaseModel) -> DType:
    """Return the type of 16 bits that the model computes in; bfloat16 unless it says float16."""
    named = base.facts.get("dtype") or base.facts.get("torch_dtype")
    return DType.F16 if named == _TORCH[DType.F16] else DType.BF16


def _checked_shape(
    source: LazyTensor, steps: Sequence[Applied], role: str | None
) -> tuple[int, ...]:
    """Return the shape to store: the base's, or that of a whole table with more rows."""
    for step in steps:
        if isinstance(step, (Product, Ruled)):
            continue
        held = step.tensor.shape if isinstance(step, Replaced) else source.shape
        grown = (
            role is not None
            and held[1:] == source.shape[1:]
            and len(steps) == 1
            and step.weight == 1
        )
        if held != source.shape and not grown:
            raise UnsupportedError(
                f"has shape {list(held)}, the base {list(source.shape)}; only an embedding or "
                "output of one adapter, at weight 1, may have other rows",
                path=step.label,
                where=step.module,
            )
        if held != source.shape:
            return held
        _check_vector(step, source)
    return source.shape


def _check_vector(step: Step, source: LazyTensor) -> None:
    match step:
        case RowsReplaced(tokens=tokens, tensor=tensor):
            rows, width = source.shape[0], source.shape[-1]
            fits = max(tokens, default=-1) < rows and tensor.shape[-1] == width
        case Added(vector=vector):
            fits = vector.size == source.size
        case _:
            return
    if not fits:
        raise UnsupportedError(
            f"does not fit the base's {list(source.shape)}", path=step.label, where=step.module
        )


def _vocabulary(base: BaseModel, names: Places, changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return the new vocab_size where tables have other rows; all of them must have the same."""
    tables = {
        name: changes[name].shape[0] if name in changes else base.tensors[name].shape[0]
        for name in dict.fromkeys((*base.tensors, *changes))
        if names.role(name)
    }
    # An output that is untied had the rows of the embedding.
    before = {n: base.tensors[n if n in base.tensors else names.embedding or n] for n in tables}
    if all(rows == before[name].shape[0] for name, rows in tables.items() if name in changes):
        return {}
    if len(set(tables.values())) > 1:
        shown = ", ".join(f"{name} {rows}" for name, rows in tables.items())
        raise UnsupportedError(
            f"embedding and output would have different rows ({shown}), and the adapter carries "
            "those of one alone; merge into a base that was saved after resize_token_embeddings",
            path=base.path,
        )
    return {"vocab_size": next(iter(tables.values()))}


def _other_files(folder: Path, shards: set[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return what is copied and what is left out, hidden files and folders aside."""
    found = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    found = [path for path in found if str(path) not in {*shards, INDEX, STAMP}]
    weights = [
        path
        for path in found
        if path.suffix in _WEIGHTS or path.name.endswith((".index.json", ".data"))
    ]
    return tuple(path for path in found if path not in weights), tuple(weights)


def write_checkpoint(
    plan: CheckpointPlan, staging: Path, journal: Journal, jobs: int, progress: Progress
) -> list[TensorReport]:
    """Write shards, then everything else, then the index; what the journal has is skipped."""
    staging.mkdir(exist_ok=True)
    reports = write_files(plan.outputs, staging, journal, jobs, progress)
    for other in plan.others:
        target = staging / other
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(plan.origin(other), target)
    if plan.config or plan.without:
        rows = plan.base.facts.get("vocab_size")
        _edit_config(staging / "config.json", plan.config, plan.without, rows)
    if (plan.base.path / INDEX).is_file():
        _write_index(plan, staging / INDEX)
    order = {name: place for place, name in enumerate(plan.base.tensors)}
    return sorted(reports, key=lambda report: order.get(report.tensor, len(order)))


def _edit_config(
    path: Path, fields: Mapping[str, Any], without: Sequence[str], rows: object
) -> None:
    """Set fields where the config has them, at the top and in the text tower; else at the top.

    A vocabulary of other than the base's `rows` is that of another tower.
    """
    config = dict(read_json_object(path))
    inner = [cast("dict[str, Any]", value) for value in config.values() if isinstance(value, dict)]
    for holder in (config, *inner):
        for name in without:
            holder.pop(name, None)
    for name, value in fields.items():
        holders = [each for each in (config, *inner) if name in each]
        if name == "vocab_size":
            holders = [each for each in holders if each[name] == rows]
        aliases = {"dtype": "torch_dtype", "torch_dtype": "dtype"}
        if not holders and aliases.get(name) in config:
            continue
        for holder in holders or [config]:
            holder[name] = value
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_index(plan: CheckpointPlan, path: Path) -> None:
    """Copy the index, or write one with the new names and sizes."""
    source = plan.base.path / INDEX
    if not any(shard.rewritten for shard in plan.shards):
        copy_file(source, path)
    else:
        index = dict(read_json_object(source))
        held = {e.name: shard.path.name for shard in plan.shards for e in shard.entries}
        metadata: dict[str, Any] = {}
        if isinstance(index.get("metadata"), dict):
            metadata |= cast("dict[str, Any]", index["metadata"])
        if isinstance(known := metadata.get("total_parameters"), int):
            # A table may be new or grown; what was decoded was stored as something else.
            stored = 0 if plan.without else known - _elements(plan.base.tensors.values())
            held_now = _elements(e.tensor for shard in plan.shards for e in shard.entries)
            metadata["total_parameters"] = stored + held_now
        index["metadata"] = {**metadata, "total_size": plan.nbytes}
        index["weight_map"] = dict(sorted(held.items()))
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def _elements(tensors: Iterable[LazyTensor]) -> int:
    return sum(tensor.size for tensor in tensors)
