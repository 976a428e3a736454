"""llama.cpp itself, as xllamacpp's extension exports its C interface: logits of every position.

Structures whose fields may change from one release to the next are taken as the library fills them,
in more memory than they need; the first four numbers of a context's are its sizes.
"""

from __future__ import annotations

import ctypes as c
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xllamacpp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CONTEXT = 1024
_YES = c.c_bool(True)  # noqa: FBT003  (C has no names for arguments)


class _Opaque(c.Structure):
    _fields_ = (("bytes", c.c_uint64 * 64),)


class _Sizes(c.Structure):
    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("rest", c.c_uint64 * 64),
    )


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


def _library() -> Any:
    library = c.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    pointer = c.c_void_p
    for name, result, arguments in (
        ("model_default_params", _Opaque, []),
        ("context_default_params", _Sizes, []),
        ("model_load_from_file", pointer, [c.c_char_p, _Opaque]),
        ("init_from_model", pointer, [pointer, _Sizes]),
        ("adapter_lora_init", pointer, [pointer, c.c_char_p]),
        (
            "set_adapters_lora",
            c.c_int32,
            [pointer, c.POINTER(pointer), c.c_size_t, c.POINTER(c.c_float)],
        ),
        ("set_n_threads", None, [pointer, c.c_int32, c.c_int32]),
        ("model_get_vocab", pointer, [pointer]),
        ("vocab_n_tokens", c.c_int32, [pointer]),
        (
            "tokenize",
            c.c_int32,
            [pointer, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
        ),
        ("batch_init", _Batch, [c.c_int32, c.c_int32, c.c_int32]),
        ("decode", c.c_int32, [pointer, _Batch]),
        ("get_logits", c.POINTER(c.c_float), [pointer]),
        ("get_memory", pointer, [pointer]),
        ("memory_clear", None, [pointer, c.c_bool]),
        ("log_set", None, [pointer, pointer]),
        ("model_free", None, [pointer]),
        ("free", None, [pointer]),
    ):
        function = getattr(library, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    return library


_SILENT = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)


def _check(done: bool, what: object) -> None:
    if not done:
        sys.exit(f"llama.cpp does not take {what}")


class Engine:
    """A model in llama.cpp, with or without a LoRA."""

    def __init__(self, path: Path, lora: Path | None = None) -> None:
        """Load a GGUF file, and a GGUF adapter at strength 1."""
        self._llama = _library()
        self._llama.llama_log_set(c.cast(_SILENT, c.c_void_p), None)
        self._model = self._llama.llama_model_load_from_file(
            str(path).encode(), self._llama.llama_model_default_params()
        )
        _check(bool(self._model), path)
        sizes = self._llama.llama_context_default_params()
        sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = _CONTEXT
        self._context = self._llama.llama_init_from_model(self._model, sizes)
        # One thread adds in one order, and waits for no other on a busy machine.
        self._llama.llama_set_n_threads(self._context, 1, 1)
        if lora is not None:
            adapter = self._llama.llama_adapter_lora_init(self._model, str(lora).encode())
            _check(bool(adapter), lora)
            adapters, scales = (c.c_void_p * 1)(adapter), (c.c_float * 1)(1.0)
            failed = self._llama.llama_set_adapters_lora(self._context, adapters, 1, scales)
            _check(not failed, lora)
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Give the memory back."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, special ones read as such and the first one added."""
        data = text.encode()
        room = (c.c_int32 * (len(data) + 8))()
        count = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), room, len(room), _YES, _YES
        )
        return list(room[:count])

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return log-probabilities of the next token at every position, (tokens, vocabulary)."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), _YES)
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.logits[place] = 1, 1
            batch.seq_id[place][0] = 0
        _check(not self._llama.llama_decode(self._context, batch), "a text")
        count = self._llama.llama_vocab_n_tokens(self._vocabulary)
        values = np.ctypeslib.as_array(
            self._llama.llama_get_logits(self._context), (len(tokens), count)
        ).astype(np.float64)
        values -= values.max(1, keepdims=True)
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    def answers(self, texts: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Yield what `logprobs` returns of each text."""
        return map(self.logprobs, texts)
