"""5,000 adapters with planted copies and merges: what `fleet similar` finds, and what it costs.

    python benchmarks/fleet.py [COUNT]

Each is 1 M parameters: 32 layers, q and v, rank 8, 1024 x 1024, with a decaying spectrum; every
tenth has the same first A and part of B as the others of its family. They are made when they are
read, by two processes, so that no disk is measured.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from adapterkit import AdapterTensorSet, Update
from adapterkit.dtype import DType
from adapterkit.fingerprints import fingerprinted
from adapterkit.fleets import relations
from adapterkit.fleets.similarity import first_of_each
from adapterkit.lowrank.products import stored

LAYERS, WIDTH, RANK = 32, 1024, 8
NAMES = [f"model.layers.{i}.self_attn.{m}" for i in range(LAYERS) for m in ("q_proj", "v_proj")]
KINDS = ("gauge", "rescaled", "bf16", "f16 negated", "1 % noise", "5 % noise")
MERGES = ("merge of 2", "merge of 3", "merge of 4", "merge of 2, cut to rank 8")
PLANTED = (*KINDS, *MERGES)
DECAY = np.exp(-np.arange(RANK) / 3).astype(np.float32)

Factors = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Made:
    kind: str
    parents: tuple[int, ...]
    factors: Factors
    scale: float = 1.0


def independent(number: int) -> Factors:
    random = np.random.Generator(np.random.SFC64(number))
    family = np.random.Generator(np.random.SFC64(10**9)) if number % 10 == 0 else None
    made: Factors = []
    for _ in NAMES:
        b = random.standard_normal((WIDTH, RANK), dtype=np.float32)
        a = random.standard_normal((RANK, WIDTH), dtype=np.float32)
        if family is not None:
            a = 0.3 * a + family.standard_normal((RANK, WIDTH), dtype=np.float32)
            b = 0.8 * b + 0.6 * family.standard_normal((WIDTH, RANK), dtype=np.float32)
        made.append((b * DECAY, a))
    return made


def make(number: int, first_planted: int) -> Made:
    if number < first_planted:
        return Made("independent", (), independent(number))
    random = np.random.Generator(np.random.SFC64(10**8 + number))
    kind = PLANTED[(number - first_planted) % len(PLANTED)]
    count = int(kind.split()[2].strip(",")) if kind in MERGES else 1
    parents = tuple(int(p) for p in random.choice(first_planted, count, replace=False))
    sources = [independent(parent) for parent in parents]
    if kind in MERGES:
        weights = [0.5, 0.3, 0.25, 0.2][:count]
        merged = [
            (
                np.hstack([w * b for w, (b, _) in zip(weights, each, strict=True)]),
                np.vstack([a for _, a in each]),
            )
            for each in zip(*sources, strict=True)
        ]
        return Made(kind, parents, [cut(*each) for each in merged] if "cut" in kind else merged)
    return Made(kind, parents, *changed(kind, sources[0], random))


def changed(kind: str, source: Factors, random: np.random.Generator) -> tuple[Factors, float]:
    if kind == "gauge":
        mixes = [random.standard_normal((RANK, RANK)) + 3 * np.eye(RANK) for _ in source]
        return [
            ((b @ np.linalg.inv(g)).astype(np.float32), (g @ a).astype(np.float32))
            for (b, a), g in zip(source, mixes, strict=True)
        ], 1.0
    if kind == "rescaled":
        return source, 0.37
    if kind in {"bf16", "f16 negated"}:
        dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
        rounded = [tuple(x.astype(dtype).astype(np.float32) for x in pair) for pair in source]
        return rounded, 1.0 if kind == "bf16" else -1.0  # type: ignore[return-value]
    share = float(kind.split(maxsplit=1)[0]) / 100
    return [
        (b + share * b.std(0) * random.standard_normal(b.shape, dtype=np.float32), a)
        for b, a in source
    ], 1.0


def cut(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (q, r), (p, s) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(r @ s.T)
    return q @ (u[:, :RANK] * values[:RANK]), vt[:RANK] @ p.T


def sketched(numbers: range, first_planted: int) -> tuple[list[tuple], float, int]:
    found: list[tuple] = []
    seconds = 0.0
    for number in numbers:
        made = make(number, first_planted)
        updates = [
            Update(name, stored(a, DType.F32), stored(b, DType.F32), made.scale)
            for name, (b, a) in zip(NAMES, made.factors, strict=True)
        ]
        adapter = AdapterTensorSet.of(updates, {})
        began = time.thread_time()
        print_ = fingerprinted(adapter)
        seconds += time.thread_time() - began
        found.append((number, made.kind, made.parents, print_.norm, print_.sketch))
    return found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(total: int) -> None:
    first = total * 9 // 10
    began = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        chunks = [range(i, min(i + 25, total)) for i in range(0, total, 25)]
        parts = list(pool.map(sketched, chunks, [first] * len(chunks)))
    rows = sorted(row for part, _, _ in parts for row in part)
    seconds = sum(each for _, each, _ in parts)
    print(f"made and sketched {total} in {time.perf_counter() - began:.0f} s, two processes")
    print(f"sketching alone {1000 * seconds / total:.1f} ms of processor each, "
          f"{max(peak for *_, peak in parts) // 1024} MiB a process")  # fmt: skip
    vectors = np.stack([np.frombuffer(row[4], "<f4") for row in rows]).astype(np.float64)
    began = time.perf_counter()
    twins = list(relations.twins(vectors))
    middle = time.perf_counter()
    leaders = first_of_each(total, twins)
    sums = relations.sums(vectors, sorted(set(leaders)))
    print(f"copies {middle - began:.1f} s, merges {time.perf_counter() - middle:.1f} s")
    judge(rows, twins, leaders, sums)


def judge(rows: list[tuple], twins: list, leaders: list[int], sums: list) -> None:
    truth = {n: (parents[0] if kind in KINDS else n) for n, kind, parents, *_ in rows}
    found: Counter[str] = Counter()
    distances: dict[str, list[float]] = {}
    for number, kind, parents, *_ in rows:
        if kind in KINDS and leaders[number] == leaders[parents[0]]:
            found[kind] += 1
    for twin in twins:
        distances.setdefault(rows[twin.index][1], []).append(twin.distance)
    wrong = sum(truth[twin.index] != truth[twin.of] for twin in twins)
    merged = {each.index: each for each in sums}
    for number, kind, parents, *_ in rows:
        told = merged.get(leaders[number])
        if kind in MERGES and told and set(told.parents) == {leaders[p] for p in parents}:
            found[kind] += 1
            distances.setdefault(kind, []).append(told.residual)
    wrong_sums = sum(rows[each.index][1] not in MERGES for each in sums)
    planted = Counter(kind for _, kind, *_ in rows)
    for kind in PLANTED:
        seen = distances.get(kind, [float("nan")])
        print(f"{kind:28} {found[kind]} of {planted[kind]}, {min(seen):.2g} to {max(seen):.2g}")
    print(f"false alarms: {wrong} copies, {wrong_sums} merges")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
