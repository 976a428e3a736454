"""What the linear layers of a GGUF base see of some tokens, layer by layer, in numpy.

A plain forward pass in float32 over decoded weights, for families whose layer is Llama's: RMS norm,
rotary attention, gated feed-forward; and for Gemma 3, which has more norms, and layers that look
back a window only. Memory is one weight and the tokens' vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from adapterkit.base.model import BaseModel

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family's layers do in their own way.

    Attributes:
        adjacent: whether rotary pairs stand next to each other, rather than in two halves.
        local: of so many layers all but the last look back a window only, and turn faster; 0 where
            none does.
        gelu: whether the gate is GELU's, rather than SiLU's.
        lengthened: whether embeddings are multiplied with the root of their width.
    """

    adjacent: bool = False
    local: int = 0
    gelu: bool = False
    lengthened: bool = False


# By GGUF architecture.
_FAMILIES = {
    "llama": _Family(adjacent=True),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "gemma3": _Family(local=6, gelu=True, lengthened=True),
}
# What this pass knows of; a model with anything else is computed otherwise.
_TABLES = {"token_embd.weight", "output.weight", "output_norm.weight"}
_OF_LAYER = {
    f"{name}.weight"
    for name in (
        *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"),
        *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_attention_norm", "post_ffw_norm"),
    )
} | {f"attn_{name}.bias" for name in "qkv"}
_FACTS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention__head_count",
    "attention__head_count_kv",
    "attention__key_length",
    "attention__value_length",
    "attention__layer_norm_rms_epsilon",
    "attention__sliding_window",
    "rope__freq_base",
    "rope__freq_base_swa",
    "rope__dimension_count",
}
_EPSILON, _BASE, _WINDOW = 1e-5, 10000.0, 1 << 30


def computable(base: BaseModel) -> bool:
    """Tell whether `activations` computes what the model does, to rounding."""
    of_layers = {name.split(".", 2)[2] for name in base.tensors if name.startswith("blk.")}
    others = {name for name in base.tensors if not name.startswith("blk.")}
    return (
        base.kind == "gguf"
        and base.architecture.gguf in _FAMILIES
        and of_layers <= _OF_LAYER
        and others <= _TABLES
        and set(base.facts) <= _FACTS
    )


def activations(
    base: BaseModel, sequences: Sequence[Sequence[int]]
) -> Iterator[tuple[tuple[str, ...], list[Array]]]:
    """Yield names of weights and what they are multiplied with, (tokens, columns) a sequence.

    Args:
        base: a GGUF model, `computable`.
        sequences: token ids, each beginning at the first position.
    """
    import numpy as np

    table = base.tensors["token_embd.weight"]
    states = [
        np.concatenate([table.rows(token, token + 1).numpy() for token in tokens])
        for tokens in sequences
    ]
    if _FAMILIES[base.architecture.gguf].lengthened:
        states = [x * np.float32(x.shape[-1] ** 0.5) for x in states]
    for number in range(int(base.facts["block_count"])):
        yield from _Layer(base, number).run(states)
    norm = base.tensors["output_norm.weight"].numpy()
    yield ("output.weight",), [_normed(x, norm, _epsilon(base)) for x in states]


def _epsilon(base: BaseModel) -> float:
    return float(base.facts.get("attention__layer_norm_rms_epsilon", _EPSILON))


