"""The HTML pages in a real browser: at two widths, light and dark, and their buttons pressed.

Needs playwright and Debian's chromium; `make browser` runs it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, written
from terminal import BASE, PEFT, TINY

import adapterkit
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.browser
LAYERS = 12
WIDTHS = (390, 1280)
# That of every module, the last of a page.
TABLE = "table.sortable >> nth=-1 >>"


def layered(seed: int) -> dict[str, tuple[Any, Any]]:
    names = ("q_proj", "k_proj", "v_proj")
    return {
        f"model.layers.{layer}.self_attn.{name}": gaussian(
            24, 16, 4, seed=10 * layer + place + (seed if layer > 3 else 0) * 1000
        )
        for layer in range(LAYERS)
        for place, name in enumerate(names)
    }


def held_against_base(style: Path, folder: Path) -> adapterkit.AuditReport:
    """Return an audit with a base and a bank."""
    base = folder / "base"
    base.mkdir()
    draw = np.random.default_rng(0).standard_normal
    weights = {
        f"{pair.module}.weight": LazyTensor.of(draw(pair.shape).astype(np.float32))
        for pair in adapterkit.read(style).pairs()
    }
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": LAYERS}
    (base / "config.json").write_text(json.dumps(config))
    write_safetensors(base / "model.safetensors", weights, {})
    others = [adapter_of(seed, folder) for seed in range(2, 5)]
    adapterkit.bank(*others, destination=folder / "bank.json")
    return adapterkit.audit(style, base=base, reference=folder / "bank.json")


def adapter_of(seed: int, folder: Path) -> Path:
    return written(adapter(layered(seed)), folder / f"other-{seed}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with every page."""
    made = tmp_path_factory.mktemp("pages")
    style, facts = (
        written(adapter(layered(seed)), made / name) for seed, name in enumerate(("style", "facts"))
    )
    adapterkit.write_html(adapterkit.audit(style, suggest=True), made / "one.html")
    adapterkit.write_html(adapterkit.audit(style, facts, TINY), made / "several.html")
    adapterkit.write_html(held_against_base(style, made), made / "base.html")
    adapterkit.write_page(adapterkit.diff(style, facts).page(), made / "diff.html")
    attempts = adapterkit.for_each(
        adapterkit.validate, [TINY, PEFT / "dora", made / "missing"], base=BASE, targets=["vllm"]
    )
    adapterkit.write_page(adapterkit.validation_page(attempts), made / "validate.html")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        assert path, "chromium is missing (Debian: apt-get install chromium)"
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> Any:
    """Open a page; whatever its script or its policy complains of fails the test."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text))
    page.on("request", lambda asked: page.complaints.append(asked.url))
    page.goto(path.as_uri())
    page.complaints.remove(path.as_uri())
    return page


@pytest.mark.parametrize("name", ["one", "several", "base", "diff", "validate"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_and_is_read(
    name: str, width: int, scheme: str, browser: Any, folder: Path
) -> None:
    page = opened(browser, folder / f"{name}.html", width=width, scheme=scheme)
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = " ".join(page.locator("table, .strip").all_inner_texts())
    assert not re.search(r"-0\.?0*(?![\d.])", shown)
    ink, paper = (
        np.array([int(part) for part in re.findall(r"\d+", page.evaluate(of))[:3]])
        for of in (
            "getComputedStyle(document.body).color",
            "getComputedStyle(document.body).backgroundColor",
        )
    )
    assert (paper.mean() > ink.mean()) == (scheme == "light")
    assert abs(paper.mean() - ink.mean()) > 150
    # Nothing is cut without a bar or a hint.
    for box in page.query_selector_all(".scroll"):
        wide, hint = box.evaluate(
            "e => [e.scrollWidth > e.clientWidth, "
            "e.nextElementSibling?.matches('.hint:not([hidden])')]"
        )
        assert not wide or hint
    page.context.close()


def test_the_page_says_when_and_with_what_it_was_made(browser: Any, folder: Path) -> None:
    page = opened(browser, folder / "one.html")
    footer = page.inner_text("footer")
    assert f"adapterkit {adapterkit.__version__} on 20" in footer
    page.context.close()


@pytest.mark.parametrize("name", ["one", "several", "validate"])
def test_contents_lead_to_every_heading(name: str, browser: Any, folder: Path) -> None:
    page = opened(browser, folder / f"{name}.html")
    page.click("summary")
    links = page.query_selector_all(".contents a")
    headings = page.query_selector_all("h1, h2")
    assert [each.inner_text() for each in links] == [each.inner_text() for each in headings]
    links[-1].click()
    assert page.evaluate("document.querySelector(':target').getBoundingClientRect().top") < 900
    page.context.close()


def test_cosines_are_shown_by_layer_with_the_names_of_their_pair(
    browser: Any, folder: Path
) -> None:
    page = opened(browser, folder / "several.html")
    strips = page.query_selector_all("ol.strip")
    titles = page.eval_on_selector_all("h3:has(+ ol.strip)", "all => all.map(e => e.innerText)")
    assert titles == ["1 style and 2 facts", "1 style and 3 tiny", "2 facts and 3 tiny"]
    found = adapterkit.audit(folder / "style", folder / "facts").interference
    assert found is not None
    shown = [cell.inner_text().split() for cell in strips[0].query_selector_all("li")]
    assert [int(layer) for layer, _ in shown] == list(range(LAYERS))
    for layer, text in shown:
        cosines = [
            m.cosine for m in found.pairs[0].modules if f"layers.{layer}." in m.module and m.cosine
        ]
        assert float(text) == pytest.approx(np.mean(cosines), abs=0.0051)
    assert "1 style and 2 facts clash in model.layers." in page.inner_text("body")
    right = page.eval_on_selector_all(
        "ol.strip li", "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 1280
    page.context.close()


def test_modules_begin_in_the_order_of_layers_and_sort_by_numbers(
    browser: Any, folder: Path
) -> None:
    page = opened(browser, folder / "one.html")
    rows = f"{TABLE} tbody tr td:first-child"

    def layers() -> list[int]:
        names = page.eval_on_selector_all(rows, "all => all.map(e => e.textContent)")
        return [int(re.findall(r"layers\.(\d+)", name)[0]) for name in names]

    assert layers() == sorted(layers())
    assert len(layers()) == 3 * LAYERS
    heads = page.query_selector_all(f"{TABLE} thead button")
    heads[0].click()
    assert layers() == sorted(layers(), reverse=True)
    norm = [head.inner_text() for head in heads].index("‖ΔW‖")
    heads[norm].click()
    cells = page.eval_on_selector_all(
        f"{TABLE} tbody tr td:nth-child({norm + 1})",
        "all => all.map(e => Number(e.dataset.v ?? e.textContent))",
    )
    assert cells == sorted(cells, reverse=True)
    assert heads[norm].evaluate("e => e.closest('th').getAttribute('aria-sort')") == "descending"
    page.context.close()


def test_the_heat_map_shows_the_metric_that_is_chosen(browser: Any, folder: Path) -> None:
    page = opened(browser, folder / "one.html")
    (module, *_) = adapterkit.audit(folder / "style").modules
    page.select_option("select", label="spectral norm of ΔW")
    shown = page.inner_text("table.heat tbody tr:first-child td[data-t*='q_proj']")
    known = {m.module: m for m in adapterkit.audit(folder / "style").modules}
    wanted = known["model.layers.0.self_attn.q_proj"].spectral_norm
    assert module.module in known
    assert float(shown) == pytest.approx(wanted, rel=5e-3)
    page.context.close()


def test_the_advice_is_copied(browser: Any, folder: Path) -> None:
    page = opened(browser, folder / "one.html")
    page.click("button.copy")
    page.wait_for_function("document.querySelector('button.copy').textContent !== 'Copy'")
    copied = page.evaluate("navigator.clipboard.readText().catch(() => String(getSelection()))")
    assert '"rank_pattern"' in copied
    assert copied.strip() == page.inner_text("code").strip()
    page.context.close()


def test_what_validation_found_is_on_its_page(browser: Any, folder: Path) -> None:
    page = opened(browser, folder / "validate.html")
    rows = page.eval_on_selector_all(
        "table tbody tr", "all => all.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert [row[1:3] + row[-1:] for row in rows] == [
        ["peft", "0", "applied"],
        ["peft", "2", "refused"],
        ["unreadable", "", ""],
    ]
    text = page.inner_text("body")
    assert "VLLM003" in text
    assert "no such file or directory" in text
    page.context.close()
