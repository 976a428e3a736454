"""`adapterkit doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit_cli import options, rendering

if TYPE_CHECKING:
    from adapterkit import DoctorReport

_SAID = {
    "right": "the adapter does what it should",
    "alive": "the adapter changes the answers; give --source and --base to tell whether rightly",
    "no effect": "the adapter changes nothing",
    "wrong strength": "the adapter acts at {strength:.2f} times its strength",
    "another effect": "what changes the answers is not this adapter at any strength",
    "another base": "the model without the adapter is not this base",
}


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
@click.option(
    "--prompts",
    metavar="FILE",
    type=options.PATH,
    help="A prompt in each line, in place of ten of its own.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    help="After which the server is asked no more.",
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
    prompts: str | None,
    seconds: float,
    *,
    as_json: bool,
) -> None:
    """Ask a running server whether an adapter works.

    Exit code 1 if it does not.

    URL is that of llama-server, vLLM, SGLang or Ollama. Each prompt is asked with the adapter and
    without, one token each; nothing on the server is changed, and no other address contacted.
    """
    from adapterkit import examine

    report = examine(
        url,
        adapter=adapter,
        source=source,
        base=base,
        prompts=prompts,
        seconds=seconds,
        dialect=dialect,
        alpha=alpha,
    )
    if as_json:
        rendering.emit_json(report)
    else:
        rendering.emit(_text(report))
        rendering.remarks("note", report.notes)
    ctx.exit(0 if report.healthy else 1)


def _text(report: DoctorReport) -> str:
    said = _SAID[str(report.condition)].format(strength=report.strength or 0.0)
    served = report.adapter + (f" ({report.path})" if report.path else "")
    expected = report.expected_effect
    effect = f"{rendering.short(report.effect)} nats"
    if expected is not None:
        effect += f", {rendering.short(expected)} expected"
    strength = "" if report.strength is None else f"{report.strength:.3f}"
    entries = [
        ("server", f"{report.server} at {report.url}"),
        ("adapter", served),
        ("effect", effect),
        ("strength", strength),
        ("base apart", _nats(report.base_divergence)),
        ("unexplained", "" if report.unexplained is None else f"{report.unexplained:.1%}"),
        ("asked", f"{report.prompts} prompts, {report.requests} requests, {report.seconds:.1f} s"),
    ]
    lines = [f"{report.condition}: {said}", *(f"  {cause}" for cause in report.causes)]
    return "\n".join([*map(rendering.printable, lines), rendering.sheet(entries)])


def _nats(value: float | None) -> str:
    return "" if value is None else f"{rendering.short(value)} nats"
