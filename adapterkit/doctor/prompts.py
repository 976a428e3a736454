"""What servers are asked: short beginnings, and questions in the shape of the model's chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import UsageError
from adapterkit.storage import read_lines

_LONGEST = 1 << 20
_MOST = 100


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and whether it is a user's question rather than the prompt itself."""

    text: str
    question: bool = False


PROMPTS = (
    Prompt("The river that flows through the city"),
    Prompt("What is a good name for a cat?", question=True),
    Prompt("def area(width, height):\n    return"),
    Prompt("How do I keep bread fresh?", question=True),
    Prompt("My favourite thing about the sea is"),
    Prompt("Tell me something about the moon.", question=True),
    Prompt("On the first day of the journey, the travellers"),
    Prompt("Who wrote the Odyssey?", question=True),
    Prompt("2 + 2 = 4, 3 + 3 ="),
    Prompt("Write one sentence about winter.", question=True),
)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Return the prompts of a file, one in each line, sent as they are.

    Raises:
        UsageError: if there are none, or too many.
        FormatError: if the file is no text or cannot be read.
    """
    prompts = tuple(map(Prompt, read_lines(path, _LONGEST)))
    if not 0 < len(prompts) <= _MOST:
        raise UsageError(f"holds {len(prompts)} prompts, not 1 to {_MOST}", path=path)
    return prompts
