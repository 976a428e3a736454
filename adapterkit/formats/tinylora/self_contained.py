"""Self-contained TinyLoRA: one safetensors file with everything that its coefficients need.

Tensors: `<module>.left` (out, r), `<module>.right` (r, in), `<module>.projection` (u, r, r) and
`v.<group>` (u,); ΔW = scale · left · (Σᵢ vᵢ Pᵢ) · right. Instead of a projection a module may have
`<module>.middle` (r, r), the sum itself. The header's metadata says `format: adapterkit.tinylora`
and holds one JSON object under `tinylora`: `version` 1, and `modules` with group, scale, embedding
and witness of each. No base and no torch are needed to read it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.beside import beside_file
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import AdapterKitError, FormatError, UnsupportedError
from adapterkit.notes import BaseReference, Provenance
from adapterkit.stamps import OURS
from adapterkit.tables import ANY_MAPPING, FLAG, TEXT, Table, listed, number, shown, whole
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora import writing
from adapterkit.tinylora.adapter import TinyAdapter, TinyModule, neutral, wide
from adapterkit.tinylora.settings import TinySettings, settings_from
from adapterkit.tinylora.targets import weight_of
from adapterkit.tinylora.witness import Witness, check_weight, parse_witness, testify

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss

NAME = "tinylora"
MARK = f"{OURS}tinylora"
FILE = "tinylora.safetensors"
_VERSION = 1
_LEAVES = ("left", "right", "projection", "middle")
_MATRIX, _CUBE = 2, 3
_LARGEST_GROUP = 1 << 31


def is_self_contained(path: Path) -> bool:
    """Tell whether a path is such a file, or a directory with one."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        return False
    try:
        return read_safetensors(file).metadata.get("format") == MARK
    except AdapterKitError:
        return False


