"""Checkpoints of `torch.distributed.checkpoint` in safetensors: each rank's pieces in its files.

HuggingFaceStorageWriter (torch 2.13) writes `shard-RANK-model-NUMBER-of-COUNT.safetensors`, whose
metadata says where in the whole each piece begins. How many ranks there were is nowhere said.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from adapterkit.containers.folders import RANK_SHARD
from adapterkit.containers.opening import check_shape
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.containers.tiles import Tile, gap, joined
from adapterkit.errors import FormatError, NotFoundError
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

_INFO = "DCP_SHARDING_INFO"
_LARGEST = 1 << 26


@dataclass(frozen=True, slots=True)
class Shards:
    """What the shards hold together.

    Attributes:
        tensors: by name, whole.
        ranks: how many ranks' files there are.
        metadata: free text of the files, that of the first where several have a word.
    """

    tensors: Mapping[str, LazyTensor]
    ranks: int
    metadata: Mapping[str, str]


def read_shards(folder: Path) -> Shards:
    """Join the tensors of all shards in a folder.

    Raises:
        NotFoundError: if a file between others is missing.
        FormatError: if a file is malformed, or pieces leave a gap, overlap, or differ in dtype.
    """
    tiles: defaultdict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], Tile]] = defaultdict(dict)
    first: dict[str, Path] = {}
    files = sorted(file for file in folder.iterdir() if RANK_SHARD.fullmatch(file.name))
    ranks = _complete(files)
    metadata: Mapping[str, str] = {}
    for file in files:
        stored = read_safetensors(file)
        metadata = {**stored.metadata, **metadata}
        offsets = _offsets(stored.metadata, file)
        for name, tensor in stored.tensors.items():
            offset = offsets.get(name)
            if offset is None or len(offset) != len(tensor.shape):
                what = f"{_INFO} does not say where this piece of {list(tensor.shape)} begins"
                raise FormatError(what, path=file, where=name)
            first.setdefault(name, file)
            if tensor.size or not tiles[name]:
                tiles[name][offset, tensor.shape] = Tile(offset, tensor)
    whole = {name: _whole(name, [*found.values()], first[name]) for name, found in tiles.items()}
    return Shards(whole, ranks, metadata)


def _complete(files: list[Path]) -> int:
    """Return the number of ranks, of which each has all its files and none before it is missing."""
    found: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for file in files:
        if named := RANK_SHARD.fullmatch(file.name):
            found[int(named["rank"])][int(named["number"])] = int(named["count"])
    for rank in range(1, max(found, default=0) + 1):
        count = max(found[rank].values(), default=1)
        for number in range(1, count + 1):
            if number not in found[rank]:
                name = f"shard-{rank:05}-model-{number:05}-of-{count:05}.safetensors"
                missing = "is missing, and holds pieces of the adapter; copy the files of all ranks"
                raise NotFoundError(missing, path=files[0].with_name(name))
    return len(found)


def _offsets(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[int, ...]]:
    text = metadata.get(_INFO, "")
    try:
        found: object = json.loads(text) if len(text) <= _LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"has no {_INFO}, which says where its pieces begin", path=path)
    offsets: dict[str, tuple[int, ...]] = {}
    for name, value in cast("dict[str, object]", found).items():
        fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        begins = fields.get("saved_offsets")
        items = cast("list[object]", begins) if isinstance(begins, list) else [None]
        if not all(type(item) is int and 0 <= item < 1 << 53 for item in items):
            raise FormatError("begins at no whole numbers", path=path, where=name)
        offsets[name] = tuple(cast("list[int]", items))
    return offsets


def _whole(name: str, tiles: list[Tile], path: Path) -> LazyTensor:
    dtype = tiles[0].piece.dtype
    if any(tile.piece.dtype is not dtype for tile in tiles):
        raise FormatError("has pieces of several dtypes", path=path, where=name)
    ends = [
        [begin + size for begin, size in zip(tile.offset, tile.piece.shape, strict=True)]
        for tile in tiles
    ]
    if any(len(each) != len(ends[0]) for each in ends):
        raise FormatError("has pieces of different axes", path=path, where=name)
    shape = tuple(map(max, zip(*ends, strict=True)))
    check_shape(dtype, shape, path=path, where=name)
    if problem := gap(shape, [(tile.offset, tile.piece.shape) for tile in tiles]):
        raise FormatError(f"{problem}; copy the files of all ranks", path=path, where=name)
    return joined(dtype, shape, tiles)
