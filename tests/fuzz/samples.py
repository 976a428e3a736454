"""What is changed: the adapters of the fixtures by format, other sound files, what once failed.

A format joins with the first fixture that the registry recognises as its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adapterkit.errors import AdapterKitError
from adapterkit.registry import detect

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
KEPT = Path(__file__).parent / "seeds"
# Small files are changed where it matters more often.
LARGEST = 1 << 16
_SKIPPED = {"generators", "hostile"}


@dataclass(frozen=True)
class Sample:
    """Files, and which of them a program is given.

    Attributes:
        files: contents by relative name.
        given: name of the one that is read, empty for the folder of all.
    """

    files: Mapping[str, bytes]
    given: str = ""

    @classmethod
    def of(cls, path: Path, given: str | None = None) -> Sample:
        """Take a file, or a folder with all that is in it."""
        if path.is_file():
            return cls({path.name: path.read_bytes()}, path.name)
        inside = sorted(each for each in path.rglob("*") if each.is_file())
        files = {str(each.relative_to(path)): each.read_bytes() for each in inside}
        return cls(files, given or "")

    @property
    def small(self) -> bool:
        return 0 < sum(map(len, self.files.values())) <= LARGEST


def found(*patterns: str) -> tuple[Sample, ...]:
    """Return the small files of the fixtures that match."""
    paths = sorted(path for pattern in patterns for path in FIXTURES.glob(pattern))
    return tuple(sample for path in paths if (sample := Sample.of(path)).small)


def kept(target: str) -> dict[str, Sample]:
    """Return what once failed, by name."""
    folder = KEPT / target.replace(" ", "-")
    return {path.name: Sample.of(path) for path in sorted(folder.glob("*"))}


@cache
def by_format() -> Mapping[str, tuple[Sample, ...]]:
    """Return the small adapters of the fixtures by the format that each is told to be."""
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    taken: set[Path] = set()
    for path in sorted(FIXTURES.rglob("*")):
        inside = not taken.isdisjoint(path.parents) or not _SKIPPED.isdisjoint(path.parts)
        if inside or (name := _format(path)) is None:
            continue
        if path.is_dir():
            if any(_format(each) for each in path.iterdir() if each.is_dir()):
                continue
            taken.add(path)
        if (sample := Sample.of(path)).small:
            samples[name].append(sample)
    return {name: tuple(each) for name, each in samples.items()}


def _format(path: Path) -> str | None:
    try:
        return detect(path).name
    except AdapterKitError:
        return None
