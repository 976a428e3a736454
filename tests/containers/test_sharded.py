"""Sharded checkpoints of torch and DeepSpeed mean what the live model means, bit for bit."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conformance.making import quiet
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from terminal import PEFT, ROOT, invoke

from adapterkit import convert, inspect
from adapterkit.containers.dcp import read_dcp
from adapterkit.containers.tiles import Tile, gap, joined
from adapterkit.containers.zero import read_zero
from adapterkit.dtype import DType
from adapterkit.errors import (
    AdapterKitError,
    FormatError,
    NotFoundError,
    TruncatedFileError,
    UnsafePickleError,
    UnsupportedError,
    UsageError,
)
from adapterkit.tensor import LazyTensor
from fixtures.generators import sharded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata

SHARDED = ROOT / "fixtures" / "sharded"
CHECKPOINTS = ("dcp", "shards", "zero2", "zero3")
Tensors = dict[str, torch.Tensor]


def written(source: Path, out: Path, alpha: float | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Convert to PEFT; return its tensors and config."""
    convert(source, out, to="peft", alpha=alpha)
    config = json.loads((out / "adapter_config.json").read_text())
    return load_file(out / "adapter_model.safetensors"), config


def same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model whose every trained tensor is random: LoRA, DoRA, an embedding, a saved head."""
    config = transformers.AutoConfig.from_pretrained(PEFT / "base")
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=True,
        rank_pattern={"k_proj": 2},
        target_modules=["q_proj", "k_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    with quiet():
        tuned: Any = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tuned


def save(state: dict[str, Any], folder: Path) -> Path:
    with quiet():
        dcp.save(state, checkpoint_id=folder)
    return folder


def saved_by_peft(model: Any, folder: Path) -> Tensors:
    with quiet():
        model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def test_a_whole_model_saved_by_torch_is_the_adapter_that_peft_saves(
    trained: Any, tmp_path: Path
) -> None:
    wanted = saved_by_peft(trained, tmp_path / "peft")
    run = tmp_path / "run" / "checkpoint-3"
    save({"model": trained.state_dict()}, run / "pytorch_model_fsdp_0")
    shutil.copy(tmp_path / "peft" / "adapter_config.json", run)
    found, config = written(run, tmp_path / "out")
    same(found, wanted)
    assert (config["lora_alpha"], config["rank_pattern"]) == (6, {"k_proj": 2})


def test_what_the_optimizer_stepped_is_the_adapter(trained: Any, tmp_path: Path) -> None:
    wanted = saved_by_peft(trained, tmp_path / "peft")
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    state = {name: {"exp_avg": torch.zeros(2)} for name in names}
    save({"model": trained.state_dict(), "optimizer": {"state": state}}, tmp_path / "dcp")
    found, config = written(tmp_path / "dcp", tmp_path / "out", alpha=6)
    same(found, {name: x for name, x in wanted.items() if ".base_layer." not in name})
    assert config["use_dora"]
    assert any(
        "optimizer has no state" in note for note in inspect(tmp_path / "dcp", alpha=6).notes
    )


RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from torch.distributed._shard.sharded_tensor import Shard as Piece
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

def train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state = torch.load(f"{folder}/state.pt", weights_only=True)
    numbered = enumerate(state.items())
    parted = {n: distribute_tensor(t, mesh, [Shard(i % 2)]) for i, (n, t) in numbered}
    dcp.save({"model": parted}, checkpoint_id=f"{folder}/dtensor")

    dcp.save(parted, storage_writer=dcp.HuggingFaceStorageWriter(
        path=f"{folder}/shards", save_distributed=True))
    halves = {n: t.bfloat16() for n, t in parted.items()}
    dcp.save({"app": {"model": halves, "step": torch.ones(1)}}, checkpoint_id=f"{folder}/bf16")
    torch.save({n: distribute_tensor(t, mesh, [Shard(0)]).to_local() for n, t in state.items()},
               f"{folder}/slice_rank{rank}.pt")
    torch.save(parted, f"{folder}/dtensor_rank{rank}.pt")
    pieces = {}
    for name, tensor in state.items():
        rows = tensor.shape[0] // 3
        begin, size = ((0, rows), (rows, tensor.shape[0] - rows))[rank]
        local = Piece.from_tensor_and_offsets(
            tensor[begin : begin + size].clone(), [begin, 0], rank)
        pieces[name] = init_from_local_shards([local], *tensor.shape)
    dcp.save(pieces, checkpoint_id=f"{folder}/sharded")
    dist.destroy_process_group()

if __name__ == "__main__":
    processes.spawn(train, (sys.argv[1],), nprocs=2)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved of one adapter."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(truth(), folder / "state.pt")
    (folder / "train.py").write_text(RANKS)
    subprocess.run([sys.executable, "train.py", folder], cwd=folder, check=True, timeout=300)
    return folder


def truth() -> Tensors:
    return {
        name: torch.tensor(sharded.values(name)).reshape(shape)
        for name, shape in sharded.SHAPES.items()
    }


def plain(state: Tensors) -> Tensors:
    return {name.replace(".default", ""): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("kind", ["dtensor", "sharded", "shards"])
def test_what_two_ranks_saved_is_joined(kind: str, ranks: Path, tmp_path: Path) -> None:
    found, _ = written(ranks / kind, tmp_path / "out", alpha=6)
    same(found, plain(truth()))


def test_half_precision_under_other_keys_is_joined(ranks: Path, tmp_path: Path) -> None:
    found, _ = written(ranks / "bf16", tmp_path / "out", alpha=6)
    same(found, {name: tensor.bfloat16() for name, tensor in plain(truth()).items()})


MESH = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

def train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    state = torch.load(f"{folder}/state.pt", weights_only=True)
    for name, parts in {
        "both": [Shard(0), Shard(1)], "rows": [Shard(0), Shard(0)], "hsdp": [Replicate(), Shard(0)],
    }.items():
        parted = {n: distribute_tensor(t, mesh, parts) for n, t in state.items()}
        dcp.save({"model": parted}, checkpoint_id=f"{folder}/{name}")
        writer = dcp.HuggingFaceStorageWriter(path=f"{folder}/{name}-shards", save_distributed=True)
        dcp.save(parted, storage_writer=writer)
    dist.destroy_process_group()

if __name__ == "__main__":
    processes.spawn(train, (sys.argv[1],), nprocs=4)
"""


