"""Any number of adapters in one process, the shapes of the answer, and how a command speaks."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest
from terminal import BASE, PEFT, TINY, invoke

import adapterkit
from adapterkit_cli.main import COMMANDS

pytestmark = pytest.mark.slow

HOSTILE = PEFT.parent / "hostile" / "peft"
BROKEN = HOSTILE / "config-empty"
DORA, WEAK = PEFT / "dora", PEFT / "tiny-weak"
WORST_FIRST = (3, 4, 1, 5, 0)


def results(*arguments: str | Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code and the results of a command, which --jsonl must give alike."""
    done = invoke(*arguments, "--json")
    content = json.loads(done.stdout)
    assert next(iter(content.items())) == ("schema", 2)
    lines = [json.loads(line) for line in invoke(*arguments, "--jsonl").stdout.splitlines()]
    assert lines == content["results"]
    return done.exit_code, content["results"]


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize(
    ("command", "more", "code"),
    [("inspect", (), 3), ("validate", ("--base", BASE), 3), ("audit", (), 3)],
)
def test_a_broken_adapter_is_one_result_and_not_the_end(
    command: str, more: tuple[str | Path, ...], code: int, jobs: int
) -> None:
    ended, found = results(command, TINY, BROKEN, WEAK, *more, "--jobs", str(jobs))
    assert ended == code
    broken = [each for each in found if "error" in each]
    assert [each["source"] for each in broken] == [str(BROKEN)]
    assert broken[0]["error"]["kind"] == "FormatError"
    assert broken[0]["error"]["exit"] == 3
    assert [each["source"] for each in found if "error" not in each] == [str(TINY), str(WEAK)]
    alone = [results(command, each, *more)[1][0] for each in (TINY, WEAK)]
    assert [each for each in found if "error" not in each] == alone


def test_convert_writes_each_under_its_name(tmp_path: Path) -> None:
    arguments = ("convert", TINY, BROKEN, DORA, WEAK, "--to", "gguf", "--base", BASE)
    done = invoke(*arguments, "-o", tmp_path / "out", "--json")
    found = json.loads(done.stdout)["results"]
    assert done.exit_code == 3
    assert [each.get("error", {}).get("exit", 0) for each in found] == [0, 3, 4, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tiny-weak.gguf",
        "tiny.gguf",
    ]
    assert invoke("diff", WEAK, tmp_path / "out" / "tiny-weak.gguf", "--base", BASE).exit_code == 0


def test_an_output_is_called_what_its_source_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to(TINY)
    done = invoke("convert", tmp_path / "latest", WEAK, "-o", tmp_path / "out", "--to", "peft")
    assert done.exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"latest", "tiny-weak"}
    # Where one stands in it, its name is that of the directory.
    monkeypatch.chdir(tmp_path / "out" / "latest")
    (attempt,) = adapterkit.convert_all(".", tmp_path / "again")
    assert attempt.get().destination == str(tmp_path / "again" / "latest")


def test_outputs_of_one_name_are_refused_before_any_work(tmp_path: Path) -> None:
    done = invoke("convert", TINY, PEFT / "base" / ".." / "tiny", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "two outputs would be called tiny" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sources", "code"),
    [
        ((TINY,), 0),
        ((TINY, DORA), 1),
        ((DORA, BROKEN), 3),
        ((BROKEN, TINY), 3),
        ((TINY, PEFT / "missing"), 3),
    ],
)
def test_the_worst_of_several_decides(sources: tuple[Path, ...], code: int) -> None:
    more = ("--base", BASE, "--target", "vllm")
    alone = [invoke("validate", source, *more).exit_code for source in sources]
    assert min(alone, key=WORST_FIRST.index) == code
    assert invoke("validate", *sources, *more).exit_code == code


def test_a_gate_fails_on_what_it_is_told_to() -> None:
    leaked = ("validate", PEFT / "leaked-name", "--base", BASE)
    assert invoke(*leaked).exit_code == 0
    assert invoke(*leaked, "--fail-on", "warning").exit_code == 1
    passed = invoke(*leaked, "--fail-on", "warning", "--ignore", "ak110")
    assert (passed.exit_code, passed.stdout) == (0, "nothing found\n")
    wrong = invoke(*leaked, "--ignore", "AK11")
    assert wrong.exit_code == 2
    assert "did you mean AK3" in wrong.stderr


def test_csv_has_a_row_for_each_and_says_why_one_has_none() -> None:
    text = invoke("inspect", TINY, BROKEN, "--csv").stdout
    one, two = csv.DictReader(io.StringIO(text))
    assert (one["source"], one["ranks"], one["error"]) == (str(TINY), "4:6", "")
    assert (two["source"], two["format"]) == (str(BROKEN), "")
    assert "is empty" in two["error"]
    rows = csv.DictReader(
        io.StringIO(
            invoke("validate", TINY, DORA, "--base", BASE, "--target", "vllm", "--csv").stdout
        )
    )
    assert [(row["errors"], row["vllm"]) for row in rows] == [("0", "applied"), ("2", "refused")]


