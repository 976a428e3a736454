"""The library as people type it: short reprs, reports as text and tables, small conveniences."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from terminal import BASE, PEFT, TINY, invoke
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit
from adapterkit import DType, LazyTensor, Update
from adapterkit.errors import UnsupportedError, UsageError
from adapterkit.model import Kind
from adapterkit.torch import from_state_dict as from_torch

ROOT = PEFT.parent
WEAK = PEFT / "tiny-weak"


def made(command: str, folder: Any) -> tuple[Any, list[str]]:
    """Return a report of the library, and the command that prints it."""
    return {
        "inspect": lambda: (adapterkit.inspect(TINY), ["inspect", str(TINY)]),
        "validate": lambda: (
            adapterkit.validate(TINY, base=PEFT / "wider-base", targets=["vllm"]),
            ["validate", str(TINY), "--base", str(PEFT / "wider-base"), "--target", "vllm"],
        ),
        "diff": lambda: (adapterkit.diff(TINY, WEAK), ["diff", str(TINY), str(WEAK)]),
        "audit": lambda: (adapterkit.audit(TINY, WEAK), ["audit", str(TINY), str(WEAK)]),
        "convert": lambda: (
            adapterkit.convert(TINY, folder / "x.gguf", base=BASE),
            ["convert", str(TINY), "-o", str(folder / "x.gguf"), "--base", str(BASE), "--force"],
        ),
    }[command]()


@pytest.mark.parametrize("command", ["inspect", "validate", "diff", "audit", "convert"])
def test_a_report_as_text_is_what_the_command_prints(command: str, tmp_path: Any) -> None:
    report, arguments = made(command, tmp_path)
    assert f"{report}\n" == invoke(*arguments).stdout
    assert repr(report).startswith(f"<{type(report).__name__}: ")
    assert "\n" not in repr(report)
    assert len(repr(report)) < 200
    shown = report._repr_html_()
    HTMLParser().feed(shown)
    assert shown.startswith("<pre>")


def test_an_adapter_is_shown_in_a_line_and_in_a_small_table() -> None:
    adapter = adapterkit.read(ROOT / "pirate" / "adapter")
    assert str(adapter) == repr(adapter)
    assert len(repr(adapter)) < 200
    table = adapter._repr_html_()
    assert table.count("<tr>") == 22
    assert "and 40 more" in table


def test_a_stack_is_shown_and_iterated() -> None:
    stack = adapterkit.AdapterStack()
    assert repr(stack) == "<AdapterStack: empty>"
    stack.load(TINY, scale=0.7)
    stack.load(WEAK)
    assert repr(stack) == "<AdapterStack: tiny @ 0.7, tiny-weak @ 1>"
    assert [member.name for member in stack] == ["tiny", "tiny-weak"]


def test_delta_is_what_peft_would_add() -> None:
    weights = load_file(TINY / "adapter_model.safetensors")
    for pair in adapterkit.read(TINY).pairs():
        a, b = (
            weights[f"base_model.model.{pair.module}.lora_{side}.weight"].astype(np.float64)
            for side in "AB"
        )
        np.testing.assert_allclose(pair.delta(), pair.scale * b @ a, rtol=1e-12)


def test_delta_of_every_kind_has_the_shape_of_its_weight() -> None:
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> LazyTensor:
        return LazyTensor.of(rng.standard_normal(shape).astype(np.float32))

    experts = Update("m", tensor(3, 2, 5), tensor(3, 4, 2), 0.5, Kind.EXPERTS)
    stacked = np.einsum("eor,eri->eoi", experts.b.numpy(), experts.a.numpy())
    np.testing.assert_allclose(experts.delta(), 0.5 * stacked, rtol=1e-5)
    table = Update("m", tensor(2, 7), tensor(4, 2), 2.0, Kind.EMBEDDING)
    np.testing.assert_allclose(
        table.delta(), 2.0 * (table.b.numpy() @ table.a.numpy()).T, rtol=1e-5
    )
    kernel = Update("m", tensor(2, 5, 3, 3), tensor(4, 2, 1, 1), 1.0, Kind.CONVOLUTION)
    folded = np.einsum("or,rihw->oihw", kernel.b.numpy()[:, :, 0, 0], kernel.a.numpy())
    np.testing.assert_allclose(kernel.delta(), folded, rtol=1e-5)
    half = Update("m", tensor(2, 32).cast(DType.Q8_0), tensor(4, 2), 1.0)
    assert half.delta().shape == (4, 32)


def test_rows_become_a_table_where_a_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    report = adapterkit.diff(TINY, WEAK)
    assert [row["module"] for row in report.rows()] == [m.module for m in report.modules]
    assert len(adapterkit.audit(TINY, WEAK).rows()) == 12
    assert adapterkit.inspect(TINY).rows()[0]["modules"] == 6
    findings = adapterkit.validate(TINY, base=PEFT / "wider-base").rows()
    assert {row["code"] for row in findings} == {"AK304"}
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UnsupportedError, match=f"{name} is not installed"):
            getattr(report, f"to_{name}")()
        library: Any = ModuleType(name)
        library.DataFrame = lambda rows, **_: ("frame", rows)
        monkeypatch.setitem(sys.modules, name, library)
        assert getattr(report, f"to_{name}")() == ("frame", report.rows())


def test_tables_are_of_types_that_arrow_has_and_have_columns_without_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Polars raises for a mapping whose keys are numbers, and cannot filter without a column."""
    made: list[tuple[Any, Any]] = []
    library: Any = ModuleType("polars")
    library.DataFrame = lambda rows=None, schema=None, **_: made.append((rows, schema))
    monkeypatch.setitem(sys.modules, "polars", library)
    adapterkit.inspect(TINY).to_polars()
    adapterkit.validate(TINY, base=BASE).to_polars()
    ((row,), _), (none, columns) = made
    mappings = [value for value in row.values() if isinstance(value, Mapping)]
    assert {type(key) for mapping in mappings for key in mapping} == {str}
    assert row["ranks"] == {"4": 6}
    assert none is None
    assert columns[:3] == ["source", "code", "severity"]


