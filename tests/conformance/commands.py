"""The commands, as their users call them: through the library, and through the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import adapterkit
from adapterkit.errors import UnsupportedError
from adapterkit.projection import project_file
from adapterkit.tinylora import TinySettings
from adapterkit_cli.main import cli
from adapterkit_cli.rendering import plain
from conformance.making import Made


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command is asked for.

    Attributes:
        made: the adapter.
        out: where to write; nothing is there.
        allow_lossy: whether parts may be left out.
        options: what the trait needs to be said, by argument.
    """

    made: Made
    out: Path
    allow_lossy: bool = False
    options: Mapping[str, Any]

    @property
    def reading(self) -> dict[str, Any]:
        """What the adapter does not say itself."""
        return {} if self.made.alpha is None else {"alpha": self.made.alpha}

    @property
    def lossy(self) -> dict[str, Any]:
        return {"allow_lossy": True} if self.allow_lossy else {}

    @property
    def layout(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name == "moe_layout"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A column of the table.

    Attributes:
        name: as traits.toml has it.
        title: as the docs have it.
        line: what a user types; `A` is the adapter.
        run: the function of the library; returns its report.
        status: the exit code that goes with a report.
        suffix: of what is written.
    """

    name: str
    title: str
    line: str
    run: Callable[[Asked], Any]
    status: Callable[[Any], int] = lambda _: 0
    suffix: str = ""


def _inspect(asked: Asked) -> Any:
    return adapterkit.inspect(asked.made.path, base=asked.made.given, **asked.reading)


def _validate(asked: Asked) -> Any:
    return adapterkit.validate(
        asked.made.path, base=asked.made.given, targets=["peft"], **asked.reading
    )


def _to(target: str) -> Callable[[Asked], Any]:
    def convert(asked: Asked) -> Any:
        base, layout = asked.made.given, asked.layout if target == "peft" else {}
        return adapterkit.convert(
            asked.made.path,
            asked.out,
            to=target,
            base=base,
            unverified=True,
            **layout,
            **asked.reading,
            **asked.lossy,
        )

    return convert


def _merge(asked: Asked) -> Any:
    """Merge the adapter with itself, half and half: the result is the adapter."""
    sources = [asked.made.path, asked.made.path]
    return adapterkit.merge_files(
        sources,
        asked.out,
        weights=[0.5, 0.5],
        base=asked.made.given,
        **asked.layout,
        **asked.reading,
        **asked.lossy,
    )


def _into(asked: Asked, base: Path) -> Any:
    said = {name: value for name, value in asked.options.items() if name == "tied"}
    return adapterkit.merge_into(
        [asked.made.path], base, asked.out, **said, **asked.reading, **asked.lossy
    )


def _engine_model(made: Made) -> Path:
    assert made.model_gguf is not None
    return made.model_gguf


def _compress(asked: Asked) -> Any:
    """Compress by nothing: every rank is needed for this tolerance."""
    return adapterkit.compress_file(
        asked.made.path, asked.out, tol=1e-6, base=asked.made.given, **asked.reading
    )


def _diff(asked: Asked) -> Any:
    assert asked.made.twin is not None
    return adapterkit.diff(asked.made.path, asked.made.twin, base=asked.made.given)


def _extract(asked: Asked) -> Any:
    assert asked.made.merged is not None
    return adapterkit.extract(
        asked.made.base.hf, asked.made.merged, asked.out, tol=1e-6, save_rest=True, **asked.layout
    )


def _project(asked: Asked) -> Any:
    assert asked.made.given is not None
    settings = TinySettings(projection_dim=8, frozen_rank=2)
    return project_file(
        asked.made.path, asked.out, base=asked.made.given, settings=settings, **asked.reading
    )


def _stack(asked: Asked) -> Any:
    """Put the adapter on a stack at two thirds and a third, and write what the engine would run."""
    stack = adapterkit.AdapterStack(asked.made.given)
    stack.load(asked.made.path, name="one", scale=2 / 3, **asked.reading)
    stack.load(asked.made.path, name="other", scale=1 / 3, **asked.reading)
    combined = stack.combined()
    adapterkit.write(combined, asked.out, to="peft", base=asked.made.given)
    return [str(member) for member in stack.list()]


@dataclass(frozen=True)
class Printed:
    """What a run of the program left."""

    exit: int
    text: str


def _serve(asked: Asked) -> Any:
    """Ask the program for the settings of an engine that loads PEFT's files."""
    given = ["--base", str(asked.made.given)] if asked.made.given else []
    given += [f"--{name}={value}" for name, value in asked.reading.items()]
    ran = CliRunner().invoke(cli, ["stack", str(asked.made.path), "--for", "vllm", *given])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    if ran.exit_code in {3, 4}:
        raise UnsupportedError(ran.output)
    return Printed(ran.exit_code, ran.output)


COMMANDS = (
    Command(name="inspect", title="inspect", line="inspect A", run=_inspect),
    Command(
        name="validate",
        title="validate",
        line="validate A --target peft",
        run=_validate,
        status=lambda report: report.exit_code,
    ),
    Command(name="to-peft", title="convert to PEFT", line="convert A -o DIR", run=_to("peft")),
    Command(
        name="to-gguf",
        title="convert to GGUF",
        line="convert A -o FILE.gguf",
        run=_to("gguf"),
        suffix=".gguf",
    ),
    Command(
        name="to-mlx", title="convert to MLX", line="convert A --to mlx -o DIR", run=_to("mlx")
    ),
    Command(
        name="to-onnx-adapter",
        title="convert to onnxruntime",
        line="convert A -o FILE.onnx_adapter",
        run=_to("onnx-adapter"),
        suffix=".onnx_adapter",
    ),
    Command(
        name="to-tinylora",
        title="convert to TinyLoRA",
        line="convert A --to tinylora -o FILE",
        run=_to("tinylora"),
        suffix=".safetensors",
    ),
    *(
        Command(
            name=f"to-{name}",
            title=f"convert to {title}",
            line=f"convert A --to {name} -o FILE",
            run=_to(name),
            suffix=".safetensors",
        )
        for name, title in (("kohya", "kohya"), ("diffusers", "diffusers"), ("comfyui", "ComfyUI"))
    ),
    Command(name="merge", title="merge", line="merge A A --weights 0.5,0.5 -o DIR", run=_merge),
    Command(
        name="into-hf",
        title="merge into Hugging Face",
        line="merge A --into BASE -o DIR",
        run=lambda asked: _into(asked, asked.made.model),
    ),
    Command(
        name="into-gguf",
        title="merge into GGUF",
        line="merge A --into BASE.gguf -o FILE.gguf",
        run=lambda asked: _into(asked, _engine_model(asked.made)),
        suffix=".gguf",
    ),
    Command(name="compress", title="compress", line="compress A --tol 1e-6 -o DIR", run=_compress),
    Command(
        name="diff",
        title="diff",
        line="diff A B",
        run=_diff,
        status=lambda report: int(not report.equal),
    ),
    Command(
        name="audit",
        title="audit",
        line="audit A",
        run=lambda a: adapterkit.audit(a.made.path, base=a.made.given, **a.reading),
    ),
    Command(
        name="extract",
        title="extract",
        line="extract --base BASE --tuned MODEL --save-rest -o DIR",
        run=_extract,
    ),
    Command(
        name="project",
        title="tinylora project",
        line="tinylora project A -o DIR",
        run=_project,
        suffix="",
    ),
    Command(
        name="stack",
        title="AdapterStack",
        line="AdapterStack: A at 2/3 and at 1/3, combined",
        run=_stack,
    ),
    Command(
        name="serve",
        title="stack --for vllm",
        line="stack A --for vllm",
        run=_serve,
        status=lambda report: report.exit,
    ),
)


def said(report: Any) -> str:
    """Return all that a report says, as one text."""
    return json.dumps(plain(report))
