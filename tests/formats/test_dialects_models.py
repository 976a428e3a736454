"""Models with LoRA written by hand, run as they are and as PEFT adapters made of their files.

Every class here states one public convention in the fewest words that compute it; factors are
random. The output of the model must be that of the plain model with the converted adapter in PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from handwritten_models import IN, OUT, RANK, TOKENS, VOCAB, in_peft, same
from safetensors.torch import save_file
from torch import nn

import adapterkit
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

# PEFT says the first of every Conv1D and every Linear beside it, and then does what is right; the
# second is between PEFT and transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


class Plain(nn.Module):
    """A table, a layer, a fused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, IN)
        self.fc = nn.Linear(IN, OUT)
        self.c_attn = nn.Linear(OUT, 3 * IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_attn(torch.tanh(self.fc(self.wte(x))))


class WithUpdates(Plain):
    """The same with a dense update of each weight, as a library states it."""

    def __init__(self, plain: Plain, updates: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.load_state_dict(plain.state_dict())
        for name, update in updates.items():
            self.get_submodule(name).weight.data += update


def check(plain: Plain, updates: dict[str, torch.Tensor], source: Path, **options: object) -> None:
    wanted = WithUpdates(plain, updates)(TOKENS)
    apart = float((wanted - plain(TOKENS)).detach().abs().max())
    assert apart > 0.1, "the updates must show"
    with torch.no_grad():
        same(in_peft(source, plain, source.parent / "peft", **options)(TOKENS), wanted)


def loralib_factors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Factors and updates: the fused layer has its first and third third enabled."""
    state = {
        "wte.lora_A": torch.randn(RANK, VOCAB),
        "wte.lora_B": torch.randn(IN, RANK),
        "fc.lora_A": torch.randn(RANK, IN),
        "fc.lora_B": torch.randn(OUT, RANK),
        "c_attn.lora_A": torch.randn(2 * RANK, OUT),
        "c_attn.lora_B": torch.randn(2 * IN, RANK),
    }
    a, b = state["c_attn.lora_A"], state["c_attn.lora_B"]
    fused = torch.cat([b[:IN] @ a[:RANK], torch.zeros(IN, OUT), b[IN:] @ a[RANK:]])
    updates = {
        "wte": (state["wte.lora_B"] @ state["wte.lora_A"]).T,
        "fc": state["fc.lora_B"] @ state["fc.lora_A"],
        "c_attn": fused,
    }
    return state, {name: 3 / RANK * update for name, update in updates.items()}


@pytest.mark.parametrize("whole", [False, True])
def test_loralib(tmp_path: Path, whole: bool) -> None:
    plain = Plain()
    state, updates = loralib_factors()
    source = tmp_path / "lora.pt"
    frozen = plain.state_dict() if whole else {}
    torch.save({"model_state_dict": {**frozen, **state}, "epoch": 3}, source)
    with pytest.raises(UsageError, match="--dialect loralib-qv"):
        adapterkit.convert(source, tmp_path / "no", alpha=3)
    check(plain, updates, source, dialect="loralib-qv", alpha=3)


@pytest.mark.parametrize("enabled", ["kv", "qk"])
def test_loralib_with_other_slots(tmp_path: Path, enabled: str) -> None:
    plain = Plain()
    state, updates = loralib_factors()
    q, zero, v = updates["c_attn"].split(IN)
    updates["c_attn"] = torch.cat([zero, q, v] if enabled == "kv" else [q, v, zero])
    torch.save(state, tmp_path / "lora.pt")
    check(plain, updates, tmp_path / "lora.pt", dialect=f"loralib-{enabled}", alpha=3)


def test_loralib_biases_that_were_trained(tmp_path: Path) -> None:
    plain = Plain()
    state, updates = loralib_factors()
    for name in ("wte", "c_attn"):
        del updates[name], state[f"{name}.lora_A"], state[f"{name}.lora_B"]
    state["fc.bias"] = torch.randn(OUT)
    save_file(state, tmp_path / "lora.safetensors")
    wanted = WithUpdates(plain, updates)
    wanted.fc.bias.data = state["fc.bias"]
    got = in_peft(tmp_path / "lora.safetensors", plain, tmp_path / "peft", alpha=3)
    with torch.no_grad():
        same(got(TOKENS), wanted(TOKENS))


@pytest.mark.parametrize("evaluation", [False, True])
def test_weights_that_hold_the_update_already_are_noticed(tmp_path: Path, evaluation: bool) -> None:
    plain = Plain()
    state, updates = loralib_factors()
    model = WithUpdates(plain, updates) if evaluation else plain
    torch.save({**model.state_dict(), **state}, tmp_path / "lora.pt")
    options = {"dialect": "loralib-qv", "alpha": 3}
    report = adapterkit.convert(tmp_path / "lora.pt", tmp_path / "peft", **options)
    assert any("hold the update already" in note for note in report.notes) == evaluation


@pytest.mark.parametrize("whole", [False, True])
def test_a_convolution_of_loralib(tmp_path: Path, whole: bool) -> None:
    kernel, out, channels = 3, 6, 4
    a = torch.randn(RANK * kernel, channels * kernel)
    b = torch.randn(out * kernel, RANK * kernel)
    layer = nn.Conv2d(channels, out, kernel)
    frozen = {f"conv.{name}": p for name, p in layer.state_dict().items()} if whole else {}
    source, own = tmp_path / "conv.pt", tmp_path / "own.toml"
    torch.save({**frozen, "conv.lora_A": a, "conv.lora_B": b}, source)
    own.write_text('extends = "loralib"\n[[convolution]]\nmatch = "conv"\nkernel = 3\n')
    if not whole:
        with pytest.raises(UsageError, match="kernel size is not in the file"):
            adapterkit.read(source, alpha=3)
    (pair,) = adapterkit.read(source, dialect=None if whole else str(own), alpha=3).pairs()
    x = torch.randn(1, channels, 5, 5)
    layer.bias = None
    with torch.no_grad():
        plain = layer(x)
        layer.weight += 3 / RANK * (b @ a).view(layer.weight.shape)
        down, up = (torch.tensor(tensor.numpy()) for tensor in (pair.a, pair.b))
        same(plain + pair.scale * nn.functional.conv2d(nn.functional.conv2d(x, down), up), layer(x))


def test_lora_torch(tmp_path: Path) -> None:
    plain = Plain()
    state = {
        "wte.w_lora_A": torch.randn(RANK, IN),
        "wte.w_lora_B": torch.randn(VOCAB, RANK),
        "fc.w_lora_A": torch.randn(RANK, IN),
        "fc.w_lora_B": torch.randn(OUT, RANK),
    }
    updates = {n: 2 * state[f"{n}.w_lora_B"] @ state[f"{n}.w_lora_A"] for n in ("wte", "fc")}
    torch.save(state, tmp_path / "lora.pt")
    check(plain, updates, tmp_path / "lora.pt", alpha=4)


def test_minlora_stacks(tmp_path: Path) -> None:
    plain = Plain()
    inner = "parametrizations.weight"
    state = {
        f"wte.{inner}.0.lora_A": torch.randn(VOCAB, RANK),
        f"wte.{inner}.0.lora_B": torch.randn(RANK, IN),
        f"wte.{inner}.0.lora_dropout_mask": torch.ones(VOCAB, 1),
    }
    for place, rank in enumerate((2, 3)):
        state[f"fc.{inner}.{place}.lora_A"] = torch.randn(rank, IN)
        state[f"fc.{inner}.{place}.lora_B"] = torch.randn(OUT, rank)
    table = state[f"wte.{inner}.0.lora_A"] @ state[f"wte.{inner}.0.lora_B"]
    layer = sum(
        5 / rank * state[f"fc.{inner}.{p}.lora_B"] @ state[f"fc.{inner}.{p}.lora_A"]
        for p, rank in enumerate((2, 3))
    )
    torch.save({"lora": state, "model": plain.state_dict()}, tmp_path / "ckpt.pt")
    updates = {"wte": 5 / RANK * table, "fc": layer}
    check(plain, updates, tmp_path / "ckpt.pt", alpha=5)


def test_lora_pytorch(tmp_path: Path) -> None:
    plain = Plain()
    state: dict[str, torch.Tensor] = {}
    for name, size in (("wte", (VOCAB, IN)), ("fc", (IN, OUT))):
        state[f"module.{name}.lora_module.in_proj"] = torch.randn(size[0], RANK)
        state[f"module.{name}.lora_module.out_proj"] = torch.randn(RANK, size[1])
        state[f"module.{name}.module.weight"] = plain.get_submodule(name).weight.data
    state["module.fc.module.bias"] = plain.fc.bias.data
    state["module.c_attn.weight"] = plain.c_attn.weight.data

    def product(name: str) -> torch.Tensor:
        inner = f"module.{name}.lora_module"
        return state[f"{inner}.in_proj"] @ state[f"{inner}.out_proj"]

    torch.save(state, tmp_path / "lora.pt")
    updates = {"wte": product("wte"), "fc": product("fc").T}
    with pytest.raises(UsageError, match="alpha is 2 in the file, --alpha is 1"):
        adapterkit.convert(tmp_path / "lora.pt", tmp_path / "no", alpha=1)
    check(plain, updates, tmp_path / "lora.pt")


def test_numpy_gpt2_wrapper(tmp_path: Path) -> None:
    plain = Plain()
    a, b = np.random.default_rng(0).normal(size=(2, OUT, RANK))
    arrays = {"fc_lora_A": a, "fc_lora_B": b[:IN].T}
    np.savez(tmp_path / "lora.npz", **arrays)
    update = torch.tensor(8 / RANK * arrays["fc_lora_A"] @ arrays["fc_lora_B"]).float()
    check(plain, {"fc": update}, tmp_path / "lora.npz", alpha=8)


def test_factors_with_biases(tmp_path: Path) -> None:
    plain = Plain()
    down, up = nn.Linear(IN, RANK), nn.Linear(RANK, OUT)
    state = {f"fc.lora_A.{n}": p.data for n, p in down.named_parameters()}
    state |= {f"fc.lora_B.{n}": p.data for n, p in up.named_parameters()}
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(UsageError, match="--dialect linear-factors"):
        adapterkit.convert(tmp_path / "lora.pt", tmp_path / "no", alpha=6)
    options = {"dialect": "linear-factors", "alpha": 6}
    x = plain.wte(TOKENS)
    wanted = plain.fc(x) + 6 / RANK * up(down(x))
    got = in_peft(tmp_path / "lora.pt", plain, tmp_path / "peft", **options)
    with torch.no_grad():
        same(got.fc(x), wanted)
