"""Four-bit codes of bitsandbytes, NF4 and FP4, decoded row by row.

Beside a parameter stand `absmax` (one number for each block of elements, counted through the whole
tensor), `quant_map` (what the 16 codes mean) and `quant_state`, JSON with shape, block and type.
Nested, `absmax` is itself stored as bytes, with a map of 256 numbers, an absmax for each of its own
blocks, and an offset. The high half of a byte is the first code.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.tables import Table, listed, number, one_of, whole
from adapterkit.tensor import LazyTensor, StoredRows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_STATE = "quant_state.bitsandbytes__"
_TYPES = {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}
_LARGEST = 1 << 40
_LONGEST = 1 << 16
_CODES, _BYTES = 16, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedRows(StoredRows):
    """Codes of 4 bits times a scale for each block, in the type that they were made from.

    Attributes:
        values: the codes, two in a byte.
        parts: `absmax`, `quant_map` and, nested, `nested_absmax` and `nested_quant_map`.
        block: how many elements share a scale.
        nested: how many scales share a scale of their own, and what is added to each; or None.
        dtype: of the decoded tensor.
        width: its last axis.
        count: its elements.
    """

    parts: Mapping[str, LazyTensor]
    block: int
    nested: tuple[int, float] | None
    dtype: DType
    width: int
    count: int

    def __call__(self) -> memoryview:
        """Decode the whole tensor."""
        return self.rows(0, self.count // self.width)

    def rows(self, begin: int, end: int) -> memoryview:
        """Return rows [begin, end) of the tensor as (-1, columns), of its dtype.

        Raises:
            FormatError: if a scale or a code's number is not finite.
            TruncatedFileError: if a file has become shorter.
        """
        import numpy as np

        first, last = begin * self.width, end * self.width
        data = self.values.in_rows_of(1).rows(first // 2, -(-last // 2)).numpy()[:, 0]
        codes = np.stack([data >> 4, data & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        decoded = self._finite(self.parts["quant_map"].numpy())[codes]
        place = first // self.block
        scales = self._scales(place, -(-last // self.block))
        decoded *= scales[np.arange(first, last) // self.block - place]
        return decoded.astype(self.dtype.numpy()).view(np.uint8).data

    def _scales(self, begin: int, end: int) -> Array:
        """Return the scales of blocks [begin, end) as float32."""
        import numpy as np

        part = self.parts["absmax"].in_rows_of(1).rows(begin, end).numpy()[:, 0]
        if self.nested is None:
            return self._finite(part)
        size, offset = self.nested
        found = self.parts["nested_quant_map"].numpy()[part]
        found *= self.parts["nested_absmax"].numpy()[np.arange(begin, end) // size]
        found += np.float32(offset)
        return self._finite(found)

    def _finite(self, numbers: Array) -> Array:
        import numpy as np

        if not np.isfinite(numbers).all():
            raise FormatError(f"a scale of {self.values} is not finite", path=self.path)
        return numbers


def companions(parameter: str, names: Sequence[str]) -> Sequence[str]:
    """Return the names of what stands beside a parameter and says what its codes mean.

    Args:
        parameter: its name.
        names: of all tensors, sorted.
    """
    begin = bisect_left(names, f"{parameter}.")
    # What begins with the name and a dot comes before the name and the letter after the dot.
    return names[begin : bisect_left(names, f"{parameter}/", begin)]


def coded(
    parameter: str, values: LazyTensor, beside: Mapping[str, LazyTensor], path: Path
) -> LazyTensor:
    """Return a parameter as the floats that its codes stand for; its quant_state is read.

    Args:
        parameter: its name.
        values: the codes.
        beside: what says what they mean, by its names.
        path: of the checkpoint.

    Raises:
        FormatError: if parts are missing, or their sizes do not belong together.
    """
    parts = {name.removeprefix(f"{parameter}."): tensor for name, tensor in beside.items()}
    states = [name for name in parts if name.startswith(_STATE)]
    if len(states) != 1:
        raise FormatError(f"needs one {parameter}.{_STATE}nf4 or fp4", path=path, where=parameter)
    state = _state(parts.pop(states[0]), path, f"{parameter}.{states[0]}")
    shape = state.get("shape", listed(whole(1, _LARGEST), most=8, least=1))
    block = state.get("blocksize", whole(1, _LARGEST))
    dtype = _TYPES[state.get("dtype", one_of(*_TYPES))]
    nested = None
    tensor = LazyTensor(dtype, shape, lambda: b"")
    sizes = {"absmax": -(-tensor.size // block), "quant_map": _CODES}
    if "nested_absmax" in parts:
        size = state.get("nested_blocksize", whole(1, _LARGEST))
        nested = size, state.get("nested_offset", number())
        sizes |= {"nested_absmax": -(-sizes["absmax"] // size), "nested_quant_map": _BYTES}
    kinds = {name: DType.U8 if nested and name == "absmax" else DType.F32 for name in sizes}
    found = {name: (part.size, part.dtype) for name, part in parts.items()}
    if found != {name: (sizes[name], kinds[name]) for name in sizes}:
        raise FormatError(
            f"needs {', '.join(f'{n} of {s} {kinds[n]}' for n, s in sizes.items())}; beside it are "
            f"{', '.join(f'{n} of {s} {k}' for n, (s, k) in found.items()) or 'none'}",
            path=path,
            where=parameter,
        )
    if values.size != -(-tensor.size // 2):
        raise FormatError(
            f"has {values.size} bytes for {tensor.size} numbers of 4 bits",
            path=path,
            where=parameter,
        )
    reader = CodedRows(
        values=values,
        parts=parts,
        block=block,
        nested=nested,
        dtype=dtype,
        width=shape[-1],
        count=tensor.size,
    )
    return LazyTensor(dtype, shape, reader)


def _state(tensor: LazyTensor, path: Path, name: str) -> Table:
    """Read the JSON that is stored as bytes."""
    if tensor.dtype is not DType.U8 or tensor.size > _LONGEST:
        raise FormatError(f"holds {tensor}, not a short text", path=path, where=name)
    try:
        state = json.loads(bytes(tensor.read()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not readable JSON ({error})", path=path, where=name) from None
    if not isinstance(state, dict):
        raise FormatError("is not a JSON object", path=path, where=name)
    return Table(cast("Mapping[str, Any]", state), path)
