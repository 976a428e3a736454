"""llama.cpp's own GGUF parser, for tests to ask."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

# A parser in C may crash, so it gets a process of its own.
LLAMA_CPP = """
import ctypes, glob, json, sys
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]
library = ctypes.CDLL(sys.argv[1])
library.gguf_init_from_file.restype = ctypes.c_void_p
library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
print(json.dumps([
    library.gguf_init_from_file(path.encode(), Params(True, None)) is not None
    for path in sys.argv[2:]
]))
"""


def accepted_by_llama_cpp(*paths: Path) -> list[bool]:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    command = [sys.executable, "-c", LLAMA_CPP, str(library), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def saved(folder: Path, data: bytes) -> Path:
    path = folder / "made.gguf"
    path.write_bytes(data)
    return path
