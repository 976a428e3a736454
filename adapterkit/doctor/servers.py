"""The servers that can be asked, each by its own protocol; nothing of a server is ever changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, cast

from adapterkit.doctor.http import Client
from adapterkit.errors import UncheckableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.doctor.distributions import Distribution
    from adapterkit.doctor.prompts import Prompt

# Tokens that are told of each distribution; the OpenAI servers give at most 20 unless configured.
_MANY, _FEW = 64, 20
_SURELY = 1e9
# The sum of probabilities, and what half precision may make of it.
_CERTAIN = 1.1
_TOKEN_ID = "token_id:"  # noqa: S105  (a prefix of vLLM)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as a server knows it.

    Attributes:
        name: what requests call it.
        path: where the server read it, if it tells.
        scale: what the server multiplies it by where a request does not say; None without.
        base: what the same server calls the model without it.
    """

    name: str
    path: str = ""
    scale: float | None = None
    base: str = ""


class Server(Protocol):
    """One kind of server."""

    @property
    def kind(self) -> str:
        """What it is."""
        ...

    @property
    def client(self) -> Client:
        """Its address."""
        ...

    def adapters(self) -> list[ServedAdapter]:
        """Return the adapters that it serves."""
        ...

    def prompt(self, prompt: Prompt) -> str:
        """Return a prompt as it is sent: a question in the shape of the model's chat, if known."""
        ...

    def ask(self, prompt: str, adapter: ServedAdapter, scale: float) -> Distribution:
        """Return the distribution of the next token, with the adapter at a scale or without."""
        ...


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama-server of llama.cpp.

    Scales are sent with each request: the server's own would change for everybody, and its prompt
    cache survives that, so that the old answer comes again. Nor is a cached prompt ever used. An
    empty `lora` means that the server's own scales apply, so every id is named.

    Attributes:
        client: its address.
        ids: of all its adapters.
        word: number of a token that is made to come: of an end of text or half a character no
            probabilities are told. Those that are told are from before that.
        told: how many tokens are told of a distribution.
        by_text: whether tokens are told by their text, not by their number.
        kind: what it is.
    """

    client: Client
    ids: tuple[int, ...]
    word: int | None = None
    told: int = _MANY
    by_text: bool = False
    kind: str = "llama-server"

    def adapters(self) -> list[ServedAdapter]:
        """Return the adapters in the order of their ids."""
        return _llama_adapters(self.client.get("/lora-adapters"))

    def prompt(self, prompt: Prompt) -> str:
        """Apply the model's own template."""
        if not prompt.question:
            return prompt.text
        messages = [{"role": "user", "content": prompt.text}]
        shaped = self.client.post("/apply-template", {"messages": messages}, optional=True)
        text = shaped.get("prompt") if isinstance(shaped, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return str(text) if text else _plainly(prompt)  # pyright: ignore[reportUnknownArgumentType]

    def ask(self, prompt: str, adapter: ServedAdapter, scale: float) -> Distribution:
        """Ask with the adapter alone, at a scale."""
        wanted = int(adapter.name)
        return self.completion(
            prompt, [{"id": i, "scale": scale if i == wanted else 0.0} for i in self.ids]
        )

    def completion(
        self, prompt: str, lora: list[dict[str, Any]] | None, *, cached: bool = False
    ) -> Distribution:
        """Ask with these scales; None leaves them to the server, as most requests do."""
        question: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": self.told,
            "temperature": 0,
            "cache_prompt": cached,
            **({"logit_bias": [[self.word, _SURELY]]} if self.word is not None else {}),
            **({"lora": lora} if lora is not None else {}),
        }
        answer = self.client.post("/completion", question)
        told = _at(answer, "completion_probabilities", 0, "top_logprobs")
        key = "token" if self.by_text else "id"
        # Of tokens with one text the likeliest counts.
        return _distribution(((e[key], e["logprob"]) for e in reversed(told or ())), self.client)


def llama_server(
    client: Client, ids: Iterable[int], *, told: int = _MANY, by_text: bool = False
) -> LlamaServer:
    """Return a llama-server whose adapters are known."""
    tokens = _at(client.post("/tokenize", {"content": "a"}, optional=True), "tokens", -1)
    word = tokens if isinstance(tokens, int) else None
    return LlamaServer(client, tuple(ids), word, told, by_text)


