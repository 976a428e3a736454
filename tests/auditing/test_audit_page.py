"""The page that `audit --html` writes: whole, small, and text where files bring names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from audit_adapters import adapter, gaussian, layered, written
from audit_commands import many
from terminal import TINY, invoke

from adapterkit import BaseReference, audit

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(adapter(many()), tmp_path_factory.mktemp("large") / "adapter")


class Page(HTMLParser):
    """A page taken apart: what is open and not closed, where it points, how many of each tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in {"src", "href", "action", "srcset"}]
        if tag not in {"meta", "path", "polyline", "polygon", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in {"path", "polyline", "polygon", "circle"}:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, *sources: Path) -> tuple[Page, str]:
    file = folder / "report.html"
    result = invoke("audit", *sources, "--html", file)
    assert result.exit_code == 0
    assert str(file) in result.stderr
    text = file.read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_is_whole_small_and_needs_no_network(large: Path, tmp_path: Path) -> None:
    page, text = page_of(tmp_path, large)
    assert len(text.encode()) < 1_000_000
    assert page.open == []
    assert page.links
    assert all(link.startswith("#part-") for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert page.tags.count("svg") == 7 + 1
    assert text.count("<td data-v='") + text.count('<td data-v="[') == 224
    for heading in ("Layer by module", "Decay", "Where the update is", "Size against", "Every"):
        assert heading in page.text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_the_page_shows_the_numbers_that_were_measured(large: Path, tmp_path: Path) -> None:
    _, text = page_of(tmp_path, large)
    first = audit(large).modules[0]
    cells = [json.loads(v.replace("&quot;", '"')) for v in re.findall(r'data-v="(\[.*?\])"', text)]
    assert cells[0][0] == pytest.approx(first.utilization, rel=1e-4)
    row = re.search(rf"<td>{re.escape(first.module)}</td>(.*?)</tr>", text)
    assert row is not None
    values = re.findall(r'<td(?: data-v="([^"]*)")?>([^<]*)<', row.group(1))
    exact = [value or text for value, text in values]
    assert [float(value) for value in exact[:2]] == [first.rank, first.scale]
    assert float(exact[2]) == pytest.approx(first.stable_rank, rel=1e-5)


def test_the_page_holds_several_adapters_against_each_other(large: Path, tmp_path: Path) -> None:
    page, text = page_of(tmp_path, large, large, TINY)
    assert page.open == []
    assert "Interference" in page.text
    assert "redundant" in page.text
    assert "nothing shared" in page.text
    assert len(text.encode()) < 1_000_000


def test_a_page_of_many_adapters_keeps_what_tells_them_apart(large: Path, tmp_path: Path) -> None:
    page, text = page_of(tmp_path, *[large] * 6)
    assert page.open == []
    assert page.tags.count("h1") == 7
    assert page.text.count("Layer by module") == 2 * 6  # and in the contents
    assert "up to 3 adapters" in page.text
    assert "Every module" not in page.text
    assert len(text.encode()) < 1_000_000


def test_names_from_files_are_text_on_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\u202e\"'&"
    whole = adapter({f"layers.0.{evil}": gaussian(8, 8, 2)}).replace(base=BaseReference(name=evil))
    page, text = page_of(tmp_path, written(whole, tmp_path / "a"))
    assert page.open == []
    assert page.tags.count("script") == 2
    assert "\u202e" not in text
    assert "<script>alert(1)</script>" in page.text


def test_an_untrained_adapter_has_a_page_too(tmp_path: Path) -> None:
    pairs = {name: (a, b * 0) for name, (a, b) in layered(2).items()}
    page, _ = page_of(tmp_path, written(adapter(pairs), tmp_path / "a"))
    assert page.open == []
    assert "untrained: all 4" in page.text
