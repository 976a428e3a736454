"""`audit` and `compress` as people and programs call them."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from audit_adapters import adapter, gaussian, layered, written
from audit_commands import many
from terminal import BASE, PEFT, TINY, invoke

from adapterkit import BaseReference, ModuleAudit, audit, convert, read
from adapterkit.auditing.tables import csv_table, markdown
from adapterkit.lowrank.differences import norm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def answer(*arguments: str | Path) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def only(*arguments: str | Path) -> dict[str, Any]:
    """Return the result of the one adapter of an audit."""
    (result,) = answer(*arguments)["results"]
    return result


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(adapter(many()), tmp_path_factory.mktemp("large") / "adapter")


def test_json_holds_the_names_that_others_rely_on() -> None:
    assert next(iter(answer("audit", TINY).items())) == ("schema", 2)
    found = only("audit", TINY)
    summary = "modules parameters stable_rank_mean stable_rank_median stable_rank_weighted_mean"
    more = "effective_rank_mean utilization_mean energy_rank_90_p50 energy_rank_90_p90"
    assert {*summary.split(), *more.split()} <= found["summary"].keys()
    module = "module rank scale singular_values spectral_norm frobenius_norm stable_rank"
    shape = "effective_rank utilization energy_rank_90 energy_rank_95 energy_rank_99"
    assert {*module.split(), *shape.split()} <= found["modules"][0].keys()
    report = audit(TINY)
    assert found["summary"]["stable_rank_mean"] == report.summary.stable_rank_mean
    assert [m["module"] for m in found["modules"]] == [m.module for m in report.modules]


def test_json_of_224_modules_is_one_object_with_null_for_what_is_not_there(large: Path) -> None:
    found = only("audit", large, "--suggest")
    assert len(found["modules"]) == 224
    assert found["suggestion"]["plan"]["peft"].keys() >= {"r", "rank_pattern", "alpha_pattern"}
    several = answer("audit", large, TINY, large)
    assert [len(a["modules"]) for a in several["results"]] == [224, found_modules(TINY), 224]
    assert [p["cosine"] for p in several["interference"]["pairs"]] == [
        None,
        pytest.approx(1.0),
        None,
    ]


def found_modules(path: Path) -> int:
    return len(audit(path).modules)


def test_the_view_fits_on_a_screen(large: Path, tmp_path: Path) -> None:
    for arguments in ((large, "--suggest"), (large, TINY), (TINY,), (large, large, TINY, large)):
        result = invoke("audit", *arguments)
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) <= 40
    names = {f"model.layers.{i}.part{i}.x{i}": gaussian(8, 8, 2, seed=i) for i in range(60)}
    crowded = written(adapter(names), tmp_path / "crowded")
    result = invoke("audit", crowded, "--suggest")
    assert len(result.stdout.splitlines()) <= 40
    assert "48 more families" in result.stdout


def test_the_view_says_what_matters(tmp_path: Path) -> None:
    pairs = layered(2)
    a, b = pairs["model.layers.0.self_attn.q_proj"]
    pairs["model.layers.0.self_attn.q_proj"] = (a, b * 0)
    shown = invoke("audit", written(adapter(pairs), tmp_path / "a"), "--suggest").stdout
    assert "untrained: 1 of 4 updates are zero" in shown
    assert "8 of 8 tensors measured" in shown
    assert re.search(r"90 % of every module's energy: .* but \d+% relative error", shown)
    clean = invoke("audit", TINY).stdout
    assert "every update is trained and of full rank" in clean


def test_what_clashes_is_named(tmp_path: Path) -> None:
    pairs = layered(2)
    turned = {n: (a, -b if "q_proj" in n else b) for n, (a, b) in pairs.items()}
    paths = [written(adapter(p), tmp_path / name) for name, p in (("one", pairs), ("two", turned))]
    shown = invoke("audit", *paths).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("clash of 1 and 2: ")]
    assert re.search(r"^1 2 .*, 2 clash$", shown, re.MULTILINE)
    named = line.removeprefix("clash of 1 and 2: ").split(", ")
    assert set(named) == {name for name in pairs if "q_proj" in name}


def test_csv_has_one_row_for_each_matrix(large: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(invoke("audit", large, TINY, "--csv").stdout)))
    report = audit(large)
    assert len(rows) == 224 + found_modules(TINY)
    assert rows[0].keys() == {"adapter", *ModuleAudit.__slots__}
    first = report.modules[0]
    assert float(rows[0]["stable_rank"]) == first.stable_rank
    values = tuple(float(v) for v in rows[0]["singular_values"].split())
    assert values == first.singular_values
    assert rows[0]["expert"] == ""


def test_markdown_is_safe_to_paste(tmp_path: Path) -> None:
    whole = adapter(layered(2)).replace(base=BaseReference(name="org/<b>|`x`\n# y"))
    path = written(whole, tmp_path / "a")
    text = invoke("audit", path, "--markdown", "--suggest").stdout
    assert r"org/\<b\>\|\`x\` \# y" in text
    widths = {line.count("|") - line.count(r"\|") for line in text.splitlines() if "| " in line}
    assert widths == {3, 4, 10}
    assert "### Interference" in invoke("audit", path, path, "--markdown").stdout


@pytest.mark.parametrize(
    ("source", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-1+1", "'-1+1"),
        ("@SUM(1)", "'@SUM(1)"),
        (" =1", "' =1"),
        ("\t=1", "\\t=1"),
        ("a\r\n=1", "a\\r\\n=1"),
        ("\x1b]0;owned\x07\u202e", "\\x1b]0;owned\\x07\\u202e"),
        ("a=b-c", "a=b-c"),
        (None, ""),
    ],
)
def test_csv_holds_no_formula_and_nothing_that_steers(source: str | None, cell: str) -> None:
    report = audit(TINY)
    (first,) = report.adapters
    module = replace(first.modules[0], module=source or "")
    changed = replace(first, source=source, modules=(module,))
    (row,) = csv.DictReader(io.StringIO(csv_table(replace(report, adapters=(changed,)))))
    assert (row["adapter"], row["module"]) == (cell, cell)
    assert float(row["scale"]) == module.scale


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://evil.example/x", r"https\://evil.example/x"),
        ("www.evil.example", r"www\.evil.example"),
        ("![x](y)", r"!\[x\](y)"),
        ("&lt;b&gt;", r"\&lt;b\&gt;"),
        ("~~gone~~ $x$", r"\~\~gone\~\~ \$x\$"),
        ("a\x1b[2Jb", r"a \[2Jb"),
    ],
)
def test_markdown_shows_names_as_they_are(name: str, shown: str) -> None:
    report = audit(TINY)
    changed = replace(report.adapters[0], base_model=name)
    assert f"| base model | {shown} |" in markdown(replace(report, adapters=(changed,)))


def test_the_same_adapter_in_another_format_measures_the_same(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "a.gguf", base=BASE, outtype="f16")
    convert(TINY, tmp_path / "b.gguf", base=BASE, outtype="f32")
    convert(TINY, tmp_path / "mlx", base=BASE, to="mlx")
    known = {m.module: m for m in audit(TINY).modules}
    for name, allowed in (("a.gguf", 1e-3), ("b.gguf", 1e-6), ("mlx", 1e-6)):
        for base in (None, BASE):
            found = audit(tmp_path / name, base=base)
            assert {m.module for m in found.modules} == known.keys()
            for module in found.modules:
                wanted = known[module.module]
                top = wanted.spectral_norm
                assert np.array(module.singular_values) == pytest.approx(
                    np.array(wanted.singular_values), abs=allowed * top
                )
                assert module.stable_rank == pytest.approx(wanted.stable_rank, rel=4 * allowed)
    both = audit(TINY, tmp_path / "b.gguf", base=BASE).interference
    assert both is not None
    assert both.pairs[0].cosine == pytest.approx(1, abs=1e-6)


OF_TUNERS = ("--base", PEFT.parent / "tuners" / "base")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("peft/patterns", ()),
        ("peft/dora", ()),
        ("mlx/lora", ()),
        ("mlx/experts", ()),
        ("mlx/unsloth", ()),
        ("handwritten/numpy-gpt2.npz", ("--alpha", "8")),
        ("handwritten/loralib.safetensors", ("--alpha", "2")),
        ("handwritten/raschka.pt", ("--dialect", "raschka-alpha", "--alpha", "3")),
        ("tinylora/self-contained.safetensors", ()),
        ("tinylora/peft", ()),
        ("tuners/adalora", ()),
        ("tuners/delora", ()),
        ("tuners/loha", ()),
        ("tuners/lokr", ()),
        ("tuners/lycoris/loha.safetensors", OF_TUNERS),
        ("tuners/miss", OF_TUNERS),
        ("tuners/vblora", ()),
        ("tuners/vera", OF_TUNERS),
        ("pirate/adapter", ()),
    ],
)
def test_every_format_is_measured_as_its_factors_say(
    name: str, more: tuple[str | Path, ...]
) -> None:
    path = PEFT.parent / name
    told: dict[str, Any] = {
        str(key)[2:]: value for key, value in zip(more[::2], more[1::2], strict=True)
    }
    if "alpha" in told:
        told["alpha"] = float(told["alpha"])
    norms = {pair.module: norm(pair) for pair in read(path, **told).pairs()}
    found: dict[str, float] = dict.fromkeys(norms, 0.0)
    for module in only("audit", path, *more)["modules"]:
        found[module["module"]] += module["frobenius_norm"] ** 2
    assert norms
    for module, squared in found.items():
        assert squared**0.5 == pytest.approx(norms[module], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file or directory"),
        ("nan", "holds NaN or infinity"),
        ("infinity", "holds NaN or infinity"),
        ("a-without-b", "has no lora_B beside it"),
        ("b-without-a", "has no lora_A beside it"),
        ("ranks-disagree", "rank"),
        ("weights-cut", "bytes of data are missing"),
        ("config-not-json", "JSON"),
        ("empty-tensor", "is empty"),
    ],
)
@pytest.mark.parametrize("command", ["audit", "compress"])
def test_bad_input_is_exit_3_and_no_number(
    command: str, name: str, reason: str, tmp_path: Path
) -> None:
    source = PEFT.parent / "hostile" / "peft" / name
    more = ["-o", tmp_path / "out", "--rank", "1"] if command == "compress" else ["--suggest"]
    result = invoke(command, source, "--json", *more)
    assert result.exit_code == 3
    if command == "audit":
        (told,) = json.loads(result.stdout)["results"]
        assert told.keys() == {"source", "error"}
        assert reason in told["error"]["message"]
        assert told["error"]["exit"] == 3
    else:
        assert result.stdout == ""
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("form", ["gguf", "mlx", "peft"])
def test_a_file_that_was_cut_is_exit_3(form: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / ("a.gguf" if form == "gguf" else "a")
    convert(TINY, path, base=BASE, to=form)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    for more in (["--suggest"], ["--csv"], ["--suggest", "--markdown"]):
        result = invoke("audit", path, *more)
        assert (result.exit_code, result.stdout) == (3, "")
        assert file.name in result.stderr


def test_something_that_is_no_adapter_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    (tmp_path / "y.txt").write_bytes(b"hello")
    (tmp_path / "empty").mkdir()
    for name in ("x.gguf", "y.txt", "empty"):
        result = invoke("audit", tmp_path / name)
        assert (result.exit_code, result.stdout) == (3, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit"],
        ["audit", TINY, "--json", "--csv"],
        ["audit", TINY, "--tol", "0.1"],
        ["audit", TINY, "--suggest", "--tol", "0.1", "--budget", "100"],
        ["audit", TINY, "--suggest", "--tol", "1"],
        ["compress", TINY, "--rank", "1"],
        ["compress", TINY, "-o", "x"],
        ["compress", TINY, "-o", "x", "--tol", "0.1", "--budget", "5"],
        ["compress", TINY, "-o", "x", "--sv-fro", "0.9", "--sv-ratio", "5"],
        ["compress", TINY, "-o", "x", "--sv-fro", "1.9"],
        ["compress", TINY, "-o", "x", "--budget", "5"],
    ],
)
def test_a_wrong_call_is_exit_2(arguments: list[Any]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_compress_says_what_it_cost(tmp_path: Path) -> None:
    source = written(adapter(layered(3, rank=6)), tmp_path / "source")
    shown = invoke("compress", source, "-o", tmp_path / "small", "--rank", "2").stdout
    assert "rank 2" in shown
    error = audit(source, suggest=True, tol=0.5)
    assert error.plans
    found = answer("compress", source, "-o", tmp_path / "other", "--sv-fro", "0.9", "--rank", "4")
    assert found["report"]["policy"] == "sv_fro 0.9, rank up to 4"
    assert found["report"]["measured_error"] == pytest.approx(
        found["report"]["predicted_error"], abs=1e-6
    )
    assert f"relative error {float(shown.split('relative error ')[1].split()[0]):.3g}" in shown
    assert invoke("compress", source, "-o", tmp_path / "small", "--rank", "2").exit_code == 1
    again = invoke("compress", source, "-o", tmp_path / "small", "--tol", "0.2", "--force")
    assert again.exit_code == 0


def test_neither_command_imports_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from adapterkit_cli.main import cli; "
        "cli.main(sys.argv[1:], standalone_mode=False); "
        "assert 'numpy' in sys.modules; "
        "print(sorted({'torch', 'safetensors.torch', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (
        ("audit", TINY, "--html", tmp_path / "x.html"),
        ("compress", TINY, "-o", tmp_path / "small", "--rank", "1"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.splitlines()[-1] == "[]"