def read(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a file, or the one in a directory; a base that is given is held to the witness.

    Raises:
        FormatError: if it is malformed.
        UnsupportedError: if a later adapterkit wrote it.
        IncompatibleBaseError: if a base is given whose weights are others than it was made on.
    """
    file = path / FILE if path.is_dir() else path
    tiny, document = _read(file)
    notes = _compared(tiny, options.base)
    return neutral(
        tiny,
        base=BaseReference(name=document.optional("base_model", TEXT) or None),
        provenance=Provenance(path, NAME, notes),
    ).replace(beside=beside_file(file, (FILE,), path, options.base))


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List what the form has no place for."""
    del options
    return writing.losses(adapter)


def write(adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
    """Write one file; the witness is the source's, or is taken from the base that is given."""
    tiny = writing.tiny_of(adapter)
    tensors: dict[str, LazyTensor] = {}
    for module in tiny.modules:
        for leaf in ("left", "right", "projection"):
            tensor: LazyTensor = getattr(module, leaf)
            stored = tensor.cast(options.dtype) if options.dtype else tensor
            tensors[f"{module.name}.{leaf}"] = stored
    # The coefficients are all that was trained, and next to nothing: they keep every digit.
    tensors |= {f"v.{group}": vector for group, vector in tiny.vectors.items()}
    document = _document(tiny, adapter, options.base)
    text = json.dumps(document, separators=(",", ":"), sort_keys=True)
    write_safetensors(path, tensors, {"format": MARK, NAME: text})


def _document(
    tiny: TinyAdapter, adapter: AdapterTensorSet, base: BaseModel | None
) -> dict[str, Any]:
    modules = {module.name: _module_document(module, base) for module in tiny.modules}
    found: dict[str, Any] = {"version": _VERSION, "form": tiny.form, "modules": modules}
    if tiny.settings:
        found["settings"] = tiny.settings.document()
    if name := adapter.base.name or (base.name if base else None):
        found["base_model"] = name
    if tiny.config:
        found["config"] = _plain(tiny.config)
    return found


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: views become plain containers."""
    return json.loads(json.dumps(value, default=lambda odd: [str(each) for each in odd]))


def _module_document(module: TinyModule, base: BaseModel | None) -> dict[str, Any]:
    found: dict[str, Any] = {"group": module.group, "scale": module.scale}
    if module.embedding:
        found["embedding"] = True
    witness = module.witness or _witness(module, base)
    if witness:
        found["witness"] = witness.document()
    return found


def _witness(module: TinyModule, base: BaseModel | None) -> Witness | None:
    """Identify the base's weight; the norms of frozen factors multiply to the singular values."""
    import numpy as np

    if base is None or base.kind != "hf" or f"{module.name}.weight" not in base.tensors:
        return None
    left, right = wide(module.left), wide(module.right)
    values = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    return testify(weight_of(base, module.name), left, tuple(map(float, values)), "float32")


def _read(path: Path) -> tuple[TinyAdapter, Table]:
    file = read_safetensors(path)
    document = _parsed(file.metadata, path)
    modules = document.inner("modules", document.get("modules", ANY_MAPPING))
    vectors = _vectors(file.tensors, path)
    known = {f"v.{group}" for group in vectors}
    found: list[TinyModule] = []
    for name in modules.fields:
        known |= {f"{name}.{leaf}" for leaf in _LEAVES}
        fields = modules.inner(name, modules.get(name, ANY_MAPPING))
        found.append(_module(name, fields, file.tensors, vectors, path))
    if strangers := sorted(file.tensors.keys() - known):
        raise FormatError("belongs to no module of the header", path=path, where=strangers[0])
    if not found:
        raise FormatError("holds no modules; training saved an empty adapter", path=path)
    if unused := sorted(vectors.keys() - {module.group for module in found}):
        raise FormatError("belongs to no module", path=path, where=f"v.{unused[0]}")
    stated = document.optional("settings", ANY_MAPPING)
    tiny = TinyAdapter(
        modules=tuple(found),
        vectors=vectors,
        form=document.get("form", TEXT, "carried"),
        settings=settings_from(stated, path) if stated else None,
        config=_config(document, {module.name for module in found}),
    )
    return tiny, document


def _config(document: Table, modules: Collection[str]) -> Mapping[str, Any]:
    """Return what its former format said of it; what writers take from there is checked here."""
    config = document.table("config")
    if config is None:
        return {}
    config.optional("metadata", ANY_MAPPING)
    for name in config.optional("keys", listed(TEXT)) or ():
        if name not in modules:
            raise config.error("keys", f"{shown(name)} is no module of it")
    return config.fields


def _parsed(metadata: Mapping[str, str], path: Path) -> Table:
    try:
        document = json.loads(metadata.get(NAME, ""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header holds no JSON ({error})", path=path, where=NAME) from None
    table = Table(Table({}, path).checked(NAME, document, ANY_MAPPING), path)
    if (version := table.get("version", whole(0, 1 << 31))) != _VERSION:
        raise UnsupportedError(
            f"is of version {version}; this adapterkit reads {_VERSION}", path=path
        )
    return table


def _vectors(tensors: Mapping[str, LazyTensor], path: Path) -> dict[int, LazyTensor]:
    vectors: dict[int, LazyTensor] = {}
    for name, tensor in tensors.items():
        kind, _, group = name.partition(".")
        if kind != "v" or not group.isdecimal() or len(group) > len(str(_LARGEST_GROUP)):
            continue
        if len(tensor.shape) != 1 or not tensor.size or not tensor.dtype.floating:
            raise FormatError("is no vector of real numbers", path=path, where=name)
        vectors[int(group)] = tensor
    return vectors


def _module(
    name: str,
    fields: Table,
    tensors: Mapping[str, LazyTensor],
    vectors: dict[int, LazyTensor],
    path: Path,
) -> TinyModule:
    scale = fields.get("scale", number())
    left, right, projection, middle = (tensors.get(f"{name}.{leaf}") for leaf in _LEAVES)
    if left is None or right is None or (projection is None) == (middle is None):
        raise FormatError(
            "needs left, right and either projection or middle", path=path, where=name
        )
    group = fields.optional("group", whole(0, _LARGEST_GROUP))
    if middle is not None:
        # A middle matrix is a projection with the one coefficient 1.
        projection = LazyTensor(middle.dtype, (1, *middle.shape), middle.read)
        group = max(vectors, default=-1) + 1
        vectors[group] = _one()
    if group is None or group not in vectors:
        raise FormatError(f"its group {group} has no vector", path=path, where=name)
    assert projection is not None  # noqa: S101  (one of the two is there)
    _check_shapes(name, left, right, projection, vectors[group].size, path)
    witness = fields.table("witness")
    return TinyModule(
        name=name,
        left=left,
        right=right,
        projection=projection,
        group=group,
        scale=scale,
        embedding=fields.get("embedding", FLAG, usual=False),
        witness=parse_witness(witness) if witness else None,
    )


def _one() -> LazyTensor:
    import numpy as np

    return LazyTensor.of(np.ones(1), DType.F32)


def _check_shapes(
    name: str, left: LazyTensor, right: LazyTensor, projection: LazyTensor, size: int, path: Path
) -> None:
    shapes = (left.shape, right.shape, projection.shape)
    matrices = left.is_matrix and right.is_matrix and len(projection.shape) == _CUBE
    fits = matrices and left.shape[1] == right.shape[0] and left.size and right.size
    rank = left.shape[-1]
    if not fits or projection.shape != (size, rank, rank):
        shown = ", ".join(str(list(shape)) for shape in shapes)
        raise FormatError(f"left, right and projection do not fit: {shown}", path=path, where=name)
    if not all(tensor.dtype.floating for tensor in (left, right, projection)):
        raise FormatError("its parts are not all real numbers", path=path, where=name)


def _compared(tiny: TinyAdapter, base: BaseModel | None) -> tuple[str, ...]:
    """Hold a base to the witness, where both are there."""
    if base is None or base.kind != "hf" or not base.has_tensors:
        return ()
    seen = [module for module in tiny.modules if module.witness]
    for module in seen:
        if module.witness:
            weight = weight_of(base, module.name)
            check_weight(module.witness, weight, module=module.name, path=base.path)
    if not seen:
        return ("it has no witness: nothing says that it was made on this base",)
    return (f"made on this base: the weights of {len(seen)} modules have the digests it recorded",)


def settings_of(adapter: AdapterTensorSet) -> TinySettings | None:
    """Return the settings that a TinyLoRA was made with, if it is one and says so."""
    return writing.tiny_of(adapter).settings
