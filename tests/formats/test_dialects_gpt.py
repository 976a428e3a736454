"""GPTs adapted by hand, litgpt and nanoGPT: what they computed is what PEFT computes afterwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from handwritten_models import IN, RANK, TOKENS, VOCAB, in_peft, same
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit
from adapterkit.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

# PEFT says the first of every Conv1D and every Linear beside it, and then does what is right; the
# second is between PEFT and transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = random(3 * width, width)
        self.out_proj = nn.Linear(width, width)


def deltas(path: Path, **options: object) -> dict[str, torch.Tensor]:
    """Return ΔW by module, for parameters that PEFT has no layer for."""
    adapter = adapterkit.read(path, **options)
    return {
        pair.module: pair.scale * torch.tensor(pair.b.numpy() @ pair.a.numpy())
        for pair in adapter.pairs()
    }


def test_attention_of_lora_pytorch_is_turned(tmp_path: Path) -> None:
    state = {}
    for part in "qkvo":
        state[f"module.attn.lora_module.{part}_in.weight"] = torch.randn(RANK, IN)
        state[f"module.attn.lora_module.{part}_out.weight"] = torch.randn(IN, RANK)
    state["module.attn.lora_module.o_out.bias"] = torch.randn(IN)
    frozen = {f"module.attn.module.{n}": p for n, p in Attention(IN).state_dict().items()}
    torch.save({**state, **frozen}, tmp_path / "lora.pt")

    def product(part: str) -> torch.Tensor:
        inner = f"module.attn.lora_module.{part}"
        return state[f"{inner}_out.weight"] @ state[f"{inner}_in.weight"]

    found = deltas(tmp_path / "lora.pt")
    assert found.keys() == {"attn.in_proj_weight", "attn.out_proj"}
    same(found["attn.in_proj_weight"], torch.cat([product(part).T for part in "qkv"]))
    same(found["attn.out_proj"], product("o"))


def test_attention_of_lora_torch_is_one_product(tmp_path: Path) -> None:
    state = {
        "attn.qv_lora_A": torch.randn(RANK, IN),
        "attn.qv_lora_B": torch.randn(3 * IN, RANK),
        "attn.o_lora_A": torch.randn(RANK, IN),
        "attn.o_lora_B": torch.randn(IN, RANK),
    }
    torch.save(state, tmp_path / "lora.pt")
    found = deltas(tmp_path / "lora.pt", alpha=2)
    same(found["attn.in_proj_weight"], state["attn.qv_lora_B"] @ state["attn.qv_lora_A"])
    same(found["attn.out_proj"], state["attn.o_lora_B"] @ state["attn.o_lora_A"])


class BookLinear(nn.Module):
    """x W^T + scale * x A B."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = nn.Module()
        self.lora.A = random(linear.in_features, RANK)
        self.lora.B = random(RANK, linear.out_features)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * (x @ self.lora.A @ self.lora.B)


