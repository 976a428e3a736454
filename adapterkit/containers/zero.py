"""Checkpoints of DeepSpeed's ZeRO: fp32 partitions of every rank, joined as zero_to_fp32 does.

A step's folder holds `[zero_pp_rank_R_]mp_rank_00_model_states.pt` with the names and shapes of the
parameters, and `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` with each rank's part of their
fp32 masters (deepspeed/utils/zero_to_fp32.py, 0.19.8). Only trained parameters are partitioned
there; the frozen ones are no part of what is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.containers.folders import MODEL, OPTIMIZER
from adapterkit.containers.opening import MAX_BYTES, MAX_NAME
from adapterkit.containers.pickle_names import Constructor, RecordClass
from adapterkit.containers.tiles import strung
from adapterkit.containers.torch_zip import read_torch_zip
from adapterkit.errors import FormatError, NotFoundError, UnsupportedError
from adapterkit.storage import readable
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_RANK = re.compile(r"^(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_00_(?:model|optim)_states\.pt$")
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
_GATHERED = 3
_MOST_RANKS = 4096


@dataclass(frozen=True, slots=True)
class ZeroCheckpoint:
    """The trained parameters of one step.

    Attributes:
        folder: the directory of the step.
        stage: of ZeRO; 0 without it, and where no files of the optimizer lie beside the model's.
        ranks: how many ranks the parameters were parted among.
        tensors: the trained parameters by name, in fp32 unless `stage` is 0.
        frozen: how many parameters and buffers were not trained.
    """

    folder: Path
    stage: int
    ranks: int
    tensors: Mapping[str, LazyTensor]
    frozen: int


@dataclass(frozen=True, slots=True)
class _Model:
    """What a file of model states says.

    Attributes:
        groups: names and shapes of trained parameters, group by group, in the optimizer's order.
        shared: second names of parameters, with the first.
        values: what is stored of the parameters themselves, in the type of the training.
        frozen: how many of them are not trained.
    """

    path: Path
    groups: tuple[Mapping[str, tuple[int, ...]], ...]
    shared: Mapping[str, str]
    values: Mapping[str, LazyTensor]
    frozen: int


def read_zero(folder: Path) -> ZeroCheckpoint:
    """Read the trained parameters of a step; their data stays on disk.

    Raises:
        NotFoundError: if the file of a rank is missing.
        UnsupportedError: if parameters are also parted in another way: tensors or experts.
        UnsafePickleError: if a file asks for anything but tensors, settings and plain containers.
        FormatError: if a file is malformed, or the partitions are not those of the parameters.
    """
    with readable(folder):
        names = sorted(path.name for path in folder.glob(f"*{MODEL}"))
        optimizers = [path.name for path in folder.glob(f"*{OPTIMIZER}")]
    for name in (*names, *optimizers):
        if name != _WHOLE_MODEL and not _RANK.match(name):
            raise UnsupportedError(
                "is parted by tensors or experts too, which is not joined here; gather the model "
                "in DeepSpeed (ds_to_universal.py) and save the adapter with PEFT",
                path=folder / name,
            )
    if not names:
        raise NotFoundError(f"holds no *{MODEL}", path=folder)
    model = _model(folder / names[0])
    if not optimizers:
        return _from_training_weights(folder, model)
    parts = {_rank(name): _optimizer(folder / name) for name in optimizers}
    first = parts[min(parts)]
    stage, ranks = _stage(first), _ranks(first)
    for rank in range(ranks):
        if rank not in parts:
            missing = f"has no *zero_pp_rank_{rank}_mp_rank_00{OPTIMIZER} of {ranks} ranks"
            raise NotFoundError(f"{missing}; copy the files of all ranks", path=folder)
    if len(parts) != ranks:
        raise FormatError(f"has files of {len(parts)} ranks, they say {ranks}", path=folder)
    ordered = [parts[rank] for rank in range(ranks)]
    join = _parted_by_parameter if stage == _GATHERED else _parted_by_group
    tensors = dict(join(model, ordered))
    for second, name in model.shared.items():
        if name in tensors:
            tensors[second] = tensors[name]
    return ZeroCheckpoint(folder, stage, ranks, tensors, model.frozen)


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """What a file of optimizer states says."""

    path: Path
    fields: Mapping[object, object]

    def groups(self, name: str) -> list[LazyTensor]:
        """Return the rank's fp32 elements, one row for each group."""
        rows = _rows(self.fields.get(name))
        found = [row for row in rows if isinstance(row, LazyTensor) and len(row.shape) == 1]
        if len(found) != len(rows):
            raise FormatError("holds no flat tensors", path=self.path, where=name)
        return found


