"""Show the HTML report in a real browser: light, dark and as wide as a phone.

    python tests/audit_screenshots.py OUT [CHROMIUM]

writes OUT/{one,several}-{light,dark,phone}.png for looking at, and fails if the page's own script
did not run or if the page is wider than the screen. Not part of the test run: a machine may have no
browser (Debian: `apt-get install chromium`); tests/test_audit_cli.py takes the page apart instead.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from audit_adapters import adapter, gaussian

from adapterkit.audit import audit, html_page

if TYPE_CHECKING:
    from adapterkit import AdapterTensorSet

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
PHONE = 375
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


def browse(chromium: str, page: Path, *arguments: str) -> str:
    """Run the browser on a page and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *arguments,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    return done.stdout


def check(chromium: str, page: Path) -> None:
    """Let the page's script run, sort a column, and measure the page on a phone."""
    probe = page.with_name("probe.html")
    text = page.read_text(encoding="utf-8").replace(
        "</body>",
        "<script>document.querySelectorAll('.sortable thead button')[3].click();"
        "const fits = document.documentElement.scrollWidth <= innerWidth;"
        "document.body.dataset.fits = fits;</script></body>",
    )
    probe.write_text(text, encoding="utf-8")
    found = browse(chromium, probe, "--dump-dom", "--window-size=500,2000")
    painted = len(re.findall(r'<td data-v="\[[^>]*background: rgb', found))
    body = found.partition('class="list sortable"')[2].partition("<tbody>")[2]
    rows = [re.findall(r'data-v="([^"]*)"', row) for row in body.split("</tr>")[:64]]
    stable = [float(row[2]) for row in rows if row and row[2]]
    assert painted >= 63, f"{painted} cells are painted"
    assert stable == sorted(stable, reverse=True), "the table is not sorted"
    assert 'data-fits="true"' in found, "the page is wider than the screen"
    probe.unlink()


def main(out: Path, chromium: str) -> None:
    """Write the pages and their pictures."""
    out.mkdir(parents=True, exist_ok=True)
    adapters = [example(1), example(2, turned=True), example(3)]
    for name, chosen in (("one", adapters[:1]), ("several", adapters)):
        page = out / f"{name}.html"
        page.write_text(html_page(audit(*chosen)), encoding="utf-8")
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