def test_a_function_takes_a_path_or_an_adapter(tmp_path: Any) -> None:
    adapter = adapterkit.read(TINY)
    assert adapterkit.inspect(adapter).sha256 == adapterkit.inspect(TINY).sha256
    found, held = (adapterkit.validate(each, base=BASE).findings for each in (TINY, adapter))
    assert held == found
    assert adapterkit.diff(adapter, TINY).equal
    adapterkit.convert(adapter, tmp_path / "x.gguf", base=BASE)
    assert adapterkit.diff(tmp_path / "x.gguf", adapter, base=BASE).equal
    adapterkit.compress_file(adapter, tmp_path / "small", rank=2)
    merged = adapterkit.merge_files([adapter, WEAK], tmp_path / "merged")
    assert merged.modules == 6


def test_a_merge_and_a_stack_take_a_path_or_an_adapter(tmp_path: Any) -> None:
    held = adapterkit.read(TINY)
    by_path, by_hand = (adapterkit.merge([each, WEAK]).adapter for each in (TINY, held))
    assert adapterkit.diff(by_path, by_hand).max_relative_error == 0
    base = weights(tmp_path)
    for name, source in (("path", TINY), ("hand", held)):
        adapterkit.merge_into([source], base, tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("path", "hand"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    stack = adapterkit.AdapterStack(BASE)
    stack.load(held, name="held", scale=0.5)
    assert adapterkit.diff(stack.combined(), TINY).modules[0].norm_ratio == pytest.approx(2)
    with pytest.raises(adapterkit.AdapterIncompatibleError, match="an engine loads files"):
        adapterkit.serving_settings(stack, "vllm")


def weights(folder: Any) -> Any:
    """Return the base with random weights."""
    base = folder / "weights"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE)).save_pretrained(base)
    return base


@pytest.mark.parametrize(
    "work",
    [
        lambda tell, _: adapterkit.audit(TINY, progress=tell),
        lambda tell, _: adapterkit.compress(TINY, rank=2, progress=tell),
        lambda tell, to: adapterkit.convert(TINY, to, progress=tell),
        lambda tell, _: adapterkit.diff(TINY, WEAK, progress=tell),
        lambda tell, _: adapterkit.inspect(TINY, progress=tell),
        lambda tell, _: adapterkit.merge([TINY, WEAK], progress=tell),
        lambda tell, to: adapterkit.merge_files([TINY, WEAK], to, progress=tell),
        lambda tell, _: adapterkit.validate(TINY, base=BASE, progress=tell),
        lambda tell, to: adapterkit.write(TINY, to, progress=tell),
    ],
)
def test_who_watches_is_told_the_size_and_the_end(work: Any, tmp_path: Any) -> None:
    told: list[tuple[int, int]] = []
    work(lambda done, total: told.append((done, total)), tmp_path / "out")
    assert told
    assert all(0 <= done <= total for done, total in told)
    assert told[-1][0] == told[-1][1]


def test_torch_tensors_and_a_config_are_taken_where_they_are_natural() -> None:
    weights = load_torch(TINY / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(TINY)
    with pytest.raises(UsageError, match=r"adapterkit\.torch\.from_state_dict"):
        adapterkit.from_state_dict(weights, config)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="config is a str"):
        adapterkit.from_state_dict({}, "config")
    arrays = load_file(TINY / "adapter_model.safetensors")
    for held in (from_torch(weights, config), adapterkit.from_state_dict(arrays, config)):
        assert adapterkit.diff(held, TINY).equal