@dataclass(frozen=True, slots=True)
class OpenAIServer:
    """vLLM, or another server of OpenAI's protocol: an adapter is a model beside its base."""

    client: Client
    kind: str

    def adapters(self) -> list[ServedAdapter]:
        """Return the models that have another as their parent.

        vLLM lists its base once under each name that it is served by, none of them with a parent.
        """
        models = _objects(self.client.get("/v1/models"), "data")
        if self.kind == "vllm":
            return _with_parents(models)
        first = str(models[0]["id"]) if models else ""
        return [
            ServedAdapter(str(each["id"]), str(each.get("root") or ""), base=first)
            for each in models[1:]
        ]

    def prompt(self, prompt: Prompt) -> str:
        """Return the text; these servers apply templates to conversations alone."""
        return _plainly(prompt)

    def ask(self, prompt: str, adapter: ServedAdapter, scale: float) -> Distribution:
        """Ask the adapter's model, or its base's for a scale of 0."""
        question: dict[str, Any] = {
            "model": adapter.name if scale else adapter.base,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": _FEW,
        }
        if self.kind == "vllm":
            question["return_tokens_as_token_ids"] = True
        answer = self.client.post("/v1/completions", question)
        told: Mapping[str, float] = _at(answer, "choices", 0, "logprobs", "top_logprobs", 0) or {}
        pairs = ((_numbered(token), value) for token, value in told.items())
        return _distribution(pairs, self.client)


@dataclass(frozen=True, slots=True)
class SGLang:
    """SGLang by its own route, which tells tokens by their numbers; OpenAI's tells their texts."""

    client: Client
    kind: str = "sglang"

    def adapters(self) -> list[ServedAdapter]:
        """Return the models that have another as their parent."""
        return _with_parents(_objects(self.client.get("/v1/models"), "data"))

    def prompt(self, prompt: Prompt) -> str:
        """Return the text; this route applies no template."""
        return _plainly(prompt)

    def ask(self, prompt: str, adapter: ServedAdapter, scale: float) -> Distribution:
        """Ask with the adapter, or with none for a scale of 0."""
        question = {
            "text": prompt,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "top_logprobs_num": _MANY,
            "lora_path": adapter.name if scale else None,
        }
        answer = self.client.post("/generate", question)
        told = _at(answer, "meta_info", "output_top_logprobs", 0)
        return _distribution(((token, value) for value, token, _ in told or ()), self.client)


@dataclass(frozen=True, slots=True)
class Ollama:
    """Ollama: an adapter is part of a model that was made from another."""

    client: Client
    kind: str = "ollama"

    def adapters(self) -> list[ServedAdapter]:
        """Return the models whose modelfile names an adapter, and who has the weights alone."""
        bases: dict[str, str] = {}
        found: list[tuple[str, str, str]] = []
        for each in _objects(self.client.get("/api/tags"), "models"):
            name = str(each["name"])
            shown: Any = self.client.post("/api/show", {"model": name}, optional=True)
            lines = str(_at(shown, "modelfile") or "").splitlines()
            adapter, weights = _after("ADAPTER", lines), _after("FROM", lines)
            if adapter:
                found.append((name, adapter, weights))
            else:
                bases.setdefault(weights, name)
        return [
            ServedAdapter(name, path, None, bases.get(weights, "")) for name, path, weights in found
        ]

    def prompt(self, prompt: Prompt) -> str:
        """Return the text; it is sent without the model's template."""
        return _plainly(prompt)

    def ask(self, prompt: str, adapter: ServedAdapter, scale: float) -> Distribution:
        """Ask the model, or the one that it was made from for a scale of 0."""
        if not adapter.base:
            message = (
                f"the weights that {adapter.name} stands on have no name of their own to be asked "
                "by; `ollama create` one from its FROM line without the ADAPTER"
            )
            raise UncheckableError(message, path=self.client.url)
        question = {
            "model": adapter.name if scale else adapter.base,
            "prompt": prompt,
            "raw": True,
            "stream": False,
            "logprobs": True,
            "top_logprobs": _FEW,
            "options": {"num_predict": 1, "temperature": 0},
        }
        told = _at(self.client.post("/api/generate", question), "logprobs", 0, "top_logprobs")
        return _distribution(((each["token"], each["logprob"]) for each in told or ()), self.client)


