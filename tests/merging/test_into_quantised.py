"""A quantised Hugging Face base is decoded on request, and the result is a plain checkpoint."""

from __future__ import annotations

import json
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import quantised_bases as quantising
import torch
import transformers
from engine import BaseFixture, family_row, logprobs, make_adapter, make_base, max_kl, prompts_for
from quantised_bases import EXPERTS, FP8, Q, logical, stored_alone, tensors_of

from adapterkit import merge_into, read
from adapterkit.auditing.against_base import against_base
from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.errors import BaseRequiredError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# What is left between two ways to compute the same in float32, in nats; updates move far more.
EQUAL, EFFECT = 1e-9, 1e-2

hub: Any = transformers
lora: Any = peft


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseFixture]:
    names = ("llama", "llama-tied", "mixtral", "gpt-oss")
    return {name: make_base(family_row(name), tmp_path_factory.mktemp(name)) for name in names}


def loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hub.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()


def with_peft(model: Any, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return lora.PeftModel.from_pretrained(model, adapter).eval()


def blocks_of(size: tuple[int, int]) -> Any:
    """Store projections of layers in blocks, with what static activations add."""

    def store(name: str, tensor: torch.Tensor) -> quantising.Tensors | None:
        if not re.search(r"layers\..*(proj|w\d)\.weight$", name):
            return None
        values, scales = quantising.fp8_blocks(tensor, size)
        return {
            name: values,
            f"{name}_scale_inv": scales,
            name.replace(".weight", ".activation_scale"): torch.tensor(1.0),
        }

    return store


@pytest.mark.parametrize(("family", "size"), [("llama", 16), ("llama", 32), ("mixtral", 16)])
def test_fp8_blocks_give_the_logits_of_peft_on_transformers_own_decoding(
    family: str, size: int, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases[family]
    config = {**FP8, "weight_block_size": [size, size], "activation_scheme": "static"}
    into = quantising.quantised(base.hf, tmp_path / "base", config, blocks_of((size, size)))
    make_adapter(base, tmp_path / "adapter")
    report = merge_into(
        [tmp_path / "adapter"], into, tmp_path / "out", dequantize=True, dtype="f32"
    )
    prompts = prompts_for(base)[-6:]
    plain = loaded(into)
    assert max_kl(logprobs(base.model, prompts), logprobs(plain, prompts)) > 1e-6
    unmerged = logprobs(plain, prompts)
    wanted = logprobs(with_peft(plain, tmp_path / "adapter"), prompts)
    assert max_kl(unmerged, wanted) > EFFECT
    assert max_kl(wanted, logprobs(loaded(tmp_path / "out"), prompts)) < EQUAL
    assert {t.stored for t in report.tensors if "q_proj" in t.tensor} == {"F8_E4M3"}
    assert report.left_out
    assert all(name.endswith(".activation_scale") for name in report.left_out)
    assert any(f"{len(report.left_out)} activation_scale" in note for note in report.notes)


def test_mxfp4_experts_give_the_logits_of_peft_on_transformers_own_decoding(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["gpt-oss"]
    into = mxfp4_base(base, tmp_path / "base")
    for name in (*EXPERTS, "mlp.router.weight"):
        assert any(name in key for key in base.model.state_dict())
    make_adapter(base, tmp_path / "adapter")
    report = merge_into(
        [tmp_path / "adapter"], into, tmp_path / "out", dequantize=True, dtype="f32"
    )
    prompts = prompts_for(base)[-6:]
    plain = loaded(into)
    unmerged = logprobs(plain, prompts)
    wanted = logprobs(with_peft(plain, tmp_path / "adapter"), prompts)
    assert max_kl(unmerged, wanted) > EFFECT
    assert max_kl(wanted, logprobs(loaded(tmp_path / "out"), prompts)) < EQUAL
    assert {t.stored for t in report.tensors if "experts" in t.tensor} == {"MXFP4"}
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base.hf).keys()


def mxfp4_base(base: BaseFixture, folder: Path) -> Path:
    """Store experts as GPT-OSS does, in the layout of its own checkpoints."""

    def store(name: str, tensor: torch.Tensor) -> quantising.Tensors | None:
        if not name.endswith(tuple(EXPERTS)):
            return None
        experts, columns, rows = tensor.shape
        blocks, scales = quantising.random_mxfp4((experts, rows, columns), len(name))
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return quantising.quantised(base.hf, folder, config, store)


def test_what_is_only_decoded_is_what_transformers_decodes(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    """To the bit, in bfloat16, of both quantisations; plain tensors are the base's own bytes."""
    for family, into in (
        (
            "llama",
            quantising.quantised(bases["llama"].hf, tmp_path / "a", FP8, blocks_of((16, 16))),
        ),
        ("gpt-oss", mxfp4_base(bases["gpt-oss"], tmp_path / "b")),
    ):
        make_adapter(
            bases[family], tmp_path / family, target_modules=["q_proj"], target_parameters=None
        )
        target = tmp_path / f"{family}-out"
        report = merge_into([tmp_path / family], into, target, dequantize=True)
        changed = {tensor.tensor for tensor in report.tensors}
        model = hub.AutoModelForCausalLM.from_pretrained(into, dtype=torch.bfloat16)
        wanted, stored = model.state_dict(), tensors_of(into)
        merged = tensors_of(target)
        assert report.decoded + report.untouched + len(changed) == len(merged)
        assert report.decoded >= 4
        for name, tensor in merged.items():
            if name in changed:
                continue
            if name in stored and stored[name].dtype is torch.float32:
                assert torch.equal(tensor, stored[name])
            else:
                assert tensor.dtype is torch.bfloat16
                assert torch.equal(tensor, wanted[name]), name
        document = json.loads((target / "config.json").read_text())
        assert "quantization_config" not in document
        again = hub.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)[1]
        assert not again["missing_keys"]
        assert not again["unexpected_keys"]


def test_modelopt_may_say_it_in_a_file_of_its_own(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    values, scales = quantising.fp8_blocks(torch.randn(64, 64), (64, 64))
    extra = {f"{Q}.weight": values, f"{Q}.weight_scale": scales.reshape(())}
    folder = stored_alone(bases["llama"].hf, tmp_path, {}, extra)
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["v_proj"])
    with pytest.raises(UnsupportedError, match=r"quantised \(modelopt fp8\).*--dequantize"):
        merge_into([tmp_path / "adapter"], folder, tmp_path / "out")
    merge_into([tmp_path / "adapter"], folder, tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    beside["quantization"]["quant_algo"] = "NVFP4"
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    with pytest.raises(UnsupportedError, match=r"quantised \(modelopt, NVFP4\).*16-bit original"):
        merge_into([tmp_path / "adapter"], folder, tmp_path / "o", dequantize=True)


def test_shards_of_values_and_scales_become_shards_of_weights(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    whole = quantising.quantised(base.hf, tmp_path / "whole", FP8, blocks_of((16, 16)))
    into = quantising.quantised(base.hf, tmp_path / "base", FP8, blocks_of((16, 16)))
    # Scales are in a file without any weight, and one file has plain tensors only.
    quantising.sharded(into, lambda name: 3 if "scale" in name else 2 if "norm" in name else 1)
    make_adapter(base, tmp_path / "adapter")
    for source, jobs in ((whole, 1), (into, 4)):
        target = tmp_path / f"out-{source.name}"
        report = merge_into([tmp_path / "adapter"], source, target, dequantize=True, jobs=jobs)
        assert not any("unmerged weights" in note for note in report.notes)
    merged, wanted = tensors_of(tmp_path / "out-base"), tensors_of(tmp_path / "out-whole")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    files = sorted(path.name for path in (tmp_path / "out-base").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    index = json.loads((tmp_path / "out-base" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    same = (into / files[1]).read_bytes() == (tmp_path / "out-base" / files[1]).read_bytes()
    assert same


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_table_that_is_quantised_is_untied(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama-tied"]

    def store(name: str, tensor: torch.Tensor) -> quantising.Tensors | None:
        if "embed_tokens" not in name:
            return None
        values, scales = quantising.fp8_blocks(tensor, (16, 16))
        return {name: values, f"{name}_scale_inv": scales}

    into = quantising.quantised(base.hf, tmp_path / "base", FP8, store)
    make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    table = logical(into)["model.embed_tokens.weight"].numpy()
    merge_into(
        [tmp_path / "adapter"], into, tmp_path / "out", dequantize=True, tied="untie", dtype="f32"
    )
    merged = tensors_of(tmp_path / "out")
    assert np.array_equal(merged["lm_head.weight"].numpy(), table)
    assert not np.array_equal(merged["model.embed_tokens.weight"].numpy(), table)


def test_sixteen_bits_are_those_that_the_model_computes_in(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    into = quantising.quantised(bases["llama"].hf, tmp_path / "base", FP8, blocks_of((16, 16)))
    make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    for named, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        quantising.edit_config(into, dtype=named)
        merge_into([tmp_path / "adapter"], into, tmp_path / named, dequantize=True)
        merged = tensors_of(tmp_path / named)
        assert {merged[name].dtype for name in merged if "proj" in name} == {kind}


def test_bases_that_are_not_quantised_need_no_decoding(
    bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases["llama"]
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    report = merge_into([tmp_path / "adapter"], base.hf, tmp_path / "out", dequantize=True)
    assert any("not quantised" in note for note in report.notes)
    with pytest.raises(UsageError, match="dequantize is for Hugging Face bases"):
        merge_into([tmp_path / "adapter"], base.gguf, tmp_path / "o.gguf", dequantize=True)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_the_audit_measures_a_quantised_base_as_it_decodes(
    family: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    base = bases[family]
    into = (
        mxfp4_base(base, tmp_path / "base")
        if family == "gpt-oss"
        else quantising.quantised(base.hf, tmp_path / "base", FP8, blocks_of((16, 16)))
    )
    make_adapter(base, tmp_path / "adapter")
    adapter = read(tmp_path / "adapter")
    found = against_base(adapter, open_base(into))
    weights = {name: x.float() for name, x in loaded(into).state_dict().items()}
    kinds = {row.dtype for row in found.weights}
    assert kinds == ({"MXFP4", "F32"} if family == "gpt-oss" else {"F8_E4M3", "F32"})
    for row in found.weights:
        whole = weights.get(f"{row.tensor}.weight", weights.get(row.tensor))
        assert whole is not None
        each = whole if row.expert is None else whole[row.expert]
        assert row.base_frobenius_norm == pytest.approx(float(each.norm()), rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_from_a_quantised_base_is_not_taken_from_its_codes(
    init: str, bases: dict[str, BaseFixture], tmp_path: Path
) -> None:
    into = quantising.quantised(bases["llama"].hf, tmp_path / "base", FP8, blocks_of((16, 16)))
    make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["init_lora_weights"] = init
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseRequiredError, match=r"q_proj: is stored as F8_E4M3.*was quantised"):
        convert(tmp_path / "adapter", tmp_path / "out.gguf", base=into)
