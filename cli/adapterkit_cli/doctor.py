"""`adapterkit doctor`."""

from __future__ import annotations

import warnings

import click

from adapterkit_cli import options, rendering
from adapterkit_cli.progress import watching


@click.command(
    "doctor",
    epilog=options.examples(
        "adapterkit doctor http://127.0.0.1:8080",
        "adapterkit doctor http://127.0.0.1:8080 --source my-adapter --base base.gguf",
    ),
)
@click.argument("url", metavar="URL")
@click.option(
    "--adapter", metavar="NAME|ID", help="Which of the server's adapters, if there are several."
)
@click.option("--source", metavar="ADAPTER", type=options.PATH, help="What it should be.")
@options.base
@options.dialect
@options.alpha
@options.as_format
@click.option(
    "--prompts",
    metavar="FILE",
    type=options.PATH,
    help="A prompt in each line, in place of ten of its own.",
)
@click.option(
    "--seconds",
    metavar="N",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    help="After which the server is asked no more.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="ADAPTERKIT_API_KEY",
    show_envvar=True,
    help="What the server wants as a bearer token.",
)
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    url: str,
    adapter: str | None,
    source: str | None,
    base: str | None,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
    prompts: str | None,
    seconds: float,
    api_key: str | None,
    *,
    as_json: bool,
) -> None:
    """Ask a running server whether an adapter works.

    Exit code 1 if it does not.

    URL is that of llama-server, vLLM, SGLang or Ollama. Each prompt is asked with the adapter and
    without, one token each; nothing on the server is changed, and no other address contacted.
    """
    from adapterkit import examine

    # What transformers and PEFT say to each other's authors.
    unsaid = warnings.catch_warnings(action="ignore", category=FutureWarning)
    with watching("asking", "prompts"), unsaid:
        report = examine(
            url,
            name=adapter,
            source=source,
            base=base,
            prompts=prompts,
            seconds=seconds,
            api_key=api_key,
            dialect=dialect,
            alpha=alpha,
            as_format=as_format,
        )
    rendering.answer(report, as_json=as_json)
    ctx.exit(0 if report.healthy else 1)
