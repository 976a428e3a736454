"""PEFT LoRA in the sharded checkpoints of a training run: torch's (DCP) and DeepSpeed's (ZeRO).

They hold the tensors of a live model, or of its adapter, under the names of memory. What scales the
update lies in no tensor: it is in adapter_config.json beside or above, or given as alpha.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.containers.dcp import read_dcp
from adapterkit.containers.dcp_shards import read_shards
from adapterkit.containers.folders import DATA_SUFFIX, INDEX, dcp_folder, shards_folder, step_folder
from adapterkit.containers.zero import read_zero
from adapterkit.errors import NotFoundError
from adapterkit.formats.peft.bare import State, adapter_of
from adapterkit.formats.peft.state import chosen
from adapterkit.notes import Note

if TYPE_CHECKING:
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet


def read_dcp_adapter(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read the adapter of a checkpoint of torch; its tensors are joined when they are asked for.

    Args:
        path: the directory, one above it, or a file of it.
        options: `alpha` is the scale numerator where no adapter_config.json lies beside.

    Raises:
        NotFoundError: if a file of a rank is missing.
        FormatError: if a file is malformed, or there is no LoRA in the checkpoint.
        UnsupportedError: if the checkpoint is parted in a way that is not joined.
        UsageError: if alpha is not known, or given and another one in the config.
    """
    return adapter_of(_dcp_state(path), "dcp", path, options)


def read_deepspeed_adapter(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read the adapter of a checkpoint of DeepSpeed; in all else as `read_dcp_adapter`."""
    return adapter_of(_zero_state(path), "deepspeed", path, options)


def _dcp_state(path: Path) -> State:
    if shards := shards_folder(path):
        held = read_shards(shards)
        note = Note(f"joined from {held.ranks} shards, which do not say how many there were")
        what = "a sharded checkpoint of torch in safetensors"
        return State(shards, what, held.tensors, (note,), held.metadata)
    folder = dcp_folder(path)
    if folder is None:
        raise NotFoundError(f"holds no checkpoint of torch ({INDEX} and *{DATA_SUFFIX})", path=path)
    checkpoint = read_dcp(folder)
    sizes = {trail: math.prod(entry.shape) for trail, entry in checkpoint.entries.items()}
    found = chosen(sizes, folder)
    names = found.names if found else {".".join(trail): trail for trail in sizes}
    within = {trail[:-1] for trail in names.values()}
    # What an optimizer holds the state of was trained; the rest of the model was not.
    stepped = {part for trail in checkpoint.entries if trail[:-1] not in within for part in trail}
    trained = [name for name in names if name in stepped]
    notes = [*(found.notes if found else ())]
    if trained and len(trained) < len(names):
        left = len(names) - len(trained)
        notes.append(Note(f"{left} tensors left out, of which the optimizer has no state"))
    tensors = {name: checkpoint.tensor(names[name]) for name in trained or names}
    return State(folder, "a sharded checkpoint of torch (DCP)", tensors, tuple(notes))


def _zero_state(path: Path) -> State:
    folder = step_folder(path)
    if folder is None:
        raise NotFoundError("holds no step of DeepSpeed (*_model_states.pt)", path=path)
    checkpoint = read_zero(folder)
    ranks = f"{checkpoint.ranks} rank{'s' if checkpoint.ranks > 1 else ''}"
    what = f"a checkpoint of DeepSpeed, ZeRO stage {checkpoint.stage} of {ranks}"
    notes: list[str] = []
    if not checkpoint.stage:
        what = "the model states of a checkpoint of DeepSpeed"
        notes.append("no optimizer states lie beside: values are in the type of the training")
    if checkpoint.frozen:
        notes.append(f"{checkpoint.frozen} parameters left out, which were not trained")
    return State(folder, what, checkpoint.tensors, tuple(notes))
