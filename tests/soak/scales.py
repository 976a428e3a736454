"""How large the models are and how often each test is repeated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """One size of everything.

    Attributes:
        name: id of the tests that run with it.
        layers: of the base, 26 MB each in 16 bits.
        vocabulary: of the base; two tables of 2 KB for each token.
        quantised_layers: of the base in f16 that becomes a mixture, which takes longer.
        moments: signals for each command.
        steps: kills for each command, each just before a call that changes the disk.
        rounds: races to one destination for each command.
        kills: replaced or resumed outputs for each command.
        repeated: whether an error is also met while something older is replaced.
    """

    name: str
    layers: int
    vocabulary: int
    quantised_layers: int
    moments: int
    steps: int
    rounds: int
    kills: int
    repeated: bool


QUICK = Scale("quick", 3, 8_000, 1, moments=2, steps=2, rounds=3, kills=2, repeated=False)
SOAK = Scale("soak", 16, 32_000, 4, moments=50, steps=30, rounds=50, kills=30, repeated=True)
