"""What undisturbed runs write, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from soak.runs import Digest, Run, digest, undisturbed

if TYPE_CHECKING:
    from soak.commands import Command
    from soak.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Reference:
    """The output of an undisturbed run.

    Attributes:
        path: where it is.
        digest: its hashes.
        seconds: of work, the start of the interpreter left out.
        largest: bytes of its largest file.
        total: bytes of all.
    """

    path: Path
    digest: Digest
    seconds: float
    largest: int
    total: int


class References:
    """Outputs of undisturbed runs, each made when it is first asked for."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        folder.mkdir()
        self.folder, self.inputs = folder, inputs
        self.known: dict[str, Reference] = {}
        # The last step before which a merge still has its journal, where that was looked for.
        self.latest: dict[str, int] = {}
        self.counted: dict[str, list[str]] = {}

    def of(self, command: Command, **instead: Path) -> Reference:
        """Return what a command writes, with other inputs of some names."""
        key = "-".join([command.name, *(path.name for path in instead.values())])
        if key not in self.known:
            # Of the same name as all others: a name may be part of what is written.
            path = self.folder / key / f"out{command.suffix}"
            path.parent.mkdir()
            ended = undisturbed(command.words(self.inputs, path, **instead))
            assert ended.code == 0, ended
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            sizes = [file.stat().st_size for file in files]
            found = digest(path)
            self.known[key] = Reference(path, found, ended.seconds, max(sizes), sum(sizes))
        return self.known[key]

    def steps(self, command: Command) -> list[str]:
        """Return the steps before which a run can be stopped, an existing output being replaced."""
        if command.name not in self.counted:
            reference = self.of(command)
            listed = self.folder / f"{command.name}.steps"
            words = [*command.words(self.inputs, reference.path), "--force"]
            ended = Run(words, fault="steps", fired=listed).finish()
            assert ended.code == 0, ended
            assert digest(reference.path) == reference.digest, f"{command.name} is not repeatable"
            self.counted[command.name] = listed.read_text().splitlines()
        return self.counted[command.name]
