"""Every case that a speed or memory promise is made for, against the peer it is made against."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import check_call

from measure import Run, alternate

BUILD = Path("build/bench")
BIN = Path(sys.executable).parent
KIT = str(BIN / "adapterkit")
LAYERS = 32


@dataclass(frozen=True)
class Case:
    """Ours, the peer's (None without one), and what is promised."""

    title: str
    ours: list[str]
    peer: list[str] | None = None
    promises: dict[str, float] = field(default_factory=dict)


def cases() -> list[Case]:
    """Return the table."""
    adapter, base, out = (str(BUILD / name) for name in ("adapter-0", "base", "out.gguf"))
    large = str(BUILD / "base-150k.gguf")
    script = str(next(BUILD.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")))
    convert = [KIT, "convert", adapter, "-o", out, "--base", base, "--force"]
    theirs = [sys.executable, script, "--base", base, "--outtype", "bf16", "--outfile", out]
    return [
        Case(
            "convert 84 MB PEFT to GGUF, proof included, vs convert_lora_to_gguf.py",
            convert,
            [*theirs, adapter],
            {"times faster": 5, "peak MiB": 100},
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


def kept(case: Case, ours: Run, peer: Run | None) -> dict[str, tuple[float, bool]]:
    """Return each promise's figure and whether it holds."""
    ratio = peer.wall / ours.wall if peer else 0.0
    figures = {
        "times faster": (ratio, ratio >= case.promises.get("times faster", 0)),
        "peak MiB": (ours.peak, ours.peak <= case.promises.get("peak MiB", 0)),
        "seconds": (ours.wall, ours.wall <= case.promises.get("seconds", 0)),
        "times the peer's time": (
            1 / ratio if ratio else 0.0,
            bool(ratio) and 1 / ratio <= case.promises.get("times the peer's time", 0),
        ),
    }
    return {name: figures[name] for name in case.promises}


def main() -> int:
    """Print the table; exit 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose title holds this text")
    arguments = parser.parse_args()
    check_call([sys.executable, str(Path(__file__).with_name("inputs.py"))])
    broken = 0
    for case in cases():
        if arguments.only not in case.title:
            continue
        commands = {"ours": case.ours} | ({"peer": case.peer} if case.peer else {})
        runs = alternate(commands, arguments.rounds)
        print(case.title)
        for name, run in runs.items():
            print(f"  {name:6} {run.wall:7.3f} s wall {run.cpu:7.3f} s CPU {run.peak:7.0f} MiB")
        for promise, (figure, holds) in kept(case, runs["ours"], runs.get("peer")).items():
            broken += not holds
            verdict = "kept" if holds else "BROKEN"
            print(f"  {promise}: {figure:.2f} (promised {case.promises[promise]:g}) {verdict}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
