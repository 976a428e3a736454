"""What is passed by mistake is named as what it is, in one line, with a next step."""

from __future__ import annotations

import shlex
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
from quiet_peft import quiet_peft
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


def gguf_of(architecture: str, kind: str, tensor: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        writer = gguf.GGUFWriter(folder / "x.gguf", architecture)
        writer.add_type(kind)
        writer.add_tensor(tensor, np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "x.gguf"

    return write


def saved_by_torch(root: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(root, folder / "x.pt")
        return folder / "x.pt"

    return write


def tensors_of(*names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file({name: np.ones((2, 8), np.float32) for name in names}, folder / "x.safetensors")
        return folder / "x.safetensors"

    return write


def pickled_settings(folder: Path) -> Path:
    from transformers import TrainingArguments

    return saved_by_torch(TrainingArguments(output_dir=str(folder)))(folder)


def pickled_model(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from small_llama import small_llama

    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with quiet_peft():
        return saved_by_torch(get_peft_model(small_llama(), settings))(folder)


def vocabulary_alone(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
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
    "control vector": gguf_of("controlvector", "controlvector", "direction.1"),
    "importance matrix": gguf_of("llama", "imatrix", "blk.0.attn_q.weight.in_sum2"),
    "mmproj": gguf_of("clip", "mmproj", "v.blk.0.attn_q.weight"),
    "whole model, not an adapter": gguf_of("llama", "model", "token_embd.weight"),
    "state of an optimizer": saved_by_torch({"state": {0: {"step": torch.ones(())}}}),
    "state of random generators": saved_by_torch({"cpu": torch.get_rng_state(), "python": (3,)}),
    "holds no tensors": saved_by_torch({"last_epoch": 3}),
    "textual inversion": saved_by_torch({"<cat>": torch.ones(8)}),
    "AdapterHub": saved_by_torch({"bert.layer.0.adapters.a.adapter_down.weight": torch.ones(2, 8)}),
    "virtual tokens": tensors_of("prompt_embeddings"),
    "value head": tensors_of("v_head.summary.weight", "v_head.summary.bias"),
    "emb": tensors_of("emb_params"),
    "training saved an empty adapter": tensors_of(),
    "pickle of a training run's settings": pickled_settings,
    "pickle of a whole PEFT model": pickled_model,
}
PICKLES = {what for what in STRANGERS if what.startswith("pickle of")}
MODELS = {"adapterkit extract --base", "whole model, not an adapter"}


@pytest.mark.parametrize("command", ["inspect", "validate"])
@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_named(what: str, command: str, tmp_path: Path) -> None:
    result = invoke(command, STRANGERS[what](tmp_path))
    if command == "validate" and what in PICKLES:
        assert result.exit_code == 1
        assert f"AK404 is a {what}" in result.stdout
        assert "adapterkit convert" not in result.stdout
        return
    assert result.exit_code == 3
    assert what in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
@pytest.mark.parametrize("what", ["Git LFS pointer", "web page"])
def test_a_stranger_in_an_adapters_folder_is_named(name: str, what: str, tmp_path: Path) -> None:
    folder = shutil.copytree(PEFT / "tiny", tmp_path / "a")
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
    shutil.copy(STRANGERS[what](tmp_path), folder / name)
    for command in (("inspect",), ("stack", "--for", "vllm")):
        result = invoke(*command, folder)
        assert result.exit_code == 3
        assert f"{name}: is a {what}" in result.stderr


@pytest.mark.parametrize("what", [what for what in STRANGERS if what not in MODELS])
def test_a_stranger_is_no_base_and_is_told_as_such(what: str, tmp_path: Path) -> None:
    stranger = STRANGERS[what](tmp_path)
    result = invoke("convert", PEFT / "tiny", "-o", tmp_path / "o.gguf", "--base", stranger)
    assert result.exit_code in {3, 4}
    assert result.stderr.count("\n") == 1
    assert "adapter_config.json" not in result.stderr
    assert "b'" not in result.stderr


def test_a_vocabulary_without_weights_is_no_base(tmp_path: Path) -> None:
    base = vocabulary_alone(tmp_path)
    for command in (("inspect",), ("convert", "-o", tmp_path / "o.gguf"), ("validate",)):
        result = invoke(*command, PEFT / "tiny", "--base", base)
        assert result.exit_code == 3
        assert "is a GGUF without weights" in result.stderr


def test_a_pickled_model_saves_itself_as_advised(tmp_path: Path) -> None:
    with quiet_peft():
        model = torch.load(pickled_model(tmp_path), weights_only=False)
        model.save_pretrained(tmp_path / "saved")
    assert convert(tmp_path / "saved", tmp_path / "p", to="peft").modules == 2


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


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("README.md", "is no file of weights"),
        ("tokenizer.json", "is of a tokenizer"),
        ("config.json", "is the config of a model"),
        (".gitattributes", "is text, not weights"),
        ("loss.png", "is a picture"),
    ],
)
def test_a_config_does_not_make_an_adapter_of_what_lies_beside(
    name: str, what: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(PEFT / "tiny", tmp_path / "a")
    begin = b"\x89PNG\r\n\x1a\n\0" if name.endswith(".png") else b'{"some": "text"}\n'
    (folder / name).write_bytes(begin)
    result = invoke("inspect", folder / name)
    assert result.exit_code == 3
    assert f"{name}: {what}" in result.stderr


def test_safetensors_beside_a_config_are_read_under_any_name(tmp_path: Path) -> None:
    folder = shutil.copytree(PEFT / "tiny", tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        assert invoke("inspect", path).exit_code == 0


def test_a_command_that_is_advised_has_the_path_as_a_shell_takes_it(tmp_path: Path) -> None:
    model = tmp_path / "it's a model"
    model.mkdir()
    said = invoke("inspect", whole_model(model)).stderr
    words = shlex.split(said.rpartition(": ")[2])
    assert words[words.index("--tuned") + 1] == str(model)
