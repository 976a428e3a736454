"""Whatever a code advises can be typed as it is printed, on the very input that provoked it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from terminal import ROOT, invoke
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from validation_cases import CASES, FOLDER, source_of

from adapterkit import convert, explanations, open_base, validate
from adapterkit.architectures.weights import model_to_engine
from adapterkit.containers.gguf import uint32, write_gguf
from adapterkit.tensor import LazyTensor
from adapterkit_cli.main import COMMANDS, cli

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from validation_cases import Case

pytestmark = pytest.mark.slow

SPOKEN = re.compile(r"\badapterkit ([a-z]+)((?: [^\s`,;)]+)*)")
# Commands that take an adapter: without one the advice is half a command.
READING = {"inspect", "convert", "validate", "merge", "audit", "compress", "stack"}
# Fixtures are as small as a check needs. These codes are provoked on a base that could be merged
# into: a tower is in its model, and only what has a bias has a trained one.
WHOLE = {
    code: replace(CASES[code], source="tower", base="multimodal", target=target)
    for code, target in (
        ("AK502", "llama.cpp"),
        ("AK503", "sglang"),
        ("LCP011", "llama.cpp"),
        ("SGL016", "sglang"),
    )
} | {"VLLM004": replace(CASES["VLLM004"], base="biased")}
# What cannot be mended by a command that leaves the file's own tensors: what is said stays true.
STAYS = {
    "AK117": "the trained file still lies beside",
    "AK204": "its values are above 65504 in float32, too",
    "VLLM007": "aLoRA waits for its tokens in every format",
    "CUI002": "a DoRA is merged",
}
# Merging into models of pictures has tests of its own, with their bases.
UNTRIED = {("CUI002", "merge")}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "model_type": "siglip_vision_model",
}
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


@cache
def flags() -> Mapping[str, Mapping[str, bool]]:
    """Return the options of each command, and whether they stand alone."""
    context = click.Context(cli)
    found: dict[str, Mapping[str, bool]] = {}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        options = (each for each in command.params if isinstance(each, click.Option))
        found[name] = {word: option.is_flag for option in options for word in option.opts}
    return found


def spoken(text: str) -> Iterator[list[str]]:
    """Yield the commands of a text, up to the first word that is no option and no place."""
    for found in SPOKEN.finditer(text):
        if found[1] not in READING:
            continue
        options, rest = flags()[found[1]], iter(found[2].split())
        words = [found[1]]
        for word in rest:
            if word in options:
                words += [word] if options[word] else [word, next(rest).rstrip(".")]
            elif word.rstrip(".") in {"SRC", "BASE"}:
                words.append(word.rstrip("."))
            else:
                break
        yield words


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the bases of the fixtures, their weights beside their configs."""
    folder = tmp_path_factory.mktemp("bases")
    for source in (FOLDER / "bases").iterdir():
        shutil.copytree(source, folder / source.name)
    shutil.copytree(folder / "llama", folder / "biased")
    path = folder / "biased" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    path = folder / "multimodal" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_config": TOWER}))
    return folder


def with_weights(base: Path, adapter: Path) -> Path:
    """Write random weights beside a config; rows that the adapter holds a copy of are its rows."""
    if not list(base.glob("model.*")):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(base)
        pictures = "ConditionalGeneration" in config.architectures[0]
        kind = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(base.with_suffix(".made"))
        shutil.copy(base.with_suffix(".made") / "model.safetensors", base)
    stored = adapter / "adapter_model.safetensors"
    held = load_file(stored) if stored.exists() else {}
    copies = {name: rows for name, rows in held.items() if "base_layer" in name}
    if copies:
        weights = load_file(base / "model.safetensors")
        for name, rows in copies.items():
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weights[place] = rows[: len(weights[place])].clone()
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def as_gguf(base: Path) -> Path:
    model = open_base(base)
    sizes = json.loads((base / "config.json").read_text())
    state = {name: tensor.numpy() for name, tensor in model.tensors.items()}
    tensors = model_to_engine(model.architecture, model.sizes, state)
    target = base.with_suffix(".gguf")
    write_gguf(
        target,
        {"general.architecture": "llama"}
        | {f"llama.{key}": uint32(sizes.get(name, 64)) for key, name in SIZES.items()},
        {name: LazyTensor.of(np.ascontiguousarray(array)) for name, array in tensors.items()},
    )
    return target


