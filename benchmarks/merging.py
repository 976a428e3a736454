"""What merging promises: adapters into one, and into the weights of a base."""

from __future__ import annotations

import sys
from pathlib import Path

from cases import BUILD, KIT, LAYERS, TARGETS, Case

PEERS = Path(__file__).with_name("peers")
MODULES = LAYERS * TARGETS
# name -> layers; the larger has about a billion parameters, 2.1 GB.
BASES = {"0.3B": 4, "1B": 16}


def make() -> None:
    """Make the inputs that are not there; imports what `run.py` should not hold in memory."""
    import checkpoints
    import inputs

    for seed in (0, 1):
        inputs.adapter(seed)
        inputs.one_module(seed)
    for name, layers in BASES.items():
        shape = checkpoints.Shape(layers=layers)
        checkpoints.checkpoint(BUILD / f"base-{name}", shape)
        checkpoints.adapter(BUILD / f"adapter-{name}", shape)


def cases() -> list[Case]:
    """Return the table."""
    first, second = (str(BUILD / f"adapter-{seed}") for seed in (0, 1))
    ones = [str(BUILD / f"one-module-{seed}") for seed in (0, 1)]
    out = BUILD / "merged"
    merge = [KIT, "merge", first, second, "--weights", "0.5,0.5", "--rank", "16", "-o", str(out)]
    return [
        Case(
            "merge two 84 MB adapters by svd to rank 16",
            merge,
            None,
            {"seconds": 3, "peak MiB": 300},
            fresh=(out,),
        ),
        Case(
            f"merge {MODULES} modules by svd vs PEFT on one of them, 4096 x 4096",
            merge,
            [sys.executable, str(PEERS / "peft_svd.py")],
            {"times less CPU for a module": 1000},
            fresh=(out,),
            modules=MODULES,
            rounds=1,
        ),
        Case(
            "merge one 4096 x 4096 module of two adapters by ties, density 0.2",
            [KIT, "merge", *ones, "--method", "ties", "--density", "0.2", "-o", str(out)],
            None,
            {"CPU seconds": 3, "peak MiB": 150},
            fresh=(out,),
        ),
        *(case for name in BASES for case in _into(name)),
    ]


def _into(name: str) -> list[Case]:
    base, adapter = str(BUILD / f"base-{name}"), str(BUILD / f"adapter-{name}")
    out, copy = BUILD / "merged-base", BUILD / "copied-base"
    ours = [KIT, "merge", adapter, "--into", base, "-o", str(out)]
    theirs = [sys.executable, str(PEERS / "peft_into.py"), base, adapter, str(copy)]
    fresh = (out, copy)
    copied = ["cp", "-r", base, str(copy)]
    durable = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', base, str(copy)]
    return [
        Case(
            f"merge into a {name} base in bf16 vs cp of its directory, which waits for no disk",
            ours,
            copied,
            {"peak MiB": 200},
            fresh=fresh,
        ),
        Case(
            f"merge into a {name} base in bf16 vs cp and sync of its directory",
            ours,
            durable,
            {"times the peer's time": 3},
            fresh=fresh,
        ),
        Case(
            f"merge into a {name} base in bf16 vs PEFT's load, merge and save",
            ours,
            theirs,
            {"times faster": 4},
            fresh=fresh,
            rounds=3,
        ),
    ]


if __name__ == "__main__":
    make()
