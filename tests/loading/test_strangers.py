"""What is passed by mistake is named as what it is, in one line, with a next step."""

from __future__ import annotations

import shutil
import tarfile
import warnings
import zipfile
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file
from terminal import PEFT, invoke

from adapterkit import convert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATE = {
    "base_model.model.model.layers.0.q_proj.lora_A.default.weight": torch.randn(4, 32),
    "base_model.model.model.layers.0.q_proj.lora_B.default.weight": torch.randn(16, 4),
}


def bytes_of(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "x").write_bytes(data)
        return folder / "x"

    return write


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.write(PEFT / "tiny" / "adapter_config.json", "tiny/adapter_config.json")
    return folder / "x.zip"


def tarred(mode: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with tarfile.open(folder / "x.tar", mode) as archive:
            archive.add(PEFT / "tiny", "tiny")
        return folder / "x.tar"

    return write


def gathered(folder: Path) -> Path:
    torch.save(STATE, folder / "pytorch_model_fsdp.bin")
    return folder


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(STATE, checkpoint_id=folder)
    return folder


def runs(folder: Path) -> Path:
    shutil.copytree(PEFT / "tiny", folder / "run" / "checkpoint-5")
    return folder


def whole_model(folder: Path) -> Path:
    shutil.copy(PEFT / "base" / "config.json", folder)
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors")
    return folder


def control_vector(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "x.gguf", "controlvector")
    writer.add_tensor("direction.1", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "x.gguf"


STRANGERS: dict[str, Callable[[Path], Path]] = {
    "Git LFS pointer": bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "zip archive": zipped,
    "tar archive": tarred("w"),
    "gzip": tarred("w:gz"),
    "LiteRT": bytes_of(b"\x18\0\0\0TFL3" + bytes(64)),
    "Keras": bytes_of(b"\x89HDF\r\n\x1a\n" + bytes(64)),
    "ggla": bytes_of(b"algg" + bytes(64)),
    "web page": bytes_of(b"<!DOCTYPE html><html></html>"),
    "run/checkpoint-5": runs,
    "adapterkit extract --base": whole_model,
    "control vector": control_vector,
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_named(what: str, tmp_path: Path) -> None:
    result = invoke("inspect", STRANGERS[what](tmp_path))
    assert result.exit_code == 3
    assert what in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_file_that_is_named_reads_as_advised(tmp_path: Path) -> None:
    file = gathered(tmp_path) / "pytorch_model_fsdp.bin"
    report = convert(file, tmp_path / "p", to="peft", alpha=8)
    assert report.modules == 1


def test_the_state_made_of_a_distributed_checkpoint_reads_as_advised(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    (tmp_path / "dcp").mkdir()
    dcp_to_torch_save(distributed(tmp_path / "dcp"), tmp_path / "state.pt")
    assert convert(tmp_path / "state.pt", tmp_path / "p", to="peft", alpha=8).modules == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("optimizer.pt", "state of an optimizer"),
        ("scheduler.pt", "learning rate schedule"),
        ("rng_state_3.pth", "random generators"),
        ("training_args.bin", "TrainingArguments"),
        ("trainer_state.json", "log of a training run"),
    ],
)
def test_what_a_trainer_leaves_is_named_with_the_adapter_to_pass(
    name: str, what: str, tmp_path: Path
) -> None:
    state = {"state": {0: {"exp_avg": torch.ones(4, 32)}}, "param_groups": []}
    torch.save(state, tmp_path / name)
    alone = invoke("inspect", tmp_path / name)
    assert alone.exit_code == 3
    assert what in alone.stderr
    shutil.copytree(PEFT / "tiny", tmp_path, dirs_exist_ok=True)
    beside = invoke("inspect", tmp_path / name)
    assert beside.exit_code == 3
    assert what in beside.stderr
    adapter = tmp_path / "adapter_model.safetensors"
    assert f"pass {adapter}" in beside.stderr
    assert invoke("inspect", adapter).exit_code == 0
