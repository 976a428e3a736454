"""Full weights move by the rules that move factors, and nothing is left out in silence.

That the results are what llama.cpp wants is proven in test_engine_families; here are the rules one
by one, including those that no family there uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from adapterkit.architectures import Architecture, Sizes, Target, WeightRule, load
from adapterkit.architectures.expressions import parse_call
from adapterkit.architectures.mapping import to_engine
from adapterkit.architectures.weights import model_to_engine, weight_to_engine
from adapterkit.errors import BaseRequiredError, IncompatibleBaseError, UnsupportedError
from adapterkit.model import Update
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 24
CONFIG = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "num_local_experts": 3,
    "nope": 3,
    "v_dim": 2,
    "multiplier": 0.5,
}
EMBEDDING = WeightRule("model.embed_tokens", (Target("token_embd"),), kind="embedding")


def family(*rules: WeightRule) -> Architecture:
    return Architecture(
        name="made-up",
        title="Made up",
        gguf="made-up",
        classes=("MadeUpForCausalLM",),
        model_types=("made_up",),
        tied=False,
        verified="no",
        select=None,
        inert=(),
        rules=(EMBEDDING, *rules),
        parameters={},
    )


def sizes(architecture: Architecture, config: Mapping[str, Any] = CONFIG) -> Sizes:
    return Sizes(architecture, "hf", config)


def moved(
    rule: WeightRule, name: str, array: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    made = family(rule)
    return dict(weight_to_engine(made, sizes(made), name, array))


def numbered(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


LLAMA = load("llama")
Q = "model.layers.1.self_attn.q_proj"


def test_weight_and_bias_follow_the_rotary_order_together() -> None:
    weight = numbered(HEADS * HEAD_DIM, HIDDEN)
    bias = weight[:, 0].copy()
    ((weight_name, turned),) = weight_to_engine(LLAMA, sizes(LLAMA), f"{Q}.weight", weight)
    ((bias_name, vector),) = weight_to_engine(LLAMA, sizes(LLAMA), f"{Q}.bias", bias)
    assert (weight_name, bias_name) == ("blk.1.attn_q.weight", "blk.1.attn_q.bias")
    # Head 0 is rows 0..7, halves 0..3 and 4..7: the pairs (0, 4), (1, 5), ... become neighbours.
    assert (vector[:8] / HIDDEN).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(turned[:, 0], vector)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"])
def test_dense_update_moves_as_its_factors_do(module: str) -> None:
    random = np.random.default_rng(0)
    rows = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(module, 5) * HEAD_DIM
    a, b = random.normal(size=(2, HIDDEN)), random.normal(size=(rows, 2))
    name = f"model.layers.0.{module}"
    pair = Update(name, LazyTensor.of(a), LazyTensor.of(b), 1.0)
    (factors,) = to_engine(LLAMA, sizes(LLAMA), [pair]).pairs
    ((tensor, dense),) = weight_to_engine(LLAMA, sizes(LLAMA), f"{name}.weight", b @ a)
    assert tensor == f"{factors.module}.weight"
    np.testing.assert_allclose(factors.b.numpy() @ factors.a.numpy(), dense, rtol=1e-12)


def test_wrapped_and_headless_names_are_found() -> None:
    weight = numbered(HIDDEN, HEADS * HEAD_DIM)
    for name in (
        "model.language_model.layers.0.self_attn.o_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.weight",
        "layers.0.self_attn.o_proj.weight",
    ):
        assert dict(weight_to_engine(LLAMA, sizes(LLAMA), name, weight)).keys() == {
            "blk.0.attn_output.weight"
        }


def test_norm_carries_the_constant_in_float32_and_its_bias_does_not() -> None:
    rule = WeightRule("model.norm", (Target("output_norm"),), kind="norm", add=1.0)
    small = np.array([0.001, -1.0], dtype=ml_dtypes.bfloat16)
    (weight,) = moved(rule, "model.norm.weight", small).values()
    assert weight.dtype == np.float32
    # bfloat16 would lose the first one altogether.
    assert weight.tolist() == [np.float32(1) + np.float32(small[0]), 0.0]
    (bias,) = moved(rule, "model.norm.bias", small).values()
    assert bias.dtype == small.dtype
    assert bias.tobytes() == small.tobytes()


def test_scale_is_carried_by_weight_and_bias() -> None:
    rule = WeightRule("model.layers.{i}.k", (Target("blk.{i}.attn_k"),), scale="multiplier")
    assert moved(rule, "model.layers.0.k.weight", numbered(2, 2))[
        "blk.0.attn_k.weight"
    ].tolist() == [
        [0.0, 0.5],
        [1.0, 1.5],
    ]
    assert moved(rule, "model.layers.0.k.bias", numbered(2))["blk.0.attn_k.bias"].tolist() == [
        0,
        0.5,
    ]


def test_input_by_output_weights_are_turned_before_their_rows_move() -> None:
    gpt2 = load("gpt2")
    weight = numbered(HIDDEN, 3 * HIDDEN)
    name = "transformer.h.0.attn.c_attn"
    ((_, turned),) = weight_to_engine(gpt2, sizes(gpt2), f"{name}.weight", weight)
    assert np.array_equal(turned, weight.T)
    bias = numbered(3 * HIDDEN)
    ((_, vector),) = weight_to_engine(gpt2, sizes(gpt2), f"{name}.bias", bias)
    assert np.array_equal(vector, bias)


def test_fused_rows_are_split_and_each_part_reordered() -> None:
    parts = (
        Target("q", size="heads * head_dim", rows=parse_call("rope(heads)")),
        Target("k", size="kv_heads * head_dim", rows=parse_call("rope(kv_heads)")),
        Target("v", size="kv_heads * head_dim"),
    )
    rule = WeightRule("model.qkv", parts)
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weights = moved(rule, "model.qkv.weight", numbered(rows, 1))
    biases = moved(rule, "model.qkv.bias", numbered(rows))
    for (name, weight), (_, bias) in zip(weights.items(), biases.items(), strict=True):
        assert np.array_equal(weight[:, 0], bias), name
    assert biases["k.bias"][:4].tolist() == [32, 36, 33, 37]
    assert biases["v.bias"].tolist() == list(range(48, 64))


def test_columns_of_weights_move_and_biases_stay() -> None:
    rule = WeightRule("model.out", (Target("out"),), cols=parse_call("interleaved(2)"))
    assert moved(rule, "model.out.weight", numbered(1, 4))["out.weight"].tolist() == [[0, 2, 1, 3]]
    assert moved(rule, "model.out.bias", numbered(4))["out.bias"].tolist() == [0, 1, 2, 3]


GATE_UP = WeightRule(
    "model.layers.{i}.mlp.experts.gate_up_proj",
    (Target("blk.{i}.ffn_gate_exps"), Target("blk.{i}.ffn_up_exps")),
    kind="experts",
    rows=parse_call("interleaved(2)"),
    stored_turned=True,
)


def test_fused_experts_are_turned_dealt_out_and_split() -> None:
    stored = numbered(3, 5, 4)  # (experts, in, out), outputs gate, up, gate, up
    halves = moved(GATE_UP, "model.layers.0.mlp.experts.gate_up_proj", stored)
    turned = stored.swapaxes(1, 2)
    assert np.array_equal(halves["blk.0.ffn_gate_exps.weight"], turned[:, 0::2])
    assert np.array_equal(halves["blk.0.ffn_up_exps.weight"], turned[:, 1::2])


def test_biases_of_fused_experts_are_spelled_whole_in_the_table() -> None:
    rule = WeightRule(
        "model.layers.{i}.mlp.experts.gate_up_proj_bias",
        (Target("blk.{i}.ffn_gate_exps.bias"), Target("blk.{i}.ffn_up_exps.bias")),
        kind="tensor",
        rows=parse_call("interleaved(2)"),
    )
    stored = numbered(3, 4)
    halves = moved(rule, "model.layers.2.mlp.experts.gate_up_proj_bias", stored)
    assert np.array_equal(halves["blk.2.ffn_gate_exps.bias"], stored[:, 0::2])
    assert np.array_equal(halves["blk.2.ffn_up_exps.bias"], stored[:, 1::2])


def test_heads_become_one_matrix_each() -> None:
    parts = (Target("k_b", size="nope", transpose=True), Target("v_b", size="v_dim"))
    rule = WeightRule("model.kv_b", parts, per_head="heads")
    weight = numbered(HEADS * 5, 6)
    split = moved(rule, "model.kv_b.weight", weight)
    heads = weight.reshape(HEADS, 5, 6)
    assert np.array_equal(split["k_b.weight"], heads[:, :3].swapaxes(1, 2))
    assert np.array_equal(split["v_b.weight"], heads[:, 3:])


def test_values_are_computed_in_float32_and_axes_counted_as_llama_cpp_does() -> None:
    rule = WeightRule(
        "model.layers.{i}.A_log",
        (Target("blk.{i}.ssm_a"),),
        kind="tensor",
        values="minus_exp",
        folded=("heads", "1"),
    )
    half = np.array([0, 1, 2, -1], dtype=ml_dtypes.bfloat16)
    (turned,) = moved(rule, "model.layers.0.A_log", half).values()
    assert turned.dtype == np.float32
    np.testing.assert_allclose(turned, -np.exp([[0], [1], [2], [-1]]), rtol=1e-6)
    with pytest.raises(IncompatibleBaseError, match=r"holds 5 values.*\(4, 1\)"):
        moved(rule, "model.layers.0.A_log", numbered(5))


def test_kernels_lose_their_empty_axis_before_their_rows_move() -> None:
    rule = WeightRule(
        "model.layers.{i}.conv1d",
        (Target("blk.{i}.ssm_conv1d"),),
        kind="conv",
        squeezed=True,
        rows=parse_call("tiled(2, 2, 1)"),
    )
    kernels = numbered(5, 1, 3)
    (stored,) = moved(rule, "model.layers.0.conv1d.weight", kernels).values()
    assert np.array_equal(stored, kernels[[0, 1, 3, 2, 4], 0])


EXPERT = WeightRule("model.layers.{i}.experts.{e}.w1", (Target("blk.{i}.ffn_gate_exps"),))


def experts(*numbers: int) -> dict[str, np.ndarray[Any, Any]]:
    return {f"model.layers.0.experts.{e}.w1.weight": np.full((2, 2), e) for e in numbers}


def test_experts_are_stacked_in_their_own_order() -> None:
    made = family(EXPERT)
    engine = model_to_engine(made, sizes(made), experts(2, 0, 1))
    assert engine["blk.0.ffn_gate_exps.weight"][:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("present", [(0, 1), (0, 2), (0, 1, 2, 3)])
def test_experts_must_be_those_that_the_base_counts(present: tuple[int, ...]) -> None:
    made = family(EXPERT)
    with pytest.raises(IncompatibleBaseError, match="3 experts"):
        model_to_engine(made, sizes(made), experts(*present))


def test_one_expert_alone_is_refused() -> None:
    ((name, array),) = experts(1).items()
    with pytest.raises(UnsupportedError, match="model_to_engine"):
        moved(EXPERT, name, array)


def test_parameter_that_no_rule_knows_is_refused() -> None:
    for name in ("model.layers.0.mystery.weight", "model.layers.0.self_attn.q_proj.A_log"):
        with pytest.raises(UnsupportedError, match="no rule of 'llama'"):
            weight_to_engine(LLAMA, sizes(LLAMA), name, numbered(2))
        with pytest.raises(UnsupportedError, match="no rule of 'llama'"):
            model_to_engine(LLAMA, sizes(LLAMA), {name: numbered(2)})


def test_two_parameters_for_one_tensor_are_refused() -> None:
    state = {"model.norm.weight": numbered(2), "norm.weight": numbered(2)}
    with pytest.raises(UnsupportedError, match="filled by another"):
        model_to_engine(LLAMA, sizes(LLAMA), state)


def test_rows_that_are_no_heads_of_this_base_are_refused() -> None:
    with pytest.raises(IncompatibleBaseError, match="do not divide"):
        weight_to_engine(LLAMA, sizes(LLAMA), f"{Q}.weight", numbered(HEADS * HEAD_DIM + 1, 2))
    rule = WeightRule("model.qkv", (Target("q", size="heads"), Target("k", size="kv_heads")))
    with pytest.raises(IncompatibleBaseError, match=r"7 output rows.*\[4, 2\]"):
        moved(rule, "model.qkv.weight", numbered(7, 2))


def test_missing_size_asks_for_the_base() -> None:
    with pytest.raises(BaseRequiredError, match="does not state 'heads'"):
        weight_to_engine(LLAMA, sizes(LLAMA, {}), f"{Q}.weight", numbered(8, 2))


def test_plain_weights_keep_their_bits() -> None:
    bits = np.array([0x7FC1, 0x0001, 0x8000, 0xFF80], dtype=np.uint16).view(ml_dtypes.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    ((_, array),) = weight_to_engine(LLAMA, sizes(LLAMA), name, bits.reshape(2, 2))
    assert array.tobytes() == bits.tobytes()


def test_numbers_that_llama_cpp_keeps_in_its_header_are_no_tensors() -> None:
    apertus = load("apertus")
    known = Sizes(apertus, "hf", {})
    name = "model.layers.0.mlp.act_fn.alpha_p"
    assert model_to_engine(apertus, known, {name: np.ones(1, np.float32)}) == {}
    with pytest.raises(UnsupportedError, match=r"keeps it in the header \(xielu.alpha_p\)"):
        weight_to_engine(apertus, known, name, np.ones(1, np.float32))


def test_nested_facts_and_what_is_stated() -> None:
    tower = load("glm4v")
    known = Sizes(tower, "hf", {"head_dim": 16, "rope_parameters": {"partial_rotary_factor": 0.5}})
    assert known.value("rotary") == 8
    told = Sizes(tower, "gguf", {"rope__dimension_sections": [2, 3, 3, 0]})
    assert told.fact("sections") is True
    assert Sizes(tower, "gguf", {}).fact("sections") is False


def test_facts_of_configs_of_which_each_layer_has_one() -> None:
    deci = load("deci")
    blocks = [{"attention": {"n_heads_in_group": size}} for size in (8, None, 4)]
    known = Sizes(deci, "hf", {"num_attention_heads": 8, "block_configs": blocks})
    assert [known.get("kv_heads", layer) for layer in range(3)] == [1, None, 2]
    for odd in ([], [*blocks, 1], {}):
        assert (
            Sizes(deci, "hf", {"num_attention_heads": 8, "block_configs": odd}).get("kv_heads")
            is None
        )
