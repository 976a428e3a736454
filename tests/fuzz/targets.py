"""What is fuzzed: for each target sound seeds, how they are changed, and what is called."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from adapterkit import inspect, validate
from adapterkit.auditing.reference_bank import read_bank
from adapterkit.base import open_base
from adapterkit.containers.gguf import read_gguf
from adapterkit.containers.npz import read_npz
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.dialects.loading import load as load_dialect
from adapterkit.merging.recipe import read_recipe
from fuzz.mutations import damaged, document, member

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
TINY, BASE = FIXTURES / "peft" / "tiny", FIXTURES / "peft" / "base"


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        file: name that the changed file gets.
        seeds: contents of sound files.
        change: makes a file of a seed.
        call: reads it, all of it.
        accepts: reads it with the reference, raising whatever it raises; None without one.
        beside: files that stand beside it, by name.
    """

    file: str
    seeds: tuple[Any, ...]
    change: Callable[[Any, Random], bytes]
    call: Callable[[Path], object]
    accepts: Callable[[bytes], object] | None = None
    beside: dict[str, bytes] = field(default_factory=dict[str, bytes])


def contents(*patterns: str) -> tuple[bytes, ...]:
    paths = sorted(path for pattern in patterns for path in FIXTURES.glob(pattern))
    return tuple(path.read_bytes() for path in paths if path.stat().st_size < 1 << 16)


def everything(tensors: Any) -> None:
    for tensor in tensors.values():
        tensor.numpy()


def numpy_reads(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            for name in file.files:
                _ = file[name]


def torch_reads(data: bytes) -> None:
    import torch

    # Where it was saved from is no concern of values.
    torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def safetensors_reads(data: bytes) -> None:
    import safetensors

    safetensors.deserialize(data)


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def adapter(path: Path) -> None:
    inspect(path.parent)
    validate(path.parent, base=BASE, targets=["peft", "llama.cpp"])


def base(path: Path) -> None:
    validate(TINY, base=path, targets=["vllm"])


TARGETS: dict[str, Target] = {
    "safetensors": Target(
        "x.safetensors",
        contents("peft/*/*.safetensors", "tuners/*/*.safetensors"),
        damaged,
        lambda path: everything(read_safetensors(path).tensors),
        safetensors_reads,
    ),
    "gguf": Target(
        "x.gguf",
        contents("validation/*/*.gguf", "hostile/gguf/*.gguf"),
        damaged,
        lambda path: everything(read_gguf(path).tensors),
    ),
    "npz": Target(
        "x.npz",
        contents("handwritten/*.npz", "mlx/*/*.npz"),
        member,
        lambda path: everything(read_npz(path)),
        numpy_reads,
    ),
    "torch": Target(
        "x.pt",
        contents("handwritten/*.pt", "tinylora/*/*.pt", "validation/AK401/*.bin"),
        member,
        lambda path: everything(flatten(read_torch_zip(path).root)),
        torch_reads,
    ),
    "adapter_config": Target(
        "adapter_config.json",
        tuple(loaded(path) for path in sorted(FIXTURES.glob("*/*/adapter_config.json"))),
        document,
        adapter,
        beside={"adapter_model.safetensors": (TINY / "adapter_model.safetensors").read_bytes()},
    ),
    "config": Target(
        "config.json",
        tuple(loaded(path) for path in sorted(FIXTURES.glob("*/*/config.json"))),
        document,
        base,
    ),
    "dialect": Target(
        "x.toml",
        tuple(path.read_bytes() for path in sorted((ROOT / "adapterkit/dialects").glob("*.toml"))),
        damaged,
        lambda path: load_dialect(str(path)),
    ),
    "recipe": Target(
        "x.yaml",
        (
            {
                "adapters": [{"path": "a", "weight": 0.5, "modules": {"q_.*": 0.5}}, "b"],
                "method": "ties",
                "params": {"density": 0.5},
                "rank": 4,
                "tol": 0.1,
                "out": "merged",
            },
        ),
        document,
        read_recipe,
    ),
    "bank": Target(
        "x.json",
        ({"kind": "adapterkit audit bank", "schema": 1, "adapters": []},),
        document,
        read_bank,
    ),
    "gguf base": Target(
        "x.gguf",
        contents("validation/bases/*/*.gguf", "validation/gguf*/*.gguf"),
        damaged,
        open_base,
    ),
}
