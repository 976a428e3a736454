"""Numbers and columns as people read them, JSON as programs do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from adapterkit import DType, text
from adapterkit_cli import rendering


@dataclass(frozen=True)
class Inner:
    where: Path
    error: float | None


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    counts: dict[float, int]
    dtype: DType


def test_json_is_one_line_that_any_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    parts = (Inner(Path("a"), float("nan")), Inner(Path("ü\ud800"), float("inf")))
    rendering.emit_json(Outer(parts, {2.0: 1}, DType.F16))
    line = capsys.readouterr().out
    assert line.isascii()
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "schema": 2,
        "parts": [{"where": "a", "error": None}, {"where": "ü\ud800", "error": None}],
        "counts": {"2.0": 1},
        "dtype": "F16",
    }


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (921_600, "922 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (83_886_080, "83.9 MB"),
        (5_000_000_000, "5 GB"),
        (1_234_000_000_000, "1,234 GB"),
    ],
)
def test_sizes_have_three_digits(number: int, shown: str) -> None:
    assert rendering.size(number) == shown


def test_one_is_singular() -> None:
    assert rendering.count(1, "module") == "1 module"
    assert rendering.count(1024, "module") == "1,024 modules"


def test_columns_are_aligned_and_not_cut() -> None:
    long = "x" * 300
    text = click.unstyle(rendering.columns([("a", "b"), ("ccc", long)], header=("n", "title")))
    assert text.split("\n") == ["n    title", "a    b", f"ccc  {long}"]


def test_entries_without_a_value_are_left_out() -> None:
    text = click.unstyle(rendering.sheet([("name", "x"), ("nothing", ""), ("odd", "a\nb")]))
    assert text.split("\n") == ["name  x", "odd   a\\nb"]


def test_no_number_is_a_dash() -> None:
    assert rendering.short(None) == "-"
    assert rendering.short(0.000123456) == "0.000123"


def test_words_stay_whole_while_a_column_of_words_can_give_way() -> None:
    rows = [
        ("self_attn.q_proj", "the weighted sum of every update in turn", "922 kB"),
        ("unreadable", "", "1"),
    ]
    told = text.columns(rows, header=("family", "what it is", "size"), pen=text.Pen(width=40))
    assert told.split("\n") == [
        "family            what it is      size",
        "self_attn.q_proj  the weighted    922 kB",
        "                  sum of every",
        "                  update in turn",
        "unreadable                        1",
    ]
    # Where nothing else helps, words are broken too: the table fits.
    narrow = text.columns([("self_attn.q_proj", "self_attn.v_proj")], pen=text.Pen(width=20))
    assert all(len(line) <= 20 for line in narrow.split("\n"))


def test_a_list_on_a_terminal_leaves_wide_columns_to_verbose() -> None:
    from adapterkit_cli.tables import LISTINGS

    for name in ("engines", "methods"):
        listing = LISTINGS[name]
        whole = listing.table(listing.rows(), whole=True).split("\n")
        brief = listing.table(listing.rows(), whole=False).split("\n")
        assert "source" in click.unstyle(whole[0])
        assert "source" not in click.unstyle(brief[0])
        assert len(whole) == len(brief)


def test_a_word_that_does_not_fit_is_parted_where_its_parts_meet() -> None:
    cells = ("SarvamMoEForCausalLM", "layers.0.self_attn.q_proj", "0.125", "applied", *"abcd")
    assert text.columns([cells], pen=text.Pen(width=64)).split("\n") == [
        "SarvamMoEFor       layers.0.self_     0.125  applied  a  b  c  d",
        "CausalLM           attn.q_proj",
    ]