class BookNorm(nn.Module):
    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.scale = nn.Parameter(source.weight.data.clone())
        self.shift = nn.Parameter(source.bias.data.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return self.scale * (x - x.mean(-1, keepdim=True)) / spread + self.shift


def linear(weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> BookLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.data.clone()
    if bias is not None:
        layer.bias.data = bias.data.clone()
    return BookLinear(layer, scale)


class BookAttention(nn.Module):
    def __init__(self, source: nn.Module, heads: int, scale: float) -> None:
        super().__init__()
        width = source.c_proj.weight.shape[0]
        weights = source.c_attn.weight.T.split(width)
        biases = source.c_attn.bias.split(width)
        self.W_query, self.W_key, self.W_value = (
            linear(w, b, scale) for w, b in zip(weights, biases, strict=True)
        )
        self.out_proj = linear(source.c_proj.weight.T, source.c_proj.bias, scale)
        self.register_buffer("mask", torch.triu(torch.ones(16, 16), diagonal=1))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width / self.heads)
        scores = scores.masked_fill(self.mask.bool()[:length, :length], -torch.inf)
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(mixed)


class BookBlock(nn.Module):
    def __init__(self, source: nn.Module, heads: int, scale: float) -> None:
        super().__init__()
        self.att = BookAttention(source.attn, heads, scale)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(
            linear(source.mlp.c_fc.weight.T, source.mlp.c_fc.bias, scale),
            nn.GELU(approximate="tanh"),
            linear(source.mlp.c_proj.weight.T, source.mlp.c_proj.bias, scale),
        )
        self.norm1, self.norm2 = BookNorm(source.ln_1), BookNorm(source.ln_2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff.layers(self.norm2(x))


class BookGPT(nn.Module):
    """GPT-2 with the book's names, every linear layer with LoRA."""

    def __init__(self, source: GPT2LMHeadModel, scale: float) -> None:
        super().__init__()
        inner = source.transformer
        self.tok_emb, self.pos_emb = nn.Embedding(VOCAB, 16), nn.Embedding(16, 16)
        self.tok_emb.load_state_dict(inner.wte.state_dict())
        self.pos_emb.load_state_dict(inner.wpe.state_dict())
        heads = source.config.n_head
        self.trf_blocks = nn.Sequential(*(BookBlock(block, heads, scale) for block in inner.h))
        self.final_norm = BookNorm(inner.ln_f)
        self.out_head = linear(source.lm_head.weight, None, scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 16, "vocab_size": VOCAB}
    config = GPT2Config(**sizes, tie_word_embeddings=False, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("dialect", ["raschka-alpha", "raschka-alpha-over-r"])
def test_the_books_gpt_gives_the_logits_of_gpt2_with_peft(
    gpt2: GPT2LMHeadModel, tmp_path: Path, dialect: str
) -> None:
    alpha = 3
    book = BookGPT(gpt2, alpha if dialect == "raschka-alpha" else alpha / RANK).eval()
    with torch.no_grad():
        for name, parameter in book.named_parameters():
            if ".lora." in name:
                parameter.mul_(0.3)
    source = tmp_path / "gpt.pth"
    torch.save(book.state_dict(), source)
    with pytest.raises(UsageError, match="2 dialects explain every tensor"):
        adapterkit.convert(source, tmp_path / "no", alpha=alpha)
    with torch.no_grad():
        before = gpt2(TOKENS).logits
        wanted = book(TOKENS)
        assert float((before - wanted).abs().max()) > 0.1
        got = in_peft(source, gpt2, tmp_path / "peft", dialect=dialect, alpha=alpha)
        same(got(TOKENS).logits, wanted)


def test_the_books_queries_alone_fill_a_third_of_the_fused_layer(tmp_path: Path) -> None:
    name = "trf_blocks.0.att.W_value.lora"
    state = {f"{name}.A": torch.randn(16, RANK), f"{name}.B": torch.randn(RANK, 16)}
    state["trf_blocks.0.ff.layers.0.lora.A"] = torch.randn(16, RANK)
    state["trf_blocks.0.ff.layers.0.lora.B"] = torch.randn(RANK, 64)
    torch.save(state, tmp_path / "gpt.pth")
    found = deltas(tmp_path / "gpt.pth", dialect="raschka-alpha", alpha=2)
    value = 2 * (state[f"{name}.A"] @ state[f"{name}.B"]).T
    same(found["transformer.h.0.attn.c_attn"], torch.cat([torch.zeros(32, 16), value]))


class LitLayer(nn.Module):
    """Grouped queries in one layer: q, then k, then v, each enabled part with its own rank."""

    heads, groups, size = 4, 2, 4

    def __init__(self, enabled: str) -> None:
        super().__init__()
        rows = {"q": self.heads * self.size, "k": self.groups * self.size}
        self.rows = {**rows, "v": rows["k"]}
        self.enabled = enabled
        self.lora_A = random(RANK * len(enabled), IN)
        self.lora_B = random(sum(self.rows[part] for part in enabled), RANK)

    def parts(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        middle = (x @ self.lora_A.T).split(RANK, -1)
        factors = self.lora_B.split([self.rows[part] for part in self.enabled])
        products = (m @ b.T for m, b in zip(middle, factors, strict=True))
        return dict(zip(self.enabled, products, strict=True))


@pytest.mark.parametrize("enabled", ["qv", "qkv", "k"])
@pytest.mark.parametrize("layer", ["qkv", "attn"])
def test_litgpt(tmp_path: Path, enabled: str, layer: str) -> None:
    lit = LitLayer(enabled)
    prefix = f"transformer.h.5.attn.{layer}"
    state = {f"{prefix}.{n}": p.data for n, p in lit.named_parameters()}
    torch.save({"model": state}, tmp_path / "lit_model.pth.lora")
    flags = {"query": "q", "key": "k", "value": "v"}
    lines = [f"lora_{word}: {str(part in enabled).lower()}" for word, part in flags.items()]
    (tmp_path / "hyperparameters.yaml").write_text("\n".join([*lines, "lora_alpha: 6", ""]))
    (tmp_path / "model_config.yaml").write_text(
        "n_head: 4\nn_query_groups: 2\nhead_size: 4\nmlp_class_name: LLaMAMLP\n"
        "hf_config:\n  org: example\n  name: tiny\n"
    )
    adapter = adapterkit.read(tmp_path)
    assert adapter.base.name == "example/tiny"
    x = torch.randn(3, IN)
    wanted = lit.parts(x)
    found = deltas(tmp_path)
    assert set(found) == {f"model.layers.5.self_attn.{part}_proj" for part in enabled}
    for part in enabled:
        same(x @ found[f"model.layers.5.self_attn.{part}_proj"].T, 6 / RANK * wanted[part])


def test_nanogpt_lora(gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    name = "transformer.h.1.attn.c_attn"
    a, b = torch.randn(RANK, 16), torch.randn(48, RANK)
    layer = gpt2.get_submodule(name)
    checkpoint = {
        "model": {
            f"_orig_mod.{name}.lora_A": a,
            f"_orig_mod.{name}.lora_B": b,
            f"_orig_mod.{name}.weight": layer.weight.data.T.contiguous(),
            f"_orig_mod.{name}.bias": layer.bias.data,
        },
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}},
        "model_args": {"lora_rank": RANK, "lora_alpha": 3.0, "n_layer": 2},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.5),
        "scaler": {"scale": torch.ones(1)},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with torch.no_grad():
        plain = gpt2(TOKENS).logits
        layer.weight.data += 3 / RANK * (b @ a).T
        wanted = gpt2(TOKENS).logits
        layer.weight.data -= 3 / RANK * (b @ a).T
        assert float((plain - wanted).abs().max()) > 0.1
        got = in_peft(tmp_path / "ckpt.pt", gpt2, tmp_path / "peft")
        same(got(TOKENS).logits, wanted)


def test_a_training_scripts_own_state_is_left_out_and_named(tmp_path: Path) -> None:
    factors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.default.weight": tensor
        for half, tensor in (("A", torch.randn(RANK, 16)), ("B", torch.randn(48, RANK)))
    }
    own = {
        "best_val_loss": torch.tensor(2.5),
        "iter_num": torch.tensor(5),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}},
        "lr_scheduler": {"last": torch.zeros(1)},
        "rng_state": torch.zeros(8, dtype=torch.uint8),
    }
    torch.save({"model": factors, **own}, tmp_path / "ckpt.pt")
    adapter = adapterkit.read(tmp_path / "ckpt.pt", alpha=4)
    assert len(adapter.tensors) == 2
    assert adapter.provenance is not None
    (note,) = (str(each) for each in adapter.provenance.notes if "state of the" in str(each))
    assert all(name in note for name in own)
    torch.save({"model": factors, "other": {"surprise": torch.ones(2)}}, tmp_path / "ckpt.pt")
    with pytest.raises(UnsupportedError, match=r"other\.surprise: lies outside of the dictionary"):
        adapterkit.read(tmp_path / "ckpt.pt", alpha=4)


def test_a_magnitude_for_some_rows_of_a_fused_layer_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    rule = "[[tensor]]\nmatch = '(?P<module>.+)\\.lora\\."
    own.write_text(
        'extends = "raschka-alpha"\n'
        f'{rule}A\'\naxes = "in r"\n{rule}B\'\naxes = "r out"\n{rule}m\'\nrole = "magnitude"\n'
    )
    name = "trf_blocks.0.att.W_query.lora"
    state = {f"{name}.A": torch.randn(8, 2), f"{name}.B": torch.randn(2, 8)}
    torch.save({**state, f"{name}.m": torch.ones(8)}, tmp_path / "gpt.pth")
    with pytest.raises(UnsupportedError, match=r"some rows of .+\.c_attn only"):
        adapterkit.read(tmp_path / "gpt.pth", dialect=str(own), alpha=1)