def test_a_mesh_of_four_ranks_is_joined(tmp_path: Path) -> None:
    torch.save(truth(), tmp_path / "state.pt")
    (tmp_path / "train.py").write_text(MESH)
    subprocess.run([sys.executable, "train.py", tmp_path], cwd=tmp_path, check=True, timeout=300)
    for kind in ("both", "rows", "hsdp"):
        for folder in (kind, f"{kind}-shards"):
            found, _ = written(tmp_path / folder, tmp_path / "out" / folder, alpha=6)
            same(found, plain(truth()))


def test_a_slice_of_one_rank_is_refused_as_that(ranks: Path, tmp_path: Path) -> None:
    for alone in (ranks / "slice_rank0.pt", ranks / "slice_rank1.pt"):
        with pytest.raises(FormatError, match="is one rank's slice of a sharded model"):
            convert(alone, tmp_path / "out", to="peft", alpha=6)
    with pytest.raises(FormatError, match="one rank's part of distributed tensors"):
        inspect(ranks / "dtensor_rank1.pt", alpha=6)


def test_a_slice_beside_its_config_is_refused_as_that(ranks: Path, tmp_path: Path) -> None:
    shutil.copy(ranks / "slice_rank0.pt", tmp_path / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="this is one rank's slice of a sharded model"):
        convert(tmp_path, tmp_path / "out", to="peft")


def test_the_last_shard_is_missed_by_the_ranks(tmp_path: Path) -> None:
    folder = copied("shards", tmp_path)
    next(folder.glob("shard-00002*")).unlink()
    with pytest.raises(FormatError, match=r"ranks disagree.* one rank's slice of a sharded"):
        convert(folder, tmp_path / "out", to="peft", alpha=6)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_fixture_is_the_adapter_that_was_parted(name: str, tmp_path: Path) -> None:
    found, config = written(SHARDED / name, tmp_path / "out", alpha=sharded.ALPHA)
    same(found, plain(truth()))
    assert (config["r"], config["lora_alpha"]) == (sharded.RANK, sharded.ALPHA)


