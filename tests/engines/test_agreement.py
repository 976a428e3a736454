"""What validate, convert --for and stack --for say of one adapter in one engine never differ.

Every fixture of a finding, on every base that it is told of, in every engine.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from terminal import ROOT, invoke

from adapterkit import load_target, target_names, validate
from adapterkit.checks.findings import Verdict
from adapterkit.engines.verdict import FAILED
from adapterkit.errors import AdapterKitError
from adapterkit.serving.launch import SERVED

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit import ValidationReport

pytestmark = pytest.mark.engine

FOLDER = ROOT / "fixtures" / "validation"
BASES = {
    "experts": "mixtral",
    "AK310": "mixtral",
    "tied-embedding": "tied",
    "tied-output": "tied",
    "inert": "deepseek",
    "AK305": "vague",
    "AK308": "padded",
    "AK309": "deep",
    "AK312": "whole",
    "AK313": "whole",
    "AK314": "whole",
}
SOURCES = sorted(path.name for path in FOLDER.iterdir() if path.name != "bases")
ENGINES = sorted(target_names())
COUNTED = {"AK501", "AK502", "AK503"}
STOPPED = {Verdict.REFUSED, Verdict.ABORTS}
# Of an engine that takes no adapters at all any more, and of one that still does.
VERSIONS = {"ollama": ("ollama@0.34.0", "ollama@0.34.1")}
REFERENCES = [each for name in ENGINES for each in VERSIONS.get(name, (name,))]


def source_of(name: str) -> Path:
    folder = FOLDER / name
    files = [*folder.glob("*.gguf"), *folder.glob("kohya.safetensors")]
    return files[0] if files else folder


def base_of(name: str) -> Path:
    return FOLDER / "bases" / BASES.get(name, "llama")


def looked_at(source: Path, base: Path, engine: str) -> ValidationReport | None:
    """Return the report; None if the file cannot be read at all."""
    try:
        return validate(source, base=base, targets=[engine])
    except AdapterKitError:
        return None


@pytest.mark.parametrize("engine", REFERENCES)
@pytest.mark.parametrize("name", SOURCES)
def test_all_commands_say_the_same(name: str, engine: str, tmp_path: Path) -> None:
    source, base = source_of(name), base_of(name)
    report = looked_at(source, base, engine)
    if report is None:
        pytest.fail("no fixture is unreadable")
    check_report(report, engine)
    check_terminal(report, source, base, engine)
    if engine.partition("@")[0] in SERVED:
        check_stack(report, source, base, engine)
    check_conversion(report, source, base, engine, tmp_path)


def check_report(report: ValidationReport, engine: str) -> None:
    """The verdict, the modules and the findings are of one mind."""
    (judged,) = report.targets
    target = load_target(engine)
    mine = [each for each in report.findings if each.engine in {"", judged.engine}]
    # What modules come to is counted already, in the coverage.
    fates = {fate for each in mine if each.code not in COUNTED and (fate := target.fate(each))}
    if judged.verdict in STOPPED:
        assert judged.coverage["applied"] == ()
        assert fates & STOPPED or judged.coverage["refused"]
    if fates & STOPPED:
        assert judged.verdict in STOPPED
    if judged.verdict in FAILED:
        assert report.exit_code == 1
    if judged.verdict is None:
        assert report.exit_code != 0
    if judged.verdict is Verdict.APPLIED:
        assert set(map(str, (module.outcome for module in judged.modules))) <= {"applied"}
        assert not fates - {Verdict.APPLIED}
    if judged.verdict is Verdict.NOTHING and judged.modules and not fates:
        assert judged.coverage["applied"] == ()


def check_terminal(report: ValidationReport, source: Path, base: Path, engine: str) -> None:
    (judged,) = report.targets
    given = ("validate", source, "--base", base, "--target", engine)
    told = invoke(*given)
    assert told.exit_code == report.exit_code
    if judged.verdict or judged.modules:
        (headline,) = [line for line in told.stdout.splitlines() if line.startswith(f"{engine}: ")]
        assert (judged.verdict or "") in headline
        if judged.verdict in STOPPED:
            assert " applied" not in headline
    answer: dict[str, Any] = json.loads(invoke(*given, "--json").stdout)["results"][0]
    (said,) = answer["targets"]
    assert said["verdict"] == judged.verdict
    assert {key: tuple(value) for key, value in said["coverage"].items()} == judged.coverage
    listed = [(each["code"], each["engine"], each["message"]) for each in answer["findings"]]
    assert len(listed) == len(set(listed)), "one finding stands twice"


def check_stack(report: ValidationReport, source: Path, base: Path, engine: str) -> None:
    (judged,) = report.targets
    told = invoke("stack", source, "--base", base, "--for", engine)
    # A stack on a base that lacks a module is refused, whatever the engine does with the module.
    misfit = {"AK302", "AK303"} & {each.code for each in report.findings}
    if judged.verdict in FAILED or misfit:
        assert told.exit_code in {3, 4}, told.stdout
        assert told.stdout == ""
    elif judged.verdict is not None:
        assert told.exit_code == 0, told.stderr


def check_conversion(
    report: ValidationReport, source: Path, base: Path, engine: str, folder: Path
) -> None:
    (judged,) = report.targets
    written = folder / ("out.gguf" if load_target(engine).format == "gguf" else "out")
    if load_target(engine).coverage == "names":
        written = folder / "out.safetensors"
    told = invoke("convert", source, "-o", written, "--for", engine, "--base", base)
    if told.exit_code:
        assert not written.exists()
        assert told.exit_code in {3, 4}, told.stderr
        fixed = judged.verdict is Verdict.APPLIED and report.exit_code == 0
        assert not fixed, told.stderr
        if judged.verdict is not Verdict.PARTLY or told.exit_code == 3:
            return
        # What an engine leaves out is a loss: it is listed, and the rest can be had.
        assert "without loss" in told.stderr, told.stderr
        told = invoke(
            *("convert", source, "-o", written, "--for", engine, "--base", base, "--allow-lossy")
        )
        assert told.exit_code == 0, told.stderr
    after = looked_at(written, base, engine)
    assert after is not None
    assert after.targets[0].verdict not in FAILED, after.text()
