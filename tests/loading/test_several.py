"""Several adapters in one call: what stands alone is one, and those in memory have names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from terminal import BASE, PEFT, TINY

import adapterkit
from adapterkit.errors import UsageError
from adapterkit.several import each_of, named

if TYPE_CHECKING:
    from pathlib import Path


WEAK = PEFT / "tiny-weak"


def test_what_stands_alone_is_one() -> None:
    adapter = adapterkit.read(TINY)
    for alone in ("vllm", TINY, adapter):
        assert each_of(alone) == [alone]
    assert each_of(("vllm", "peft")) == ["vllm", "peft"]
    assert each_of(iter([TINY])) == [TINY]
    assert each_of(()) == []


def test_functions_of_several_take_a_single_name(tmp_path: Path) -> None:
    report = adapterkit.validate(TINY, base=BASE, targets="vllm", ignore="AK110")
    assert [engine.engine for engine in report.targets] == ["vllm"]
    assert len(adapterkit.for_each(adapterkit.inspect, str(TINY))) == 1
    assert adapterkit.merge(str(TINY)).report.adapters == (str(TINY),)
    assert adapterkit.merge_files(str(TINY), tmp_path / "one").sources == (str(TINY),)
    (attempt,) = adapterkit.convert_all(str(TINY), tmp_path / "all", to="mlx", base=BASE)
    assert attempt.get().modules == 6
    assert adapterkit.find_similar(str(TINY)).clusters == ()
    with pytest.raises(UsageError, match="1 adapter, but 2 weights: give one for each"):
        adapterkit.merge(str(TINY), weights=[1, 2])


def test_adapters_in_memory_are_named_by_where_they_come_from(tmp_path: Path) -> None:
    held = [adapterkit.read(TINY), adapterkit.read(WEAK)]
    assert [attempt.source for attempt in adapterkit.for_each(adapterkit.inspect, held)] == [
        str(TINY),
        str(WEAK),
    ]
    done = adapterkit.convert_all(held, tmp_path / "out", to="gguf", base=BASE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tiny-weak.gguf",
        "tiny.gguf",
    ]
    assert adapterkit.diff(tmp_path / "out" / "tiny.gguf", TINY, base=BASE).equal
    assert [attempt.source for attempt in done] == [str(TINY), str(WEAK)]
    assert named("a/b") == "a/b"