def test_sarif_holds_all_with_percent_encoded_places(tmp_path: Path) -> None:
    odd = tmp_path / "a b%ü#?"
    odd.symlink_to(DORA)
    done = invoke("validate", odd, BROKEN, "--base", BASE, "--target", "vllm", "--sarif")
    (run,) = json.loads(done.stdout)["runs"]
    assert done.exit_code == 3
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    places: dict[str, set[str]] = {}
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]
        # GitHub's rule GH1003: without a line nothing is shown.
        assert place["region"] == {"startLine": 1}
        uri = place["artifactLocation"]["uri"]
        assert uri.isascii()
        split = urlsplit(uri)
        assert (split.scheme, split.query, split.fragment) == ("file", "", "")
        places.setdefault(unquote(split.path), set()).add(result["ruleId"])
    assert places == {
        str(odd / "adapter_config.json"): {"AK403", "VLLM003", "VLLM005"} & set(rules),
        str(BROKEN / "adapter_config.json"): {"unreadable"},
    }
    assert all(Path(place).is_file() for place in places)


@pytest.mark.parametrize(
    ("command", "flags"),
    [("validate", "--json --sarif"), ("audit", "--csv --markdown"), ("inspect", "--jsonl --csv")],
)
def test_two_shapes_exclude_each_other(command: str, flags: str) -> None:
    done = invoke(command, TINY, *flags.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert "exclude each other" in done.stderr


def test_an_argument_that_is_wrong_for_all_is_said_once() -> None:
    done = invoke("validate", TINY, DORA, "--target", "vlm")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("unknown engine 'vlm'") == 1


def test_a_base_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit import loading

    opened: list[object] = []
    before = loading.open_base
    monkeypatch.setattr(loading, "open_base", lambda base: (opened.append(base), before(base))[1])
    found = adapterkit.for_each(adapterkit.validate, [TINY, WEAK, DORA], base=BASE)
    assert [attempt.exit_code for attempt in found] == [0, 0, 0]
    assert len(opened) == 1


def test_progress_counts_adapters_of_several_and_steps_of_one() -> None:
    told: list[tuple[int, int]] = []
    adapterkit.for_each(
        adapterkit.inspect, [TINY, WEAK, DORA], progress=lambda *each: told.append(each)
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    told.clear()
    adapterkit.for_each(adapterkit.inspect, [TINY], progress=lambda *each: told.append(each))
    assert told[-1] == (12, 12)
    with adapterkit.watched(lambda *each: told.append(each)):
        adapterkit.audit(TINY)
    assert told[-1] == (6, 6)


def test_a_bug_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(adapterkit, "inspect", buggy)
    with pytest.raises(ZeroDivisionError):
        invoke("inspect", TINY, DORA)


def test_quiet_leaves_notes_out_and_verbose_lists_whole() -> None:
    leaked = PEFT / "leaked-name"
    assert "note: " in invoke("inspect", leaked).stderr
    assert invoke("inspect", leaked, "-q").stderr == ""
    assert invoke("-q", "inspect", leaked).stderr == ""
    wide = ("validate", TINY, "--base", PEFT / "wider-base")
    assert "down_proj and 1 more:" in invoke(*wide).stdout
    assert "down_proj, model.layers.1.mlp.down_proj:" in invoke(*wide, "-v").stdout
    assert invoke("inspect", TINY, "-q", "-v").exit_code == 2


def test_colour_is_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    wide = ("validate", TINY, "--base", PEFT / "wider-base")
    assert "\x1b[31m" in invoke(*wide, "--color", "always").stdout
    assert "\x1b" not in invoke(*wide, "--color", "never", color=True).stdout
    assert "\x1b[31m" in invoke("--color", "always", "inspect", BROKEN).stderr
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in invoke(*wide, color=True).stdout
    assert "\x1b[31m" in invoke(*wide, "--color", "always").stdout


def on_terminal(*arguments: str, width: int, **environment: str) -> str:
    """Return what a terminal of a width is sent."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "adapterkit", *arguments],
        stdout=slave,
        stderr=slave,
        env=os.environ | {"COLUMNS": str(width)} | environment,
    ) as process:
        os.close(slave)
        text = b""
        try:
            while block := os.read(master, 1 << 16):
                text += block
        except OSError:  # the other side is closed
            pass
        process.wait(60)
    os.close(master)
    return text.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("kind", ["formats", "families", "engines", "codes"])
@pytest.mark.parametrize("width", [60, 100])
def test_tables_fit_the_terminal_and_lose_no_word(kind: str, width: int) -> None:
    said = on_terminal("list", kind, "-v", width=width, TERM="dumb")
    shown = said.partition("\nnote: ")[0]
    assert "\x1b" not in said
    assert max(map(len, shown.splitlines())) <= width
    whole = invoke("list", kind, "-v").stdout
    assert sorted("".join(shown.split())) == sorted("".join(whole.split()))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("inspekt", "inspect"), ("vaildate", "validate"), ("formats", "list"), ("targets", "list")],
)
def test_a_command_that_is_none_names_the_one_that_is_meant(typed: str, meant: str) -> None:
    done = invoke(typed, "x")
    assert done.exit_code == 2
    assert f"Did you mean {meant}?" in done.stderr


def test_a_path_that_is_none_names_the_one_beside_it(tmp_path: Path) -> None:
    done = invoke("inspect", PEFT / "tinny")
    assert f"did you mean {TINY}?" in done.stderr
    assert "did you mean" not in invoke("inspect", tmp_path / "nothing-like-it").stderr


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("x.ggf", None, "did you mean {}/x.gguf?"),
        ("x.gguf", "mlx", "mlx is a directory"),
        ("x.gguf", "kohya", "is for gguf"),
        ("x.safetensors", "peft", "peft is a directory"),
        ("x.safetensors", None, "can hold several formats"),
        ("x.txt", None, "no format has the suffix .txt"),
    ],
)
def test_a_name_that_means_something_else_is_asked_about(
    name: str, to: str | None, words: str, tmp_path: Path
) -> None:
    more = ["--to", to] if to else []
    done = invoke("convert", TINY, "-o", tmp_path / name, "--base", BASE, *more)
    assert done.exit_code == 2
    assert words.format(tmp_path) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1-lora", "v1", "a.b"])
def test_a_dot_in_a_name_is_no_suffix(name: str, tmp_path: Path) -> None:
    assert invoke("convert", TINY, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / name / "adapter_config.json").is_file()


def test_a_file_is_streamed_once_it_is_proven(tmp_path: Path) -> None:
    arguments = ("convert", TINY, "--base", BASE)
    assert invoke(*arguments, "-o", tmp_path / "x.gguf").exit_code == 0
    done = invoke(*arguments, "--to", "gguf", "-o", "-")
    assert done.stdout_bytes == (tmp_path / "x.gguf").read_bytes()
    broken = invoke("convert", BROKEN, "--to", "gguf", "-o", "-", "--base", BASE)
    assert (broken.exit_code, broken.stdout) == (3, "")
    for more in ((), ("--to", "peft"), ("--to", "gguf", "--json")):
        assert invoke(*arguments, "-o", "-", *more).exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_completes_its_options(name: str) -> None:
    asked = {"_ADAPTERKIT_COMPLETE": "bash_complete", "COMP_WORDS": f"adapterkit {name} --"}
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit"],
        env=os.environ | asked | {"COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "plain,--help" in done.stdout


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("merge --method ti", "ties"),
        ("merge --gguf-type q4_k", "q4_k_m"),
        ("validate --ignore AK30", "AK304"),
        ("validate --target vl", "vllm"),
        ("stack --for olla", "ollama"),
        ("convert --outtype b", "bf16"),
        ("convert --to mlx", "mlx"),
        ("inspect --dialect torcht", "torchtune"),
        ("list me", "methods"),
    ],
)
def test_values_are_completed(words: str, wanted: str) -> None:
    from click.shell_completion import ShellComplete

    from adapterkit_cli.main import cli

    *before, incomplete = words.split()
    found = ShellComplete(cli, {}, "adapterkit", "").get_completions(before, incomplete)
    assert wanted in [item.value for item in found]


def test_a_bar_appears_once_work_takes_long_and_has_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterkit_cli import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.watching("reading", "tensors"):
        adapterkit.inspect(TINY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    with progress.watching("reading", "tensors"):
        adapterkit.inspect(TINY)
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "12/12" in shown
    assert "/?" not in click.unstyle(shown)
    with progress.watching("converting") as told:
        assert told is not None
        for done, total in ((0, 2), (2, 2), (0, 3), (3, 3)):
            told(done, total)
    shown = click.unstyle(capsys.readouterr().err)
    assert "converting ━" in shown
    assert "converting, part 2 ━" in shown
    assert "3/3 steps" in shown
    monkeypatch.setenv("TERM", "dumb")
    with progress.watching("reading", "tensors"):
        adapterkit.inspect(TINY)
    assert capsys.readouterr().err == ""
