"""Every command: its help, its JSON and its options."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from terminal import BASE, PEFT, TINY, invoke

import adapterkit
from adapterkit.architectures import families
from adapterkit.registry import formats
from adapterkit_cli.main import COMMANDS
from adapterkit_cli.tables import LISTINGS

if TYPE_CHECKING:
    from pathlib import Path


def answer(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """Return the one JSON object that a command prints; nothing else is on stdout."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    value = json.loads(result.stdout)
    assert next(iter(value.items())) == ("schema", 2)
    return value


def only(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """Return the one result of a command that takes any number of adapters."""
    (result,) = answer(*arguments, code=code)["results"]
    return result


def test_version_is_the_packages() -> None:
    assert invoke("--version").stdout == f"adapterkit, version {adapterkit.__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_whole(flag: str) -> None:
    shown = invoke(flag).stdout
    listed = re.findall(r"^  (\w+)  +(\S.*)$", shown, re.MULTILINE)
    assert [name for name, _ in listed] == list(COMMANDS)
    assert not any(line.endswith("...") for _, line in listed)
    assert "5 could not be checked" in re.sub(r"\s+", " ", shown)


# Their own commands take the options.
GROUPS = {"tinylora", "fleet"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_json(name: str) -> None:
    result = invoke(name, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {name} ")
    assert "--json" in result.stdout or name in GROUPS
    assert re.search(rf"Examples:\n    adapterkit {name} ", result.stdout)
    assert "--quiet" in result.stdout or name in GROUPS


@pytest.mark.parametrize("name", ["inspect", "convert", "diff"])
def test_a_command_is_a_function_of_the_library(name: str) -> None:
    assert callable(getattr(adapterkit, name))


def test_inspect_answers_with_the_keys_that_others_rely_on() -> None:
    found = only("inspect", TINY)
    keys = (
        "source format base_model architecture tuner modules parameters ranks scales dtypes bytes"
    )
    assert {*keys.split(), "sha256", "targets"} <= found.keys()
    assert found["modules"] == 6
    assert found["ranks"] == {"4": 6}
    assert found["scales"] == {"2.0": 6}


def test_inspect_shows_what_is_broken_and_succeeds() -> None:
    broken = PEFT.parent / "hostile" / "peft" / "ranks-disagree"
    result = invoke("inspect", broken)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert line.endswith("q_proj: ranks disagree, A is [4, 32], B is [32, 5]")
    assert result.exit_code == 0


def test_convert_reports_what_it_did(tmp_path: Path) -> None:
    target = tmp_path / "tiny.gguf"
    found = only("convert", TINY, "-o", target, "--base", BASE)
    assert (found["source"], found["destination"]) == (str(TINY), str(target))
    assert (found["modules"], found["parameters"]) == (6, 1536)
    assert (found["max_relative_error"], found["losses"]) == (0.0, [])
    assert found["bytes"] == target.stat().st_size


def test_convert_json_is_alone_on_stdout_when_there_are_notes(tmp_path: Path) -> None:
    found = only("convert", PEFT / "leaked-name", "-o", tmp_path / "clean")
    assert found["notes"] == ["12 tensor names: adapter name taken out of the tensor name"]


@pytest.mark.parametrize("output", ["-o", "--output", "--outfile"])
@pytest.mark.parametrize("base", ["--base", "--base-model-id"])
def test_convert_takes_the_names_of_llama_cpp(tmp_path: Path, output: str, base: str) -> None:
    target = tmp_path / "tiny.gguf"
    assert invoke("convert", TINY, output, target, base, BASE).exit_code == 0
    assert target.read_bytes().startswith(b"GGUF")


def test_convert_passes_its_switches_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def convert(source: str, **options: Any) -> adapterkit.ConversionReport:
        given.update(options, source=source)
        return adapterkit.ConversionReport(
            source="a",
            destination="b",
            source_format="peft",
            format="gguf",
            modules=1,
            parameters=2,
            bytes=3,
            max_relative_error=0.5,
            worst_module="only",
        )

    monkeypatch.setattr(adapterkit, "convert", convert)
    flags = ("--unverified", "--allow-lossy", "--force", "--outtype", "Q8_0")
    flags += ("--for", "sglang", "--dialect", "torchtune", "--alpha", "16")
    result = invoke("convert", "a", "-o", "b", "--to", "gguf", "--moe-layout", "fused", *flags)
    assert result.stdout.splitlines()[1] == (
        "proof: ΔW equal in the one module, largest relative error 0.5 (only)"
    )
    assert given == {
        "source": "a",
        "destination": "b",
        "to": "gguf",
        "outtype": "q8_0",
        "dora_rank": None,
        "moe_layout": "fused",
        "for_engine": "sglang",
        "dialect": "torchtune",
        "alpha": 16.0,
        "as_format": None,
        "unverified": True,
        "allow_lossy": True,
        "force": True,
        "proof": True,
    }
    assert list(tmp_path.iterdir()) == []


def test_convert_offers_every_outtype_of_the_library() -> None:
    from adapterkit.saving import OUTTYPES

    assert f"[{'|'.join(OUTTYPES)}]" in invoke("convert", "-h").stdout


def test_diff_tells_equal_from_different_by_its_exit_code() -> None:
    same = answer("diff", TINY, TINY)
    assert same["equal"] is True
    assert same["max_relative_error"] == 0.0
    other = answer("diff", TINY, PEFT / "tiny-weak", code=1)
    assert other["equal"] is False
    assert other["max_relative_error"] == pytest.approx(0.75)
    assert len(other["diagnosis"]) == 1
    assert set(other["modules"][0]) == {"module", "relative_error", "cosine", "norm_ratio"}
    assert {"only_in_a", "only_in_b"} <= other.keys()


def test_diff_takes_a_tolerance() -> None:
    assert invoke("diff", TINY, PEFT / "tiny-weak", "--tolerance", "0.76").exit_code == 0
    assert invoke("diff", TINY, PEFT / "tiny-weak", "--tolerance", "0.74").exit_code == 1
    assert invoke("diff", TINY, TINY, "--tolerance", "-1").exit_code == 2


def test_diff_shows_the_ten_worst_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tuple(
        adapterkit.ModuleDifference(f"m{place}", 1 / (1 + place), None, None) for place in range(12)
    )
    report = adapterkit.DiffReport(
        a="a",
        b="b",
        equal=False,
        tolerance=0.09,
        max_relative_error=1.0,
        modules=modules,
        only_in_b=tuple(f"extra{place}" for place in range(12)),
    )
    monkeypatch.setattr(adapterkit, "diff", lambda *_, **__: report)
    result = invoke("diff", "a", "b")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    # m11 is within the tolerance.
    assert [line.split()[0] for line in lines[3:13]] == [f"m{place}" for place in range(10)]
    assert lines[13] == "and 1 more; --json or -v lists all"
    assert lines[14] == "only in B: extra0"
    assert lines[-1] == "and 2 more; --json or -v lists all"


@pytest.mark.parametrize("kind", LISTINGS)
def test_each_kind_is_listed_with_its_names(kind: str) -> None:
    listed = answer("list", kind)[kind]
    rows = invoke("list", kind).stdout.splitlines()[1:]
    assert len(rows) == len(listed) > 0
    for row, known in zip(rows, listed, strict=True):
        assert row.startswith(known.get("name") or known["code"])
        assert known.get("title") or kind == "mixtures"


def test_lists_are_the_data_that_the_program_works_with() -> None:
    assert [row["name"] for row in answer("list", "formats")["formats"]] == [
        spec.name for spec in formats()
    ]
    assert [row["name"] for row in answer("list", "families")["families"]] == list(families())
    methods = {row["name"]: row for row in answer("list", "methods")["methods"]}
    assert list(methods) == [method.name for method in adapterkit.merge_methods()]
    assert methods["ties"]["parameters"] == {"density": 0.2}
    assert "density=0.2" in invoke("list", "methods").stdout
    assert set(answer("list")["kinds"]) == set(LISTINGS)
    assert invoke("list", "nothing").exit_code == 2


def test_formats_are_completed_by_name() -> None:
    from click import Context

    from adapterkit_cli.convert import command

    (option,) = [each for each in command.params if each.name == "to"]
    found = option.shell_complete(Context(command), "gg")
    assert [item.value for item in found] == ["gguf"]
