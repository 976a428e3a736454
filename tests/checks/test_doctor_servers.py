"""The doctor asks every server by its own protocol, one address only, and not for ever."""

from __future__ import annotations

import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pretend_servers import answers, ollama, pretending, sglang, vllm

from adapterkit import Condition, examine
from adapterkit.doctor.http import Client
from adapterkit.doctor.prompts import PROMPTS, read_prompts
from adapterkit.doctor.servers import ServedAdapter, chosen, connected
from adapterkit.errors import UncheckableError, UsageError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("answer", "kind", "name"),
    [(vllm, "vllm", "pirate"), (sglang, "sglang", "pirate"), (ollama, "ollama", "pirate:latest")],
)
def test_other_servers_by_their_protocols(answer: Any, kind: str, name: str) -> None:
    with pretending(answer) as url:
        report = examine(url)
    assert (report.server, report.adapter, report.condition) == (kind, name, Condition.ALIVE)
    on, off = answers(1.0), answers(0.0)
    exact = sum(math.exp(p) * (p - off[word]) for word, p in on.items())
    assert report.effect == pytest.approx(exact)


@pytest.mark.parametrize(
    ("answer", "adapter", "said"),
    [
        (vllm, ServedAdapter("gone", base="org/base"), "404: .*`gone` does not exist"),
        (sglang, ServedAdapter("gone", base="base"), "400: .*has never been loaded: gone"),
        (ollama, ServedAdapter("gone", base="x:1"), "404: .*model 'gone' not found"),
        (ollama, ServedAdapter("gone"), "weights that gone stands on have no name"),
    ],
)
def test_what_another_server_refuses_is_told(
    answer: Any, adapter: ServedAdapter, said: str
) -> None:
    with pretending(answer) as url:
        server = connected(Client(url, most=20, seconds=20))
        with pytest.raises(UncheckableError, match=said):
            server.ask("text", adapter, float(bool(adapter.base)))


def test_numbers_that_are_no_logarithms_of_probabilities_are_refused() -> None:
    def logits(path: str, body: dict[str, Any]) -> Any:
        found = vllm(path, body)
        if path == "/v1/completions":
            found["choices"][0]["logprobs"]["top_logprobs"] = [
                {"token_id:1": 21.0, "token_id:2": 7}
            ]
        return found

    with pretending(logits) as url, pytest.raises(UncheckableError, match="tells logits"):
        examine(url)


def test_a_key_is_sent_where_it_is_wanted_and_told_to_nobody() -> None:
    with pretending(vllm, key="s3cret") as url:
        with pytest.raises(UncheckableError, match="asks for an API key; give it with --api-key"):
            examine(url)
        with pytest.raises(UncheckableError, match="does not take this API key") as refused:
            examine(url, api_key="0ther")
        assert "0ther" not in str(refused.value)
        report = examine(url, api_key="s3cret")
    assert report.condition == Condition.ALIVE
    assert "s3cret" not in repr(report) + report.text()


@pytest.mark.parametrize("key", ["", " ", "a\nHost: b", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        examine("http://127.0.0.1:9", api_key=key)


def test_adapters_are_chosen_by_any_of_their_names() -> None:
    with pretending(vllm) as url:
        server = connected(Client(url, most=20, seconds=20))
        assert (
            chosen(server, "/adapters/pirate") == chosen(server, None) == chosen(server, "pirate")
        )


# What is no server.


def test_only_the_one_address_is_asked_and_not_for_ever() -> None:
    asked: list[str] = []

    def elsewhere(path: str, _: Any) -> Any:
        asked.append(path)
        return [] if path == "/lora-adapters" else None

    with pretending(elsewhere) as url:
        with pytest.raises(UncheckableError, match="has no adapter loaded"):
            examine(url)
        client = Client(url, most=2, seconds=20)
        for _ in range(2):
            client.get("/lora-adapters")
        with pytest.raises(UncheckableError, match="2 requests for it ran out"):
            client.get("/lora-adapters")
        with pytest.raises(UncheckableError, match="time for it ran out"):
            Client(url, most=2, seconds=-1).get("/")
    with pytest.raises(UncheckableError, match="nothing answers"):
        examine("http://127.0.0.1:9")
    for wrong in ("file:///etc/passwd", "ftp://host", "http://"):
        with pytest.raises(UsageError, match="no address"):
            examine(wrong)


def test_a_redirect_is_not_followed() -> None:
    class Away(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Away)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UncheckableError, match="is no llama-server"):
        examine(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_a_slow_server_is_no_missing_one() -> None:
    def slow(path: str, _: Any) -> Any:
        time.sleep(3 if path == "/late" else 0)
        return []

    with pretending(slow) as url:
        client = Client(url, most=3, seconds=1)
        client.get("/")
        with pytest.raises(UncheckableError, match=r"/late: no answer within 1 s; see --seconds"):
            client.get("/late")


def test_unknown_servers_and_silent_ones(tmp_path: Path) -> None:
    with (
        pretending(lambda *_: None) as url,
        pytest.raises(UncheckableError, match="is no llama-server, vLLM, SGLang or Ollama"),
    ):
        examine(url)

    def mute(path: str, body: dict[str, Any]) -> Any:
        return {"choices": [{"text": ""}]} if path == "/v1/completions" else vllm(path, body)

    with pretending(mute) as url, pytest.raises(UncheckableError, match="no log-probabilities"):
        examine(url)
    with pytest.raises(UsageError, match="both the adapter and its base"):
        examine("http://127.0.0.1:9", source=tmp_path)
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UsageError, match="holds 0 prompts"):
        read_prompts(tmp_path / "none.txt")
    assert len(PROMPTS) == 10
