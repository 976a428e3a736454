"""What conversion, inspection, validation, audit and start-up promise."""

from __future__ import annotations

import sys

from cases import BIN, BUILD, KIT, LAYERS, Case


def cases() -> list[Case]:
    """Return the table."""
    adapter, base, out = (str(BUILD / name) for name in ("adapter-0", "base", "out.gguf"))
    large = str(BUILD / "base-150k.gguf")
    script = str(next(BUILD.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")))
    convert = [KIT, "convert", adapter, "-o", out, "--base", base, "--force"]
    theirs = [sys.executable, script, "--base", base, "--outfile", out, adapter, "--outtype"]
    return [
        *(
            Case(
                f"convert 84 MB PEFT to GGUF in {kind}, proof included, vs convert_lora_to_gguf.py",
                [*convert, "--outtype", kind],
                [*theirs, kind],
                {"times faster": 5, "peak MiB": 100},
            )
            for kind in ("bf16", "f16", "f32")
        ),
        Case("inspect the same adapter", [KIT, "inspect", adapter], None, {"seconds": 0.3}),
        Case(
            "validate the same adapter, values included, on a GGUF base with 150k tokens",
            [KIT, "validate", adapter, "--base", large],
            None,
            {"seconds": 0.5, "peak MiB": 80},
        ),
        Case(
            "audit the same adapter vs gradience 0.11",
            [KIT, "audit", adapter],
            [str(BIN / "gradience"), "audit", "--peft-dir", adapter],
            {"seconds": 1.0, "peak MiB": 80, "times faster": 4},
        ),
        *(
            Case(
                f"audit {7 * layers} modules vs half as many",
                [KIT, "audit", adapter if layers == LAYERS else _layers(layers)],
                [KIT, "audit", _layers(layers // 2)],
                {"times the peer's time": 2},
            )
            for layers in (LAYERS, LAYERS // 2)
        ),
        Case(
            "audit one layer against the weights of its base, 436 MB",
            [KIT, "audit", _layers(1), "--base", str(BUILD / "base-1-layer")],
            None,
            {"seconds": 30},
        ),
        Case(
            "adapterkit --help vs python importing click",
            [KIT, "--help"],
            [sys.executable, "-c", "import click"],
            {"times the peer's time": 3},
        ),
    ]


def _layers(count: int) -> str:
    return str(BUILD / f"adapter-{count}-layers")
