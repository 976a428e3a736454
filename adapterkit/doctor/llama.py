"""llama.cpp itself in a process of its own, which says what a base and adapters answer."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UncheckableError
from adapterkit.work import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from multiprocessing.connection import Connection

    from adapterkit.doctor.distributions import Distribution

    Ask = Callable[[str, Mapping[int, float]], Distribution]

# Tokens that are told of each distribution: what servers tell lies among them.
_TOLD = 512
_CONTEXT = 1024
# Of an end of text or half a character no probabilities are told, so a word is made to come; those
# that are told are from before that.
A_WORD = [[" the", 1e9]]
_LONGEST = 500
# Seconds to load a model, and to answer.
_LOADING, _ANSWERING = 600, 120


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

    def answered(seconds: float) -> Any:
        try:
            if ours.poll(seconds):
                answer = ours.recv()
                if not isinstance(answer, str):
                    return answer
                raise UncheckableError(answer, path=base)
        except EOFError:
            pass
        message = "llama.cpp ended without an answer; does it take this base and this adapter?"
        raise UncheckableError(message, path=base)

    def ask(prompt: str, strengths: Mapping[int, float]) -> Distribution:
        ours.send((prompt, [strengths.get(i, 0.0) for i in range(len(adapters))]))
        entries: list[tuple[int, str, float]] = answered(_ANSWERING)
        return {text if by_text else number: value for number, text, value in reversed(entries)}

    try:
        answered(_LOADING)
        yield ask
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(connection: Connection, base: str, adapters: list[str], count: int) -> None:
    """Answer until the other end is closed; runs in the engine's process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # it prints whatever it is told not to
        os.dup2(nowhere, stream)
    try:
        import xllamacpp
    except ImportError:
        connection.send("llama.cpp is not installed; pip install 'adapterkit[llama]'")
        return
    try:
        engine = _engine(xllamacpp, base, adapters, count)
        connection.send([])
        while True:
            connection.send(_answer(engine, *connection.recv()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  (the engine's threads would keep the process)
        connection.send(f"llama.cpp does not answer: {error!r}"[:_LONGEST])


def _answer(engine: Any, prompt: str, strengths: list[float]) -> list[tuple[int, str, float]]:
    question: dict[str, Any] = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": _TOLD,
        "temperature": 0,
        "cache_prompt": False,
        "logit_bias": A_WORD,
        "lora": [{"id": i, "scale": scale} for i, scale in enumerate(strengths)],
    }
    answer = engine.handle_completions(question)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return [(each["id"], each["token"], each["logprob"]) for each in token["top_logprobs"]]


def _engine(library: Any, base: str, adapters: list[str], count: int) -> Any:
    params = library.CommonParams()
    params.model.path = base
    params.lora_adapters = [library.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    params.n_ctx = params.n_batch = _CONTEXT
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = count
        cpu.poll = 0  # threads that wait by spinning stop each other on a busy machine
    return library.Server(params)
