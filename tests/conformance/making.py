"""Adapters with one trait each: PEFT saves them, and the live model says what they mean.

Beside each lies its twin, the same adapter without the trait: what `diff` must tell apart, and what
is left where a command leaves the trait out.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from conformance.bases import Answers, Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj"]
Document = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Document, Tensors], None]


@dataclass(frozen=True, kw_only=True)
class Made:
    """An adapter that has a trait.

    Attributes:
        path: what the commands are given.
        twin: the same without the trait; None if there is none.
        base: the model that it is for.
        given: the base that the commands are told, None for none.
        alpha: the scale numerator that they are told, None where the adapter has it.
        model: the base that it is merged into, `model_gguf` as llama.cpp has it.
        want: answers of the model with it; None if no program can run it any more.
        rest: answers without the trait.
        spoken: those of the language model alone, where the others hold more.
        merged: directory of the model that PEFT merged it into, if it can.
        tuned: answers of that model: where the output is tied, PEFT merges into both.
        fresh: gives the model that PEFT loads it onto.
        answers: takes the answers of a live model with it.
    """

    path: Path
    twin: Path | None
    base: Base
    given: Path | None
    alpha: float | None
    model: Path
    model_gguf: Path | None
    want: Answers | None
    rest: Answers | None
    spoken: Answers | None
    merged: Path | None
    tuned: Answers | None
    fresh: Callable[[], Any]
    answers: Callable[[Any], Answers]


@dataclass(kw_only=True)
class Bench:
    """Where an adapter is made.

    Attributes:
        base: the model it is for.
        folder: empty.
        fresh: gives the model that PEFT adapts.
        answers: takes the answers of a live model.
        given: the base that the commands are told, and the `alpha`.
        model: the base that it is merged into, `model_gguf` for llama.cpp.
        live: the model with the adapter on it; None if no program can run it any more.
        rest: takes the answers of a saved adapter without the trait.
        speak: takes the answers of the language model alone.
        mergeable: whether the live model is one of weights alone.
    """

    base: Base
    folder: Path
    fresh: Callable[[], Any] = field(init=False)
    answers: Callable[[Any], Answers] = field(init=False)
    given: Path | None = field(init=False)
    model: Path = field(init=False)
    model_gguf: Path | None = field(init=False)
    speak: Callable[[Path], Answers] | None = None
    rest: Callable[[Path], Answers] = field(init=False)
    path: Path = field(init=False)
    alpha: float | None = None
    live: Any = None
    mergeable: bool = True

    def __post_init__(self) -> None:
        self.fresh, self.answers = self.base.fresh, self.base.ask
        self.given = self.model = self.base.hf
        self.model_gguf = self.base.gguf
        self.path = self.folder / "adapter"
        self.rest = lambda path: self.answers(self.reload(path))

    def train(
        self, *, embeddings: bool = False, task: str | None = "CAUSAL_LM", **settings: Any
    ) -> Any:
        """Save an adapter, all of whose trained tensors are random; return the live model."""
        config = peft.LoraConfig(
            **{
                "r": 4,
                "lora_alpha": 8,
                "init_lora_weights": False,
                "target_modules": LINEAR,
                "task_type": task,
                **settings,
            }
        )
        # PEFT draws factors from torch's own state, which depends on what ran before.
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(5)
            tuned: Any = peft.get_peft_model(self.fresh(), config)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in tuned.named_parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator)
                        step = parameter * noise if "magnitude" in name else noise
                        parameter.add_((0.3 if "magnitude" in name else 0.1) * step)
            tuned.save_pretrained(self.path, save_embedding_layers=embeddings)
        self.live = tuned.eval()
        return tuned

    def edit(self, change: Edit, *, into: Path | None = None) -> Path:
        """Change the saved adapter, or a copy of it."""
        target = into or self.path
        if into:
            shutil.copytree(self.path, into)
        config = json.loads((target / CONFIG).read_text())
        tensors = load_file(target / WEIGHTS)
        change(config, tensors)
        (target / CONFIG).write_text(json.dumps(config))
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
        return target

    def reload(self, path: Path | None = None) -> Any:
        """Return the live model of what is saved."""
        return loaded(self.fresh(), path or self.path)


@contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT say what it likes: odd adapters are the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(model: Any, path: Path) -> Any:
    """Return a model with an adapter on it, as PEFT loads it."""
    with quiet():
        return peft.PeftModel.from_pretrained(model, path).eval()


def settings(**changes: Any) -> Edit:
    """Change the config alone."""
    return lambda config, _: config.update(changes)


def without(*parts: str, **changes: Any) -> Edit:
    """Leave out tensors whose names hold one of some parts."""

    def change(config: Document, tensors: Tensors) -> None:
        config.update(changes)
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def unchanged(config: Document, tensors: Tensors) -> None:
    """Leave everything: the trait has no meaning of its own."""
    del config, tensors


@dataclass(frozen=True)
class Recipe:
    """How a trait is made, and how it is left out."""

    make: Callable[[Bench], None]
    twin: Edit | None


RECIPES: dict[str, Recipe] = {}


def trait(name: str, twin: Edit | None = None) -> Callable[[Callable[[Bench], None]], None]:
    """Enter a recipe under the name that traits.toml gives it."""

    def enter(make: Callable[[Bench], None]) -> None:
        RECIPES[name] = Recipe(make, twin)

    return enter


def plainly(name: str, twin: Edit | None = None, **given: Any) -> None:
    """Enter a recipe that is a LoraConfig."""

    def make(bench: Bench) -> None:
        bench.train(**given)

    RECIPES[name] = Recipe(make, twin)


def make(name: str, base: Base, folder: Path) -> Made:
    """Make the adapter of a trait, its twin, and the model that PEFT merges it into."""
    recipe = RECIPES[name]
    bench = Bench(base=base, folder=folder)
    recipe.make(bench)
    twin = bench.edit(recipe.twin, into=folder / "twin" / bench.path.name) if recipe.twin else None
    with quiet():
        want = bench.answers(bench.live) if bench.live is not None else None
        rest = bench.rest(twin) if twin else None
        spoken = bench.speak(twin) if twin and bench.speak else rest
        merged = _merged(bench) if bench.live is not None and bench.mergeable else None
        tuned = bench.answers(base.load(merged)) if merged else None
    return Made(
        path=bench.path,
        twin=twin,
        base=base,
        given=bench.given,
        alpha=bench.alpha,
        model=bench.model,
        model_gguf=bench.model_gguf,
        want=want,
        rest=rest,
        spoken=spoken,
        merged=merged,
        tuned=tuned,
        fresh=bench.fresh,
        answers=bench.answers,
    )


def _merged(bench: Bench) -> Path:
    model = bench.live
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(bench.folder / "merged")
    return bench.folder / "merged"
