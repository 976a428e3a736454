"""Write a LoRA of a diffusion model as kohya's scripts, diffusers or ComfyUI name it.

kohya: `lora_down`, `lora_up` and always `alpha`, the scale times the rank. ComfyUI: `lora_A`,
`lora_B`, and `alpha` where the scale is not 1. diffusers: `lora_A` and `lora_B` alone, the scale in
B, because only its newest versions read it elsewhere and every other program would not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.containers.safetensors import write_safetensors
from adapterkit.dtype import DType
from adapterkit.errors import FormatError
from adapterkit.factors import with_scale
from adapterkit.formats.diffusion.plan import planned
from adapterkit.formats.diffusion.reader import BASE
from adapterkit.formats.diffusion.rows import Moved, joined, moved, rescaled
from adapterkit.keys import Role, TensorKey
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from adapterkit.formats.diffusion.plan import Destination
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet, Update

BESIDE = (Role.MAGNITUDE, Role.COLUMN_MAGNITUDE, Role.LORA_BIAS)


def write_diffusion(
    adapter: AdapterTensorSet, path: Path, options: FormatOptions, spelling: str
) -> None:
    """Write a file; what has no place in it must have been dropped or refused before.

    Raises:
        FormatError: if updates that are one in the file do not fit together.
    """
    updates = {pair.module: pair for pair in adapter.pairs()}
    tensors: dict[str, LazyTensor] = {}
    ends = _Ends(spelling, adapter)
    for stem, members in planned(adapter, spelling, base=options.base).fused().items():
        parts = {
            destination.part: with_others(adapter, updates[module])
            for module, destination in members
        }
        try:
            whole = whole_of(parts, members[0][1])
        except ValueError as error:
            raise FormatError(str(error), where=stem) from None
        tensors |= _named(stem, whole, ends.of(members[0][0]), options.dtype, spelling)
    base = {BASE: adapter.base.name} if adapter.base.name else {}
    write_safetensors(path, tensors, {**adapter.metadata, **base, "format": "pt"})


def with_others(adapter: AdapterTensorSet, update: Update) -> Moved:
    """Return an update with its magnitudes and its bias."""
    keys = [TensorKey(update.module, role) for role in BESIDE]
    return Moved(update, {key.role: adapter.tensors[key] for key in keys if key in adapter.tensors})


def whole_of(parts: Mapping[int, Moved], destination: Destination) -> Moved:
    """Return the update of a module of the file: of several parts, or in another order.

    Raises:
        ValueError: if the parts do not fit together.
    """
    row = destination.row
    if row is None:
        return parts[destination.part]
    count = len(row.shares)
    whole = joined([parts.get(i) for i in range(count)], row.shares) if count > 1 else parts[0]
    order = row.ordered(*whole.update.matrix_shape)
    if not order:
        return whole
    back = sorted(range(len(order)), key=order.__getitem__)
    return moved(whole, [1] * len(back), order=back)[0]


class _Ends:
    """What follows `.` and a module in the names of a pair.

    diffusers infers the type of a text encoder's tensors, from `lora_A` in its attention alone;
    without attention they need the name that its own scripts once gave them.
    """

    def __init__(self, spelling: str, adapter: AdapterTensorSet) -> None:
        usual = ("lora_down", "lora_up") if spelling == "kohya" else ("lora_A", "lora_B")
        self._usual, self._others = usual, set[str]()
        if spelling == "diffusers":
            components = {m.partition(".")[0] for m in adapter.modules if m.startswith(_ENCODER)}
            found = {m.partition(".")[0] for m in adapter.modules if ".self_attn." in m}
            self._others = components - found

    def of(self, module: str) -> tuple[str, str]:
        """Return (down, up) of a module of the adapter."""
        return _LINEAR if module.partition(".")[0] in self._others else self._usual


_ENCODER, _LINEAR = "text_encoder", ("lora_linear_layer.down", "lora_linear_layer.up")


def _named(
    stem: str, whole: Moved, ends: tuple[str, str], dtype: DType | None, spelling: str
) -> dict[str, LazyTensor]:
    """Return the tensors of one module by name."""
    if spelling == "diffusers":
        whole = rescaled(whole, 1.0)
    elif whole.update.scale < 0:
        # diffusers never returns from a negative alpha; the sign of B rounds nothing.
        whole = replace(whole, update=with_scale(whole.update, -whole.update.scale))
    update, others = whole.update, whole.others
    down, up = ends
    found = {
        f"{stem}.{down}.weight": update.a if dtype is None else update.a.cast(dtype),
        f"{stem}.{up}.weight": update.b if dtype is None else update.b.cast(dtype),
    }
    if spelling == "kohya" or (spelling == "comfyui" and update.scale != 1.0):
        found[f"{stem}.alpha"] = _number(update.scale * update.rank, update.b.dtype)
    if (magnitude := others.get(Role.MAGNITUDE)) is not None:
        found |= _magnitude(stem, magnitude, len(update.b.shape), spelling)
    if (columns := others.get(Role.COLUMN_MAGNITUDE)) is not None:
        shape = (1, columns.size, *[1] * (len(update.a.shape) - 2))
        found[f"{stem}.dora_scale"] = columns.map(lambda x: x.reshape(shape), shape=shape)
    if (bias := others.get(Role.LORA_BIAS)) is not None:
        name = "lora_B.bias" if spelling == "diffusers" else "diff_b"
        scale = update.scale
        plain = bias if scale == 1.0 else bias.map(lambda x: x.astype("float64") * scale)
        found[f"{stem}.{name}"] = plain
    return found


def _magnitude(stem: str, magnitude: LazyTensor, axes: int, spelling: str) -> dict[str, LazyTensor]:
    rows = magnitude.size
    ones: Sequence[int] = [1] * (axes - 1)
    if spelling == "diffusers":
        shape = (rows,) if axes == 2 else (1, rows, *ones[1:])  # noqa: PLR2004  (a matrix)
        # transformers finds one of a text encoder by this name alone.
        weight = ".weight" if stem.startswith(_ENCODER) else ""
        name = f"{stem}.lora_magnitude_vector{weight}"
    else:
        shape, name = (rows, *ones), f"{stem}.dora_scale"
    return {name: magnitude.map(lambda x: x.reshape(shape), shape=shape)}


def _number(value: float, dtype: DType) -> LazyTensor:
    """Return a number in the type of the factors where that rounds nothing, else in float32."""
    import numpy as np

    for stored in (dtype, DType.F32):
        if stored in {DType.F16, DType.BF16, DType.F32}:
            tensor = LazyTensor.of(np.array(value), stored)
            if float(tensor.numpy().reshape(())) == value or stored is DType.F32:
                return tensor
    raise AssertionError
