"""Random adapters through every format and back: bits where nothing was folded, updates always."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.dtype import DType
from adapterkit.formats.protocol import FormatOptions
from adapterkit.keys import Role, TensorKey
from adapterkit.lowrank.differences import difference
from adapterkit.model import AdapterTensorSet
from adapterkit.notes import BaseReference
from adapterkit.proof import tolerance_for
from adapterkit.registry import spec
from adapterkit.tensor import LazyTensor

pytestmark = pytest.mark.slow

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB, LAYERS = 4, 2, 6, 20, 28, 40, 3
GGUF, PEFT = spec("gguf"), spec("peft")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.down_proj": (HIDDEN, FFN),
}
MODULES = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SHAPES] + ["lm_head"]
BITS = {DType.F32: np.uint32, DType.F16: np.uint16, DType.BF16: np.uint16}
BOUNDED = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)


def shape_of(module: str) -> tuple[int, int]:
    return (VOCAB, HIDDEN) if module == "lm_head" else SHAPES[module.split(".", 3)[3]]


@st.composite
def adapters(draw: st.DrawFn, *, any_bits: bool) -> AdapterTensorSet:
    """Any ranks, scales and float types; with `any_bits` NaN payloads and infinities too."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=6, unique=True))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    uniform = draw(st.booleans())
    rank, scale = draw(st.integers(1, 9)), draw(scales())
    tensors: dict[TensorKey, LazyTensor] = {}
    chosen: dict[str, float] = {}
    for module in modules:
        if not uniform:
            rank, scale = draw(st.integers(1, 9)), draw(scales())
        out, inputs = shape_of(module)
        chosen[module] = scale
        for role, shape in ((Role.LORA_A, (rank, inputs)), (Role.LORA_B, (out, rank))):
            dtype = draw(st.sampled_from(list(BITS)))
            tensors[TensorKey(module, role)] = values(random, shape, dtype, any_bits=any_bits)
    return AdapterTensorSet(tensors=tensors, scales=chosen, base=BaseReference(name="org/name"))


def scales() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 1.0, 2.0, 0.25, 1 / 3, 16 / 7**0.5, 1e-3, -1.5])


def values(
    random: np.random.Generator, shape: tuple[int, ...], dtype: DType, *, any_bits: bool
) -> LazyTensor:
    if any_bits:
        kind = BITS[dtype]
        bits = random.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)
        return LazyTensor.of(bits.view(dtype.numpy()))
    return LazyTensor.of(random.standard_normal(shape).astype(dtype.numpy()))


def bits(adapter: AdapterTensorSet) -> dict[TensorKey, tuple[Any, ...]]:
    return {k: (t.dtype, t.shape, bytes(t.tobytes())) for k, t in adapter.tensors.items()}


def base_in(folder: Path) -> FormatOptions:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return FormatOptions(base=open_base(folder / "config.json"))


@BOUNDED
@given(adapter=adapters(any_bits=True))
def test_peft_keeps_every_bit(adapter: AdapterTensorSet) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        PEFT.write(adapter, folder / "a", FormatOptions())
        again = PEFT.read(folder / "a", FormatOptions())
        assert bits(again) == bits(adapter)
        for module, scale in adapter.scales.items():
            np.testing.assert_allclose(again.scales[module], scale, rtol=1e-15)


@BOUNDED
@given(adapter=adapters(any_bits=True))
def test_gguf_keeps_every_bit_that_no_scale_is_folded_into(adapter: AdapterTensorSet) -> None:
    alphas = {pair.scale * pair.rank for pair in adapter.pairs()}
    assume(len(alphas) == 1 and 0.0 not in alphas)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = base_in(folder)
        GGUF.write(adapter, folder / "a.gguf", options)
        assert bits(GGUF.read(folder / "a.gguf", options)) == bits(adapter)


@BOUNDED
@given(adapter=adapters(any_bits=False))
def test_gguf_keeps_every_update(adapter: AdapterTensorSet) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = base_in(folder)
        GGUF.write(adapter, folder / "a.gguf", options)
        again = {p.module: p for p in GGUF.read(folder / "a.gguf", options).pairs()}
        for pair in adapter.pairs():
            # A folded B is widened to float32, so that the float32 bound holds for every dtype.
            assert difference(pair, again[pair.module]).relative_error < 1e-6


@BOUNDED
@given(adapter=adapters(any_bits=False), outtype=st.sampled_from(["auto", "f32", "f16", "bf16"]))
def test_convert_there_and_back_changes_nothing_but_rounding(
    adapter: AdapterTensorSet, outtype: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_in(folder)
        PEFT.write(adapter, folder / "a", FormatOptions())
        base = folder / "config.json"
        there = convert(folder / "a", folder / "b.gguf", base=base, outtype=outtype)
        back = convert(folder / "b.gguf", folder / "c", base=base)
        stored = {"auto": DType.F32, "f32": DType.F32, "f16": DType.F16, "bf16": DType.BF16}
        assert there.max_relative_error <= tolerance_for([stored[outtype]])
        assert back.max_relative_error <= 1e-6


def test_a_file_without_a_base_keeps_the_engines_rows(tmp_path: Path) -> None:
    """Written again without a base, it is the same file."""
    random = np.random.default_rng(0)
    tensors = {}
    for role, shape in ((Role.LORA_A, (4, HIDDEN)), (Role.LORA_B, (HEADS * HEAD_DIM, 4))):
        key = TensorKey("model.layers.0.self_attn.q_proj", role)
        tensors[key] = values(random, shape, DType.F32, any_bits=False)
    adapter = AdapterTensorSet(tensors=tensors, scales={"model.layers.0.self_attn.q_proj": 2.0})
    GGUF.write(adapter, tmp_path / "a.gguf", base_in(tmp_path))
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", proof=False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
