"""What gates adapters elsewhere, a GitHub Action and a pre-commit hook: what they run is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from playing import environment
from terminal import BASE, PEFT, ROOT

import adapterkit

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TIME_LIMIT = 60


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def acted(folder: Path, **inputs: str) -> tuple[int, str, dict[str, Any] | None]:
    """Run the action's last step with these inputs; return its exit code, output and SARIF."""
    action = loaded("action.yml")
    known = {name: str(each.get("default", "")) for name, each in action["inputs"].items()}
    known |= {name.replace("_", "-"): value for name, value in inputs.items()}
    step = action["runs"]["steps"][-1]
    given = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: known[found[1]], text)
        for name, text in step["env"].items()
    }
    home = folder / "home"
    home.mkdir()
    sarif = folder / "a.sarif"
    done = subprocess.run(
        ["/bin/bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=PEFT,
        env=environment(home) | given | {"SARIF": str(sarif), "RUNNER_TEMP": str(folder)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    report = json.loads(sarif.read_text()) if sarif.exists() else None
    return done.returncode, done.stdout + done.stderr, report


@pytest.mark.parametrize(
    ("inputs", "code", "rules"),
    [
        ({"adapters": "tiny patterns", "base": "base"}, 0, set[str]()),
        (
            {"adapters": "tiny dora missing", "base": "base", "targets": "vllm llama.cpp"},
            3,
            {"VLLM003", "VLLM005", "LCP001", "LCP008", "unreadable"},
        ),
        ({"adapters": "leaked-name", "base": "base", "fail_on": "warning"}, 1, {"AK110"}),
        (
            {"adapters": "leaked-*", "base": "base", "fail_on": "warning", "ignore": "AK110"},
            0,
            set[str](),
        ),
        (
            {"adapters": "**/leaked-name/adapter_config.json", "fail_on": "error"},
            5,
            {"AK110", "AK300"},
        ),
    ],
)
def test_the_action_does_what_its_inputs_say(
    inputs: dict[str, str], code: int, rules: set[str], tmp_path: Path
) -> None:
    ended, told, sarif = acted(tmp_path, **inputs)
    assert ended == code, told
    assert sarif is not None
    assert {result["ruleId"] for result in sarif["runs"][0]["results"]} == rules
    # One run serves the reader of the log and code scanning.
    assert all(f" {rule} " in told for rule in rules)
    assert told.count("\n") >= len(sarif["runs"][0]["results"])


def test_the_action_looks_at_adapters_once() -> None:
    (run,) = (
        each["run"] for each in loaded("action.yml")["runs"]["steps"] if each["name"] == "Validate"
    )
    assert run.count("adapterkit validate") == 1


@pytest.mark.parametrize("inputs", [{"targets": "vlm"}, {"base": "nowhere"}])
def test_wrong_inputs_of_the_action_leave_no_half_report(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    ended, told, sarif = acted(tmp_path, adapters="tiny", **inputs)
    assert ended in {2, 3}
    assert "Error: " in told
    assert sarif is None


@pytest.mark.parametrize(("name", "code"), [("tiny", 0), ("dora", 1)])
def test_the_hook_gates_the_files_that_it_is_given(name: str, code: int, tmp_path: Path) -> None:
    (hook,) = loaded(".pre-commit-hooks.yaml")
    files = [f"{name}/{path.name}" for path in sorted((PEFT / name).iterdir())]
    chosen = [path for path in files if re.search(hook["files"], path)]
    assert chosen == [f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors"]
    words = [*shlex.split(hook["entry"]), "--base", str(BASE), "--target", "vllm", *chosen]
    done = subprocess.run(
        words,
        cwd=PEFT,
        env=environment(tmp_path),
        capture_output=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == code


@pytest.mark.parametrize(
    ("path", "gated"),
    [
        ("adapters/0000100_adapters.safetensors", True),
        ("a/adapter_model-00001-of-00002.safetensors", True),
        ("pytorch_lora_weights.safetensors", True),
        ("a.onnx_adapter", True),
        ("base/config.json", False),
        ("model.safetensors", False),
        ("my_adapter_config.json", False),
    ],
)
def test_the_hook_takes_files_of_adapters_alone(path: str, gated: bool) -> None:
    (hook,) = loaded(".pre-commit-hooks.yaml")
    assert bool(re.search(hook["files"], path)) is gated


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name
)
def test_files_of_github_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in loaded(str(path))["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_the_shape_that_github_reads(path: Path) -> None:
    content = loaded(str(path))
    # YAML 1.1 reads the word `on` as true.
    assert set(content) <= {"name", True, "permissions", "jobs"}
    assert content[True].keys() <= {"push", "pull_request"}
    for job in content["jobs"].values():
        assert job.keys() <= {"runs-on", "needs", "environment", "permissions", "steps"}
        assert job.get("needs", next(iter(content["jobs"]))) in content["jobs"]
        for step in job["steps"]:
            assert step.keys() <= {"name", "uses", "with", "run"}
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "action.yml"], ids=lambda path: path.name)
def test_what_the_steps_run_is_there(path: Path) -> None:
    found = loaded(str(path))
    listed = found["runs"]["steps"] if "runs" in found else steps(path)
    for step in listed:
        if "run" in step:
            subprocess.run(["/bin/bash", "-n", "-c", step["run"]], check=True)
            program = step["run"].split()[0]
            assert "/" not in program or os.access(ROOT / program, os.X_OK)


@pytest.mark.parametrize(("tag", "code"), [("v{}", 0), ("{}", 1), ("v{}.1", 1)])
def test_a_release_is_of_the_version_that_its_tag_says(tag: str, code: int) -> None:
    (step,) = (each for each in steps(ROOT / ".github/workflows/release.yml") if "name" in each)
    run = step["run"].replace(".venv/bin/python", shlex.quote(sys.executable))
    done = subprocess.run(
        ["/bin/bash", "-e", "-c", run],
        cwd=ROOT,
        env=os.environ | {"GITHUB_REF_NAME": tag.format(adapterkit.__version__)},
        check=False,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == code


def test_the_version_is_that_of_the_citation_and_of_the_changelog() -> None:
    assert loaded("CITATION.cff")["version"] == adapterkit.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert versions[0] == adapterkit.__version__


def test_what_the_image_copies_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        name
        for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
        for name in line.split()[:-1]
    ]
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {f"!{name}" for name in copied} == set(kept) - {"*"}
    assert all((ROOT / name).exists() for name in copied)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.split("\n"))
    return [
        (w, rest.strip())
        for w, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")
    ]


def test_the_steps_of_the_image_make_a_program_that_runs(tmp_path: Path) -> None:
    """Run what the Dockerfile copies and runs, its absolute folders under one of the test's own."""
    environment_, source = tmp_path / "python", tmp_path
    venv = [sys.executable, "-m", "venv", "--system-site-packages", str(environment_)]
    subprocess.run(venv, check=True, timeout=TIME_LIMIT)
    search = os.environ | {"PATH": f"{environment_ / 'bin'}:{os.environ['PATH']}"}
    search.pop("PYTHONPATH", None)
    for word, rest in instructions():
        if word == "WORKDIR":
            source = tmp_path / rest.lstrip("/")
            source.mkdir(exist_ok=True)
        elif word == "COPY":
            *names, place = rest.split()
            for name in names:
                target = source / place
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("*.pyc"))
                else:
                    shutil.copy(ROOT / name, target)
        elif word == "RUN":
            command = re.sub(r"--mount=\S+", "", rest).replace("/wheels", f"{tmp_path}/wheels")
            # The dependencies are the index's; what is tried is this project's own steps.
            run = ["/bin/sh", "-ec", f"{command} --no-deps"]
            subprocess.run(run, cwd=source, env=search, check=True, timeout=4 * TIME_LIMIT)
    (entry,) = (json.loads(rest) for word, rest in instructions() if word == "ENTRYPOINT")
    (arguments,) = (json.loads(rest) for word, rest in instructions() if word == "CMD")
    program = environment_ / "bin" / entry[0]
    done = subprocess.run(
        [program, *arguments],
        cwd=tmp_path / "data",
        env=search,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Read, check and convert LoRA adapters" in done.stdout
    assert {word for word, _ in instructions()} == {
        *("FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD")
    }
