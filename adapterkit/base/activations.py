"""What the linear layers of a GGUF base see of some tokens, layer by layer, in numpy.

A plain forward pass in float32 over decoded weights, for families whose layer is Llama's: RMS norm,
rotary attention, gated feed-forward. Memory is one weight and the tokens' vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from adapterkit.base.model import BaseModel

    Array = np.ndarray[Any, np.dtype[Any]]

# GGUF architecture -> whether rotary pairs stand next to each other, rather than in two halves.
_ADJACENT = {"llama": True, "qwen2": False, "qwen3": False}
# What this pass knows of; a model with anything else is computed otherwise.
_TABLES = {"token_embd.weight", "output.weight", "output_norm.weight"}
_OF_LAYER = {
    f"{name}.weight"
    for name in (
        *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"),
        *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
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
    "rope__freq_base",
    "rope__dimension_count",
}
_EPSILON, _BASE = 1e-5, 10000.0


def computable(base: BaseModel) -> bool:
    """Tell whether `activations` computes what the model does, to rounding."""
    of_layers = {name.split(".", 2)[2] for name in base.tensors if name.startswith("blk.")}
    others = {name for name in base.tensors if not name.startswith("blk.")}
    return (
        base.kind == "gguf"
        and base.architecture.gguf in _ADJACENT
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
    for number in range(int(base.facts["block_count"])):
        yield from _Layer(base, f"blk.{number}.").run(states)
    norm = base.tensors["output_norm.weight"].numpy()
    yield ("output.weight",), [_normed(x, norm, _epsilon(base)) for x in states]


def _epsilon(base: BaseModel) -> float:
    return float(base.facts.get("attention__layer_norm_rms_epsilon", _EPSILON))


class _Layer:
    """One layer; vectors of all sequences go through it together, so that it is decoded once."""

    def __init__(self, base: BaseModel, prefix: str) -> None:
        self.base, self.prefix, self.epsilon = base, prefix, _epsilon(base)
        facts = base.facts
        self.heads = int(facts["attention__head_count"])
        self.shared = int(facts.get("attention__head_count_kv", self.heads))
        self.frequency = float(facts.get("rope__freq_base", _BASE))
        self.adjacent = _ADJACENT[base.architecture.gguf]

    def run(self, states: list[Array]) -> Iterator[tuple[tuple[str, ...], list[Array]]]:
        """Yield what each weight sees, and take the states, which are written over, a layer on."""
        seen = self._normed("attn_norm", states)
        yield self._names("attn_q", "attn_k", "attn_v"), seen
        q, k, v = (self._linear(name, seen) for name in ("attn_q", "attn_k", "attn_v"))
        seen = [self._attention(*each) for each in zip(q, k, v, strict=True)]
        yield self._names("attn_output"), seen
        _add(states, self._linear("attn_output", seen))
        seen = self._normed("ffn_norm", states)
        yield self._names("ffn_gate", "ffn_up"), seen
        gate, up = self._linear("ffn_gate", seen), self._linear("ffn_up", seen)
        seen = [_silu(g) * u for g, u in zip(gate, up, strict=True)]
        yield self._names("ffn_down"), seen
        _add(states, self._linear("ffn_down", seen))

    def _names(self, *names: str) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{name}.weight" for name in names)

    def _tensor(self, name: str) -> Array | None:
        found = self.base.tensors.get(self.prefix + name)
        return None if found is None else found.numpy()

    def _normed(self, name: str, states: list[Array]) -> list[Array]:
        weight = self._tensor(f"{name}.weight")
        return [_normed(x, weight, self.epsilon) for x in states]

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
        scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
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
        first = slice(0, width, 2) if self.adjacent else slice(0, half)
        second = slice(1, width, 2) if self.adjacent else slice(half, width)
        turned = x.copy()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned


def _add(states: list[Array], more: list[Array]) -> None:
    for number, each in enumerate(more):
        states[number] += each


def _normed(x: Array, weight: Array | None, epsilon: float) -> Array:
    import numpy as np

    scaled = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(epsilon))
    return scaled if weight is None else scaled * weight


def _silu(x: Array) -> Array:
    import numpy as np

    return x / (1 + np.exp(-x))
