"""Every report of the library is shown alike: as text, in one line, as rows, in a notebook."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from html.parser import HTMLParser
from typing import Any, get_args, get_type_hints

import pytest
import torch
from terminal import BASE, PEFT, TINY
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit
from adapterkit import projection, tinylora
from adapterkit.doctor.examination import Condition
from adapterkit.text import Shown

WEAK = PEFT / "tiny-weak"
# What a public function returns that is a thing to work with, and no report on one.
THINGS = {"AdapterTensorSet", "Attempt", "BaseModel", "Loss", "MethodSpec", "Recipe", "Target"}


def own(item: Any) -> bool:
    return str(getattr(item, "__module__", "")).startswith("adapterkit")


# `projection` and `tinylora` are modules of their own; this is what they answer with.
SHOWN = {"plan", "project_file", "PlanReport", "ProjectedFile", "ProjectionReport"}
PUBLIC = [
    item
    for module in (adapterkit, projection)
    for name in dir(module)
    if not name.startswith("_") and own(item := getattr(module, name))
    if module is adapterkit or name in SHOWN
]
DOCTOR = adapterkit.DoctorReport(
    url="http://127.0.0.1:8080",
    server="llama-server",
    adapter="0",
    path="tiny.gguf",
    condition=Condition.STRENGTH,
    strength=0.5,
    causes=("alpha is not applied",),
    notes=("the server tells no path",),
    effect=0.25,
    expected_effect=1.0,
    base_divergence=1e-9,
    unexplained=0.01,
    prompts=10,
    requests=20,
    seconds=1.5,
)


def classes(annotation: Any) -> set[type]:
    """Return the dataclasses of the project that an annotation names, at any depth."""
    inner = {found for part in get_args(annotation) for found in classes(part)}
    named = inspect.isclass(annotation) and own(annotation) and is_dataclass(annotation)
    return inner | ({annotation} if named else set())


RETURNED = {
    each: found
    for each in PUBLIC
    if inspect.isfunction(each) and own(each)
    for found in classes(get_type_hints(each)["return"])
}
REPORTS = {each for each in PUBLIC if inspect.isclass(each) and issubclass(each, Shown)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    """Return a report of every type, each from the function that gives it."""
    folder = tmp_path_factory.mktemp("reports")
    base = folder / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE)).save_pretrained(base)
    adapter = adapterkit.read(TINY)
    audited = adapterkit.audit(TINY, WEAK, suggest=True)
    stack = adapterkit.AdapterStack()
    stack.load(TINY)
    written = adapterkit.write(adapter, folder / "written", base=base)
    settings = tinylora.TinySettings(
        projection_dim=2, target_modules=("q_proj", "v_proj", "down_proj")
    )
    projected = projection.project_file(TINY, folder / "tiny", base=base, settings=settings)
    compressed = adapterkit.compress(TINY, rank=2)
    merged = adapterkit.merge([adapter, adapterkit.read(WEAK)])
    reports = [
        written,
        audited,
        audited.adapters[0],
        audited.suggestions[0],
        audited.suggestions[0].plan,
        adapterkit.bank(TINY, WEAK, destination=folder / "bank.json"),
        compressed,
        compressed.report,
        adapterkit.compress_file(TINY, folder / "small", rank=2),
        adapterkit.convert(TINY, folder / "x.gguf", base=BASE),
        adapterkit.diff(TINY, WEAK),
        DOCTOR,
        adapterkit.find_similar([TINY, WEAK]),
        adapterkit.inspect(TINY),
        merged,
        merged.report,
        adapterkit.merge_files([TINY, WEAK], folder / "merged"),
        adapterkit.merge_into([TINY], base, folder / "model"),
        adapterkit.extract(base, folder / "model", folder / "extracted"),
        adapterkit.run_fleet("inspect", [TINY, WEAK], folder / "fleet"),
        adapterkit.serving_settings(stack, "vllm"),
        adapterkit.validate(TINY, base=PEFT / "wider-base", targets=["vllm"]),
        adapterkit.verify(folder / "x.gguf", against=WEAK, base=BASE),
        projected,
        tinylora.project(adapter, base=adapterkit.open_base(base), settings=settings)[1],
        projection.plan(base, budget=20),
    ]
    return {type(report): report for report in reports}


def test_what_a_function_answers_is_a_report() -> None:
    assert len(RETURNED) > 20
    bare = {found.__name__ for found in RETURNED.values() if not issubclass(found, Shown)}
    assert bare <= THINGS


def test_a_report_of_every_type_is_made_here(made: dict[type, Any]) -> None:
    answered = {found for found in RETURNED.values() if issubclass(found, Shown)}
    assert REPORTS | answered == set(made)


def test_what_is_no_report_is_a_line_too() -> None:
    target, base = adapterkit.load_target("vllm"), adapterkit.open_base(BASE)
    for thing in (target, base, base.architecture, adapterkit.read(TINY)):
        line = repr(thing)
        assert line.startswith(f"<{type(thing).__name__}: "), line
        assert "\n" not in line, line
        assert len(line) < 250, line


def test_every_report_is_text_a_line_rows_and_a_notebooks_table(made: dict[type, Any]) -> None:
    for kind, report in made.items():
        text = str(report)
        assert text.strip(), kind
        assert text == report.text(), kind
        line = repr(report)
        assert line.startswith(f"<{kind.__name__}: "), line
        assert "\n" not in line, line
        assert len(line) < 250, line
        rows = report.rows()
        assert rows, kind
        assert all(row.keys() == rows[0].keys() for row in rows), kind
        page = report._repr_html_()
        HTMLParser().feed(page)
        assert page.startswith("<pre>"), kind
        for words in report.remarks():
            assert all(isinstance(each, str) and each for each in words), kind