def _parted_by_group(
    model: _Model, parts: Sequence[_Optimizer]
) -> Iterator[tuple[str, LazyTensor]]:
    """Cut the parameters out of all ranks' parts of a group, laid end to end (stages 1 and 2)."""
    rows = [part.groups("single_partition_of_fp32_groups") for part in parts]
    _check_counts(model, parts, rows)
    paddings = parts[0].fields.get("param_alignment_paddings")
    for number, shapes in enumerate(model.groups):
        flat = [group[number] for group in rows]
        padded = _paddings(paddings, number, len(shapes), parts[0].path)
        offset = 0
        for (name, shape), padding in zip(shapes.items(), padded, strict=True):
            size = math.prod(shape)
            yield name, _cut(model, flat, (name, shape), offset)
            offset += size + padding
        # The tail fills up to a multiple of two for each rank.
        step = 2 * len(parts)
        held = sum(row.size for row in flat)
        if -(-offset // step) != -(-held // step):
            what = f"group {number} has {held} elements, its parameters {offset}"
            raise FormatError(what, path=parts[0].path)


def _parted_by_parameter(
    model: _Model, parts: Sequence[_Optimizer]
) -> Iterator[tuple[str, LazyTensor]]:
    """Join the equal shares that every rank has of every parameter (stage 3)."""
    rows = [part.groups("fp32_flat_groups") for part in parts]
    shapes = {name: shape for group in model.groups for name, shape in group.items()}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        share = -(-size // len(parts))
        pieces = [piece for group in rows for piece in _span(group, offset, offset + share)]
        held = sum(piece.size for piece in pieces)
        if held != share * len(parts):
            raise _short(model, name, held, share * len(parts))
        yield name, _shaped(pieces, shape)
        offset += share
    for part, group in zip(parts, rows, strict=True):
        if (held := sum(row.size for row in group)) != offset:
            what = f"has {held} elements, its shares of the parameters are {offset}"
            raise FormatError(what, path=part.path)


def _cut(
    model: _Model, flat: Sequence[LazyTensor], named: tuple[str, tuple[int, ...]], offset: int
) -> LazyTensor:
    name, shape = named
    size = math.prod(shape)
    pieces = list(_span(flat, offset, offset + size))
    held = sum(piece.size for piece in pieces)
    if held != size:
        raise _short(model, name, held, size)
    return _shaped(pieces, shape)


def _short(model: _Model, name: str, held: int, size: int) -> FormatError:
    what = f"has {held} of {size} elements in the files of all ranks"
    return FormatError(what, path=model.path, where=name)


def _span(rows: Sequence[LazyTensor], begin: int, end: int) -> Iterator[LazyTensor]:
    """Yield what lies in [begin, end) of rows that are laid end to end, as (n, 1)."""
    ends = list(accumulate(row.size for row in rows))
    for row, stop in zip(rows, ends, strict=True):
        start = stop - row.size
        first, last = max(begin, start), min(end, stop)
        if first < last:
            column = LazyTensor(row.dtype, (row.size, 1), row.read)
            yield column.rows(first - start, last - start)


def _shaped(pieces: Sequence[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    """Return a parameter; the last piece may hold padding after it."""
    kept: list[LazyTensor] = []
    left = math.prod(shape)
    for piece in pieces:
        count = min(left, piece.size)
        kept.append(piece if count == piece.size else piece.rows(0, count))
        left -= count
    return strung(pieces[0].dtype, shape, kept)


def _check_counts(
    model: _Model, parts: Sequence[_Optimizer], rows: Sequence[Sequence[LazyTensor]]
) -> None:
    for part, groups in zip(parts, rows, strict=True):
        if len(groups) != len(model.groups):
            what = f"has {len(groups)} groups, {model.path.name} {len(model.groups)}"
            raise FormatError(what, path=part.path)


def _paddings(value: Any, group: int, count: int, path: Path) -> Sequence[int]:
    """Return how many elements follow each parameter of a group; none in older files."""
    if value is None:
        return [0] * count
    match value:
        case [*groups] if group < len(groups):
            match groups[group]:
                case [*numbers] if len(numbers) == count and all(map(_is_count, numbers)):
                    return numbers
                case _:
                    pass
        case _:
            pass
    raise FormatError("are not those of the parameters", path=path, where="alignment paddings")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_BYTES


def _from_training_weights(folder: Path, model: _Model) -> ZeroCheckpoint:
    """Return the trained parameters as the model has them, where no masters lie beside it."""
    tensors: dict[str, LazyTensor] = {}
    for group in model.groups:
        for name, shape in group.items():
            value = model.values.get(name)
            if value is None or value.shape != shape:
                raise NotFoundError(
                    f"lies in *{OPTIMIZER} files, and none is here; copy those of all ranks",
                    path=folder,
                    where=name,
                )
            tensors[name] = value
    return ZeroCheckpoint(folder, 0, 1, tensors, model.frozen)


def _model(path: Path) -> _Model:
    root = _mapping(read_torch_zip(path, names=_NAMES).root, path, "the file")
    shapes = root.get("param_shapes")
    values = _mapping(root.get("module"), path, "module")
    tensors = {str(n): v for n, v in values.items() if isinstance(v, LazyTensor)}
    if (
        shapes is None
    ):  # nothing is parted without ZeRO (stage 0), and nothing says what was trained
        shapes = {name: value.shape for name, value in tensors.items()}
    groups = [_shapes(group, path) for group in _rows(shapes)]
    if not any(groups):
        raise FormatError("lists no trained parameters (param_shapes)", path=path)
    trained = {name for group in groups for name in group}
    frozen = root.get("frozen_param_shapes")
    count = len(cast("dict[object, object]", frozen)) if type(frozen) is dict else 0
    shared = root.get("shared_params")
    named = _mapping(shared or {}, path, "shared_params")
    return _Model(
        path,
        tuple(groups),
        {str(second): str(name) for second, name in named.items()},
        tensors,
        max(count, len(tensors.keys() - trained)),
    )


def _rows(value: Any) -> list[Any]:
    return cast("list[Any]", value) if type(value) is list else [value]


def _shapes(group: object, path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in _mapping(group, path, "param_shapes").items():
        shape = cast("tuple[int, ...]", value if type(value) is tuple else (0,))
        if not all(map(_is_count, shape)) or not 0 < math.prod(shape) < MAX_BYTES:
            raise FormatError("has no shape", path=path, where=str(name)[:MAX_NAME])
        shapes[str(name)] = shape
    return shapes


def _optimizer(path: Path) -> _Optimizer:
    root = _mapping(read_torch_zip(path, names=_NAMES).root, path, "the file")
    state = _mapping(root.get("optimizer_state_dict"), path, "optimizer_state_dict")
    return _Optimizer(path, state)


def _stage(part: _Optimizer) -> int:
    match part.fields.get("zero_stage"):
        case int(stage) if 1 <= stage <= _GATHERED:
            return stage
        case _:
            raise FormatError("states no stage of ZeRO from 1 to 3", path=part.path)


def _ranks(part: _Optimizer) -> int:
    """Return the number of ranks; that of experts, group by group, may be smaller."""
    counts = _rows(part.fields.get("partition_count"))
    found = [count for count in counts if isinstance(count, int)]
    if len(found) != len(counts) or not 1 <= max(found, default=0) <= _MOST_RANKS:
        raise FormatError("states no number of ranks", path=part.path, where="partition_count")
    return max(found)


def _rank(name: str) -> int:
    match = _RANK.match(name)
    return int(match[1]) if match else 0


def _mapping(value: object, path: Path, where: str) -> Mapping[object, object]:
    if type(value) is not dict:
        raise FormatError("is no dictionary of DeepSpeed", path=path, where=where)
    return cast("Mapping[object, object]", value)


def _member(arguments: tuple[object, ...]) -> int:
    match arguments:
        case (int(value),):
            return value
        case _:
            raise ValueError("a member of an enumeration without a number")


_NAMES: Mapping[tuple[str, str], object] = {
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): Constructor("ZeroStageEnum", _member),
    **{
        ("deepspeed.runtime.fp16.loss_scaler", name): RecordClass(name)
        for name in ("LossScaler", "DynamicLossScaler")
    },
    ("deepspeed.utils.tensor_fragment", "fragment_address"): RecordClass("fragment_address"),
}
