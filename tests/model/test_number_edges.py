"""Numbers at the edges of their types, through every command: the right answer or a named refusal.

numpy's warnings are errors here, as in all tests. What is right is said by arithmetic in long
double, and of methods without a formula by the same merge in sizes near 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from number_edges import EDGES, MODULES, RANK, Edge, write_base, write_gguf_base
from number_edges import weight as base_weight
from safetensors.numpy import load_file
from terminal import invoke

import adapterkit
from adapterkit.registry import formats

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]
Deltas = dict[str, Array]
# Where nothing is refused, but what no adapter of such a kind can become.
SOUND = {"plain", "alpha -2", "one by one"}
PLAIN = {"peft", "gguf", "mlx"}
NEVER = {
    "convert peft q8_0",
    *(f"convert {spec.name} auto" for spec in formats() if spec.name not in PLAIN),
}
# Relative to ΔW, by the stored type that was asked for.
ROUNDING = {"auto": 2e-2, "f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}
BLOCKS = {
    "model.layers.0.mlp.down_proj": "ffn_down",
    "model.layers.0.self_attn.o_proj": "attn_output",
}
NAMES = ("down_proj", "o_proj", *BLOCKS.values())


@dataclass
class Bench:
    """An edge, its files, where to write, and what the command printed."""

    edge: Edge
    folder: Path
    out: Path
    printed: str = ""

    @property
    def plain(self) -> Edge:
        return Edge(width=self.edge.width, rank=self.edge.rank or RANK)

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


Check = Callable[[Bench], None]


@dataclass(frozen=True)
class Command:
    """What a user types, and what must be so where it succeeds."""

    line: Callable[[Bench], Sequence[str | Path]]
    check: Check
    codes: tuple[int, ...] = (0,)
    out: str = "out"


def read(path: Path) -> Deltas:
    return {
        pair.module: np.longdouble(pair.scale)
        * (pair.b.numpy().astype(np.longdouble) @ pair.a.numpy().astype(np.longdouble))
        for pair in adapterkit.read(path).pairs()
    }


def apart(found: Deltas, want: Deltas) -> float:
    """Return the largest relative Frobenius error of a module; one that is missing is zero."""
    worst = 0.0
    for module, right in want.items():
        there = found.get(module, np.zeros_like(right))
        size = np.abs(right).max()
        if not size:
            assert not there.any()
            continue
        error = np.linalg.norm(((there - right) / size).astype(np.float64))
        worst = max(worst, float(error / np.linalg.norm((right / size).astype(np.float64))))
    assert found.keys() <= want.keys()
    return worst


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def anything(bench: Bench) -> None:
    if bench.printed.startswith("{"):
        strict(bench.printed)


def written(tolerance: float) -> Check:
    def check(bench: Bench) -> None:
        assert apart(read(bench.out), bench.edge.deltas(1)) <= tolerance

    return check


def summed(bench: Bench) -> None:
    other = bench.plain.deltas(3)
    want = {module: each + other[module] for module, each in bench.edge.deltas(1).items()}
    assert apart(read(bench.out), want) <= ROUNDING["auto"]


def scaled(method: str) -> Check:
    """The merge of two edges is that of their twins times their size."""

    def check(bench: Bench) -> None:
        if not bench.edge.size:
            assert apart(read(bench.out), bench.edge.deltas(1)) == 0
            return
        twin = bench.out.with_name("twin")
        line = merging(bench.folder / "twin1", bench.folder / "twin2", twin, method)
        assert invoke(*line).exit_code == 0
        want = {module: bench.edge.size * each for module, each in read(twin).items()}
        assert apart(read(bench.out), want) <= ROUNDING["auto"]

    return check


def merging(first: Path, second: Path, out: Path, method: str) -> list[str | Path]:
    return ["merge", first, second, "-o", out, "--method", method]


def equal(bench: Bench) -> None:
    found = strict(bench.printed)
    assert (found["equal"], found["max_relative_error"]) == (True, 0)


def different(bench: Bench) -> None:
    want, other = bench.edge.deltas(1), bench.plain.deltas(3)
    for row in strict(bench.printed)["modules"]:
        mine, theirs = want[row["module"]], other[row["module"]]
        size = np.sqrt((mine**2).sum())
        if size:
            error = np.sqrt(((theirs - mine) ** 2).sum()) / size
            assert row["relative_error"] == pytest.approx(float(error), rel=1e-6)


def measured(bench: Bench) -> None:
    want, found = bench.edge.deltas(1), strict(bench.printed)
    rows = found["results"][0]["modules"]
    for row in rows:
        norm = float(np.sqrt((want[row["module"]] ** 2).sum()))
        assert row["frobenius_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-322)


def added(bench: Bench) -> None:
    if bench.out.is_file():
        stored: Any = {t.name: t.data for t in GGUFReader(bench.out).tensors}
        found = {m: stored[f"blk.0.{name}.weight"] for m, name in BLOCKS.items()}
    else:
        stored = load_file(bench.out / "model.safetensors")
        found = {module: stored[f"{module}.weight"] for module in MODULES}
    for module, delta in bench.edge.deltas(1).items():
        want = base_weight(module, bench.edge.width).astype(np.longdouble) + delta
        error = np.abs(found[module].astype(np.longdouble) - want).max()
        assert error <= 1e-6 * np.abs(want).max()


def extracted(bench: Bench) -> None:
    """The factors are as near to what the files differ by as a matrix of that rank can be."""
    before, after = (load_file(bench.folder / n / "model.safetensors") for n in ("wide", "tuned"))
    found = read(bench.out)
    for module in MODULES:
        old, new = (each[f"{module}.weight"].astype(np.longdouble) for each in (before, after))
        size = np.abs(new - old).max()
        if not size:
            assert module not in found or not found[module].any()
            continue
        exact = ((new - old) / size).astype(np.float64)
        rest = np.linalg.svd(exact, compute_uv=False)[RANK:]
        there = (found[module] / size).astype(np.float64)
        norm = float(np.linalg.norm(exact))
        assert np.linalg.norm(exact - there) <= np.linalg.norm(rest) + ROUNDING["f16"] * norm


def _commands() -> Iterator[tuple[str, Command]]:
    yield "inspect", Command(lambda x: ["inspect", x.a, "--json"], anything)
    yield (
        "validate",
        Command(lambda x: ["validate", x.a, "--base", x.base, "--json"], anything, (0, 1)),
    )
    for spec in formats():
        if spec.writes:
            kinds = ROUNDING if spec.name in {"peft", "gguf"} else ("auto",)
            yield from _conversions(spec.name, kinds)
    yield "diff self", Command(lambda x: ["diff", x.a, x.a, "--json"], equal)
    yield "diff", Command(lambda x: ["diff", x.a, x.other, "--json"], different, (0, 1))
    yield "diff back", Command(lambda x: ["diff", x.other, x.a, "--json"], anything, (0, 1))
    yield "audit", Command(lambda x: ["audit", x.a, x.a2, x.other, "--json"], measured)
    yield "audit csv", Command(lambda x: ["audit", x.a, "--csv"], anything)
    yield "audit markdown", Command(lambda x: ["audit", x.a, "--markdown"], anything)
    yield (
        "audit base",
        Command(lambda x: ["audit", x.a, "--base", x.base, "--exact", "--json"], measured),
    )
    yield "audit suggest", Command(lambda x: ["audit", x.a, "--suggest", "--json"], measured)
    yield (
        "audit html",
        Command(lambda x: ["audit", x.a, "--base", x.base, "--suggest", "--html", x.out], anything),
    )
    yield "audit bank", Command(lambda x: ["audit", x.a, x.a2, "--bank", x.out], anything)
    yield (
        "audit reference",
        Command(lambda x: ["audit", x.a, "--reference", x.bank, "--json"], measured),
    )
    for cut in (
        "--rank=1",
        "--tol=0.1",
        "--budget=128",
        "--sv-ratio=4",
        "--sv-cumulative=0.9",
        "--sv-fro=0.9",
    ):
        yield (
            f"compress {cut}",
            Command(lambda x, cut=cut: ["compress", x.a, "-o", x.out, cut], anything),
        )
    yield (
        "compress --tol=0",
        Command(lambda x: ["compress", x.a, "-o", x.out, "--tol=0"], written(ROUNDING["auto"])),
    )
    for spec in adapterkit.merge_methods():
        yield (
            f"merge {spec.name}",
            Command(lambda x, name=spec.name: merging(x.a, x.a2, x.out, name), scaled(spec.name)),
        )
    for name in ("svd", "linear", "task-arithmetic", "cat"):
        yield (
            f"merge {name} with another",
            Command(lambda x, name=name: merging(x.a, x.other, x.out, name), summed),
        )
    yield "merge into", Command(lambda x: ["merge", x.a, "--into", x.base, "-o", x.out], added)
    yield (
        "merge into gguf",
        Command(lambda x: ["merge", x.a, "--into", x.gguf, "-o", x.out], added, out="x.gguf"),
    )
    yield (
        "merge into bf16",
        Command(lambda x: ["merge", x.a, "--into", x.base, "--dtype=bf16", "-o", x.out], anything),
    )
    yield (
        "extract",
        Command(
            lambda x: [
                "extract",
                "--base",
                x.wide,
                "--tuned",
                x.tuned,
                f"--rank={RANK}",
                "-o",
                x.out,
            ],
            extracted,
        ),
    )
    yield (
        "extract auto",
        Command(lambda x: ["extract", "--base", x.wide, "--tuned", x.tuned, "-o", x.out], anything),
    )
    yield "stack", Command(lambda x: ["stack", x.a, "--for", "vllm", "--base", x.base], anything)
    yield (
        "tinylora",
        Command(
            lambda x: [
                "tinylora",
                "project",
                x.a,
                "--base",
                x.base,
                "--size=4",
                "--rank=1",
                "-o",
                x.out,
            ],
            anything,
        ),
    )


def _conversions(name: str, kinds: Iterable[str]) -> Iterator[tuple[str, Command]]:
    for kind in kinds:

        def line(x: Bench, kind: str = kind) -> list[str | Path]:
            return ["convert", x.a, "-o", x.out, "--to", name, "--base", x.base, "--outtype", kind]

        yield f"convert {name} {kind}", Command(line, written(ROUNDING[kind]))


COMMANDS = dict(_commands())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of every edge."""
    found: dict[str, Path] = {}
    for name, edge in EDGES.items():
        folder = found[name] = tmp_path_factory.mktemp("edge")
        write_base(folder / "base", edge.width)
        write_base(folder / "wide", edge.width, np.float64)
        write_base(folder / "tuned", edge.width, np.float64, add=edge.deltas(1))
        write_gguf_base(folder / "gguf", edge.width)
        for place, seed in (("a", 1), ("a2", 2)):
            edge.write(folder / place, seed)
        if edge.size:
            edge.write_twin(folder / "twin1", 1)
            edge.write_twin(folder / "twin2", 2)
        other = Edge(width=edge.width, rank=edge.rank or RANK).write(folder / "other", 3)
        invoke("audit", other, "--bank", folder / "bank")
    return found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("edge", EDGES)
