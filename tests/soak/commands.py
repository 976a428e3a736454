"""Every command that writes, as a line of the terminal."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from soak.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Command:
    """A command line.

    Attributes:
        name: id in the tests.
        line: the words, with the names of `Inputs` and `{out}` in braces.
        suffix: of the destination; without one it is a directory.
        model: whether the output is a whole model.
    """

    name: str
    line: str
    suffix: str = ""
    model: bool = False

    def words(self, inputs: Inputs, out: Path, **instead: Path) -> list[str]:
        """Return the arguments of `adapterkit`."""
        paths = {**asdict(inputs), **instead, "out": out}
        return [word.format(**paths) for word in self.line.split()]


CONVERT_FILE = Command("convert-gguf", "convert {adapter} --base {base} -o {out}", ".gguf")
CONVERT_DIRECTORY = Command("convert-peft", "convert {adapter} -o {out}")
INTO_DIRECTORY = Command("into-hf", "merge {adapter} --into {base} -o {out}", model=True)
INTO_FILE = Command("into-q8_0", "merge {adapter} --into {q8} -o {out}", ".gguf", model=True)
INTO_REAL = Command("into-smollm2", "merge {pirate} --into {smollm2} -o {out}", ".gguf", model=True)
INTO_MIXTURE = Command(
    "into-q4_k_m", "merge {small} --into {f16} --gguf-type q4_k_m -o {out}", ".gguf", model=True
)
REPORT = Command("audit-html", "audit {adapter} --html {out}", ".html")
BANK = Command("audit-bank", "audit {adapter} {other} --bank {out}", ".json")
COMPRESS = Command("compress", "compress {adapter} --rank 4 -o {out}")
EXTRACT = Command("extract", "extract --base {base} --tuned {tuned} --rank 8 -o {out}")
MERGE = Command("merge", "merge {adapter} {other} -o {out}")
COMMANDS = (
    CONVERT_FILE,
    CONVERT_DIRECTORY,
    MERGE,
    INTO_DIRECTORY,
    INTO_FILE,
    INTO_REAL,
    INTO_MIXTURE,
    EXTRACT,
    COMPRESS,
)
RACED = (CONVERT_FILE, CONVERT_DIRECTORY, INTO_DIRECTORY, INTO_FILE, REPORT)
RESUMED = (INTO_DIRECTORY, INTO_FILE, INTO_MIXTURE)


def each(
    commands: Iterable[Command], quick: Collection[Command] | None = None
) -> pytest.MarkDecorator:
    """Run a test with every one of some commands; in the quick slice with a few."""
    rows = [
        pytest.param(c, id=c.name, marks=whole_only(quick is None or c in quick)) for c in commands
    ]
    return pytest.mark.parametrize("command", rows)


def whole_only(quick: bool) -> list[pytest.MarkDecorator]:
    """Return the marks of a row that is in the quick slice too, or is not."""
    return [] if quick else [pytest.mark.soak]


def former(command: Command, inputs: Inputs, place: Path) -> Path:
    """Make something that --force may replace: a file, an adapter, or a model of one file."""
    path = place / f"former{command.suffix}"
    if command.suffix:
        path.write_bytes(b"GGUF of yesterday")
    elif command.model:
        path.mkdir()
        config = json.loads((inputs.base / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
        shutil.copy(inputs.pirate / "adapter_model.safetensors", path / "model.safetensors")
    else:
        shutil.copytree(inputs.pirate, path)
    return path
