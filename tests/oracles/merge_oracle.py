"""The merge methods on dense float64 matrices, written from the papers and not from the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor

Array = np.ndarray[Any, Any]
# module -> (B, A, scale)
Parts = Mapping[str, tuple[Array, Array, float]]


def adapter(parts: Parts, *, embeddings: Sequence[str] = (), **fields: Any) -> AdapterTensorSet:
    """Return an adapter of these factors."""
    tensors: dict[TensorKey, LazyTensor] = {}
    for module, (b, a, _) in parts.items():
        roles = (
            (Role.EMBEDDING_A, Role.EMBEDDING_B)
            if module in embeddings
            else (Role.LORA_A, Role.LORA_B)
        )
        tensors[TensorKey(module, roles[0])] = LazyTensor.of(a)
        tensors[TensorKey(module, roles[1])] = LazyTensor.of(b)
    tensors |= fields.pop("tensors", {})
    scales = {module: scale for module, (_, _, scale) in parts.items()}
    return AdapterTensorSet(tensors=tensors, scales=scales, **fields)


def random_parts(
    seed: int, shapes: Mapping[str, tuple[int, int]], rank: int = 3, scale: float = 1.0
) -> dict[str, tuple[Array, Array, float]]:
    """Return factors with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    decay = 0.6 ** np.arange(rank)
    return {
        module: (
            rng.standard_normal((out, rank)) * decay,
            rng.standard_normal((rank, inputs)),
            scale,
        )
        for module, (out, inputs) in shapes.items()
    }


def deltas(merged: AdapterTensorSet) -> dict[str, Array]:
    """Return ΔW of every module, dense, float64; of an embedding (vocabulary, width)."""
    found: dict[str, Array] = {}
    for pair in merged.pairs():
        b, a = (np.asarray(t.numpy(), dtype=np.float64) for t in (pair.b, pair.a))
        found[pair.module] = (
            pair.scale * (b @ a).swapaxes(-1, -2) if pair.embedding else (pair.scale * (b @ a))
        )
    return found


def relative(found: Array, wanted: Array, floor: float = 0.0) -> float:
    """Return the relative Frobenius error; against `floor` where nothing is wanted."""
    return float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), floor, 1e-300)


def weighted(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum((w * x for w, x in zip(weights, updates, strict=True)), np.zeros(updates[0].shape))


def slerp(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    x, y = updates
    share = weights[1] / sum(weights)
    angle = np.arccos(np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y)))
    first, second = np.sin((1 - share) * angle), np.sin(share * angle)
    return sum(weights) * (first * x + second * y) / np.sin(angle)


