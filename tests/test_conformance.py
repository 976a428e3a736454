"""Every field of the neutral model, for every format that is written: held, or named as a loss."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from adapterkit.base import open_base
from adapterkit.formats.protocol import Options
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, BesideFile, BesideKind, Kind, Update
from adapterkit.model.defects import problems
from adapterkit.notes import BaseReference
from adapterkit.proof import prove
from adapterkit.registry import BUILTIN, detect, spec
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parents[1] / "fixtures"
# The pack is written from its own checkpoints alone, with its base: its losses are looked at below.
PACK = "tinylora-pack"
WRITABLE = [known.name for known in BUILTIN if known.writes and known.name != PACK]
PLAIN = FIXTURES / "peft" / "tiny"
# Spellings of one file that says nothing beside what the neutral model holds.
DIFFUSION = ("kohya", "diffusers", "comfyui")
SOURCES = {
    "tinylora": FIXTURES / "tinylora" / "self-contained.safetensors",
    "tinylora-peft": FIXTURES / "tinylora" / "peft",
    **{name: FIXTURES / "diffusion" / f"{name}.safetensors" for name in DIFFUSION},
}
HEAD = FIXTURES / "validation" / "AK117" / "mm_projector.safetensors"
EMBEDDING, QUERY = "model.embed_tokens", "model.layers.0.self_attn.q_proj"


def convolved(adapter: AdapterTensorSet) -> AdapterTensorSet:
    a, b = np.ones((2, 3, 4), np.float32), np.ones((5, 2, 1), np.float32)
    update = Update("model.conv", LazyTensor.of(a), LazyTensor.of(b), 1.0, Kind.CONVOLUTION)
    return adapter.updated([update])


def rescaled(adapter: AdapterTensorSet) -> AdapterTensorSet:
    return adapter.replace(scales=dict.fromkeys(adapter.scales, 0.75))


def tokens(adapter: AdapterTensorSet) -> AdapterTensorSet:
    rows = LazyTensor.of(np.ones((2, 8), np.float32))
    rows_of = {TensorKey(EMBEDDING, Role.TOKEN_ROWS): rows}
    return adapter.updated([], rows_of).replace(token_indices=(3, 5))


def tied(adapter: AdapterTensorSet) -> AdapterTensorSet:
    a, b = np.ones((2, 16), np.float32), np.ones((8, 2), np.float32)
    table = Update(EMBEDDING, LazyTensor.of(a), LazyTensor.of(b), 1.0, Kind.EMBEDDING)
    return adapter.updated([table]).replace(tied={EMBEDDING: ("lm_head",)})


def beside(adapter: AdapterTensorSet) -> AdapterTensorSet:
    return adapter.updated([], {TensorKey("score.weight", Role.FULL): LazyTensor.of(np.ones(3))})


def first_module(adapter: AdapterTensorSet) -> str:
    return next(adapter.pairs()).module


# A new field fails the tests until it says here what an adapter looks like that has it.
SET: dict[str, Callable[[AdapterTensorSet], AdapterTensorSet]] = {
    "tensors": beside,
    "scales": rescaled,
    "kinds": convolved,
    "base": lambda adapter: adapter.replace(base=BaseReference(name="org/name")),
    "initialisation": lambda adapter: adapter.replace(initialisation="pissa"),
    "layer_replication": lambda adapter: adapter.replace(layer_replication=((0, 1), (0, 2))),
    "invocation_tokens": lambda adapter: adapter.replace(invocation_tokens=(5, 6)),
    "token_indices": tokens,
    "tied": tied,
    "engine_layout": lambda adapter: adapter.replace(engine_layout={QUERY: "blk.0.attn_q"}),
    "rank_conflicts": lambda adapter: adapter.replace(
        rank_conflicts={first_module(adapter): (5, 4)}
    ),
    "unstored": lambda adapter: adapter.replace(unstored={"use_dora": (first_module(adapter),)}),
    "undeclared": lambda adapter: adapter.replace(
        undeclared={"use_dora": (first_module(adapter),)}
    ),
    "unplaced": lambda adapter: adapter.replace(
        unplaced={first_module(adapter): "is no module of a model that is known"}
    ),
    "beside": lambda adapter: adapter.replace(
        beside=(BesideFile("value_head.bin", BesideKind.HEAD, "a trained value head", 792, HEAD),)
    ),
    "metadata": lambda adapter: adapter.replace(metadata={"ss_epoch": "3"}),
}
# What belongs to the file that was read, and to no other.
OF_THE_FILE = {"source", "provenance"}


def prepared(name: str) -> tuple[AdapterTensorSet, Options]:
    """Return an adapter that a format holds whole, and the options that it is written with."""
    options = Options(base=open_base(PLAIN.parent / "base"))
    path = SOURCES.get(name, PLAIN)
    return detect(path).format.read(path, options), options


def test_every_field_is_known() -> None:
    assert {field.name for field in fields(AdapterTensorSet)} == SET.keys() | OF_THE_FILE


@pytest.mark.parametrize("field", SET)
@pytest.mark.parametrize("name", WRITABLE)
def test_a_field_is_written_or_named_as_a_loss(name: str, field: str, tmp_path: Path) -> None:
    plain, options = prepared(name)
    form = spec(name).format
    changed = SET[field](plain)
    assert getattr(changed, field) != getattr(plain, field)
    lost = set(form.losses(changed, options)) - set(form.losses(plain, options))
    if any(loss.blocks for loss in lost) or (lost and field == "metadata"):
        return
    if problems(changed):
        return  # refused as broken before any format is asked
    form.write(changed, tmp_path / "written", options)
    if field == "engine_layout":  # the base undoes it
        options = Options()
        assert form.read(tmp_path / "written", options).engine_layout[QUERY] == "blk.0.attn_q"
        return
    again = form.read(tmp_path / "written", options)
    if field == "tied" and not again.tied:  # under all its names, which is the same without a base
        prove(changed, again, path=tmp_path)
        assert {"lm_head", EMBEDDING} <= set(again.modules)
        return
    if field == "scales" and name == "diffusers":  # in B
        prove(changed, again, path=tmp_path)
        return
    assert held(again, field) == held(changed, field)


def held(adapter: AdapterTensorSet, field: str) -> Any:
    value = getattr(adapter, field)
    if field == "tensors":
        return {key: np.asarray(tensor.numpy()).tolist() for key, tensor in value.items()}
    return value.name if field == "base" else value


# The base is for everybody; the others are no tensors, and refused before a format is asked.
OTHER_CHECKS = {"base", "rank_conflicts", "unstored", "unplaced"}


@pytest.mark.parametrize("field", sorted(SET.keys() - OTHER_CHECKS))
def test_the_pack_holds_nothing_that_tinylora_does_not(field: str) -> None:
    plain, options = prepared("tinylora")
    changed = SET[field](plain)
    lost = set(spec("tinylora").format.losses(changed, options))
    assert lost
    assert lost <= set(spec(PACK).format.losses(changed, options))


@pytest.mark.parametrize("name", WRITABLE)
def test_what_only_one_format_reads_comes_back_to_it(name: str, tmp_path: Path) -> None:
    plain, options = prepared(name)
    form = spec(name).format
    assert not [loss for loss in form.losses(plain, options) if loss.blocks]
    form.write(plain, tmp_path / "written", options)
    again = form.read(tmp_path / "written", options)
    assert again.source is not None
    form.write(again, tmp_path / "twice", options)
    assert type(form.read(tmp_path / "twice", options).source) is type(again.source)
