"""diff: equal across formats, and a diagnosis for each way in which converters break adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from adapterkit import audit, merge_files
from adapterkit.architectures.transforms import rope
from adapterkit.comparison import diff
from adapterkit.errors import FormatError, IncompatibleBaseError, UncheckableError
from adapterkit.factors import take_rows, transposed
from adapterkit.files import write
from adapterkit.model import AdapterTensorSet, Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
SHAPES = {
    "self_attn.q_proj": (64, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 64),
    "mlp.up_proj": (96, HIDDEN),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(CONFIG))
    return path


def adapter(change: Callable[[Update], Update] = lambda pair: pair) -> AdapterTensorSet:
    """A random adapter, each of its pairs changed."""
    random = np.random.default_rng(0)
    pairs: list[Update] = []
    for layer in range(2):
        for name, (rows, columns) in SHAPES.items():
            a, b = (
                LazyTensor.of(random.standard_normal(shape).astype(np.float32))
                for shape in ((4, columns), (rows, 4))
            )
            pairs.append(change(Update(f"model.layers.{layer}.{name}", a, b, 2.0)))
    tensors = {key: t for pair in pairs for key, t in zip(pair.keys, (pair.a, pair.b), strict=True)}
    return AdapterTensorSet(tensors=tensors, scales={pair.module: pair.scale for pair in pairs})


def unpermuted(pair: Update) -> Update:
    """What a converter makes that forgets the rotary order of q and k."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(pair.module.rpartition(".")[2])
    return take_rows(pair, rope(pair.shape[0], heads)) if heads else pair


BROKEN = {
    "scale lost: 0.25 everywhere (8 modules)": lambda pair: replace(pair, scale=0.5),
    "scale lost: -1 everywhere (8 modules)": lambda pair: replace(pair, scale=-2.0),
    "scale lost: 0.5 where wrong (2 modules)": lambda pair: replace(
        pair, scale=1.0 if "up_proj" in pair.module else 2.0
    ),
    "scales differ, directions agree: ratio 0.5 to 2": lambda pair: replace(
        pair, scale=1.0 if "layers.0" in pair.module else 4.0
    ),
    "q/k rows not permuted between Hugging Face's and llama.cpp's rotary order: 4": unpermuted,
    "factors transposed or swapped: 4 modules": lambda pair: (
        transposed(pair) if pair.shape[0] == pair.shape[1] else pair
    ),
    "no update in B where A has one: 8 modules": lambda pair: replace(pair, scale=0.0),
}


@pytest.mark.parametrize("diagnosis", BROKEN)
def test_the_cause_is_named(diagnosis: str, tmp_path: Path) -> None:
    write(adapter(), tmp_path / "a")
    write(adapter(BROKEN[diagnosis]), tmp_path / "b")
    report = diff(tmp_path / "a", tmp_path / "b")
    assert not report.equal
    assert len(report.diagnosis) == 1
    assert report.diagnosis[0].startswith(diagnosis)


def test_an_unknown_cause_is_not_invented(tmp_path: Path) -> None:
    random = np.random.default_rng(1)

    def noisy(pair: Update) -> Update:
        noise = random.standard_normal(pair.b.shape).astype(np.float32)
        return replace(pair, b=pair.b.map(lambda b: b + noise))

    write(adapter(), tmp_path / "a")
    write(adapter(noisy), tmp_path / "b")
    assert diff(tmp_path / "a", tmp_path / "b").diagnosis == ()


def test_formats_are_compared_by_what_they_mean(base: Path, tmp_path: Path) -> None:
    write(adapter(), tmp_path / "a")
    write(adapter(), tmp_path / "b.gguf", base=base, outtype="f16")
    report = diff(tmp_path / "a", tmp_path / "b.gguf", base=base)
    assert report.equal
    assert report.max_relative_error
    assert 1e-5 < report.max_relative_error < report.tolerance == 1e-3


