"""Bases that were built differently: fused, split, trimmed, tied; the base GGUF decides.

Every base is what convert_hf_to_gguf.py could have made of the same weights, written here tensor by
tensor and run in llama.cpp.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from engine import (
    BaseFixture,
    convert_adapter,
    engine_logprobs,
    family_row,
    kl,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)
from fused_checkpoints import QKV, fused, rewritten
from safetensors.numpy import load_file, save_file

import adapterkit
from adapterkit.base import open_base
from adapterkit.containers.gguf import (
    Typed,
    ValueType,
    array,
    int32,
    read_gguf,
    uint32,
    write_gguf,
)
from adapterkit.conversion import convert
from adapterkit.errors import FormatError, LossyConversionError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]
    Tensors = dict[str, Array]

pytestmark = pytest.mark.engine


GATE_UP = fused("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1)


def agrees(tuned: Any, base: BaseFixture, gguf: Path, adapter: Path) -> bool:
    prompts = prompts_for(base)
    adapted = logprobs(tuned.model, prompts)
    assert kl(logprobs(base.model, prompts), adapted).min() > 1e-3
    return max_kl(adapted, engine_logprobs(gguf, prompts, [(adapter, 1.0)])) < base.tolerance


CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "qkv": ("llama", QKV, {}),
    "qkv with biases": ("qwen2", QKV, {}),
    "only k of qkv": ("llama", QKV, {"target_modules": ["k_proj", "o_proj"]}),
    "ranks of their own": ("llama", QKV, {"rank_pattern": {"q_proj": 2, "v_proj": 7}}),
    "wide heads": ("llama-wide-heads", QKV, {}),
    "gate and up of experts": ("deepseek3", GATE_UP, {}),
    "linear attention beside": ("qwen35moe", GATE_UP, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter_is_fused_for_a_fused_base(case: str, tmp_path: Path) -> None:
    name, change, settings = CASES[case]
    base = make_base(family_row(name), tmp_path)
    gguf = rewritten(base, tmp_path / "fused.gguf", change)
    assert read_gguf(gguf).tensors.keys() != read_gguf(base.gguf).tensors.keys()
    tuned = make_adapter(base, tmp_path / "adapter", **settings)
    convert(tuned.path, tmp_path / "a.gguf", base=gguf)
    assert agrees(tuned, base, gguf, tmp_path / "a.gguf")

    # And back: whole again under the names that PEFT knows.
    convert(tmp_path / "a.gguf", tmp_path / "back", base=gguf)
    convert_adapter(tmp_path / "back", base, tmp_path / "plain.gguf")
    assert agrees(tuned, base, base.gguf, tmp_path / "plain.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseFixture:
    return make_base(family_row("llama"), tmp_path_factory.mktemp("llama"))


def test_split_base_is_read_whole_from_its_first_file(llama: BaseFixture, tmp_path: Path) -> None:
    file = read_gguf(llama.gguf)
    names = list(file.tensors)
    # The files cut through a layer: q, k and v of one lie apart.
    halves = (names[: len(names) // 2 + 1], names[len(names) // 2 + 1 :])
    for number, part in enumerate(halves):
        split = {
            "split.no": Typed(ValueType.UINT16, number),
            "split.count": Typed(ValueType.UINT16, 2),
            "split.tensors.count": int32(len(names)),
        }
        metadata = file.typed() if number == 0 else {"general.architecture": "llama"}
        path = tmp_path / f"base-{number + 1:05}-of-00002.gguf"
        write_gguf(path, {**metadata, **split}, {name: file.tensors[name] for name in part})
    tuned = make_adapter(llama, tmp_path / "adapter")
    first = tmp_path / "base-00001-of-00002.gguf"
    convert(tuned.path, tmp_path / "a.gguf", base=first)
    assert agrees(tuned, llama, first, tmp_path / "a.gguf")

    (tmp_path / "base-00002-of-00002.gguf").unlink()
    with pytest.raises(NotFoundError, match="missing from the split base"):
        convert(tuned.path, tmp_path / "b.gguf", base=first)


# What the second part says or holds otherwise, and what is said of it.
@pytest.mark.parametrize(
    ("changed", "extra", "message"),
    [
        ({}, True, "blk.0.attn_q.weight: is in two parts of the split base model"),
        ({"general.architecture": "qwen2"}, False, "is a part of architecture 'qwen2'"),
        (
            {"split.no": Typed(ValueType.UINT16, 0)},
            False,
            "says that it is part 1 of 2, not 2",
        ),
        ({"split.count": Typed(ValueType.UINT16, 3)}, False, "says that it is part 2 of 3"),
        ({"split.no": None}, False, "split.no: is missing"),
    ],
)
def test_parts_that_make_no_model_are_refused(
    changed: dict[str, Any], extra: bool, message: str, llama: BaseFixture, tmp_path: Path
) -> None:
    file = read_gguf(llama.gguf)
    names = [name for name in file.tensors if not (extra and name == "blk.0.attn_q.weight")]
    split = {"split.count": Typed(ValueType.UINT16, 2), "split.tensors.count": int32(len(names))}
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, part in enumerate(halves):
        metadata = file.typed() if number == 0 else {"general.architecture": "llama"}
        metadata |= {**split, "split.no": Typed(ValueType.UINT16, number)}
        metadata |= changed if number else {}
        held = [*part, "blk.0.attn_q.weight"] if extra else part
        write_gguf(
            tmp_path / f"base-{number + 1:05}-of-00002.gguf",
            {key: value for key, value in metadata.items() if value is not None},
            {name: file.tensors[name] for name in held},
        )
    with pytest.raises(FormatError, match=re.escape(message)):
        open_base(tmp_path / "base-00001-of-00002.gguf")


def test_a_part_without_some_tensors_is_refused(llama: BaseFixture, tmp_path: Path) -> None:
    file = read_gguf(llama.gguf)
    for number, part in enumerate((list(file.tensors)[:5], list(file.tensors)[6:])):
        split = {
            "split.no": Typed(ValueType.UINT16, number),
            "split.count": Typed(ValueType.UINT16, 2),
            "split.tensors.count": int32(len(file.tensors)),
        }
        path = tmp_path / f"base-{number + 1:05}-of-00002.gguf"
        write_gguf(path, {**file.typed(), **split}, {name: file.tensors[name] for name in part})
    with pytest.raises(FormatError, match=r"has \d+ tensors in its parts, not \d+"):
        open_base(tmp_path / "base-00001-of-00002.gguf")


# Rows of the base's vocabulary in the GGUF: 512 in the Hugging Face model.
@pytest.mark.parametrize("rows", [480, 544])
def test_vocabulary_is_cut_or_padded_to_the_bases(
    rows: int, llama: BaseFixture, tmp_path: Path
) -> None:
    def resized(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for name in ("token_embd.weight", "output.weight"):
            whole = np.zeros((max(rows, 512), tensors[name].shape[1]), np.float32)
            whole[:512] = tensors[name]
            made[name] = whole[:rows]
        return made

    gguf = rewritten(llama, tmp_path / "base.gguf", resized, vocabulary(llama, rows))
    tuned = make_adapter(
        llama, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    if rows < 512:
        with pytest.raises(adapterkit.LossyConversionError, match="the others hold an update"):
            convert(tuned.path, tmp_path / "a.gguf", base=gguf)
        assert not (tmp_path / "a.gguf").exists()
    report = convert(tuned.path, tmp_path / "a.gguf", base=gguf, allow_lossy=True)
    assert len(report.losses) == (2 if rows < 512 else 0)
    verb = "cut" if rows < 512 else "padded with zeros"
    assert sum(f"vocabulary {verb} from 512 to the base's {rows}" in n for n in report.notes) == 2
    prompts = [[token % min(rows, 512) for token in prompt] for prompt in prompts_for(llama)]
    adapted = logprobs(tuned.model, prompts)
    answer = engine_logprobs(gguf, prompts, [(tmp_path / "a.gguf", 1.0)])
    shared = min(rows, 512)
    assert max_kl(adapted[:, :shared], answer[:, :shared]) < llama.tolerance
    # Rows that padding added are rows of zeros still: their logits are all the same.
    assert all(len(set(added.round(5))) <= 1 for added in answer[:, shared:])


def vocabulary(base: BaseFixture, rows: int) -> dict[str, Any]:
    """Return the tokenizer's keys for that many tokens."""
    metadata = read_gguf(base.gguf).metadata
    prefix = "tokenizer.ggml."
    tokens = list(metadata[f"{prefix}tokens"].values())
    kinds = list(metadata[f"{prefix}token_type"].values())
    more = range(len(tokens), rows)
    return {
        f"{prefix}tokens": array(
            ValueType.STRING, [*tokens, *(f"\u2581t{place}" for place in more)][:rows]
        ),
        f"{prefix}scores": array(ValueType.FLOAT32, [0.0] * rows),
        f"{prefix}token_type": array(ValueType.INT32, [*kinds, *(1 for _ in more)][:rows]),
        "llama.vocab_size": uint32(rows),
    }


