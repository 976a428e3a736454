"""Ask a running server whether an adapter does what it should, and say what is wrong if not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base import BaseModel
from adapterkit.doctor.distributions import Measured, mean_divergence, measured
from adapterkit.doctor.http import Client
from adapterkit.doctor.prompts import PROMPTS, read_prompts
from adapterkit.doctor.reference import Reference, reference
from adapterkit.doctor.servers import LlamaServer, ServedAdapter, chosen, connected
from adapterkit.errors import UsageError
from adapterkit.loading import open_model
from adapterkit.model import AdapterTensorSet
from adapterkit.text import PLAIN, Pen, Shown, printable, sheet, short
from adapterkit.work import tracked, watchable

if TYPE_CHECKING:
    from adapterkit.doctor.distributions import Distribution
    from adapterkit.doctor.servers import Server

# Divergence without the adapter from which the base is another: as a share of the expected effect,
# and in nats. Storage of the same base in 8 bits makes 0.01, in 5 bits 0.08.
_OTHER_BASE, _LEAST_BASE = 0.05, 0.02
# Shares of the expected effect, or nats where none is known, below which there is none.
_NONE, _NONE_NATS = 1e-3, 1e-5
# Share of the effect that no strength explains from which it is another's.
_UNEXPLAINED = 0.10
# Share of the effect that is left from which the usual mistakes are tried, and how many times
# nearer than the nearest strength one must come: what a server rounds keeps it from all alike.
_TRIED, _NEARER = 1e-3, 3
_WEAK, _STRONG = 0.8, 1.25
# Prompts that are asked again with the prompt cache and with the server's own scales.
_AGAIN = 2
_DIFFERENT = 0.01
_REQUESTS = 400


class Condition(StrEnum):
    """How an adapter does in a server."""

    RIGHT = "right"
    ALIVE = "alive"
    NO_EFFECT = "no effect"
    STRENGTH = "wrong strength"
    ANOTHER = "another effect"
    BASE = "another base"


# Conditions that may be one of the usual mistakes: a small one moves the answers little.
_EXPLAINABLE = {Condition.RIGHT, Condition.STRENGTH, Condition.ANOTHER}
_SAID = {
    Condition.RIGHT: "the adapter does what it should",
    Condition.ALIVE: "the adapter changes the answers; give --source and --base to tell whether "
    "rightly",
    Condition.NO_EFFECT: "the adapter changes nothing",
    Condition.STRENGTH: "the adapter acts at {strength:.2f} times its strength",
    Condition.ANOTHER: "what changes the answers is not this adapter at any strength",
    Condition.BASE: "the model without the adapter is not this base",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DoctorReport(Shown):
    """What was found; divergences are means over the prompts, in nats.

    Attributes:
        url: the server.
        server: `llama-server`, `vllm`, `sglang`, `ollama` or `openai`.
        adapter: as the server calls it.
        path: where the server read it, if it tells.
        condition: what is the matter; `alive` is all that can be said without a source and a base.
        strength: that of the adapter in effect, 1 as it was trained; None if that is not known.
        causes: what explains it, one sentence each.
        notes: what else to know of this server, one sentence each.
        effect: divergence of the answers with the adapter from those without.
        expected_effect: what it should be; None without a source and a base.
        base_divergence: divergence of the answers without the adapter from those of the base.
        unexplained: share of the effect that the adapter has at no strength.
        prompts: how many were asked.
        requests: how many requests the server answered.
        seconds: how long it all took.
    """

    url: str
    server: str
    adapter: str
    path: str
    condition: Condition
    strength: float | None
    causes: tuple[str, ...]
    notes: tuple[str, ...]
    effect: float
    expected_effect: float | None
    base_divergence: float | None
    unexplained: float | None
    prompts: int
    requests: int
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether nothing is known to be wrong."""
        return self.condition in {Condition.RIGHT, Condition.ALIVE}

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what is the matter, what explains it, and the numbers."""
        said = _SAID[self.condition].format(strength=self.strength or 0.0)
        expected = self.expected_effect
        entries = [
            ("server", f"{self.server} at {self.url}"),
            ("adapter", self.adapter + (f" ({self.path})" if self.path else "")),
            (
                "effect",
                _nats(self.effect)
                + (f", {short(expected)} expected" if expected is not None else ""),
            ),
            ("strength", "" if self.strength is None else f"{self.strength:.3f}"),
            ("base apart", _nats(self.base_divergence)),
            ("unexplained", "" if self.unexplained is None else f"{self.unexplained:.1%}"),
            ("asked", f"{self.prompts} prompts, {self.requests} requests, {self.seconds:.1f} s"),
        ]
        lines = [f"{self.condition}: {said}", *(f"  {cause}" for cause in self.causes)]
        return "\n".join([*map(printable, lines), sheet(entries, pen=pen)])


def _nats(value: float | None) -> str:
    return "" if value is None else f"{short(value)} nats"


@watchable
def examine(
    url: str,
    *,
    name: str | None = None,
    source: AdapterTensorSet | Path | str | None = None,
    base: BaseModel | Path | str | None = None,
    prompts: Path | str | None = None,
    seconds: float = 300.0,
    api_key: str | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DoctorReport:
    """Ask a running llama-server, vLLM, SGLang or Ollama whether an adapter works there.

    Each prompt is asked with the adapter and without it, one token each. With the source and the
    base, what should come is computed by llama.cpp (a GGUF base) or transformers and PEFT.

    Args:
        url: address of the server; nothing else is contacted.
        name: what the server calls it, its id or file there; not needed where there is but one.
        source: the adapter that it should be, of any format or in memory.
        base: its base model with weights: GGUF file or Hugging Face directory.
        prompts: file with a prompt in each line; by default ten of its own.
        seconds: after which no more is asked.
        api_key: what the server wants as a bearer token.
        dialect: key grammar of a hand-written source.
        alpha: scale numerator of the source, where its file does not hold it.
        as_format: name of the format to read the source as, where its content does not tell.
        progress: told how many prompts of how many are done, stage by stage.

    Raises:
        UncheckableError: if nothing that is known answers, or the engine that should say what to
            expect is not installed.
        UsageError: if the adapter is not there, or a source is given without a base.
        FormatError: if the source, the base or the prompts cannot be read.
    """
    del progress  # told by `watchable`
    if (source is None) != (base is None):
        raise UsageError("what to expect takes both the adapter and its base: --source and --base")
    began = time.monotonic()
    asked = read_prompts(Path(prompts)) if prompts is not None else PROMPTS
    server = connected(Client(url, most=_REQUESTS, seconds=seconds, key=api_key))
    served = chosen(server, name)
    texts = [server.prompt(prompt) for prompt in asked]
    # What a server multiplies by is part of what its users get; asked off, it is asked at 1.
    scale = served.scale or 1.0
    asked_of = [(text, strength) for strength in (0.0, scale) for text in texts]
    answers = [server.ask(text, served, strength) for text, strength in tracked(asked_of)]
    off, on = answers[: len(texts)], answers[len(texts) :]
    notes = _told_of_scales(server, served, texts, on)
    found = Findings(Condition.ALIVE, effect=mean_divergence(on, off))
    if source is not None and base is not None:
        by_text = not all(isinstance(token, int) for token in on[0])
        known = reference(
            source,
            open_model(base),
            by_text=by_text,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
        )
        found = compared(known, texts, off, on)
    elif found.effect < _NONE_NATS:
        found = Findings(Condition.NO_EFFECT, effect=found.effect)
    return DoctorReport(
        url=server.client.url,
        server=server.kind,
        adapter=served.name,
        path=served.path,
        condition=found.condition,
        strength=found.strength,
        causes=found.causes,
        notes=tuple(notes),
        effect=found.effect,
        expected_effect=found.numbers and found.numbers.expected,
        base_divergence=found.numbers and found.numbers.base,
        unexplained=found.numbers and found.numbers.unexplained,
        prompts=len(texts),
        requests=server.client.requests,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class Findings:
    """What the answers say: the condition, its numbers, and what explains it."""

    condition: Condition
    effect: float
    strength: float | None = None
    numbers: Measured | None = None
    causes: tuple[str, ...] = ()


def compared(
    known: Reference,
    texts: Sequence[str],
    off: Sequence[Distribution],
    on: Sequence[Distribution],
) -> Findings:
    """Compare the answers with what they should be."""
    with known.expected(texts) as expected:
        numbers = measured(off, on, expected)
    condition, causes = judged(numbers), tuple[str, ...]()
    if condition in _EXPLAINABLE and numbers.distance > _TRIED * numbers.effect:
        mistaken = known.mistaken(texts)
        left = {cause: mean_divergence(on, answers) for cause, answers in mistaken.items()}
        cause = min(left, key=lambda name: left[name], default="")
        if cause and left[cause] * _NEARER < numbers.distance:
            condition, causes = Condition.ANOTHER, (cause,)
    strength = numbers.strength if condition in {Condition.RIGHT, Condition.STRENGTH} else None
    return Findings(condition, numbers.effect, strength, numbers, causes)


def judged(numbers: Measured) -> Condition:
    """Return what divergences mean, the first that holds: each rule trusts those before it."""
    if numbers.base > max(_OTHER_BASE * numbers.expected, _LEAST_BASE):
        return Condition.BASE
    if numbers.effect < _NONE * numbers.expected:
        return Condition.NO_EFFECT
    if numbers.unexplained > _UNEXPLAINED:
        return Condition.ANOTHER
    if not _WEAK <= numbers.strength <= _STRONG:
        return Condition.STRENGTH
    return Condition.RIGHT


def _told_of_scales(
    server: Server, served: ServedAdapter, texts: Sequence[str], on: Sequence[Distribution]
) -> list[str]:
    """Say what a llama-server's own scales and its prompt cache make of other people's requests."""
    if not isinstance(server, LlamaServer) or served.scale is None:
        return []
    notes: list[str] = []
    if served.scale == 0:
        notes.append(
            "the server's own scale for it is 0: only requests with a lora field get it "
            "(--lora-init-without-apply, or POST /lora-adapters without its id)"
        )
    elif served.scale != 1:
        notes.append(f"the server's own scale for it is {served.scale:g} (--lora-scaled)")
    few = texts[:_AGAIN]
    plain = [server.completion(text, None) for text in few]
    if served.scale and mean_divergence(plain, on[:_AGAIN]) > _DIFFERENT:
        notes.append("requests that name no adapter get another mixture: others are loaded too")
    nothing = [{"id": number, "scale": 0.0} for number in server.ids]
    cached: list[Distribution] = []
    for text in few:
        server.completion(text, nothing, cached=True)
        cached.append(server.completion(text, None, cached=True))
    if mean_divergence(cached, plain) > _DIFFERENT:
        notes.append('the prompt cache gives answers of other scales: send "cache_prompt": false')
    return notes
