"""Checkpoints of many ranks from which something is missing or wrong are refused by name."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sharded_checkpoints import CHECKPOINTS, SHARDED, copied, save, truth
from terminal import PEFT, invoke

from adapterkit import inspect
from adapterkit.errors import (
    AdapterKitError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
    UnsafePickleError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata


@pytest.mark.parametrize(
    "path",
    [
        "dcp/.metadata",
        "dcp/__1_0.distcp",
        "shards/shard-00002-model-00001-of-00001.safetensors",
        "zero2/global_step1",
        "zero3/global_step1/zero_pp_rank_1_mp_rank_00_model_states.pt",
    ],
)
def test_a_file_of_a_checkpoint_means_all_of_it(path: str) -> None:
    assert inspect(SHARDED / path, alpha=6).modules == 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_alpha_is_asked_for_and_the_checkpoint_named(name: str) -> None:
    result = invoke("inspect", SHARDED / name)
    assert result.exit_code == 2
    torch_s = name in {"dcp", "shards"}
    what = "sharded checkpoint of torch" if torch_s else f"ZeRO stage {name[-1]} of 2 ranks"
    assert what in result.stderr
    assert "--alpha" in result.stderr


def test_a_config_above_scales_and_contradicts(tmp_path: Path) -> None:
    shutil.copytree(SHARDED / "zero3", tmp_path / "checkpoint-1")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = inspect(tmp_path / "checkpoint-1").scales
    assert [float(scale) for scale in scales] == [pytest.approx(12 / math.sqrt(3))]
    with pytest.raises(UsageError, match=r"alpha is 12 in .*, --alpha is 6"):
        inspect(tmp_path / "checkpoint-1", alpha=6)


def edited(change: Callable[[Metadata], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = folder / ".metadata"
        found = pickle.loads(index.read_bytes())  # noqa: S301
        found.storage_meta = None
        change(found)
        index.write_bytes(pickle.dumps(found))

    return edit


def first_place(found: Metadata, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(next(iter(found.storage_data.values())), name, value)


def lose_a_chunk(found: Metadata) -> None:
    next(iter(found.state_dict_metadata.values())).chunks.pop()


def repeat_a_chunk(found: Metadata) -> None:
    chunks: Any = next(iter(found.state_dict_metadata.values())).chunks
    chunks[1].offsets = torch.Size([1, 0])


OPTIM = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], type[AdapterKitError], str]] = {
    "a file of a rank": (
        "dcp",
        lambda folder: (folder / "__1_0.distcp").unlink(),
        NotFoundError,
        r"__1_0\.distcp: .*q_proj.lora_A.*copy the files of all ranks",
    ),
    "a short file": (
        "dcp",
        lambda folder: (folder / "__1_0.distcp").write_bytes(b"PK"),
        TruncatedFileError,
        "ends at byte 2",
    ),
    "a chunk": ("dcp", edited(lose_a_chunk), FormatError, "its pieces have 10 of 15 elements"),
    "chunks that overlap": (
        "dcp",
        edited(repeat_a_chunk),
        FormatError,
        "two of its pieces overlap",
    ),
    "a place": (
        "dcp",
        edited(lambda found: found.storage_data.pop(next(iter(found.storage_data)))),
        FormatError,
        r"does not say where its piece at \[0, 0\] is",
    ),
    "a place outside": (
        "dcp",
        edited(lambda found: first_place(found, relative_path="../x.distcp")),
        FormatError,
        "no .distcp file beside the index",
    ),
    "another chunk": (
        "dcp",
        edited(lambda found: first_place(found, offset=0, relative_path="__1_0.distcp")),
        FormatError,
        "the index says|contradicts its directory",
    ),
    "a shard between others": (
        "shards",
        lambda folder: next(folder.glob("shard-00001*")).unlink(),
        NotFoundError,
        r"shard-00001-model-00001-of-00001\.safetensors: is missing",
    ),
    "where shards begin": (
        "shards",
        lambda folder: shutil.copy(
            PEFT / "tiny" / "adapter_model.safetensors", next(folder.glob("shard-00002*"))
        ),
        FormatError,
        "has no DCP_SHARDING_INFO",
    ),
    "compression": (
        "dcp",
        edited(lambda found: first_place(found, transform_descriptors=["zstd"])),
        UnsupportedError,
        "is compressed",
    ),
    "code": (
        "dcp",
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x02cos\nsystem\n."),
        UnsafePickleError,
        r"asks for os\.system; nothing was executed",
    ),
    "a rank of ZeRO 2": (
        "zero2",
        lambda folder: (folder / OPTIM).unlink(),
        NotFoundError,
        "zero_pp_rank_1_mp_rank_00_optim_states.pt of 2 ranks",
    ),
    "a rank of ZeRO 3": (
        "zero3",
        lambda folder: (folder / OPTIM).unlink(),
        NotFoundError,
        "zero_pp_rank_1_mp_rank_00_optim_states.pt of 2 ranks",
    ),
    "all ranks of ZeRO 3": (
        "zero3",
        lambda folder: [file.unlink() for file in folder.glob("*_optim_states.pt")],
        NotFoundError,
        r"lies in \*_optim_states.pt files, and none is here",
    ),
    "tensor parallelism": (
        "zero2",
        lambda folder: (folder / "mp_rank_01_model_states.pt").write_bytes(b"PK"),
        UnsupportedError,
        "parted by tensors or experts too",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_or_wrong_is_refused_by_name(what: str, tmp_path: Path) -> None:
    name, breaking, error, message = BROKEN[what]
    folder = copied(name, tmp_path)
    breaking(folder)
    with pytest.raises(error, match=message):
        inspect(folder, alpha=6)


def test_a_checkpoint_without_lora_is_named(tmp_path: Path) -> None:
    save({"model": {"model.norm.weight": torch.ones(4)}}, tmp_path / "dcp")
    with pytest.raises(FormatError, match=r"sharded checkpoint of torch.*none is a factor"):
        inspect(tmp_path / "dcp", alpha=6)


def test_two_adapters_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    save({"model": truth(), "average": truth()}, tmp_path / "dcp")
    with pytest.raises(UnsupportedError, match=r"a LoRA in 2 dictionaries"):
        inspect(tmp_path / "dcp", alpha=6)


def test_an_adapter_of_peft_beside_the_checkpoint_is_the_adapter(tmp_path: Path) -> None:
    shutil.copytree(PEFT / "tiny", tmp_path / "checkpoint-1")
    shutil.copytree(SHARDED / "zero2", tmp_path / "checkpoint-1", dirs_exist_ok=True)
    assert inspect(tmp_path / "checkpoint-1").format == "peft"
