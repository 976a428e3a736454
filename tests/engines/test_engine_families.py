"""Adapters in llama.cpp give the logits that they give in PEFT, for every family of the tables.

First the bases agree: that proves names, row orders and hyper-parameters of the row. Then the
adapters do. `engine` explains the rows and the tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine import (
    BaseFixture,
    EngineError,
    by_length,
    convert_adapter,
    embeddings,
    engine_embeddings,
    engine_logprobs,
    family_row,
    family_rows,
    gaps,
    idle_modules,
    kl,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)

from adapterkit.architectures import families, load
from adapterkit.containers.gguf import read_gguf
from adapterkit.errors import BaseRequiredError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# What an adapter must do to its base in these tests, in nats, for agreement to mean anything.
EFFECT = 1e-2
# A module whose absence would stay under this many tolerances is not proven to be applied.
VISIBLE = 10


@pytest.mark.parametrize("name", family_rows())
def test_base_and_adapter_agree_with_transformers_and_peft(name: str, tmp_path: Path) -> None:
    base = make_base(family_row(name), tmp_path)
    prompts = prompts_for(base)
    plain = logprobs(base.model, prompts)
    apart = kl(plain, engine_logprobs(base.gguf, prompts))
    assert apart.max() < base.tolerance, f"base, by tokens: {by_length(prompts, apart)}"

    tuned = make_adapter(base, tmp_path / "adapter")
    adapted = logprobs(tuned.model, prompts)
    assert kl(plain, adapted).min() > EFFECT
    assert not idle_modules(tuned, prompts[-4:], VISIBLE * base.tolerance)

    convert_adapter(tuned.path, base, tmp_path / "adapter.gguf", given="hf")
    apart = kl(adapted, engine_logprobs(base.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)]))
    assert apart.max() < base.tolerance, f"adapter, by tokens: {by_length(prompts, apart)}"

    if base.row.config_only:
        with pytest.raises(BaseRequiredError, match="give its full config"):
            convert_adapter(tuned.path, base, tmp_path / "again.gguf", given="gguf")
        return
    convert_adapter(tuned.path, base, tmp_path / "again.gguf", given="gguf")
    assert stored(tmp_path / "again.gguf") == stored(tmp_path / "adapter.gguf")


@pytest.mark.parametrize("name", family_rows(encoder=True))
def test_encoder_and_its_adapter_agree_with_transformers_and_peft(
    name: str, tmp_path: Path
) -> None:
    base = make_base(family_row(name), tmp_path)
    prompts = prompts_for(base)
    plain = embeddings(base.model, prompts)
    apart = gaps(plain, engine_embeddings(base.gguf, prompts))
    assert apart.max() < base.tolerance, f"base, by tokens: {by_length(prompts, apart)}"

    tuned = make_adapter(base, tmp_path / "adapter")
    adapted = embeddings(tuned.model, prompts)
    assert gaps(plain, adapted).min() > EFFECT
    floor = VISIBLE * base.tolerance
    assert not idle_modules(tuned, prompts[-4:], floor, embeddings, gaps)

    convert_adapter(tuned.path, base, tmp_path / "adapter.gguf", given="hf")
    answer = engine_embeddings(base.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)])
    apart = gaps(adapted, answer)
    assert apart.max() < base.tolerance, f"adapter, by tokens: {by_length(prompts, apart)}"

    convert_adapter(tuned.path, base, tmp_path / "again.gguf", given="gguf")
    assert stored(tmp_path / "again.gguf") == stored(tmp_path / "adapter.gguf")


def stored(path: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.tobytes()) for name, tensor in read_gguf(path).tensors.items()}


@pytest.mark.parametrize("family", families())
def test_family_said_to_be_verified_has_a_row(family: str) -> None:
    rows = (*family_rows(), *family_rows(encoder=True))
    proven = {family_row(name).family for name in rows}
    told = load(family).verified
    assert (told == "engine") == (family in proven), (
        f'verified = "{told}" and {"a" if family in proven else "no"} row in tests/engine/families'
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


RANKS = {"q_proj": 2, "layers.1.mlp.down_proj": 8}
ALPHAS = {"v_proj": 3, r"layers\.0\.self_attn\.o_proj": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "one-layer": {"layers_to_transform": [1], "target_modules": ["k_proj", "up_proj"]},
    "alpha-zero-module": {"alpha_pattern": {"q_proj": 0}},
    "bin": {"safe_serialization": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_scales_survive_every_way_to_state_them(
    settings: dict[str, Any], llama: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(llama, tmp_path / "adapter", **settings)
    prompts = prompts_for(llama)
    adapted = logprobs(tuned.model, prompts)
    assert kl(logprobs(llama.model, prompts), adapted).min() > EFFECT
    convert_adapter(tuned.path, llama, tmp_path / "adapter.gguf")
    answer = engine_logprobs(llama.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)])
    assert max_kl(adapted, answer) < llama.tolerance


# llama.cpp rounds activations to the type of the factors that they meet, q8_0 to eight bits in
# blocks of 32. That, not the stored factors, sets these bounds; see the next test.
ROUNDED = {"f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}


@pytest.mark.parametrize("outtype", ROUNDED)
def test_small_types_cost_what_the_engine_rounds(
    outtype: str, llama: BaseFixture, tmp_path: Path
) -> None:
    # q8_0 needs ranks of 32. A gentle adapter: rounding costs in proportion to the update.
    tuned = make_adapter(llama, tmp_path / "adapter", r=32, lora_alpha=4)
    prompts = prompts_for(llama)
    adapted = logprobs(tuned.model, prompts)
    assert kl(logprobs(llama.model, prompts), adapted).min() > 10 * ROUNDED[outtype]
    convert_adapter(tuned.path, llama, tmp_path / "adapter.gguf", outtype=outtype)
    answer = engine_logprobs(llama.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)])
    assert max_kl(adapted, answer) < ROUNDED[outtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_stored_in_half_precision_are_moved_exactly(
    dtype: torch.dtype, llama: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(llama, tmp_path / "adapter", dtype=dtype)
    half, full = tmp_path / "half.gguf", tmp_path / "full.gguf"
    convert_adapter(tuned.path, llama, half)
    convert_adapter(half, llama, full, outtype="f32")
    prompts = prompts_for(llama)
    answer = engine_logprobs(llama.gguf, prompts, [(full, 1.0)])
    assert max_kl(logprobs(tuned.model, prompts), answer) < llama.tolerance


def test_oracle_notices_a_scale_that_is_off_by_one_in_ten_thousand(
    llama: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(llama, tmp_path / "adapter")
    convert_adapter(tuned.path, llama, tmp_path / "adapter.gguf")
    prompts = prompts_for(llama)
    answer = engine_logprobs(llama.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0001)])
    assert max_kl(logprobs(tuned.model, prompts), answer) > 10 * llama.tolerance


def test_oracle_reports_an_adapter_that_the_engine_refuses(
    llama: BaseFixture, tmp_path: Path
) -> None:
    other = make_base(family_row("qwen2"), tmp_path)
    tuned = make_adapter(other, tmp_path / "adapter")
    convert_adapter(tuned.path, other, tmp_path / "adapter.gguf")
    with pytest.raises(EngineError, match="model arch and LoRA arch mismatch"):
        engine_logprobs(llama.gguf, [[5]], [(tmp_path / "adapter.gguf", 1.0)])
