"""llama.cpp itself on loopback, in a process of its own: what a base and adapters answer."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterkit.doctor.http import Client
from adapterkit.doctor.servers import llama_server
from adapterkit.errors import UncheckableError
from adapterkit.work import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from adapterkit.doctor.distributions import Distribution

    Ask = Callable[[str, Mapping[int, float]], Distribution]

# Tokens that are told of each distribution: what servers tell lies among them.
_TOLD = 512
_CONTEXT = 1024
# Seconds to load a model, and for all answers; and how many of those there may be.
_LOADING, _ANSWERING, _MOST = 600, 3600, 100_000
_LONGEST = 500


@contextmanager
def llama_cpp(base: Path, adapters: Sequence[Path], *, by_text: bool) -> Generator[Ask]:
    """Yield a function of a prompt and the strength of each adapter, by its place.

    The engine ends its process on files that it dislikes; that must not be this one.

    Args:
        base: GGUF file of a model.
        adapters: GGUF files of adapters.
        by_text: whether tokens are told by their text, not by their number.

    Raises:
        UncheckableError: if the engine is not installed, or does not take the files.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    job = str(base), [str(path) for path in adapters], max(threads() // 2, 1)
    process = context.Process(target=_serve, args=(theirs, *job), daemon=True)
    process.start()
    theirs.close()
    try:
        client = Client(_address(ours, base), most=_MOST, seconds=_ANSWERING)
        server = llama_server(client, range(len(adapters)), told=_TOLD, by_text=by_text)
        yield lambda prompt, strengths: server.completion(
            prompt, [{"id": i, "scale": strengths.get(i, 0.0)} for i in server.ids]
        )
    finally:
        process.kill()
        process.join()
        ours.close()


def _address(ours: Any, base: Path) -> str:
    try:
        address, problem = ours.recv() if ours.poll(_LOADING) else ("", "is not ready in time")
    except EOFError:
        address, problem = "", "ended; does it take this base and this adapter?"
    if problem:
        raise UncheckableError(f"llama.cpp {problem}", path=base)
    return str(address)


def _serve(connection: Connection, base: str, adapters: list[str], count: int) -> None:
    """Serve until the other end is closed; runs in the engine's process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # it prints whatever it is told not to
        os.dup2(nowhere, stream)
    try:
        server = _engine(import_module("xllamacpp"), base, adapters, count)
        connection.send((server.listening_address, ""))
    except ImportError:
        connection.send(("", "is not installed; pip install 'adapterkit[llama]'"))
    except Exception as error:  # noqa: BLE001  (whatever it is, the other end must hear of it)
        connection.send(("", f"does not start: {error!r}"[:_LONGEST]))
    connection.poll(None)


def _engine(library: Any, base: str, adapters: list[str], count: int) -> Any:
    params = library.CommonParams()
    params.model.path = base
    params.lora_adapters = [library.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    params.n_ctx = params.n_batch = _CONTEXT
    params.n_parallel = 1
    params.port = 0
    params.warmup = False
    params.verbosity = 0
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = count
        cpu.poll = 0  # threads that wait by spinning stop each other on a busy machine
    return library.Server(params)