def test_the_answer_is_right_or_refused_by_name(
    edge: str, command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = COMMANDS[command]
    bench = Bench(EDGES[edge], folders[edge], tmp_path / asked.out)
    result = invoke(*asked.line(bench))
    if result.exit_code in asked.codes:
        bench.printed = result.stdout
        asked.check(bench)
        return
    assert edge not in SOUND or command in NEVER
    assert result.exit_code in {3, 4, 5}
    several = "unreadable: " in result.stdout or '"error": {' in result.stdout
    assert result.stdout == "" or several
    assert "Error: " in result.stderr or several
    named = (*NAMES, str(bench.a), str(bench.tuned), str(bench.bank))
    assert any(name in result.stderr + result.stdout for name in named), result.stderr
    # A report says of each source what is wrong with it.
    assert command == "audit html" or not any(tmp_path.iterdir())


@pytest.mark.parametrize("alpha", [np.nan, np.inf, -np.inf])
def test_no_command_takes_an_alpha_of_gguf_that_is_no_number(
    alpha: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    bench = Bench(EDGES["plain"], folders["plain"], tmp_path / "out")
    path = tmp_path / "a.gguf"
    assert invoke("convert", bench.a, "-o", path, "--base", bench.base).exit_code == 0
    data = path.read_bytes()
    name = b"adapter.lora.alpha"
    place = data.index(name) + len(name) + 4  # after the number of its type
    path.write_bytes(data[:place] + np.float32(alpha).tobytes() + data[place + 4 :])
    for line in (
        ["inspect", path],
        ["validate", path, "--base", bench.base, "--target", "llama.cpp"],
        ["convert", path, "-o", bench.out, "--to", "peft", "--base", bench.base],
        ["diff", path, path],
        ["audit", path],
        ["compress", path, "-o", bench.out, "--rank", "1"],
        ["merge", path, "-o", bench.out],
        ["merge", path, "--into", bench.base, "-o", bench.out],
        ["stack", path, "--for", "llama.cpp"],
        ["tinylora", "project", path, "--base", bench.base, "--size=4", "-o", bench.out],
    ):
        result = invoke(*line)
        assert result.exit_code == 3, line
        assert "alpha" in result.stderr
    assert not bench.out.exists()


@pytest.mark.parametrize("weight", ["1e308", "-1e308", "1e41", "nan", "inf"])
@pytest.mark.parametrize("method", [spec.name for spec in adapterkit.merge_methods()])
def test_a_weight_that_leaves_no_room_is_an_error_of_usage(
    method: str, weight: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    bench = Bench(EDGES["plain"], folders["plain"], tmp_path / "out")
    line = merging(bench.a, bench.a2, bench.out, method)
    result = invoke(*line, f"--weights={weight},1")
    assert result.exit_code == 2
    assert "weight" in result.stderr
    result = invoke("merge", bench.a, "--into", bench.base, "-o", bench.out, f"--weights={weight}")
    assert result.exit_code == 2
    assert "weight" in result.stderr
    assert not bench.out.exists()
