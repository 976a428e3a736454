"""Sharded checkpoints of torch and DeepSpeed mean what the live model means, bit for bit."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conformance.making import quiet
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sharded_checkpoints import CHECKPOINTS, SHARDED, Tensors, copied, save, truth, zero
from terminal import PEFT, ROOT

from adapterkit import convert, inspect
from adapterkit.containers.dcp import read_dcp
from adapterkit.containers.folders import step_folder
from adapterkit.containers.tiles import Tile, gap, joined
from adapterkit.containers.zero import read_zero
from adapterkit.dtype import DType
from adapterkit.errors import (
    FormatError,
)
from adapterkit.tensor import LazyTensor
from fixtures.generators import sharded

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


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
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
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
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may ask a finishing interpreter for its lock, and abort it

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
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
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
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may ask a finishing interpreter for its lock, and abort it

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
    folder = zero(tmp_path / "step", truth(), stage, **options)
    found = {name: torch.tensor(x.numpy()) for name, x in read_zero(folder).tensors.items()}
    same(found, truth())


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_what_deepspeed_saved_is_what_it_trained(name: str, tmp_path: Path) -> None:
    """Two ranks of DeepSpeed 0.19.8 trained; it gathered the parameters itself."""
    folder = ROOT / "fixtures" / "deepspeed" / name
    trained = load_file(folder.with_suffix(".safetensors"))
    step = step_folder(folder)
    assert step is not None
    found = {name: torch.tensor(x.numpy()) for name, x in read_zero(step).tensors.items()}
    same(found, trained)
    tensors, config = written(folder, tmp_path / "out")
    saved = {name.replace(".default", "").removesuffix(".weight"): x for name, x in trained.items()}
    same({name.removesuffix(".weight"): x for name, x in tensors.items()}, saved)
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 6, True)


def test_a_checkpoint_without_zero_holds_the_model_itself(tmp_path: Path) -> None:
    """Stage 0, as DeepSpeed saves it: nothing is parted, and no parameter is listed as trained."""
    halves = {name: tensor.bfloat16() for name, tensor in truth().items()}
    state = {"module": OrderedDict(halves), "param_shapes": None, "optimizer": {"cur_iter": 2}}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    read = read_zero(tmp_path)
    assert read.stage == 0
    found = {n: torch.tensor(x.numpy().astype(np.float32)) for n, x in read.tensors.items()}
    same(found, {name: tensor.float() for name, tensor in halves.items()})


@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_of_other_parameters_are_refused(stage: int, tmp_path: Path) -> None:
    folder = zero(tmp_path / "step", truth(), stage, ranks=2)
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