def test_torch_reads_the_fixture_alike() -> None:
    state = {f"model.{name}": torch.zeros(shape) for name, shape in sharded.SHAPES.items()}
    from torch.distributed.checkpoint.state_dict_loader import load

    with quiet():
        load(state, checkpoint_id=SHARDED / "dcp")
    same(state, {f"model.{name}": tensor for name, tensor in truth().items()})


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


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(SHARDED / name, folder / name)
    return folder / name if name in {"dcp", "shards"} else folder / name / "global_step1"


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


def zero(
    folder: Path, stage: int, *, ranks: int, groups: int = 1, padding: int = 0, buckets: int = 1
) -> Path:
    """Save the adapter as DeepSpeed parts it, with torch."""
    folder.mkdir()
    items = list(truth().items())
    size = -(-len(items) // groups)
    parted = [OrderedDict(items[at : at + size]) for at in range(0, len(items), size)]
    model = {
        "module": {name: torch.zeros(0) for name, _ in items},
        "param_shapes": [{name: x.shape for name, x in group.items()} for group in parted],
        "buffer_names": [],
        "shared_params": {},
        "frozen_param_shapes": None,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        state: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks}
        if stage == 3:
            row = torch.cat([share(x, rank, ranks) for _, x in items])
            state["fp32_flat_groups"] = list(row.tensor_split(buckets))
        else:
            state["single_partition_of_fp32_groups"] = [
                flat(group, padding, ranks).tensor_split(ranks)[rank].clone() for group in parted
            ]
            if padding:
                state["param_alignment_paddings"] = [[padding] * len(group) for group in parted]
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / name)
    return folder


def flat(group: Tensors, padding: int, ranks: int) -> torch.Tensor:
    row = torch.cat([torch.cat([x.reshape(-1), torch.zeros(padding)]) for x in group.values()])
    return torch.cat([row, torch.zeros(-len(row) % (2 * ranks))])


def share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = -(-tensor.numel() // ranks)
    row = torch.cat([tensor.reshape(-1), torch.zeros(size * ranks - tensor.numel())])
    return row[rank * size : (rank + 1) * size].clone()


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, {"ranks": 1}),
        (2, {"ranks": 3, "groups": 2}),
        (2, {"ranks": 4, "padding": 5}),
        (3, {"ranks": 1}),
        (3, {"ranks": 5}),
        (3, {"ranks": 11, "buckets": 3}),
    ],
)
def test_partitions_are_joined_however_many(
    stage: int, options: dict[str, int], tmp_path: Path
) -> None:
    folder = zero(tmp_path / "step", stage, **options)
    found = {name: torch.tensor(x.numpy()) for name, x in read_zero(folder).tensors.items()}
    same(found, truth())


@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_of_other_parameters_are_refused(stage: int, tmp_path: Path) -> None:
    folder = zero(tmp_path / "step", stage, ranks=2)
    path = folder / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=True)
    model["param_shapes"][0]["more"] = torch.Size([9, 9])
    torch.save(model, path)
    with pytest.raises(FormatError, match=r"more: has 0 of 8[12] elements|more: has \d of 81"):
        read_zero(folder)


@given(st.data())
def test_boxes_that_tile_a_tensor_make_it_again(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    whole = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        offset, size = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, size[axis]))
        parts = ((offset[axis], cut), (offset[axis] + cut, size[axis] - cut))
        for begin, length in parts:
            if length:
                boxes.append(
                    (
                        (*offset[:axis], begin, *offset[axis + 1 :]),
                        (*size[:axis], length, *size[axis + 1 :]),
                    )
                )
    assert gap(shape, boxes) is None
    tiles = [
        Tile(o, LazyTensor.of(whole[tuple(slice(b, b + n) for b, n in zip(o, s, strict=True))]))
        for o, s in boxes
    ]
    np.testing.assert_array_equal(joined(DType.F32, shape, tiles).numpy(), whole)
    assert gap(shape, boxes[1:]) is not None
    assert gap(shape, [*boxes, boxes[0]]) is not None


def test_an_index_is_read_in_bounds(tmp_path: Path) -> None:
    folder = copied("dcp", tmp_path)
    assert len(read_dcp(folder).entries) == len(sharded.SHAPES)
