"""What vLLM and SGLang make of modules by their paths, as their loaders read them.

vLLM holds the last name of a module against those of the model's linear layers: an unknown one is
a ValueError, and a known one under a path that the model has not is passed over. SGLang reads the
number behind `layers.` and the last name, and stacks q, k and v, gate and up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from adapterkit import convert, merge_into, read, target_names, validate, write
from adapterkit.errors import AdapterKitError, LossyConversionError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet
from adapterkit.tensor import LazyTensor
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "model.layers.0"


def saved(name: str, shapes: dict[str, tuple[int, int]], folder: Path) -> Path:
    """Save a tiny model of a class, and an adapter with an update of each module, (out, in)."""
    model: Any = built(getattr(transformers, name), "cpu")
    model.save_pretrained(str(folder / "base"))
    numbers = np.random.default_rng(0)
    tensors: dict[TensorKey, LazyTensor] = {}
    for module, (rows, columns) in shapes.items():
        for role, shape in ((Role.LORA_A, (2, columns)), (Role.LORA_B, (rows, 2))):
            values = numbers.normal(size=shape).astype(np.float32)
            tensors[TensorKey(module, role)] = LazyTensor.of(values)
    write(AdapterTensorSet(tensors=tensors, scales=dict.fromkeys(shapes, 1.0)), folder / "adapter")
    return folder / "adapter"


def outcome(adapter: Path, engine: str) -> tuple[dict[str, int], str, set[str]]:
    report = validate(adapter, base=adapter.parent / "base", targets=[engine])
    judged = report.targets[0]
    counts = {name: len(modules) for name, modules in judged.coverage.items() if modules}
    return counts, str(judged.verdict), {finding.code for finding in report.findings}


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        (f"{LAYER}.self_attn.q_proj", {"applied": 1}),
        ("model.blocks.0.self_attn.q_proj", {"ignored": 1}),
        (f"{LAYER}.self_attn.wibble", {"refused": 1}),
    ],
)
def test_vllm_refuses_last_names_and_passes_over_paths(
    module: str, counts: dict[str, int], tmp_path: Path
) -> None:
    adapter = saved("Qwen3ForCausalLM", {module: (64, 64)}, tmp_path)
    assert outcome(adapter, "vllm")[0] == counts


@pytest.mark.parametrize(
    "path", ["model.blocks.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"]
)
def test_what_vllm_passes_over_is_a_loss_and_no_refusal(path: str, tmp_path: Path) -> None:
    """vLLM holds last names against the model's, and asks for the paths that the model has."""
    sound = f"{LAYER}.self_attn.q_proj"
    adapter = saved("Qwen3ForCausalLM", {path: (64, 64), sound: (64, 64)}, tmp_path)
    counts, verdict, codes = outcome(adapter, "vllm")
    assert (counts, verdict) == ({"ignored": 1, "applied": 1}, "partly applied")
    assert "AK501" in codes
    assert codes & {"AK302", "AK303"}
    base, made = tmp_path / "base", tmp_path / "made"
    with pytest.raises(LossyConversionError, match=path.replace(".", r"\.")):
        convert(adapter, made, base=base, for_engine="vllm")
    report = convert(adapter, made, base=base, for_engine="vllm", allow_lossy=True)
    assert [loss.subject for loss in report.losses] == [path]
    assert read(made).modules == (sound,)
    made.rename(tmp_path / "adapter-made")
    assert outcome(tmp_path / "adapter-made", "vllm")[1] == "applied"


@pytest.mark.parametrize(
    ("name", "verdict"), [("LlamaForCausalLM", "applied"), ("Qwen2ForCausalLM", "refused")]
)
def test_vllm_takes_tables_of_some_classes_only(name: str, verdict: str, tmp_path: Path) -> None:
    """Only a class with `embedding_modules` expects the name of its output in a file."""
    shapes = {"lm_head": (300, 64), f"{LAYER}.self_attn.q_proj": (64, 64)}
    adapter = saved(name, shapes, tmp_path)
    assert outcome(adapter, "vllm")[:2] == ({verdict: 2}, verdict)


