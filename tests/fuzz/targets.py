"""What is fuzzed: for each target sound samples, what is called, and who else has a say."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from number_edges import Edge, write_base, write_gguf_base

import adapterkit
from adapterkit import (
    audit,
    convert,
    diff,
    extract,
    inspect,
    merge_files,
    merge_into,
    open_base,
    read,
    validate,
    verify,
)
from adapterkit.auditing.reference_bank import read_bank
from adapterkit.containers.gguf import read_gguf
from adapterkit.containers.npz import read_npz
from adapterkit.containers.onnx_adapter import read_onnx_adapter
from adapterkit.containers.safetensors import read_safetensors
from adapterkit.containers.torch_zip import flatten, read_torch_zip
from adapterkit.errors import AdapterKitError
from adapterkit.formats.handwritten.dialects.loading import load as load_dialect
from adapterkit.merging.into.journal import Journal, Segment, Written, read_journal
from adapterkit.merging.into.report import TensorReport
from adapterkit.merging.recipe import read_recipe
from adapterkit.projection import project_file
from adapterkit.registry import formats
from adapterkit.stamps import stamp
from adapterkit.tinylora import TinySettings
from fuzz import judges, making
from fuzz.making import made, proven, weights
from fuzz.samples import FIXTURES, ROOT, Sample, by_format, found, kept

DIALECTS = ROOT / "adapterkit" / "formats" / "handwritten" / "dialects"
TINY, BASE = FIXTURES / "peft" / "tiny", FIXTURES / "peft" / "base"


_INDEX = b"""{"metadata": {"total_size": 4},
"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        samples: what is changed.
        call: reads what it is given, all of it; returns what the judge looks at.
        judge: raises where a reference refuses the file, or finds other values in it.
        forgiven: words of refusals by the reference that we do not follow; each says why below.
        kept: files of the samples that stay as they are.
    """

    samples: tuple[Sample, ...]
    call: Callable[[Path], Any]
    judge: Callable[[Path, Any], None] | None = None
    forgiven: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()


def arrays(tensors: Any) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def bits(tensors: Any) -> dict[str, Any]:
    """Return values as unsigned numbers: torch has types that numpy has not."""
    return {
        name: np.frombuffer(tensor.tobytes(), f"u{tensor.dtype.block_bytes}").reshape(tensor.shape)
        for name, tensor in tensors.items()
        if tensor.numpy() is not None
    }


def raw(tensors: Any) -> dict[str, Any]:
    for tensor in tensors.values():
        tensor.numpy()
    return dict(tensors)


def adapter(path: Path) -> None:
    """Show, check and read an adapter; what one refuses, the others are still asked."""
    refused: list[AdapterKitError] = []
    asked = (
        lambda: inspect(path),
        lambda: raw(read(path).tensors),
        lambda: raw(read(path, base=BASE).tensors),
        lambda: raw(read(path, base=BASE, alpha=6).tensors),
        lambda: validate(path, base=BASE, targets=["peft", "llama.cpp"]),
        lambda: audit(path),
        lambda: _converted(path),
    )
    for ask in asked:
        try:
            ask()
        except AdapterKitError as error:
            refused.append(error)
    if len(refused) == len(asked):
        raise refused[0]


def _converted(path: Path) -> None:
    """Write the adapter in one format or the other, by chance of its own length."""
    length = sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else 0
    spec = _WRITTEN[(length or path.stat().st_size) % len(_WRITTEN)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        convert(path, out, to=spec.name, base=BASE, allow_lossy=True, unverified=True)


_WRITTEN = [spec for spec in formats() if spec.writes]


def _bank(folder: Path) -> None:
    adapterkit.bank(TINY, FIXTURES / "peft" / "patterns", destination=folder / "x.json")


def _journal(folder: Path) -> None:
    journal = Journal(folder / "journal.jsonl")
    journal.begin("0" * 64)
    report = TensorReport(
        tensor="a.weight",
        modules=("a",),
        stored="BF16",
        dtype="BF16",
        relative_norm=0.5,
        survival=0.99,
    )
    journal.finish("model.safetensors", 0, Segment((report,), (Written(8, 64, 5),)))
    journal.finish("model.safetensors", 1, Segment((), ()))


def _recipe(folder: Path) -> None:
    fields = {
        "adapters": [{"path": "a", "weight": 0.5, "modules": {"q_.*": 0.5}}, "b"],
        "method": "ties",
        "params": {"density": 0.5},
        "rank": 4,
        "tol": 0.1,
        "out": "merged",
    }
    (folder / "x.json").write_text(json.dumps(fields))


def _into(folder: Path, *, gguf: bool) -> None:
    Edge().write(folder / "adapter", 1)
    if gguf:
        write_gguf_base(folder / "base", 32)
    else:
        write_base(folder / "base", 32)


def into(path: Path) -> None:
    out = path / "out.gguf" if (path / "base").is_file() else path / "out"
    merge_into([path / "adapter"], path / "base", out, force=True)


def _two(folder: Path) -> None:
    for place in (1, 2):
        Edge().write(folder / f"a{place}", place)
    write_base(folder / "base", 32)
    write_base(folder / "tuned", 32, add=Edge().deltas(1))


def merged(path: Path) -> None:
    """Merge two adapters by one method or the other, and hold one against the other."""
    adapters = [path / "a1", path / "a2"]
    size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    method = _METHODS[size % len(_METHODS)]
    with tempfile.TemporaryDirectory() as folder:
        merge_files(adapters, Path(folder, "out"), method=method)
    diff(*adapters)


def extracted(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        extract(path / "base", path / "tuned", Path(folder, "out"), rank=2)


def projected(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = TinySettings(projection_dim=4, target_modules=("o_proj", "down_proj"))
        project_file(path / "a1", Path(folder, "out"), base=path / "base", settings=settings)


def _packed(folder: Path) -> None:
    _two(folder)
    settings = TinySettings(projection_dim=4, target_modules=("o_proj", "down_proj"))
    project_file(folder / "a1", folder / "pack", base=folder / "base", settings=settings)


def packed(path: Path) -> None:
    """Read a pack of TinyLoRA on the base whose singular vectors it needs, and write it as LoRA."""
    raw(read(path / "pack", base=path / "base").tensors)
    with tempfile.TemporaryDirectory() as folder:
        convert(path / "pack", Path(folder, "out"), to="peft", base=path / "base")


def proof(path: Path) -> None:
    """Put the proof into the adapter beside it, and hold the two against each other."""
    written = next(each for each in path.iterdir() if each.suffix == ".gguf" or each.is_dir())
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, written.name)
        (shutil.copytree if written.is_dir() else shutil.copy)(written, copy)
        text = (path / "proof.json").read_text(encoding="utf-8", errors="surrogateescape")
        try:
            stamp(copy, text)
        except UnicodeEncodeError:
            text = text.encode(errors="replace").decode()
            stamp(copy, text)
        verify(copy, against=TINY, base=BASE)


def megatron(path: Path) -> None:
    for base in (None, path / "base"):
        with suppress(AdapterKitError):
            raw(read(path / "adapter.pt", alpha=2, base=base, dialect="megatron").tensors)
    adapter(path / "adapter.pt")


def diffusion(path: Path) -> None:
    """Open a diffusion model, and merge into it what was trained on it."""
    base = path / "base"
    base = base if base.is_dir() else path / "base.safetensors"
    open_base(base)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, f"out{base.suffix}")
        merge_into([path / "adapter.safetensors"], base, out, force=True)


_METHODS = [spec.name for spec in adapterkit.merge_methods()]


def _below_its_config() -> Sample:
    """Return weights in a checkpoint whose adapter lies in the folder above it."""
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    read = {name: (TINY / name).read_bytes() for name in (config, weights)}
    return Sample({config: read[config], f"global_step5/{weights}": read[weights]}, "global_step5")


_MADE = {
    "peft-weights": (
        _below_its_config(),
        weights("adapter_model.safetensors"),
        weights("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
    ),
}


def _bases() -> tuple[Sample, ...]:
    return found("*/*/config.json", "validation/bases/*/config.json")


TARGETS: dict[str, Target] = {
    "safetensors": Target(
        found("peft/*/*.safetensors", "tuners/*/*.safetensors"),
        lambda path: arrays(read_safetensors(path).tensors),
        judges.safetensors,
    ),
    "gguf": Target(
        found("validation/*/*.gguf", "hostile/gguf/*.gguf"),
        lambda path: raw(read_gguf(path).tensors),
        judges.gguf,
    ),
    "npz": Target(
        found("handwritten/*.npz", "mlx/*/*.npz"),
        lambda path: arrays(read_npz(path)),
        judges.numpy,
    ),
    "torch": Target(
        found("handwritten/*.pt", "tinylora/*/*.pt", "validation/AK401/*.bin"),
        lambda path: bits(flatten(read_torch_zip(path).root)),
        judges.torch,
        # torch.load with weights_only reads protocol 2 alone, and torch.save writes up to 5: what
        # it calls an unsupported operand is an opcode of those. Versions of numpy's pickles are not
        # looked at: what is no tensor is left out of the adapter, and named.
        forgiven=("Unsupported operand", "of numpy.dtype pickle"),
    ),
    "onnx adapter": Target(
        found("onnx/*.onnx_adapter"),
        lambda path: arrays(read_onnx_adapter(path).tensors),
        judges.onnxruntime,
        # numpy has no bfloat16 of its own, which the file may hold.
        forgiven=("No corresponding Numpy type",),
    ),
    **{
        f"format {spec.name}": Target(
            (*by_format().get(spec.name, ()), *_MADE.get(spec.name, ())), adapter
        )
        for spec in formats()
        if spec.reads
    },
    "config": Target(_bases(), lambda path: validate(TINY, base=path, targets=["vllm"])),
    "gguf base": Target(
        found("validation/bases/*/*.gguf", "validation/gguf*/*.gguf"),
        lambda path: validate(TINY, base=path, targets=["llama.cpp"]),
    ),
    "merge into": Target(
        (made(lambda x: _into(x, gguf=False)), made(lambda x: _into(x, gguf=True))), into
    ),
    "merge": Target((made(_two),), merged),
    "extract": Target((made(_two),), extracted),
    "project": Target((made(_two),), projected),
    "pack": Target((made(_packed),), packed),
    "proof": Target((proven("x.gguf"), proven("peft"), proven("mlx")), proof),
    "megatron": Target((made(making.megatron),), megatron),
    "diffusion base": Target((made(making.pipeline), made(making.checkpoint)), diffusion),
    "index": Target(
        (
            Sample(
                {
                    "config.json": (BASE / "config.json").read_bytes(),
                    "model.safetensors.index.json": _INDEX,
                }
            ),
        ),
        open_base,
    ),
    "dialect": Target(
        tuple(
            map(
                Sample.of,
                sorted(
                    (ROOT / "adapterkit" / "formats" / "handwritten" / "dialects").glob("*.toml")
                ),
            )
        ),
        lambda path: load_dialect(str(path)),
    ),
    "recipe": Target((made(_recipe, "x.json"),), read_recipe),
    "bank": Target((made(_bank, "x.json"),), read_bank),
    "journal": Target((made(_journal, "journal.jsonl"),), read_journal),
}


def sample_of(name: str, choose: Any) -> Sample:
    """Return a sample to change: a sound one, or one that once failed."""
    return choose((*TARGETS[name].samples, *kept(name).values()))