def of_the_class(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the modules of a tower as the class of the base does."""
    place = "vision_tower.encoder"
    return {name.replace("vision_tower", place): factor for name, factor in held.items()}


def both_tables(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Carry the rows of both tables, as PEFT does after resize_token_embeddings."""
    rows = held["base_model.model.lm_head.base_layer.weight"]
    factor = held["base_model.model.lm_head.lora_B.weight"]
    return held | {
        "base_model.model.model.embed_tokens.weight": rows.clone(),
        "base_model.model.lm_head.lora_B.weight": torch.ones(len(rows), factor.shape[1]),
    }


PROVOKING = {"tower": of_the_class, "resized": both_tables}


def provoking(code: str, folder: Path) -> tuple[Case, Path]:
    """Return the case of a code, and its adapter."""
    case = WHOLE.get(code, CASES[code])
    if code in {"CUI001", "DIF001"}:
        convert(source_of("DIF003"), folder / "adapter", to="peft")
        return case, folder / "adapter"
    if case.source in {"tower", "resized"}:
        shutil.copytree(source_of(case.source), folder / "adapter")
        stored = folder / "adapter" / "adapter_model.safetensors"
        held = load_file(stored)
        save_file(PROVOKING[case.source](held), stored)
        return case, folder / "adapter"
    return case, source_of(case.source)


@pytest.mark.parametrize("code", CASES)
def test_what_a_code_advises_works_on_what_provoked_it(
    code: str, bases: Path, tmp_path: Path
) -> None:
    case, source = provoking(code, tmp_path)
    base = bases / (case.base or "llama")
    targets = [case.target] if case.target else []
    before = validate(source, base=base if case.base else None, targets=targets)
    own = [finding for finding in before.findings if finding.code == code]
    assert own
    texts = [explanations()[code].action, *(t for f in own for t in (f.message, f.hint))]
    commands = {tuple(words) for text in texts for words in spoken(text)}
    for number, words in enumerate(sorted(commands)):
        if (code, words[0]) in UNTRIED:
            continue
        assert "SRC" in words, words
        place = tmp_path / str(number)
        place.mkdir()
        if words[0] == "merge" or any("BASE" in word for word in words):
            with_weights(base, source)
        given = {"SRC": source, "BASE": base, "DIRECTORY": base, "N": "32"}
        if "BASE.gguf" in words:
            given["BASE.gguf"] = as_gguf(base)
        made = [place / word for word in words if re.match(r"DIR\b|DST\b|FILE\b", word)]
        done = invoke(*(given.get(w, place / w if place / w in made else w) for w in words))
        assert done.exit_code == 0 or words[0] == "validate", (words, done.stderr)
        if words[0] in {"convert", "compress"} and code not in STAYS and made[0].exists():
            after = validate(made[0], base=base, targets=targets)
            assert code not in {finding.code for finding in after.findings}, words


def test_there_are_commands_to_type() -> None:
    assert sum(len(list(spoken(each.action))) for each in explanations().values()) > 80


def test_no_text_advises_half_a_command() -> None:
    """An adapter is a part of the command, so that nobody has to guess where it goes."""
    texts = [path.read_text("utf-8") for path in (ROOT / "adapterkit" / "engines").glob("*.toml")]
    texts += [each.action for each in explanations().values()]
    halves = [words for text in texts for words in spoken(text) if "SRC" not in words]
    assert halves == []
