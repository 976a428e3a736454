"""Every field of the neutral model, for every format that is written: held, or named as a loss."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapterkit.base import open_base
from adapterkit.formats.builtin import BUILTIN
from adapterkit.formats.protocol import FormatOptions
from adapterkit.model import AdapterTensorSet
from adapterkit.registry import detect, spec
from adapterkit.testing import OF_THE_FILE, check_field, check_round_trip, variants

if TYPE_CHECKING:
    from adapterkit.formats.spec import FormatSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
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
# Formats whose files say nothing beside what the neutral model holds.
NO_SOURCE: frozenset[str] = frozenset()
FIELDS = sorted({field.name for field in fields(AdapterTensorSet)} - OF_THE_FILE)


def prepared(name: str) -> tuple[AdapterTensorSet, FormatOptions]:
    """Return an adapter that a format holds whole, and the options that it is written with."""
    options = FormatOptions(base=open_base(PLAIN.parent / "base"))
    path = SOURCES.get(name, PLAIN)
    return detect(path).read(path, options), options


def test_every_field_is_known(tmp_path: Path) -> None:
    assert set(FIELDS) == variants(tmp_path).keys()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", WRITABLE)
def test_a_field_is_written_or_named_as_a_loss(name: str, field: str, tmp_path: Path) -> None:
    adapter, options = prepared(name)
    check_field(spec(name), field, tmp_path, adapter=adapter, options=options)


# The base is for everybody; the others are no tensors, and refused before a format is asked.
OTHER_CHECKS = {"base", "rank_conflicts", "unstored", "unplaced"}


@pytest.mark.parametrize("field", sorted(set(FIELDS) - OTHER_CHECKS))
def test_the_pack_holds_nothing_that_tinylora_does_not(field: str, tmp_path: Path) -> None:
    plain, options = prepared("tinylora")
    changed = variants(tmp_path)[field](plain)
    lost = set(spec("tinylora").losses(changed, options))
    assert lost
    assert lost <= set(spec(PACK).losses(changed, options))


@pytest.mark.parametrize("name", WRITABLE)
def test_what_only_one_format_reads_comes_back_to_it(name: str, tmp_path: Path) -> None:
    adapter, options = prepared(name)
    form: FormatSpec = spec(name)
    check_round_trip(form, tmp_path, adapter=adapter, options=options)
    form.write(adapter, tmp_path / "once", options)
    sourceless = form.read(tmp_path / "once", options).source is None
    assert sourceless is (name in NO_SOURCE), (
        f"{name}: what its files say beside the model goes into a source type of its own "
        "(AdapterTensorSet.source); where they say nothing more, it stands in NO_SOURCE"
    )
