"""How a merged model is written, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.merging.into.proving import CarriedProof
from adapterkit.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.destination import Directory
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.planning import Source


@dataclass(frozen=True, slots=True)
class Write:
    """Where a model is written, and how.

    Attributes:
        destination: directory, or file.
        jobs: tensors at a time.
        progress: called with the bytes that are done, and all of them.
        resume: whether to go on where a killed merge ended.
        force: whether to replace what is there.
        proof: what the model carries, if anything.
    """

    destination: Path
    jobs: int
    progress: Callable[[int, int], None] | None
    resume: bool
    force: bool
    proof: CarriedProof | None

    def output(self, sources: Sequence[Source], directory: Directory | None = None) -> Output:
        """Return the destination; the adapters are not replaced by it."""
        read = [source.adapter.provenance for source in sources]
        return Output(
            self.destination,
            force=self.force,
            directory=directory,
            spared=[provenance.path for provenance in read if provenance],
            resume=self.resume,
        )

    def proven(self, path: Path, reports: Sequence[TensorReport]) -> None:
        """Have a finished model carry its proof, if it is to carry one.

        Raises:
            ProofError: if the model is another one with it.
        """
        if self.proof is not None:
            self.proof.carry(path, reports)
