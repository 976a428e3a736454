"""Show the HTML report in a real browser: light, dark and as wide as a phone.

    python tests/auditing/screenshots.py OUT [CHROMIUM]

writes OUT/{one,base,several}-{light,dark,phone}.png for looking at, and fails if the page's own
script did not run or if the page is wider than the screen. Not part of the test run: a machine may
have no browser (Debian: `apt-get install chromium`); tests/auditing/test_audit_cli.py reads it
instead.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "builders"))

from audit_adapters import adapter, gaussian

from adapterkit import AuditReport, audit, bank, html_page
from adapterkit.containers.safetensors import write_safetensors
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit import AdapterTensorSet

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
PHONE = 390
CONFIG = {"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 16}
# (name, width, height, preferred colour scheme as Chromium numbers it: 0 dark, 1 light)
VIEWS = (("light", 1200, 3000, 1), ("dark", 1200, 3000, 0), ("phone", 500, 4200, 1))


def example(seed: int, *, turned: bool = False) -> AdapterTensorSet:
    """Return an adapter that shares its first layers with every other one."""
    pairs = {}
    for layer in range(16):
        for place, name in enumerate(NAMES):
            own = seed if layer > 4 else 0
            a, b = gaussian(128, 96, 8, seed=1000 * own + 10 * layer + place)
            b = b * np.exp(-np.arange(8) / (1 + layer / 4)).astype(np.float32)
            b = b * np.float32(0 if (layer, place) == (7, 2) else -1 if turned and layer < 3 else 1)
            pairs[f"model.layers.{layer}.self_attn.{name}"] = (a, b)
    return adapter(pairs, scale=2.0)


def beside(whole: AdapterTensorSet, folder: Path) -> AuditReport:
    """Hold an adapter against a base with falling spectra, and against four others."""
    random = np.random.default_rng(0)
    weights = {}
    for pair in whole.pairs():
        out, inputs = pair.shape
        left, right = (
            random.standard_normal((out, inputs)),
            random.standard_normal((inputs, inputs)),
        )
        falling = np.exp(-np.arange(inputs) / 12) / inputs**0.5
        weights[f"{pair.module}.weight"] = LazyTensor.of(((left * falling) @ right).astype("f4"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(folder / "model.safetensors", weights, {})
    bank(*(example(seed) for seed in range(4, 8)), destination=folder / "bank.json")
    return audit(whole, base=folder, reference=folder / "bank.json")


def browse(chromium: str, page: Path, *arguments: str) -> str:
    """Run the browser on a page and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *arguments,
                page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    return done.stdout


def check(chromium: str, page: Path) -> None:
    """Let the page's script run, switch the metric, sort a column, and measure the page."""
    probe = page.with_name("probe.html")
    text = page.read_text(encoding="utf-8").replace(
        "</body>",
        "<script>for (const metric of document.querySelectorAll('select[data-heat]')) {"
        "metric.selectedIndex = metric.options.length - 1;"
        "metric.dispatchEvent(new Event('change'));}"
        "const tables = document.querySelectorAll('.sortable');"
        "for (const table of tables) table.querySelectorAll('thead button')[3]?.click();"
        "const fits = document.documentElement.scrollWidth <= innerWidth;"
        "document.body.dataset.fits = fits;</script></body>",
    )
    probe.write_text(text, encoding="utf-8")
    found = browse(chromium, probe, "--dump-dom", "--window-size=500,2000")
    cells = re.findall(r'<td data-v="\[([^"]*)\]"[^>]*background: rgb[^>]*>([^<]*)<', found)
    body = found.partition("<h2>Every module</h2>")[2].partition("<tbody>")[2]
    rows = [re.findall(r'<td(?: data-v="([^"]*)")?>([^<]*)<', row) for row in body.split("</tr>")]
    stable = [
        float(row[3][0] or row[3][1]) for row in rows[:64] if len(row) > 3 and row[3][1] != "-"
    ]
    assert len(cells) >= 63, f"{len(cells)} cells are painted"
    for values, text in cells:
        last = float(values.split(",")[-1])
        assert abs(float(text) - last) <= 0.005 * abs(last), f"{text} is shown for {last}"
    assert stable == sorted(stable, reverse=True), "the table is not sorted"
    assert 'data-fits="true"' in found, "the page is wider than the screen"
    probe.unlink()


def main(out: Path, chromium: str) -> None:
    """Write the pages and their pictures."""
    out.mkdir(parents=True, exist_ok=True)
    adapters = [example(1), example(2, turned=True), example(3)]
    with tempfile.TemporaryDirectory() as folder:
        base = beside(adapters[0], Path(folder))
    reports = {"one": audit(adapters[0]), "base": base, "several": audit(*adapters)}
    for name, report in reports.items():
        page = out / f"{name}.html"
        page.write_text(html_page(report), encoding="utf-8")
        check(chromium, page)
        framed = out / "phone.html"
        frame = (
            f'<iframe src="{page.name}" width="{PHONE}" height="4200" style="border:0"></iframe>'
        )
        framed.write_text(f'<body style="margin:0">{frame}</body>', encoding="utf-8")
        for view, width, height, scheme in VIEWS:
            browse(
                chromium,
                framed if view == "phone" else page,
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--screenshot={out / f'{name}-{view}.png'}",
            )
        framed.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), (sys.argv[2:] or [shutil.which("chromium") or "chromium"])[0])
