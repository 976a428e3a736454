"""vLLM, SGLang and Ollama, written by hand after their protocols: none of them runs here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

WORDS = [" the", " a", " one", " some", " any"]


def softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def answers(strength: float) -> dict[str, float]:
    logits = np.arange(5) * (0.3 + strength)
    return dict(zip(WORDS, softmax(logits).tolist(), strict=True))


def vllm(path: str, body: dict[str, Any]) -> Any:
    if path == "/v1/models":
        base = {"id": "org/base", "object": "model", "owned_by": "vllm", "root": "org/base"}
        return {
            "data": [
                {**base, "parent": None},
                {**base, "id": "pirate", "parent": "org/base", "root": "/adapters/pirate"},
            ]
        }
    if path == "/v1/completions":
        assert body["return_tokens_as_token_ids"] is True
        found = answers({"org/base": 0.0, "pirate": 1.0}[body["model"]])
        top = {f"token_id:{WORDS.index(word)}": value for word, value in found.items()}
        return {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}
    return None


def sglang(path: str, body: dict[str, Any]) -> Any:
    if path == "/v1/models":
        base = {"id": "base", "owned_by": "sglang", "root": "base"}
        return {"data": [{**base, "parent": None}, {**base, "id": "pirate", "parent": "base"}]}
    if path == "/v1/completions":
        found = answers({"base": 0.0, "base:pirate": 1.0}[body["model"]])
        return {"choices": [{"text": "", "logprobs": {"top_logprobs": [found]}}]}
    return None


def ollama(path: str, body: dict[str, Any]) -> Any:
    if path == "/api/version":
        return {"version": "0.13.0"}
    if path == "/api/tags":
        return {"models": [{"name": "llama3.2:1b"}, {"name": "pirate:latest"}]}
    if path == "/api/show":
        if body["model"] == "llama3.2:1b":
            return {"modelfile": "FROM /blobs/sha256-1\n", "details": {"parent_model": ""}}
        modelfile = "FROM llama3.2:1b\nADAPTER /blobs/sha256-2\n"
        return {"modelfile": modelfile, "details": {"parent_model": "llama3.2:1b"}}
    if path == "/api/generate":
        assert body["raw"] is True
        assert body["stream"] is False
        found = answers({"llama3.2:1b": 0.0, "pirate:latest": 1.0}[body["model"]])
        top = [{"token": w, "logprob": v, "bytes": list(w.encode())} for w, v in found.items()]
        return {"response": " any", "done": True, "logprobs": [{**top[-1], "top_logprobs": top}]}
    return None


@contextmanager
def pretending(answer: Callable[[str, dict[str, Any]], Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            found = answer(self.path, body)
            data = json.dumps(found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
