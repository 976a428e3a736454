"""Merging files into a file: formats, proofs, recipes and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import merge_oracle as oracle
import numpy as np
import pytest
from click.testing import CliRunner

import adapterkit
from adapterkit import merge_files, read_recipe
from adapterkit.conversion import convert
from adapterkit.errors import (
    DestinationExistsError,
    FormatError,
    LossyConversionError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit_cli.main import cli

FIXTURES = Path(__file__).parents[2] / "fixtures" / "peft"
TINY, WEAK, BASE = FIXTURES / "tiny", FIXTURES / "tiny-weak", FIXTURES / "base"


def deltas(path: Path) -> dict[str, Any]:
    from adapterkit.base import open_base

    return oracle.deltas(detect(path).read(path, FormatOptions(base=open_base(BASE))))


def weighted(weights: tuple[float, float]) -> dict[str, Any]:
    first, second = deltas(TINY), deltas(WEAK)
    return {m: weights[0] * first[m] + weights[1] * second[m] for m in first}


def close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    assert all(oracle.relative(found[m], wanted[m]) < tolerance for m in wanted)


@pytest.mark.parametrize("name", ["merged", "merged.gguf"])
@pytest.mark.parametrize("method", ["svd", "cat"])
def test_any_formats_into_any_format(tmp_path: Path, name: str, method: str) -> None:
    convert(WEAK, tmp_path / "weak.gguf", base=BASE)
    out = tmp_path / name
    sources = [TINY, tmp_path / "weak.gguf"]
    report = merge_files(sources, out, base=BASE, method=method, weights=[0.7, -0.3])
    close(deltas(out), weighted((0.7, -0.3)), 1e-6)
    assert report.format == ("gguf" if name.endswith("gguf") else "peft")
    assert report.modules == len(deltas(TINY))
    assert report.max_relative_error < 1e-6
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.iterdir()))
    assert report.bytes == size


def test_gguf_files_merge_without_a_base(tmp_path: Path) -> None:
    for source, name in ((TINY, "a.gguf"), (WEAK, "b.gguf")):
        convert(source, tmp_path / name, base=BASE)
    merge_files([tmp_path / "a.gguf", tmp_path / "b.gguf"], tmp_path / "m.gguf")
    close(deltas(tmp_path / "m.gguf"), weighted((1.0, 1.0)), 1e-6)
    # Into other names and another row order the base is needed.
    with pytest.raises(LossyConversionError, match="give the base model with --base"):
        merge_files([tmp_path / "a.gguf", tmp_path / "b.gguf"], tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "m.gguf"]


@pytest.mark.parametrize(("outtype", "error"), [("f32", 1e-6), ("f16", 1e-3), ("bf16", 1e-2)])
def test_the_stored_type_is_the_one_asked_for(tmp_path: Path, outtype: str, error: float) -> None:
    report = merge_files([TINY, WEAK], tmp_path / "m", outtype=outtype)
    # Rounded once, by the merge: the file then holds the merged adapter bit by bit.
    assert report.max_relative_error == 0
    assert report.merge.max_measured_error < error
    close(deltas(tmp_path / "m"), weighted((1.0, 1.0)), error)
    adapter = detect(tmp_path / "m").read(tmp_path / "m", FormatOptions())
    assert {t.dtype.value for t in adapter.tensors.values()} == {outtype.upper()}


def test_the_config_keeps_what_the_model_is_for(tmp_path: Path) -> None:
    report = merge_files([TINY, WEAK], tmp_path / "m", rank=3)
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    source = json.loads((TINY / "adapter_config.json").read_text())
    for name in ("base_model_name_or_path", "task_type"):
        assert config[name] == source.get(name, config[name])
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {module.rank for module in report.merge.modules} == {3}


def test_what_was_merged_beside_factors_is_written(tmp_path: Path) -> None:
    report = merge_files([FIXTURES / "saved-head", TINY], tmp_path / "m", weights=[1.0, 0.5])
    assert report.merge.beside == {"lm_head.weight.full": f"copied from {FIXTURES / 'saved-head'}"}
    with pytest.raises(LossyConversionError, match="a whole trained weight has no place"):
        merge_files([FIXTURES / "saved-head", TINY], tmp_path / "m.gguf", base=BASE)
    assert not (tmp_path / "m.gguf").exists()


def test_nothing_appears_when_something_is_wrong(tmp_path: Path) -> None:
    broken = FIXTURES.parent / "hostile" / "peft"
    cases: list[tuple[type[Exception], list[Path], dict[str, Any]]] = [
        (FormatError, [TINY, broken / "nan"], {}),
        (FormatError, [TINY, broken / "a-without-b"], {}),
        (UnsupportedError, [TINY, FIXTURES / "dora"], {}),
        (NotFoundError, [TINY, tmp_path / "none"], {}),
        (UsageError, [], {}),
        (UsageError, [TINY], {"outtype": "f8"}),
        (UsageError, [TINY], {"to": "onnx"}),
    ]
    for error, sources, more in cases:
        with pytest.raises(error):
            merge_files(sources, tmp_path / "m", **more)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationExistsError):
        merge_files([TINY, WEAK], tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]


class TestRecipe:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "recipe.yaml"
        path.write_text(text)
        return path

    def test_it_says_what_flags_say(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(TINY)
        recipe = read_recipe(
            self.write(
                tmp_path,
                """
            adapters:
              - {path: a, weight: 0.7, modules: {'self_attn\\..*': 0.9, down_proj: -1}}
              - {path: org/name, weight: 3e-1}
            method: ties
            space: knots
            params: {density: 0.5}
            rank: auto
            tol: 1.0e-2
            normalize: true
            seed: 3
            out: merged
        """,
            )
        )
        assert recipe.sources == (str(tmp_path / "a"), "org/name")
        assert recipe.settings == {
            "weights": [0.7, 0.3],
            "module_weights": [{"self_attn\\..*": 0.9, "down_proj": -1.0}, {}],
            "method": "ties",
            "space": "knots",
            "params": {"density": 0.5},
            "rank": "auto",
            "tol": 0.01,
            "normalize": True,
            "seed": 3,
        }
        assert recipe.files == {"out": str(tmp_path / "merged")}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("adapters: [a]\nmethods: svd", "methods: unknown key; known are adapters, method"),
            (
                "adapters: [a]\nrank: many",
                "rank: expects a whole number from 1 to 1048576 or one of auto, has 'many'",
            ),
            (
                "adapters: [a]\nrank: true",
                "rank: expects a whole number from 1 to 1048576 or one of auto, has true",
            ),
            ("adapters: [a]\ntol: small", "tol: expects a finite number, has 'small'"),
            ("adapters: [a]\nnormalize: 1", "normalize: expects true or false, has 1"),
            (
                "adapters: [a]\nparams: 3",
                "params: expects a mapping of names (a finite number each), has 3",
            ),
            ("adapters: [a]\nparams: {t: x}", "params.t: expects a finite number, has 'x'"),
            ("adapters: [{weight: 1}]", "adapters[0].path: is missing"),
            ("adapters: [a, {path: b, wait: 1}]", "adapters[1].wait: unknown key"),
            ("adapters: [a, {path: b, weight: 1}]", "adapters[0].weight: others have one"),
            ("adapters: [3]", "adapters[0]: expects text that is not empty or a mapping, has 3"),
            ("adapters: []", "adapters: expects a list of 1 to 4096 ("),
            ("method: svd", "adapters: is missing; expects a list of 1 to 4096 ("),
            ("a: &a [x, x]\nadapters: [*a, *a]", "holds YAML aliases"),
            ("adapters: [a]\nseed: 1\nseed: 2", "seed: is there twice"),
            ("- a\n- b", "is not a mapping of keys to values"),
            ("a: [", "is not readable YAML"),
            ("adapters: !!python/object/apply:os.getcwd []", "is not readable YAML"),
            ("", "is not a mapping of keys to values"),
        ],
    )
    def test_a_mistake_is_named_by_its_key(self, tmp_path: Path, text: str, message: str) -> None:
        path = self.write(tmp_path, text)
        with pytest.raises(FormatError) as caught:
            read_recipe(path)
        assert str(caught.value).startswith(f"{path}: {message}")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no such file"):
            read_recipe(tmp_path / "none.yaml")


def command(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["merge", *map(str, arguments)])


class TestCommand:
    def test_flags_and_a_recipe_give_the_same_file(self, tmp_path: Path) -> None:
        flags = ("--weights", "0.7,0.3", "--method", "dare", "--seed", 5, "--space", "core")
        done = command(TINY, WEAK, *flags, "--rank", 3, "--density", 0.5, "-o", tmp_path / "flags")
        assert done.exit_code == 0, done.stderr
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"adapters: [{{path: {TINY}, weight: 0.7}}, {{path: {WEAK}, weight: 0.3}}]\n"
            "method: dare\nseed: 5\nspace: core\nrank: 3\nparams: {density: 0.5}\nout: recipe\n"
        )
        assert command("--recipe", recipe).exit_code == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            first, second = (tmp_path / folder / name for folder in ("flags", "recipe"))
            assert first.read_bytes() == second.read_bytes()

    def test_it_says_what_was_done(self, tmp_path: Path) -> None:
        done = command(TINY, WEAK, "-o", tmp_path / "m", "--rank", 1, "--weights", "1,-2")
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"{tmp_path / 'm'}  peft  6 modules  ")
        assert lines[1].startswith("svd of 2 adapters: rank 1, ")
        assert lines[2] == (
            "proof: ΔW of the file is the merged one in all 6 modules, largest relative error 0"
        )
        assert "keep less than 90% of their energy" in done.stderr

    def test_json_is_the_report(self, tmp_path: Path) -> None:
        done = command(
            TINY, WEAK, "-o", tmp_path / "m", "--param", "density=0.5", "--method", "ties", "--json"
        )
        found = json.loads(done.stdout)
        assert found["schema"] == 2
        assert found["sources"] == [str(TINY), str(WEAK)]
        assert found["merge"]["parameters"] == {"density": 0.5}
        assert len(found["merge"]["modules"]) == 6
        assert set(found["merge"]["modules"][0]) == {
            "module",
            "weights",
            "coefficients",
            "ranks",
            "rank",
            "norm",
            "predicted_error",
            "measured_error",
            "retained_energy",
        }

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ((TINY, WEAK), 2, "with -o"),
            (("-o", "x"), 2, "name the adapters"),
            ((TINY, WEAK, "-o", "x", "--weights", "1,b"), 2, "'b' is not a number"),
            ((TINY, WEAK, "-o", "x", "--weights", "1"), 2, "2 adapters, but 1 weight"),
            ((TINY, WEAK, "-o", "x", "--param", "t"), 2, "'t' is not NAME=X"),
            ((TINY, WEAK, "-o", "x", "--method", "mean"), 2, "unknown method 'mean'; known: svd"),
            ((TINY, WEAK, "-o", "x", "--density", "0", "--method", "ties"), 2, "density is 0"),
            ((TINY, WEAK, "-o", "x", "--seed", "0"), 2, "draws nothing at random"),
            ((TINY, FIXTURES / "dora", "-o", "x"), 4, "has a DoRA magnitude"),
            ((TINY, "none", "-o", "x"), 3, "none: no such file or directory"),
        ],
    )
    def test_mistakes_have_one_line_and_an_exit_code(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: Any,
        code: int,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = command(*arguments)
        assert done.exit_code == code
        assert message in done.stderr
        assert not list(tmp_path.iterdir())

    def test_what_a_recipe_says_is_not_said_again(self, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"adapters: [{TINY}]\nrank: 2\nout: m\n")
        for more, message in (
            (["--rank", "3"], "the recipe has rank"),
            (["-o", "x"], "the recipe has out"),
            ([TINY], "leave out SRC"),
        ):
            done = command("--recipe", recipe, *more)
            assert (done.exit_code, message in done.stderr) == (2, True)


def test_a_merge_is_the_same_file_every_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "della", "seed": 9, "rank": 4}
    for name, threads in (("a", 1), ("b", 3)):
        merge_files([TINY, WEAK], tmp_path / name, jobs=threads, **options)
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert np.isfinite(next(iter(deltas(tmp_path / "a").values()))).all()


def test_alpha_and_dialect_are_for_files_that_do_not_tell(tmp_path: Path) -> None:
    """Of several adapters, only those that need it; the others keep their own scale."""
    shutil.copy(TINY / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    sources = [tmp_path / "bare.safetensors", WEAK]
    told: dict[str, Any] = {"base": BASE, "weights": [0.7, -0.3], "dialect": "linear-factors"}
    with pytest.raises(UsageError, match="pass the alpha of the training run with --alpha"):
        merge_files(sources, tmp_path / "out", **told)
    alpha = json.loads((TINY / "adapter_config.json").read_text())["lora_alpha"]
    merge_files(sources, tmp_path / "out", alpha=alpha, **told)
    close(deltas(tmp_path / "out"), weighted((0.7, -0.3)), 1e-6)
    raschka = FIXTURES.parent / "handwritten" / "raschka.pt"
    with pytest.raises(UsageError, match="2 dialects explain every tensor"):
        merge_files([raschka], tmp_path / "raschka", alpha=4)
    for dialect, name in (("raschka-alpha", "a"), ("raschka-alpha-over-r", "b")):
        merge_files([raschka], tmp_path / name, alpha=4, dialect=dialect)
    plain, divided = (
        oracle.deltas(detect(path).read(path, FormatOptions()))
        for path in (tmp_path / "a", tmp_path / "b")
    )
    ranks = {pair.module: pair.rank for pair in adapterkit.read(tmp_path / "a").pairs()}
    close(divided, {module: plain[module] / ranks[module] for module in plain}, 1e-6)