def nuslerp(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    return slerp(updates, [weight / sum(weights) for weight in weights])


def multislerp(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    lengths = [float(np.linalg.norm(x)) for x in updates]
    shares = [weight / sum(weights) for weight in weights]
    mean = weighted([x / n for x, n in zip(updates, lengths, strict=True)], shares)
    return mean / np.linalg.norm(mean) * float(np.dot(shares, lengths))


def karcher(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    lengths = [float(np.linalg.norm(x)) for x in updates]
    units = [x / length for x, length in zip(updates, lengths, strict=True)]
    shares = np.array(weights) / sum(weights)
    mean = weighted(units, list(shares))
    mean /= np.linalg.norm(mean)
    for _ in range(500):
        step = np.zeros_like(mean)
        for unit, share in zip(units, shares, strict=True):
            angle = np.arccos(np.clip(np.sum(mean * unit), -1, 1))
            across = unit - np.cos(angle) * mean
            if np.linalg.norm(across) > 0:
                step += share * angle * across / np.linalg.norm(across)
        size = float(np.linalg.norm(step))
        if size < 1e-15:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
    return mean * float(np.dot(weights, lengths))


def model_stock(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    count = len(updates)
    if count == 1:
        return weights[0] * updates[0]
    cosines = [
        np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))
        for x, y in itertools.combinations(updates, 2)
    ]
    cosine = float(np.mean(cosines))
    return count * cosine / ((count - 1) * cosine + 1) * weighted(updates, weights)


def trimmed(x: Array, density: float) -> Array:
    kept = max(int(density * x.size), 1)
    order = np.argsort(-np.abs(x), axis=None)[:kept]
    mask = np.zeros(x.size, dtype=bool)
    mask[order] = True
    return np.where(mask.reshape(x.shape), x, 0)


def crumbs(x: Array, density: float, gamma: float) -> Array:
    kept = int(density * x.size)
    top = min(int(gamma * x.size), x.size - kept)
    order = np.argsort(-np.abs(x), axis=None)[top : top + kept]
    mask = np.zeros(x.size, dtype=bool)
    mask[order] = True
    return np.where(mask.reshape(x.shape), x, 0)


def elected(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    """Entry by entry, in plain Python."""
    result = np.zeros(updates[0].shape)
    strength = sum(abs(w) for w in weights)
    for place in np.ndindex(result.shape):
        terms = [(w * x[place], abs(w)) for w, x in zip(weights, updates, strict=True)]
        total = sum(term for term, _ in terms)
        agreeing = [(term, share) for term, share in terms if term * total > 0]
        if agreeing:
            mean = sum(t for t, _ in agreeing) / sum(s for _, s in agreeing)
            result[place] = strength * mean
    return result


def knots(updates: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    u, s, vt = np.linalg.svd(np.concatenate(updates, axis=1), full_matrices=False)
    kept = s > 1e-7 * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    parts = np.split(s[:, None] * vt, len(updates), axis=1)
    return u @ elected([trimmed(part, density) for part in parts], weights)


def core(
    updates: Sequence[Array], weights: Sequence[float], density: float, rule: Any = None
) -> Array:
    """Ties on cores, or another rule, in bases of balanced factors."""
    lefts, rights = [], []
    for update in updates:
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        kept = s > 1e-7 * s[0]
        lefts.append(u[:, kept] * np.sqrt(s[kept]))
        rights.append(np.sqrt(s[kept])[:, None] * vt[kept])
    left, size, _ = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)
    left = left[:, size > 1e-7 * size[0]]
    _, size, right = np.linalg.svd(np.concatenate(rights, axis=0), full_matrices=False)
    right = right[size > 1e-7 * size[0]]
    cores = [trimmed(left.T @ update @ right.T, density) for update in updates]
    return left @ (rule or elected)(cores, weights) @ right


def tsv(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    us, values, vs = [], [], []
    room = min(updates[0].shape) // len(updates)
    for update, weight in zip(updates, weights, strict=True):
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        kept = (s > 1e-7 * s[0]) & (np.arange(s.size) < room)
        us.append(u[:, kept])
        values.append(weight * s[kept])
        vs.append(vt[kept].T)

    def polar(columns: list[Array]) -> Array:
        p, s, q = np.linalg.svd(np.concatenate(columns, axis=1), full_matrices=False)
        kept = s > 1e-7 * s[0]
        return p[:, kept] @ q[kept]

    return polar(us) * np.concatenate(values) @ polar(vs).T


def iso_c(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    u, s, vt = np.linalg.svd(weighted(updates, weights), full_matrices=False)
    kept = s > 1e-7 * s[0]
    return float(s[kept].mean()) * u[:, kept] @ vt[kept]


def masked(
    updates: Sequence[Array], chances: Sequence[Array]
) -> Iterator[tuple[tuple[bool, ...], list[Array]]]:
    """Yield the rescaled updates under every choice of whole masks: kept or dropped."""
    for kept in itertools.product((True, False), repeat=len(updates)):
        yield (
            kept,
            [
                x / p if keep else np.zeros_like(x)
                for x, p, keep in zip(updates, chances, kept, strict=True)
            ],
        )


def keep_chances(x: Array, density: float, epsilon: float) -> Array:
    """DELLA's probabilities: linear in the rank of the magnitude within its row."""
    ranks = np.argsort(np.argsort(np.abs(x), axis=1), axis=1)
    return density - epsilon + 2 * epsilon * ranks / (x.shape[1] - 1)
