"""PEFT's tuners that set whole parameters: what each one becomes, given the base where it needs it.

Definitions are those of PEFT 0.21.2 (`merge` of each tuner's layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UnsupportedError
from adapterkit.formats.peft.tuners_rules import Context, Parts
from adapterkit.keys import Role, TensorKey
from adapterkit.tables import listed, whole
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Whole = Callable[[str, Parts, Context], dict[TensorKey, LazyTensor]]

_TOKENS = 1 << 31


def _ia3(module: str, parts: Parts, context: Context) -> dict[TensorKey, LazyTensor]:
    """Return l ∘ W, and l ∘ b where l scales outputs: (out, 1) there, (1, in) for inputs."""
    scale = parts["ia3_l"]
    outputs = scale.shape[-1:] == (1,)
    found: dict[TensorKey, LazyTensor] = {}
    weight = context.parameter(f"{module}.weight")
    turned = context.turned(module)
    shape = scale.shape[::-1] if turned else scale.shape
    fits = [(weight.shape[0], 1), (1, weight.shape[-1])]
    if len(weight.shape) != len(shape) or shape not in fits:
        raise ValueError(f"ia3_l has shape {list(scale.shape)}, the base {list(weight.shape)}")
    found[_full(module, "weight")] = _changed(weight, lambda w: w * _wide(scale).reshape(shape))
    bias = context.optional(f"{module}.bias")
    if bias is not None:  # PEFT loads a saved layer whole
        factor = scale if outputs else None
        found[_full(module, "bias")] = _changed(
            bias, lambda b: b if factor is None else b * _wide(factor).reshape(-1)
        )
    return found


def _beft(module: str, parts: Parts, context: Context) -> dict[TensorKey, LazyTensor]:
    """Return b + v."""
    added = parts["beft_bias"]
    context.parameter(f"{module}.weight")  # a base with weights, whose biases are known
    bias = context.optional(f"{module}.bias")
    if bias is None:
        raise UnsupportedError(
            "trains a bias, and the base has none here that it could be added to; PEFT alone runs "
            "it, and cannot merge it either",
            path=context.path,
            where=module,
        )
    if added.size != bias.size:
        raise ValueError(f"beft_bias has {added.size} values, the base's bias {bias.size}")
    return {_full(module, "bias"): _changed(bias, lambda b: b + _wide(added).reshape(-1))}


def _norms(module: str, parts: Parts, context: Context) -> dict[TensorKey, LazyTensor]:
    """Return the layer as it is stored."""
    del context
    return {_full(module, name.removeprefix("ln_tuning_")): part for name, part in parts.items()}


def _tokens(module: str, parts: Parts, context: Context) -> dict[TensorKey, LazyTensor]:
    """Return the rows as they are stored; `token_indices` says whose they are."""
    del context
    return {TensorKey(module, Role.TOKEN_ROWS): parts["trainable_tokens_delta"]}


def token_indices(context: Context) -> tuple[int, ...]:
    """Return the tokens that TRAINABLE_TOKENS has rows of; none for other tuners."""
    if context.config.get("peft_type") != "TRAINABLE_TOKENS":
        return ()
    return context.fields.optional("token_indices", listed(whole(0, _TOKENS))) or ()


def _full(module: str, name: str) -> TensorKey:
    return TensorKey(f"{module}.{name}", Role.FULL)


def _changed(tensor: LazyTensor, values: Callable[[Array], Array]) -> LazyTensor:
    """Return a parameter of the base changed in float64, and stored no narrower than float32."""
    kind = DType.F64 if tensor.dtype is DType.F64 else DType.F32
    return LazyTensor.computed(kind, tensor.shape, lambda: values(_wide(tensor)))


def _wide(tensor: LazyTensor) -> Array:
    import numpy as np

    return tensor.numpy().astype(np.float64)


WHOLE: Mapping[str, Whole] = {
    "BEFT": _beft,
    "IA3": _ia3,
    "LN_TUNING": _norms,
    "TRAINABLE_TOKENS": _tokens,
}
