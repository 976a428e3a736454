"""Small files that ask for much get a named refusal, in little memory and little time."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from terminal import ROOT

from fixtures.generators import torch_zip

pytestmark = pytest.mark.slow

CHILD = """
import resource, sys, time
from pathlib import Path
from adapterkit.errors import AdapterKitError
from adapterkit.base import open_base
from adapterkit.files import read
import adapterkit.summary, numpy, safetensors
path, action = Path(sys.argv[1]), sys.argv[2]
call = {"inspect": adapterkit.summary.inspect, "read": read, "base": open_base}[action]
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
def peak():
    # Not ru_maxrss, which a process inherits.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
before = peak()
begin = time.process_time()
try:
    call(path)
    found = "read"
except AdapterKitError as error:
    found = error.message
print(time.process_time() - begin)
print(peak() - before)
print(found)
"""
MEGABYTE = 1 << 20
CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]})
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 64,
}


@dataclass(frozen=True)
class Flood:
    """A file, what is called with it, and what must be said."""

    make: Callable[[Path], None]
    action: str
    message: str


def adapter(weights: bytes, name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(CONFIG)
        (folder / name).write_bytes(weights)

    return make


def headed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def lists(folder: Path) -> None:
    adapter(headed(b"{}"))(folder)
    (folder / "adapter_config.json").write_bytes(b'{"r": [' + b"[]," * 8_000_000 + b"[]]}")


def metadata() -> bytes:
    keys = b",".join(b'"%07d":""' % place for place in range(1_000_000))
    return headed(b'{"__metadata__":{' + keys + b"}}")


def empty_tensors() -> bytes:
    each = b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return headed(b"{" + b",".join(each % place for place in range(400_000)) + b"}")


def many_shards(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    shards = {f"model.layers.{place}": f"{place}.safetensors" for place in range(400_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def long_array(folder: Path) -> None:
    def word(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    length = 24_000_000
    architecture = word("general.architecture") + struct.pack("<I", 8) + word("llama")
    counts = word("llama.attention.head_count") + struct.pack("<IIQ", 9, 0, length)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + architecture + counts
    tensor = word("token_embd.weight") + struct.pack("<IQIQ", 1, 1, 0, 0)
    data = head + b"\1" * length + tensor
    (folder / "base.gguf").write_bytes(data + bytes(-len(data) % 32 + 32))


def one_factor(folder: Path) -> None:
    """A factor of 256 MiB, of which the disk holds nothing."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    count = 1 << 26
    header = json.dumps(
        {
            name.format("A"): {"dtype": "F32", "shape": [1, count], "data_offsets": [0, 4 * count]},
            name.format("B"): {
                "dtype": "F32",
                "shape": [1, 1],
                "data_offsets": [4 * count, 4 * count + 4],
            },
        }
    ).encode()
    adapter(headed(header))(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(8 + len(header) + 4 * count + 4)


def pickled(stream: bytes) -> Callable[[Path], None]:
    return adapter(torch_zip.archive(b"\x80\x04" + stream), "adapter_model.bin")


FLOODS = {
    "lists": Flood(lists, "inspect", "values, the most is 500000"),
    "metadata": Flood(adapter(metadata()), "inspect", "more than 100000 keys of metadata"),
    "empty tensors": Flood(adapter(empty_tensors()), "inspect", "values, the most is 2000000"),
    "sets": Flood(pickled(b"(" + b"\x8f" * 3_900_000 + b"t."), "inspect", "more than 100000 dicts"),
    "dicts": Flood(pickled(b"(" + b"}K\x01Ns" * 800_000 + b"t."), "inspect", "more than 100000 d"),
    "tuples": Flood(pickled(b"(" + b"N\x85" * 900_000 + b"t."), "inspect", "more than 200000"),
    "memo": Flood(pickled(b"N" + b"\x94" * 4_000_000 + b"."), "inspect", "more than 2000000 op"),
    "shards": Flood(many_shards, "base", "names 400000 files, the most is 9999"),
    "array": Flood(long_array, "base", "has 24000000 elements, the most is 65536"),
    "factor": Flood(one_factor, "inspect", "read"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("name", FLOODS)
def test_memory_is_a_small_multiple_of_the_file(name: str, tmp_path: Path) -> None:
    flood = FLOODS[name]
    flood.make(tmp_path)
    largest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    path = largest if largest.suffix == ".gguf" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), flood.action],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seconds, peak, message = done.stdout.split("\n", 2)
    assert flood.message in message
    # A file that is only read in pieces costs a few of them.
    wanted = 0 if flood.message == "read" else 8 * largest.stat().st_size
    assert int(peak) < wanted + 160 * MEGABYTE
    # Processor time, with room for machines that are slower than this one.
    assert float(seconds) < 20