def test_an_unknown_last_name_is_refused_with_all_the_rest(tmp_path: Path) -> None:
    """It is a ValueError in vLLM, and so of none of the modules is anything applied."""
    shapes = {f"{LAYER}.self_attn.{leaf}": (64, 64) for leaf in ("wibble", "q_proj")}
    adapter = saved("Qwen3ForCausalLM", shapes, tmp_path)
    assert outcome(adapter, "vllm")[:2] == ({"refused": 2}, "refused")
    with pytest.raises(UnsupportedError):
        convert(
            adapter,
            tmp_path / "made",
            base=tmp_path / "base",
            for_engine="vllm",
            allow_lossy=True,
        )


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        (("self_attn.q_proj",), {"self_attn.v_proj"}),
        (("self_attn.k_proj",), {"self_attn.q_proj", "self_attn.v_proj"}),
        (("self_attn.q_proj", "self_attn.v_proj"), set[str]()),
        (("mlp.up_proj",), {"mlp.gate_proj"}),
        (("mlp.gate_proj",), set[str]()),
    ],
)
def test_sglang_gets_factors_of_zero_for_what_it_stacks(
    modules: tuple[str, ...], missing: set[str], tmp_path: Path
) -> None:
    sizes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}
    shapes = {f"{LAYER}.{name}": sizes.get(name.split(".")[-1], (96, 64)) for name in modules}
    adapter = saved("Qwen3ForCausalLM", shapes, tmp_path)
    _, verdict, codes = outcome(adapter, "sglang")
    assert (verdict, "SGL015" in codes) == (("refused", True) if missing else ("applied", False))
    made = tmp_path / "made"
    convert(adapter, made, base=tmp_path / "base", for_engine="sglang")
    added = set(read(made).modules) - set(read(adapter).modules)
    assert added == {f"{LAYER}.{name}" for name in missing}
    assert all(not read(made).update_of(name).delta().any() for name in added)
    made.rename(tmp_path / "adapter-made")
    report = validate(tmp_path / "adapter-made", base=tmp_path / "base", targets=["sglang"])
    assert str(report.targets[0].verdict) == "applied"


def test_sglang_refuses_dora_as_such_and_not_for_want_of_zeros(tmp_path: Path) -> None:
    module = f"{LAYER}.self_attn.q_proj"
    adapter = read(saved("Qwen3ForCausalLM", {module: (64, 64)}, tmp_path))
    magnitude = LazyTensor.of(np.ones(64, np.float32))
    dora = adapter.updated([], {TensorKey(module, Role.MAGNITUDE): magnitude})
    with pytest.raises(UnsupportedError, match=r"as it is: SGLang refuses DoRA") as refusal:
        convert(dora, tmp_path / "made", base=tmp_path / "base", for_engine="sglang")
    assert "holds none" not in str(refusal.value)


def test_sglang_passes_over_what_is_under_no_layers(tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    adapter = saved("GPT2LMHeadModel", {module: (192, 64)}, tmp_path)
    counts, verdict, _ = outcome(adapter, "sglang")
    assert (counts, verdict) == ({"ignored": 1}, "no effect")


@pytest.mark.parametrize("engine", sorted(target_names()))
@pytest.mark.parametrize("trait", ["bias on B", "aLoRA"])
def test_nobody_is_told_to_merge_what_cannot_be_merged(
    trait: str, engine: str, tmp_path: Path
) -> None:
    module = f"{LAYER}.self_attn.q_proj"
    adapter = read(saved("Qwen3ForCausalLM", {module: (64, 64)}, tmp_path))
    bias = {TensorKey(module, Role.LORA_BIAS): LazyTensor.of(np.ones(64, np.float32))}
    made = adapter.updated([], bias)
    if trait == "aLoRA":
        made = adapter.replace(invocation_tokens=(3, 4))
    with pytest.raises(AdapterKitError):
        merge_into([made], tmp_path / "base", tmp_path / "merged")
    write(made, tmp_path / "made")
    report = validate(tmp_path / "made", base=tmp_path / "base", targets=[engine])
    hints = [finding.hint for finding in report.findings]
    assert not any("merge it" in hint for hint in hints)
    if str(report.targets[0].verdict) != "applied" and engine not in {"comfyui", "diffusers"}:
        assert hints
