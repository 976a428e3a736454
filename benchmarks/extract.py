"""What extraction promises: one module against a full decomposition in torch, and a whole model."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import check_call

from cases import BUILD, KIT, Case

FOLDER = BUILD / "extract"
PEERS = Path(__file__).with_name("peers")
WHOLE, ONE = "1b", "one"


def make() -> None:
    """Make a base, an adapter and the merged model of each size, if they are not there."""
    from checkpoints import INDEX, Shape, adapter, checkpoint

    module = Shape(layers=1, ffn=64, vocabulary=64, only=("self_attn.q_proj",))
    for name, shape, shards in ((ONE, module, 1), (WHOLE, Shape(), 4)):
        base, lora, tuned = (FOLDER / f"{name}-{part}" for part in ("base", "lora", "tuned"))
        checkpoint(base, shape, shards=shards)
        adapter(lora, shape)
        if not (tuned / INDEX).is_file():
            check_call([KIT, "merge", str(lora), "--into", str(base), "-o", str(tuned)])


def cases() -> list[Case]:
    """Return the table."""
    one, whole = _extract(ONE), _extract(WHOLE)
    peer = [sys.executable, str(PEERS / "torch_svd.py"), *one[3:6:2]]
    return [
        Case(
            "extract one 2048 x 2048 module, r=16, vs a full decomposition in torch",
            one,
            peer,
            {"times faster": 5, "peak MiB": 150},
            fresh=(FOLDER / "out",),
            rounds=3,
        ),
        Case(
            "extract r=16 of 112 modules between two 1B checkpoints in bf16",
            whole,
            None,
            {"seconds": 60, "peak MiB": 200},
            fresh=(FOLDER / "out",),
            rounds=3,
        ),
    ]


def _extract(name: str) -> list[str]:
    base, tuned = str(FOLDER / f"{name}-base"), str(FOLDER / f"{name}-tuned")
    return [KIT, "extract", "--base", base, "--tuned", tuned, "-o", str(FOLDER / "out")]


if __name__ == "__main__":
    make()
