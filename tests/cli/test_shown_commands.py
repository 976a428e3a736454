"""Every command that the help texts, README and docs/ show without its output is run, as shown.

Sessions with outputs are the business of the transcripts and of test_docs. A folder holds what the
commands name: adapters, a small llama with weights as a directory and as GGUF, tuned copies.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest
import torch
from terminal import BASE, PEFT, ROOT, TINY, invoke
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit
from adapterkit.architectures.weights import model_to_engine
from adapterkit.containers.gguf import uint32, write_gguf
from adapterkit.tensor import LazyTensor
from adapterkit_cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

WEAK = PEFT / "tiny-weak"
TINIES = ("my-adapter", "style", "before", "after", "stranger", "a", "b", "pirate", "adapters/a")
WEAKS = ("facts", "domain", "c", "adapters/b", "trusted/one", "trusted/two")
BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What needs a server, a plug-in's own format or a model of gigabytes; diffusion's is run by its own
# tests.
ELSEWHERE = ("adapterkit doctor http", "my-adapter.mine", "mine.safetensors", "--tuned merged/")
# What README shows with the output of a real model, which test_readme runs.
PRINTED = ("SmolLM2",)
# What is shown because it finds something.
FOUND = {
    "adapterkit validate my-adapter --base base/ --target llama.cpp --target vllm": 1,
    "adapterkit validate my-adapter --base base/ --target llama.cpp --target vllm@0.33": 1,
}


def below(command: click.Command, context: click.Context) -> Iterator[click.Command]:
    """Yield a command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from below(inner, context)


def shown() -> list[str]:
    """Return every command that stands alone: an example, or a line of a block without outputs."""
    lines = [
        line
        for command in below(cli, click.Context(cli))
        for line in re.findall(r"^ *(adapterkit .*)$", command.epilog or "", re.MULTILINE)
    ]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            every = block.strip().split("\n")
            said = [line.removeprefix("$ ") for line in every]
            if page.name == "README.md" or not any(line.startswith("$ ") for line in every):
                lines += [re.sub(r" {2,}#.*", "", line) for line in said]
    commands = (line for line in lines if line.startswith("adapterkit "))
    return [
        line
        for line in dict.fromkeys(commands)
        if not any(part in line for part in (*ELSEWHERE, *PRINTED))
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("shown")
    for names, source in ((TINIES, TINY), (WEAKS, WEAK), (("dora", "my-dora"), PEFT / "dora")):
        for name in names:
            shutil.copytree(source, folder / name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE))
    model.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "model")
    base = adapterkit.open_base(folder / "base")
    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    state = {name: tensor.numpy() for name, tensor in base.tensors.items()}
    tensors = model_to_engine(base.architecture, base.sizes, state)
    write_gguf(
        folder / "base.gguf",
        {"general.architecture": "llama"}
        | {f"llama.{name}": uint32(value) for name, value in sizes.items()},
        {name: LazyTensor.of(np.ascontiguousarray(array)) for name, array in tensors.items()},
    )
    for name in ("my-adapter", "style", "facts"):
        adapterkit.convert(folder / name, folder / f"{name}.gguf", base=base)
    adapterkit.merge_into([TINY], base, folder / "tuned")
    adapterkit.merge_into([TINY], folder / "base.gguf", folder / "tuned.gguf")
    adapterkit.bank(TINY, WEAK, destination=folder / "bank.json")
    (folder / "list.txt").write_text("a\nb\n")
    factors = {"lora_a": torch.ones(4, 32), "lora_b": torch.ones(32, 4)}
    torch.save(
        {f"layers.0.attn.q_proj.{name}.weight": factor for name, factor in factors.items()},
        folder / "weights.pt",
    )
    return folder


@pytest.mark.parametrize("line", shown())
def test_a_command_that_is_shown_works(
    line: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    _clear(line, folder)
    monkeypatch.chdir(folder)
    # As a shell has them: patterns expanded, and where the output goes left to it.
    words = [word for each in shlex.split(re.split(r" [>|] ", line)[0]) for word in _expanded(each)]
    done = invoke(*words[1:])
    assert done.exit_code == FOUND.get(line, 0), done.stderr


def _expanded(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def _clear(line: str, folder: Path) -> None:
    """Remove what the command creates: it is there for the others."""
    for name in re.findall(r"(?:-o|--bank) (\S+)", line):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)


def test_there_are_commands_to_run() -> None:
    assert len(shown()) > 45


def test_every_command_has_an_example_and_every_option_a_word_for_its_value() -> None:
    for command in below(cli, click.Context(cli)):
        assert "Examples:" in (command.epilog or ""), command.name
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (command.name, option.opts)
                # Otherwise click prints the name of a class.
                told = option.is_flag or option.metavar or isinstance(option.type, click.Choice)
                assert told, (command.name, option.opts)
