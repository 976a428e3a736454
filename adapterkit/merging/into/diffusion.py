"""Diffusion models merged: a directory of components, or a single file, with the same names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.base.diffusion import PIPELINE
from adapterkit.base.model import BaseModel
from adapterkit.base.places import Places
from adapterkit.destination import Directory
from adapterkit.formats.diffusion.on_base import on_base
from adapterkit.merging.into.huggingface import checkpoint_steps
from adapterkit.merging.into.journal import journalled, plan_hash
from adapterkit.merging.into.shards import Shard, planned_shards
from adapterkit.merging.into.steps import Change
from adapterkit.merging.into.writing import write_files
from adapterkit.stamps import BESIDE
from adapterkit.storage import copy_file
from adapterkit.work import counter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.merging.into.journal import Journal
    from adapterkit.merging.into.report import TensorReport
    from adapterkit.merging.into.steps import Step
    from adapterkit.merging.into.write import Write
    from adapterkit.merging.into.writing import OutputFile, Progress
    from adapterkit.merging.planning import Source
    from adapterkit.storage import FileSlice

MODEL = Directory("model directory", marks=lambda: (PIPELINE, "config.json"), files=lambda: ("*",))
# Other copies of a component's weights: they would still be the unmerged ones.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class DiffusionPlan:
    """What will be written.

    Attributes:
        base: the base.
        shards: files with tensors.
        others: files to copy, relative to the base; none for a single file.
        left_out: files that hold other copies of what is merged.
        name: of a single file.
    """

    base: BaseModel
    shards: tuple[Shard, ...]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]
    name: str = ""

    def named(self, name: str) -> DiffusionPlan:
        """Return the plan of a single file of this name."""
        return replace(self, name=name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def outputs(self) -> list[OutputFile]:
        """The files with tensors, by their paths in the directory."""
        if self.base.layout == "checkpoint":
            return [replace(shard.output(), name=self.name) for shard in self.shards]
        return [
            replace(shard.output(), name=shard.path.relative_to(self.base.path).as_posix())
            for shard in self.shards
        ]

    @property
    def spans(self) -> list[FileSlice]:
        """The byte ranges of the base that are read."""
        return [span for file in self.outputs for span in file.spans()]


def merge_diffusion(
    sources: Sequence[Source], base: BaseModel, write: Write
) -> tuple[list[TensorReport], list[str]]:
    """Write a diffusion model with adapters merged into it.

    Raises:
        UnsupportedError: if an adapter does not fit.
    """
    plan = plan_diffusion(respelled(sources, base), base)
    single = base.layout == "checkpoint"
    if single:
        plan = plan.named(write.destination.name)
    with write.output(sources, None if single else MODEL) as output:
        others = [base.path / path for path in plan.others]
        key = plan_hash(sources, plan.spans, others, {})
        count = counter(plan.nbytes, write.progress)
        folder = output.folder if single else output.path
        with journalled(output, key) as journal:
            tensors = write_diffusion_base(plan, folder, journal, write.jobs, count)
            write.proven(output.path, tensors)
    left = [f"{path} is not copied: it holds the unmerged weights" for path in plan.left_out]
    return tensors, left


def respelled(sources: Sequence[Source], base: BaseModel) -> list[Source]:
    """Return adapters under the names of a diffusion base."""
    return [replace(source, adapter=on_base(source.adapter, base)) for source in sources]


def plan_diffusion(sources: Sequence[Source], base: BaseModel) -> DiffusionPlan:
    """Decide what every stored tensor gets, before anything is written.

    Raises:
        IncompatibleBaseError: if an adapter does not fit the base; names what.
        UnsupportedError: if something of it has no place there.
    """
    names = Places(base)
    steps: dict[str, list[Step]] = {}
    for source in sources:
        for name, more in checkpoint_steps(source, names).items():
            steps.setdefault(name, []).extend(more)
    changes = {
        name: Change(
            name,
            base.tensors[name],
            tuple(given),
            base.tensors[name].dtype,
            base.tensors[name].shape,
        )
        for name, given in steps.items()
    }
    shards = planned_shards(base.tensors, changes)
    if base.layout == "checkpoint":
        return DiffusionPlan(base, tuple(shards), (), ())
    others, left_out = _other_files(base, {shard.path for shard in shards})
    return DiffusionPlan(base, tuple(shards), others, left_out)


def _other_files(base: BaseModel, shards: set[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return what is copied and what is left out, hidden files and folders aside."""
    merged = {base.path / folder for folder in base.folders.values()}
    indexes = {shard.parent / "diffusion_pytorch_model.safetensors.index.json" for shard in shards}
    indexes |= {shard.parent / "model.safetensors.index.json" for shard in shards}
    copied: list[Path] = []
    left: list[Path] = []
    for path in sorted(base.path.rglob("*")):
        relative = path.relative_to(base.path)
        if path.is_dir() or path in shards or any(p.startswith(".") for p in relative.parts):
            continue
        if relative.as_posix() == BESIDE:
            continue
        copy = path.parent in merged and path.name.endswith(_WEIGHTS) and path not in indexes
        (left if copy else copied).append(relative)
    return tuple(copied), tuple(left)


def write_diffusion_base(
    plan: DiffusionPlan, staging: Path, journal: Journal, jobs: int, progress: Progress
) -> list[TensorReport]:
    """Write the components, then everything else; what the journal has is skipped."""
    staging.mkdir(exist_ok=True)
    for file in plan.outputs:
        (staging / file.name).parent.mkdir(parents=True, exist_ok=True)
    reports = write_files(plan.outputs, staging, journal, jobs, progress)
    for other in plan.others:
        (staging / other).parent.mkdir(parents=True, exist_ok=True)
        copy_file(plan.base.path / other, staging / other)
    order = {name: place for place, name in enumerate(plan.base.tensors)}
    return sorted(reports, key=lambda report: order[report.tensor])
