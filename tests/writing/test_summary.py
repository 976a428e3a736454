"""What inspect counts, and the digest that tells adapters apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import adapterkit
from adapterkit import AdapterTensorSet, DType, LazyTensor, Role, TensorKey
from adapterkit.model import Kind, Update
from adapterkit.summary import digest, inspect, summarize

PEFT = Path(__file__).parents[2] / "fixtures" / "peft"
A, B = Role.LORA_A, Role.LORA_B


def tensor(*shape: int, dtype: DType = DType.F32, fill: float = 0.5) -> LazyTensor:
    return LazyTensor.of(np.full(shape, fill, dtype=np.float32), dtype)


def adapter(*tensors: tuple[str, Role, LazyTensor], **scales: float) -> AdapterTensorSet:
    named = {TensorKey(module, role): value for module, role, value in tensors}
    return AdapterTensorSet(tensors=named, scales=scales)


def test_an_adapter_is_counted_by_module() -> None:
    summary = inspect(PEFT / "patterns")
    assert (summary.format, summary.tuner, summary.modules) == ("peft", "LoRA", 6)
    assert summary.ranks == {2: 2, 4: 4}
    # v_proj has alpha 8 and rank 2, one down_proj alpha 16 and rank 4.
    assert summary.scales == {2.0: 3, 4.0: 3}
    assert summary.targets == {"down_proj": 2, "q_proj": 2, "v_proj": 2}
    assert summary.dtypes == {"F32": 12}
    assert summary.parameters * 4 == summary.bytes == 5376
    assert summary.base_model == "example/tiny-llama"
    assert summary.problems == ()


def test_what_is_stored_whole_is_no_module() -> None:
    summary = inspect(PEFT / "saved-head")
    assert summary.modules == sum(summary.ranks.values()) == 6
    assert summary.replaced == ("lm_head.weight",)


def test_magnitudes_make_it_a_dora() -> None:
    assert inspect(PEFT / "dora").tuner == "DoRA"
    assert summarize(adapter(("norm.weight", Role.FULL, tensor(4)))).tuner == "none"


def test_an_adapter_made_in_memory_has_no_path() -> None:
    summary = summarize(adapter(("m", A, tensor(2, 3)), ("m", B, tensor(4, 2)), m=2.0))
    assert (summary.source, summary.format) == (None, None)
    assert summary.scales == {2.0: 1}


@pytest.mark.parametrize(
    ("kind", "a", "b", "rank"),
    [
        (Kind.LINEAR, (3, 8), (9, 3), 3),
        (Kind.EXPERTS, (5, 3, 8), (5, 9, 3), 3),
        (Kind.CONVOLUTION, (3, 8, 5, 5), (9, 3, 1, 1), 3),
        (Kind.CONVOLUTION, (3, 8, 3), (9, 3, 1), 3),
        (Kind.LINEAR, (8,), (9, 3), 3),
        (Kind.LINEAR, (3, 8), (9,), 3),
        (Kind.LINEAR, (8,), (9,), 0),
    ],
)
def test_the_rank_is_the_inner_dimension(
    kind: Kind, a: tuple[int, ...], b: tuple[int, ...], rank: int
) -> None:
    update = Update("m", tensor(*a), tensor(*b), 1.0, kind)
    assert summarize(AdapterTensorSet.of([update], {})).ranks == {rank: 1}


def test_a_target_is_a_name_with_its_numbers() -> None:
    names = ("model.layers.0.mlp.experts.3.w1", "model.layers.1.proj.0", "lonely", "0")
    summary = summarize(adapter(*((name, A, tensor(2, 3)) for name in names)))
    assert summary.targets == {"0": 1, "lonely": 1, "proj.0": 1, "w1": 1}


def test_a_broken_adapter_is_summarised_with_its_problems() -> None:
    summary = summarize(adapter(("m", A, tensor(2, 3))))
    assert (summary.modules, summary.ranks) == (1, {})
    assert len(summary.problems) == 1
    assert summary.problems[0].startswith("m.lora_A")


def test_the_digest_is_what_its_docstring_says() -> None:
    values = np.arange(6, dtype="<f4")
    found = digest(adapter(("m", A, LazyTensor.of(values.reshape(2, 3)))))
    content = hashlib.sha256(values.tobytes()).hexdigest()
    line = json.dumps(["m", "lora_A", "F32", [2, 3], content]) + "\n"
    assert found == hashlib.sha256(line.encode()).hexdigest()


def test_the_digest_ignores_order_scale_and_metadata() -> None:
    first = adapter(("m", A, tensor(2, 3)), ("m", B, tensor(4, 2)), m=1.0)
    second = adapter(("m", B, tensor(4, 2)), ("m", A, tensor(2, 3)), m=8.0)
    assert digest(first) == digest(second.replace(metadata={"name": "x"}))


@pytest.mark.parametrize(
    "other",
    [
        ("n", A, tensor(2, 3)),
        ("m", B, tensor(2, 3)),
        ("m", A, tensor(3, 2)),
        ("m", A, tensor(2, 3, fill=0.25)),
        ("m", A, tensor(2, 3, dtype=DType.F16)),
    ],
)
def test_the_digest_sees_every_change(other: tuple[str, Role, LazyTensor]) -> None:
    assert digest(adapter(other)) != digest(adapter(("m", A, tensor(2, 3))))


def test_one_adapter_in_two_containers_has_one_digest(tmp_path: Path) -> None:
    made = tmp_path / "tiny.gguf"
    adapterkit.convert(PEFT / "tiny", made, base=PEFT / "base")
    adapterkit.convert(made, tmp_path / "back", base=PEFT / "base")
    assert inspect(tmp_path / "back").sha256 == inspect(PEFT / "tiny").sha256
    # Rows of q_proj are in llama.cpp's order in the file.
    assert inspect(made).sha256 != inspect(PEFT / "tiny").sha256
