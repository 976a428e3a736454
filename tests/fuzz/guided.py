"""Fuzzes one target by the code that its inputs reach, where atheris is installed.

    python -m fuzz.guided TARGET SECONDS

from the folder `tests`. What is changed is the first file of a sample; atheris has wheels for few
versions of Python, so it is no dependency: `pip install atheris` where it has one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapterkit"]):
    from fuzz.harness import Room, outcome
    from fuzz.samples import Sample
    from fuzz.targets import TARGETS

# Bytes of an input.
_LONGEST = 1 << 14


def main() -> None:
    """Run one target; a finding ends the process with its words."""
    name, seconds = sys.argv[1:3]
    target = TARGETS[name]
    sample = min(target.samples, key=lambda each: sum(map(len, each.files.values())))
    changed = next(iter(sorted(sample.files)))
    with tempfile.TemporaryDirectory() as folder:
        room, corpus = Room(Path(folder, "room")), Path(folder, "corpus")
        for path in (Path(folder, "room"), corpus):
            path.mkdir()
        for place, each in enumerate(target.samples):
            if changed in each.files or len(each.files) == 1:
                (corpus / str(place)).write_bytes(next(iter(each.files.values())))

        def one(data: bytes) -> None:
            files = {**sample.files, changed: data}
            kind, words = outcome(target, room.put(Sample(files, sample.given)))
            if kind not in {"read", "refused"}:
                raise AssertionError(f"{kind}: {words}")

        options = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", "-rss_limit_mb=3000"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