def test_another_vocabulary_is_no_padding(llama: BaseFixture, tmp_path: Path) -> None:
    def grown(tensors: Tensors) -> Tensors:
        width = tensors["token_embd.weight"].shape[1]
        return {**tensors, "token_embd.weight": np.zeros((2048, width), np.float32)}

    gguf = rewritten(llama, tmp_path / "base.gguf", grown)
    tuned = make_adapter(llama, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(Exception, match="2048 x 64"):
        convert(tuned.path, tmp_path / "a.gguf", base=gguf)


def test_output_of_a_tied_model_converts_for_a_base_that_was_untied(tmp_path: Path) -> None:
    tied = make_base(family_row("llama-tied"), tmp_path)
    untied = rewritten(
        tied,
        tmp_path / "untied.gguf",
        lambda tensors: {**tensors, "output.weight": tensors["token_embd.weight"]},
    )
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        tuned = make_adapter(tied, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    convert(tuned.path, tmp_path / "a.gguf", base=untied)
    assert agrees(tuned, tied, untied, tmp_path / "a.gguf")
    with pytest.raises(LossyConversionError) as refused:
        convert(tuned.path, tmp_path / "b.gguf", base=tied.gguf)
    assert [loss.code for loss in refused.value.losses] == ["tied-output"]


def test_embedding_of_a_base_that_was_tied_is_refused(llama: BaseFixture, tmp_path: Path) -> None:
    tied = rewritten(
        llama,
        tmp_path / "tied.gguf",
        lambda tensors: {name: x for name, x in tensors.items() if name != "output.weight"},
    )
    tuned = make_adapter(llama, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(LossyConversionError) as refused:
        convert(tuned.path, tmp_path / "a.gguf", base=tied)
    assert [loss.code for loss in refused.value.losses] == ["tied-embedding"]
    report = convert(tuned.path, tmp_path / "b.gguf", base=tied, allow_lossy=True)
    assert report.modules == 2


PREFIXES = {
    "model.": "model.language_model.",
    "model.layers.": "language_model.model.layers.",
    "model.layers": "thinker.model.layers",
    "model.layers.0": "model.text_model.layers.0",
}


@pytest.mark.parametrize(("plain", "wrapper"), PREFIXES.items(), ids=PREFIXES.values())
def test_text_tower_is_found_under_its_wrapper(
    plain: str, wrapper: str, llama: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    convert(tuned.path, tmp_path / "plain.gguf", base=llama.gguf)
    weights = tuned.path / "adapter_model.safetensors"
    renamed = {
        name.replace(f"base_model.model.{plain}", f"base_model.model.{wrapper}"): tensor
        for name, tensor in load_file(weights).items()
    }
    assert any(wrapper in name for name in renamed)
    save_file(renamed, weights)
    convert(tuned.path, tmp_path / "wrapped.gguf", base=llama.gguf)
    assert stored(tmp_path / "wrapped.gguf") == stored(tmp_path / "plain.gguf")


@pytest.mark.parametrize("tower", ["visual.blocks.0.attn.qkv", "audio_tower.layers.0.fc1"])
def test_towers_are_listed_and_dropped_only_when_told(
    tower: str, llama: BaseFixture, tmp_path: Path
) -> None:
    tuned = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    convert(tuned.path, tmp_path / "plain.gguf", base=llama.gguf)
    weights = tuned.path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.model.{tower}.lora_A.weight"] = np.ones((4, 16), np.float32)
    tensors[f"base_model.model.model.{tower}.lora_B.weight"] = np.ones((16, 4), np.float32)
    save_file(tensors, weights)
    config = tuned.path / "adapter_config.json"
    named = {"target_modules": ["q_proj", tower]}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(LossyConversionError) as refused:
        convert(tuned.path, tmp_path / "a.gguf", base=llama.gguf)
    assert [(loss.code, loss.subject) for loss in refused.value.losses] == [
        ("tower", f"model.{tower}")
    ]
    convert(tuned.path, tmp_path / "a.gguf", base=llama.gguf, allow_lossy=True)
    assert stored(tmp_path / "a.gguf") == stored(tmp_path / "plain.gguf")


def stored(path: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.tobytes()) for name, tensor in read_gguf(path).tensors.items()}


def test_unsplit_latent_projection_is_left_whole(tmp_path: Path) -> None:
    base = make_base(family_row("deepseek3"), tmp_path)

    def legacy(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for layer in range(3):
            keys = made.pop(f"blk.{layer}.attn_k_b.weight")
            values = made.pop(f"blk.{layer}.attn_v_b.weight")
            heads = [np.concatenate([k.T, v]) for k, v in zip(keys, values, strict=True)]
            made[f"blk.{layer}.attn_kv_b.weight"] = np.concatenate(heads)
        return made

    gguf = rewritten(base, tmp_path / "legacy.gguf", legacy)
    tuned = make_adapter(
        base, tmp_path / "adapter", target_modules=["kv_b_proj"], target_parameters=None
    )
    report = convert(tuned.path, tmp_path / "a.gguf", base=gguf)
    assert any("never applies it" in note for note in report.notes)
    file = read_gguf(tmp_path / "a.gguf")
    weights = load_file(tuned.path / "adapter_model.safetensors")
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.kv_b_proj"
        for half, factor in (("a", "A"), ("b", "B")):
            tensor = file.tensors[f"blk.{layer}.attn_kv_b.weight.lora_{half}"]
            assert np.array_equal(tensor.numpy(), weights[f"{name}.lora_{factor}.weight"])
    again = convert(tmp_path / "a.gguf", tmp_path / "back", base=gguf)
    assert again.max_relative_error == 0


def test_gate_of_one_row_fits_a_base_that_stores_a_vector(tmp_path: Path) -> None:
    base = make_base(family_row("qwen2moe"), tmp_path)

    def squeezed(tensors: Tensors) -> Tensors:
        return {name: x[0] if "gate_inp_shexp" in name else x for name, x in tensors.items()}

    gguf = rewritten(base, tmp_path / "squeezed.gguf", squeezed)
    tuned = make_adapter(base, tmp_path / "adapter")
    convert(tuned.path, tmp_path / "a.gguf", base=gguf)
    assert agrees(tuned, base, gguf, tmp_path / "a.gguf")