def test_a_basis_change_is_no_difference(tmp_path: Path) -> None:
    mix = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]

    def rotated(pair: Update) -> Update:
        return replace(pair, a=pair.a.map(lambda a: mix @ a), b=pair.b.map(lambda b: b @ mix.T))

    write(adapter(), tmp_path / "a")
    write(adapter(rotated), tmp_path / "b")
    report = diff(tmp_path / "a", tmp_path / "b")
    assert report.equal
    assert report.max_relative_error
    assert report.max_relative_error > 0


def headless(folder: Path) -> AdapterTensorSet:
    """The adapter as one is named that was trained on the model without its head."""
    whole = adapter()
    write(whole.renamed({m: m.removeprefix("model.") for m in whole.modules}), folder)
    return whole


def test_a_prefix_that_one_leaves_out_is_said_and_no_difference(tmp_path: Path) -> None:
    write(headless(tmp_path / "short"), tmp_path / "whole")
    for a, b, name in (("short", "whole", "A"), ("whole", "short", "B")):
        report = diff(tmp_path / a, tmp_path / b)
        assert report.equal
        assert len(report.modules) == 2 * len(SHAPES)
        assert report.diagnosis[0].startswith(f"names: {name} leaves out 'model.'")


def test_names_of_another_place_are_not_joined(tmp_path: Path) -> None:
    whole = adapter()
    write(whole, tmp_path / "a")
    tower = {m: m.replace("model.", "model.vision_tower.") for m in whole.modules}
    write(whole.renamed(tower), tmp_path / "b")
    report = diff(tmp_path / "a", tmp_path / "b")
    assert not report.equal
    assert len(report.only_in_a) == len(report.only_in_b) == 2 * len(SHAPES)


def test_a_base_gives_its_names_to_all_that_are_loaded_together(base: Path, tmp_path: Path) -> None:
    write(headless(tmp_path / "short"), tmp_path / "whole")
    both = [tmp_path / "short", tmp_path / "whole"]
    assert diff(*both, base=base).equal
    with pytest.raises(IncompatibleBaseError, match="give its directory with --base"):
        merge_files(both, tmp_path / "merged")
    merged = merge_files(both, tmp_path / "merged", base=base, weights=[0.25, 0.75])
    assert diff(tmp_path / "whole", merged.destination).equal
    pairs = audit(*both, base=base).interference
    assert pairs is not None
    assert pairs.pairs[0].shared == 2 * len(SHAPES)


def test_missing_modules_are_listed(tmp_path: Path) -> None:
    whole = adapter()
    some = {key: t for key, t in whole.tensors.items() if "up_proj" not in key.module}
    write(whole, tmp_path / "a")
    write(whole.replace(tensors=some), tmp_path / "b")
    report = diff(tmp_path / "a", tmp_path / "b")
    assert not report.equal
    assert report.only_in_a == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert report.only_in_b == ()


def test_rows_that_need_a_base_are_not_guessed(base: Path, tmp_path: Path) -> None:
    write(adapter(), tmp_path / "a")
    write(adapter(), tmp_path / "b.gguf", base=base)
    with pytest.raises(UncheckableError, match="--base") as caught:
        diff(tmp_path / "a", tmp_path / "b.gguf")
    assert caught.value.exit_code == 5


def test_a_broken_adapter_is_said_to_be(tmp_path: Path) -> None:
    whole = adapter()
    half = {key: t for key, t in whole.tensors.items() if key.role != "lora_B"}
    write(whole, tmp_path / "a")
    write(whole, tmp_path / "b")
    from adapterkit.containers.safetensors import write_safetensors

    weights = tmp_path / "b" / "adapter_model.safetensors"
    write_safetensors(
        weights, {f"base_model.model.{k.module}.lora_A.weight": t for k, t in half.items()}, {}
    )
    with pytest.raises(FormatError, match="has no lora_B"):
        diff(tmp_path / "a", tmp_path / "b")
