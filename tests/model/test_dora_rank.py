"""DoRA as the nearest LoRA: the error that is listed is the least there is, and PEFT's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from quiet_peft import quiet_peft
from small_llama import SIZES
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterkit
from adapterkit.base import open_base
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import apply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

transformers.utils.logging.disable_progress_bar()

PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])
MODELS: dict[str, tuple[Any, Any, list[str]]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES),
        ["q_proj", "k_proj", "down_proj"],
    ),
    # Its weights are stored as (in, out).
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0),
        ["c_attn", "c_fc"],
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_peft():
        yield


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A base, and a DoRA whose tensors are all random, as PEFT saves it."""
    torch.manual_seed(0)
    kind, config, targets = MODELS[request.param]
    kind(config).save_pretrained(tmp_path / "base")
    settings = {"target_modules": targets, "r": 4, "lora_alpha": 6, "use_dora": True}
    fan = request.param == "gpt2"
    model = get_peft_model(
        kind.from_pretrained(tmp_path / "base"), LoraConfig(**settings, fan_in_fan_out=fan)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "dora")
    return kind, tmp_path / "base", tmp_path / "dora"


def loaded(kind: Any, base: Path, adapter: Path | None = None) -> Any:
    model = kind.from_pretrained(base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return model.double().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def added(kind: Any, base: Path, dora: Path) -> dict[str, np.ndarray]:
    """Return what PEFT adds to every weight, (out, in), float64."""
    before = {n: x.detach().numpy() for n, x in loaded(kind, base).named_parameters()}
    after = loaded(kind, base, dora).merge_and_unload().named_parameters()
    turned = kind is GPT2LMHeadModel
    changes = {n.removesuffix(".weight"): x.detach().numpy() - before[n] for n, x in after}
    return {n: x.T if turned else x for n, x in changes.items() if x.ndim == 2 and x.any()}


def test_at_full_rank_it_is_peft_s_dora(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    kind, base, dora = made
    report = adapterkit.convert(
        dora, tmp_path / "lora", base=base, dora_rank=32, allow_lossy=True, outtype="f32"
    )
    assert {loss.code for loss in report.losses} == {"dora-truncated"}
    want = logits(loaded(kind, base, dora))
    effect = (want - logits(loaded(kind, base))).norm()
    got = logits(loaded(kind, base, tmp_path / "lora"))
    assert (got - want).norm() < 1e-5 * effect


@pytest.mark.parametrize("rank", [2, 8])
def test_the_error_that_is_listed_is_measured_and_the_least(
    rank: int, made: tuple[Any, Path, Path]
) -> None:
    kind, base, dora = made
    adapter = adapterkit.read(dora)
    done = apply(["dora"], adapter, Context(base=open_base(base), dora_rank=rank))
    truth = added(kind, base, dora)
    losses = {loss.subject: loss.message for loss in done.losses}
    pairs = {pair.module: pair for pair in done.adapter.pairs()}
    assert pairs.keys() == losses.keys() == truth.keys()
    for module, change in truth.items():
        pair = pairs[module]
        assert pair.rank == rank
        error = np.linalg.norm(pair.delta() - change) / np.linalg.norm(change)
        values = np.linalg.svd(change, compute_uv=False)
        least = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
        assert error == pytest.approx(least, rel=1e-4)
        assert f"off by {error:.2g} of its update" in losses[module]


def test_it_is_a_loss_that_must_be_allowed(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, base, dora = made
    with pytest.raises(adapterkit.LossyConversionError, match="nearest LoRA of rank 2") as caught:
        adapterkit.convert(dora, tmp_path / "lora", base=base, dora_rank=2)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "lora").exists()
    (dora / "adapter_config.json").write_text(
        (dora / "adapter_config.json").read_text().replace(str(base), "")
    )
    with pytest.raises(adapterkit.BaseRequiredError, match="with --base"):
        adapterkit.convert(dora, tmp_path / "lora", dora_rank=2, allow_lossy=True)


def test_engines_that_refuse_dora_take_what_it_becomes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, config, targets = MODELS["llama"]
    kind(config).save_pretrained(tmp_path / "base")
    settings = {"target_modules": targets, "r": 4, "use_dora": True}
    get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(**settings)).save_pretrained(
        tmp_path / "dora"
    )
    given: dict[str, Any] = {"base": tmp_path / "base", "dora_rank": 8, "allow_lossy": True}
    for engine, name in (("vllm", "for-vllm"), ("llama.cpp", "adapter.gguf")):
        adapterkit.convert(tmp_path / "dora", tmp_path / name, for_engine=engine, **given)
        report = adapterkit.validate(tmp_path / name, base=tmp_path / "base", targets=[engine])
        assert not [found for found in report.findings if found.severity == "error"]


def test_convolutions_are_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(4, 10, (3, 2))).double()
    tuned = get_peft_model(cast("Any", layer), LoraConfig(target_modules=["0"], r=3, use_dora=True))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "dora")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"architectures": ["Mine"], "model_type": "mine"}')
    from safetensors.torch import save_file

    weight = cast("Any", tuned).base_model.model[0].base_layer.weight.detach().clone()
    save_file({"0.weight": weight}, base / "model.safetensors")
    adapter = adapterkit.read(tmp_path / "dora")
    done = apply(["dora"], adapter, Context(base=open_base(base), dora_rank=24))
    merged = cast("Any", tuned).merge_and_unload()[0].weight.detach()
    (pair,) = done.adapter.pairs()
    assert pair.delta() == pytest.approx((merged - weight).numpy(), abs=1e-6)