class _Layer:
    """One layer; vectors of all sequences go through it together, so that it is decoded once."""

    def __init__(self, base: BaseModel, number: int) -> None:
        self.base, self.prefix, self.epsilon = base, f"blk.{number}.", _epsilon(base)
        self.family, facts = _FAMILIES[base.architecture.gguf], base.facts
        self.heads = int(facts["attention__head_count"])
        self.shared = int(facts.get("attention__head_count_kv", self.heads))
        local = self.family.local and (number + 1) % self.family.local
        rate = "rope__freq_base_swa" if local else "rope__freq_base"
        self.frequency = float(facts.get(rate, _BASE))
        self.window = int(facts.get("attention__sliding_window", _WINDOW)) if local else _WINDOW

    def run(self, states: list[Array]) -> Iterator[tuple[tuple[str, ...], list[Array]]]:
        """Yield what each weight sees, and take the states, which are written over, a layer on."""
        seen = self._normed("attn_norm", states)
        yield self._names("attn_q", "attn_k", "attn_v"), seen
        q, k, v = (self._linear(name, seen) for name in ("attn_q", "attn_k", "attn_v"))
        seen = [self._attention(*each) for each in zip(q, k, v, strict=True)]
        yield self._names("attn_output"), seen
        _add(states, self._normed("post_attention_norm", self._linear("attn_output", seen)))
        seen = self._normed("ffn_norm", states)
        yield self._names("ffn_gate", "ffn_up"), seen
        gate, up = self._linear("ffn_gate", seen), self._linear("ffn_up", seen)
        opened = _gelu if self.family.gelu else _silu
        seen = [opened(g) * u for g, u in zip(gate, up, strict=True)]
        yield self._names("ffn_down"), seen
        _add(states, self._normed("post_ffw_norm", self._linear("ffn_down", seen)))

    def _names(self, *names: str) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{name}.weight" for name in names)

    def _tensor(self, name: str) -> Array | None:
        found = self.base.tensors.get(self.prefix + name)
        return None if found is None else found.numpy()

    def _normed(self, name: str, states: list[Array]) -> list[Array]:
        """Return vectors as a norm of the layer leaves them; as they are, where it has none."""
        weight = self._tensor(f"{name}.weight")
        return states if weight is None else [_normed(x, weight, self.epsilon) for x in states]

    def _linear(self, name: str, inputs: list[Array]) -> list[Array]:
        import numpy as np

        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        turned = np.asarray(weight, np.float32).T
        return [x @ turned if bias is None else x @ turned + bias for x in inputs]

    def _attention(self, q: Array, k: Array, v: Array) -> Array:
        """Return what the heads have looked up, (tokens, heads · width)."""
        import numpy as np

        count = len(q)
        queries = self._turned(self._headed(q, self.heads, "attn_q_norm"))
        keys = self._turned(self._headed(k, self.shared, "attn_k_norm"))
        values = v.reshape(count, self.shared, -1).swapaxes(0, 1)
        times = self.heads // self.shared
        keys, values = np.repeat(keys, times, axis=0), np.repeat(values, times, axis=0)
        scores = queries @ keys.swapaxes(1, 2) / np.float32(queries.shape[-1] ** 0.5)
        every = np.ones((count, count), bool)
        scores[:, np.triu(every, 1) | np.tril(every, -self.window)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ values).swapaxes(0, 1).reshape(count, -1)

    def _headed(self, x: Array, heads: int, norm: str) -> Array:
        """Return (heads, tokens, width), normed where the model does so."""
        x = x.reshape(len(x), heads, -1).swapaxes(0, 1)
        weight = self._tensor(f"{norm}.weight")
        return x if weight is None else _normed(x, weight, self.epsilon)

    def _turned(self, x: Array) -> Array:
        """Return vectors with their positions turned in (rotary embedding, arXiv 2104.09864)."""
        import numpy as np

        width = int(self.base.facts.get("rope__dimension_count", x.shape[-1]))
        rates: Array = self.frequency ** (-np.arange(0, width, 2) / width)
        angles: Array = np.outer(np.arange(x.shape[1], dtype=np.float64), rates)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        half = width // 2
        adjacent = self.family.adjacent
        first = slice(0, width, 2) if adjacent else slice(0, half)
        second = slice(1, width, 2) if adjacent else slice(half, width)
        turned = x.copy()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned


def _add(states: list[Array], more: list[Array]) -> None:
    for number, each in enumerate(more):
        states[number] += each


def _normed(x: Array, weight: Array, epsilon: float) -> Array:
    import numpy as np

    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(epsilon)) * weight


def _silu(x: Array) -> Array:
    import numpy as np

    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    """Return GELU in its form with tanh, which is what llama.cpp computes."""
    import numpy as np

    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
    return x * (1 + np.tanh(inner)) / 2
