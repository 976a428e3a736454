"""Every trait against every command: carried exactly, refused by name, or listed as a loss."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import pytest

from adapterkit.errors import AdapterKitError, LossyConversionError
from adapterkit.formats.builtin import BUILTIN
from conformance import bases, judges, making
from conformance.commands import COMMANDS, Asked, Command, said
from conformance.page import PAGE, page
from conformance.table import Cell, Trait, known, traits
from conformance.traits import RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Workshop = Callable[[Trait], making.Made]
    Run = Callable[..., tuple[int, str, AdapterKitError | None]]

pytestmark = pytest.mark.slow

REFUSALS = (3, 4)
# No LoRA is TinyLoRA, whichever way it is stored: to-tinylora speaks for these.
TINYLORA = {"to-tinylora-pack", "to-tinylora-peft"}
BY_NAME = {command.name: command for command in COMMANDS}
# Where the answers of the language model alone are what the output can give.
SPOKEN = ("to-gguf", "to-mlx", "into-gguf")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Make every base and every adapter once."""

    @cache
    def base(name: str) -> bases.Base:
        return bases.make(name, tmp_path_factory.mktemp(name))

    @cache
    def made(name: str) -> making.Made:
        row = traits()[name]
        return making.make(name, base(row.base), tmp_path_factory.mktemp(name))

    return lambda trait: made(trait.name)


def cells() -> list[pytest.ParameterSet]:
    """Return one case for every cell that applies, those of a trait together."""
    return [
        pytest.param(
            trait,
            BY_NAME[name],
            id=f"{trait.name}/{name}",
            marks=[pytest.mark.xfail(reason=known()[where])]
            if (where := f"{trait.name}/{name}") in known()
            else [],
        )
        for trait in traits().values()
        for name, cell in trait.cells.items()
        if cell.kind != "-"
    ]


def test_no_cell_is_empty() -> None:
    assert traits().keys() == RECIPES.keys()
    names = [command.name for command in COMMANDS]
    for trait in traits().values():
        lacking = [name for name in names if name not in trait.cells]
        assert not lacking, f"[{trait.name}] of traits.toml has no cell for {lacking}"
        assert list(trait.cells) == names, f"[{trait.name}]: in the order of commands.py"
        for cell in trait.cells.values():
            assert cell.word or cell.kind in {"exact", "told"}, trait.name
    assert not known().keys() - {f"{t.name}/{name}" for t in traits().values() for name in t.cells}


def test_every_format_that_is_written_has_a_column() -> None:
    lacking = {f"to-{each.name}" for each in BUILTIN if each.writes} - BY_NAME.keys() - TINYLORA
    assert not lacking, f"no Command of commands.py is called {sorted(lacking)}"
    judged = {
        name for name in BY_NAME if any(t.cells[name].kind == "exact" for t in traits().values())
    }
    unjudged = {name for name in judged if name.startswith("to-")} - judges.JUDGES.keys()
    assert not unjudged, f"no judge of judges.py runs what {sorted(unjudged)} wrote"


@pytest.mark.parametrize("trait", traits().values(), ids=traits())
def test_a_trait_is_seen(trait: Trait, workshop: Workshop) -> None:
    """The adapter changes what the model says, and so does the trait where it has a meaning."""
    made = workshop(trait)
    if made.want is None:
        return
    plain = made.answers(made.fresh())
    assert (judges.apart(plain, made.want) > judges.EFFECT) is not trait.idle
    told = trait.cells["diff"]
    if made.rest is not None and told.kind == "told":
        assert (judges.apart(made.rest, made.want) > judges.EFFECT) is (told.status == 1)


@pytest.mark.parametrize(("trait", "command"), cells())
def test_a_command_does_what_is_right(
    trait: Trait, command: Command, workshop: Workshop, tmp_path: Path
) -> None:
    made, cell = workshop(trait), trait.cells[command.name]
    out = tmp_path / f"out{command.suffix}"
    options = {"tied": trait.tied} if trait.tied else {}

    def run(*, allow_lossy: bool = False) -> tuple[int, str, AdapterKitError | None]:
        asked = Asked(made=made, out=out, allow_lossy=allow_lossy, options=options)
        try:
            report = command.run(asked)
        except AdapterKitError as error:
            return error.exit_code, str(error), error
        return command.status(report), said(report), None

    CHECKS[cell.kind](cell, command, made, out, run)


def _exact(cell: Cell, command: Command, made: making.Made, out: Path, run: Run) -> None:
    del cell
    status, text, _ = run()
    assert status == 0, text
    want = made.tuned if command.name == "extract" else made.want
    assert want is not None
    assert judges.JUDGES[command.name](made, out, want) == ""


def _refused(cell: Cell, command: Command, made: making.Made, out: Path, run: Run) -> None:
    del command, made
    status, text, _ = run()
    assert status in REFUSALS, text
    assert re.search(cell.word, text), text
    assert not out.exists()


def _loss(cell: Cell, command: Command, made: making.Made, out: Path, run: Run) -> None:
    status, text, error = run()
    assert status == 4, text
    assert re.search(cell.word, text), text
    assert isinstance(error, LossyConversionError)
    assert not out.exists()
    status, text, _ = run(allow_lossy=True)
    assert status == 0, text
    assert re.search(cell.word, text), text
    rest = made.spoken if command.name in SPOKEN else made.rest
    assert rest is not None
    assert judges.JUDGES[command.name](made, out, rest) == ""


def _told(cell: Cell, command: Command, made: making.Made, out: Path, run: Run) -> None:
    del command, made, out
    status, text, _ = run()
    assert status == cell.status, text
    assert re.search(cell.word, text), text


CHECKS = {"exact": _exact, "refused": _refused, "loss": _loss, "told": _told}


def test_the_page_is_what_the_table_holds() -> None:
    assert PAGE.read_text("utf-8") == page()