def connected(client: Client) -> Server:
    """Tell what kind of server answers.

    Raises:
        UncheckableError: if nothing answers, or it is none that is known.
    """
    adapters = client.get("/lora-adapters")
    if isinstance(adapters, list):
        known = _llama_adapters(cast("Any", adapters))
        return llama_server(client, (int(each.name) for each in known))
    if _at(client.get("/api/version"), "version"):
        return Ollama(client)
    if models := _objects(client.get("/v1/models"), "data"):
        owners = {str(each.get("owned_by")) for each in models}
        if "sglang" in owners:
            return SGLang(client)
        return OpenAIServer(client, "vllm" if "vllm" in owners else "openai")
    message = "is no llama-server, vLLM, SGLang or Ollama: it answers none of their paths"
    raise UncheckableError(message, path=client.url)


def chosen(server: Server, name: str | None) -> ServedAdapter:
    """Return the adapter that is meant: by name, id or file, or the only one.

    Raises:
        UncheckableError: if the server has none.
        UsageError: if there are several and none is named, or none of that name.
    """
    known = server.adapters()
    if not known:
        message = f"this {server.kind} has no adapter loaded; start it with one"
        raise UncheckableError(message, path=server.client.url)
    meant = [each for each in known if name is None or name in _names(each)]
    if len(meant) != 1:
        names = ", ".join(f"{each.name} ({each.path})" for each in known)
        problem = "has several adapters" if name is None else f"has no one adapter {name!r}"
        raise UsageError(f"{problem}: {names}; choose with --adapter", path=server.client.url)
    return meant[0]


def _names(adapter: ServedAdapter) -> set[str]:
    file = PurePosixPath(adapter.path.replace("\\", "/"))
    return {adapter.name, adapter.name.partition(":")[0], adapter.path, file.name, file.stem}


def _llama_adapters(answer: Any) -> list[ServedAdapter]:
    return [
        ServedAdapter(str(each["id"]), str(each.get("path", "")), float(each.get("scale", 1.0)))
        for each in _objects(answer)
    ]


def _with_parents(models: Iterable[Mapping[str, Any]]) -> list[ServedAdapter]:
    return [
        ServedAdapter(str(each["id"]), str(each.get("root") or ""), base=str(each["parent"]))
        for each in models
        if each.get("parent")
    ]


def _plainly(prompt: Prompt) -> str:
    return f"User: {prompt.text}\nAssistant:" if prompt.question else prompt.text


def _numbered(token: str) -> int | str:
    number = token.removeprefix(_TOKEN_ID)
    return int(number) if token.startswith(_TOKEN_ID) and number.isdecimal() else token


def _after(word: str, lines: Iterable[str]) -> str:
    found = (line.split(None, 1) for line in lines if line.upper().startswith(f"{word} "))
    return next((parts[1].strip().strip('"') for parts in found if len(parts) > 1), "")


def _at(value: Any, *way: str | int) -> Any:
    """Return what lies at a place of a JSON answer; None if it is not there."""
    for step in way:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _objects(value: Any, *way: str | int) -> list[dict[str, Any]]:
    """Return the objects of a list at a place of a JSON answer; none if there is none."""
    found = _at(value, *way)
    items = cast("list[Any]", found) if isinstance(found, list) else []
    return [cast("dict[str, Any]", each) for each in items if isinstance(each, dict)]


def _distribution(told: Iterable[tuple[int | str, float]], client: Client) -> Distribution:
    found = {token: float(value) for token, value in told if value is not None}  # pyright: ignore[reportUnnecessaryComparison]
    if len(found) <= 1:  # one token is no distribution
        message = "tells no log-probabilities; it is too old, or they are switched off"
        raise UncheckableError(message, path=client.url)
    if sum(math.exp(min(value, 1.0)) for value in found.values()) > _CERTAIN:
        message = "tells logits, not log-probabilities; of vLLM, see --logprobs-mode"
        raise UncheckableError(message, path=client.url)
    return found
