"""A llama-server on loopback: the server code of llama.cpp in xllamacpp, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def served(
    base: Path, adapters: Sequence[tuple[Path, float]] = (), **settings: Any
) -> Iterator[str]:
    """Yield the address of a server.

    Args:
        base: GGUF file.
        adapters: GGUF files and the scales that the server is started with.
        settings: attributes of xllamacpp's CommonParams.
    """
    job = {
        "base": str(base),
        "adapters": [[str(path), scale] for path, scale in adapters],
        "settings": settings,
    }
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("LISTENING "):
                yield line.split()[1]
                return
        raise AssertionError("the server did not start")
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    import xllamacpp

    job = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in job["adapters"]
    ]
    params.n_ctx = 1024
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.port = 0
    params.endpoint_props = True
    threads = job["settings"].pop("threads", 1)
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
        cpu.poll = 0
    for name, value in job["settings"].items():
        kind = {"flash_attn_type": "llama_flash_attn_type", "cache_type_k": "ggml_type"}.get(name)
        setattr(params, name, getattr(getattr(xllamacpp, kind), value) if kind else value)
    server = xllamacpp.Server(params)
    sys.stdout.write(f"LISTENING {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()  # until the other end is gone
    os._exit(0)


if __name__ == "__main__":
    main()
