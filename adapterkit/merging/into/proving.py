"""A merged model carries its proof: in a GGUF's metadata, else in a file of its directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.certificates import Making, ModelProof
from adapterkit.stamps import KEY, carry, contents, fill, stamped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.merging.into.gguf import EnginePlan
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.planning import Source
    from adapterkit.model import AdapterTensorSet


def model_proof(
    sources: Sequence[Source], base: BaseModel, options: Mapping[str, object]
) -> CarriedProof:
    """Look at what a model is merged from.

    Raises:
        FormatError: if a factor holds NaN or infinity.
    """
    adapters: dict[str, AdapterTensorSet] = {}
    for source in sources:
        name = Path(source.label).name
        number = sum(1 for known in adapters if known.split(" (")[0] == name)
        adapters[f"{name} ({number + 1})" if number else name] = source.adapter
    origins = [source.adapter.provenance for source in sources]
    making = Making("merge --into", options, [origin.path for origin in origins if origin])
    return CarriedProof(ModelProof(making, base, adapters))


@dataclass(frozen=True, slots=True)
class CarriedProof:
    """What a model is made from, and the place for it in the model."""

    proof: ModelProof

    def with_room(self, plan: EnginePlan) -> EnginePlan:
        """Return the plan of a file whose metadata have room for the proof."""
        blank = " " * self.proof.room(plan.tensors, plan.metadata)
        return replace(plan, metadata={**plan.metadata, KEY: blank})

    def carry(self, path: Path, reports: Sequence[TensorReport]) -> None:
        """Have a finished model carry it; every byte of the model is read once more.

        Raises:
            ProofError: if the model is another one with it.
        """
        error = max((each.noise or 0.0 for each in reports), default=0.0)
        blank = stamped(path) if path.suffix == ".gguf" and path.is_file() else None
        if blank is None:
            carry(path, lambda found: self.proof.text(found, error))
        else:
            fill(path, blank, self.proof.text(contents(path), error))
