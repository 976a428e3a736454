"""Run prompts in llama.cpp, in a process of its own: the engine aborts on files it dislikes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORKER = Path(__file__).parent / "worker.py"
_PATIENCE = 120
_TAIL = 3000


class EngineError(Exception):
    """llama.cpp refused a file or died; the message ends with what it printed last."""


def engine_logprobs(
    gguf: Path,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[tuple[Path, float]] = (),
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return log-probabilities of the token after each prompt, (prompts, vocabulary).

    Args:
        gguf: the base model.
        prompts: token ids.
        adapters: LoRA files and the scale that the user would type.
    """
    return engine_answers(gguf, prompts, adapters)


def engine_answers(
    gguf: Path,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[tuple[Path, float]],
    *,
    embedding: bool = False,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what llama.cpp says to each prompt: log-probabilities, or the pooled embedding."""
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npy"
        job = {
            "model": str(gguf),
            "adapters": [[str(path), scale] for path, scale in adapters],
            "prompts": [list(prompt) for prompt in prompts],
            "answer": str(answer),
            "embedding": embedding,
        }
        done = subprocess.run(
            [sys.executable, str(_WORKER)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE,
        )
        if done.returncode or not answer.is_file():
            tail = (done.stdout + done.stderr)[-_TAIL:]
            raise EngineError(f"llama.cpp ended with {done.returncode}:\n{tail}")
        return np.load(answer)
